# SPDX-License-Identifier: Apache-2.0
"""Host time of single calls from Python: the cache's methods and the torch operators.

python benchmarks/host.py --output benchmarks/results/host.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode_cases import Zones, caches, queries
from measure import host_times, machine, spread
from results import METHOD, OPERATOR, Results, Row, save
from rich.console import Console
from rich.table import Table
from shapes import Case, tagged
from suites import FORMATS

from bitdecoding import KvFormat, PagedKvCache, torch_ops

ZONES = Zones(16, 64)
CALLS = 50  # into an empty queue
REPEATS = 41
WARM_UP = 200


def method_calls(cache: PagedKvCache, q: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Calls of the cache's methods; METHOD decodes into memory that is there. Appends add no
    token."""
    kv, none = new_token(cache, q)
    return {
        METHOD: partial(cache.decode, q, out=torch.empty_like(q)),
        "PagedKvCache.decode, new out and lse": partial(cache.decode, q, return_softmax_lse=True),
        "PagedKvCache.append": partial(cache.append, kv, kv, num_tokens=none),
    }


def operator_calls(cache: PagedKvCache, q: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The same through torch.ops.bitdecoding."""
    batch, query_tokens, query_heads, _ = q.shape
    workspace, counters, errors = torch_ops.scratch(
        cache.format, batch=batch, num_kv_heads=int(cache.pool.shape[1]),
        query_heads=query_heads, query_tokens=query_tokens, device=q.device,
    )  # fmt: skip
    zones = (str(cache.format), cache.keep_first, cache.keep_last)
    tensors = tuple(torch_ops.tensors_of(cache).values())
    read = (*tensors, workspace, errors, *zones)
    written = (*tensors, counters, errors, *zones)
    kv, none = new_token(cache, q)
    return {
        OPERATOR: partial(torch_ops.decode_into, q, torch.empty_like(q), None, *read),
        "torch operator decode": partial(torch_ops.decode, q, *read),
        "torch operator append": partial(torch_ops.append, kv, kv, *written, num_tokens=none),
    }


def new_token(cache: PagedKvCache, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K or V (B, 1, Hkv, D) of a token per sequence, and int32 (B,) that says to take none."""
    batch, _, _, head_dim = q.shape
    kv = torch.zeros((batch, 1, int(cache.pool.shape[1]), head_dim), dtype=q.dtype, device=q.device)
    return kv, torch.zeros(batch, dtype=torch.int32, device=q.device)


def host_rows(case: Case, fmt: KvFormat, device: torch.device) -> list[Row]:
    """A row per way to call. No call waits: the queue of a GPU takes more than CALLS."""
    (cache,) = caches(case, fmt, ZONES, 1, device)
    q = queries(case, device)
    rows = []
    for name, call in (method_calls(cache, q) | operator_calls(cache, q)).items():
        for _ in range(WARM_UP):
            call()
        found = spread(host_times([call], CALLS, REPEATS))
        cache.check()
        label = {"format": str(fmt), "sinks": ZONES.sinks, "recent": ZONES.recent}
        rows.append(case.facts() | label | {"mode": "host", "call": name} | found)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    facts = machine()
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for case in tagged("host"):
        for name in args.formats:
            rows += host_rows(case, KvFormat.parse(name), device)
    table = Table("case", "format", "call", "us", "p10", "p90")
    for row in rows:
        times = (str(row[name]) for name in ("time_us", "p10_us", "p90_us"))
        table.add_row(row["case"], row["format"], row["call"], *times)
    Console(width=140).print(table)
    if args.output is not None:
        save(args.output, Results(facts, rows))


if __name__ == "__main__":
    main()
