# SPDX-License-Identifier: Apache-2.0
"""Host time of one decode call from Python: the cache's method, the registered torch operator.

python benchmarks/host.py --output benchmarks/results/host.json
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
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

from bitdecoding import KvFormat, PagedKvCache

ZONES = Zones(16, 64)
CALLS = 50  # into an empty queue
REPEATS = 41
WARM_UP = 200


def method_call(cache: PagedKvCache, q: torch.Tensor) -> Callable[[], Any]:
    """The cache's decode into memory that is there."""
    return partial(cache.decode, q, out=torch.empty_like(q))


def operator_call(cache: PagedKvCache, q: torch.Tensor) -> Callable[[], Any] | None:
    """The same through torch.ops.bitdecoding; None where this package has no operators."""
    if importlib.util.find_spec("bitdecoding.torch_ops") is None:
        return None
    torch_ops: Any = importlib.import_module("bitdecoding.torch_ops")
    batch, query_tokens, query_heads, _ = q.shape
    scratch = torch_ops.scratch(
        cache.format, batch=batch, num_kv_heads=int(cache.pool.shape[1]),
        query_heads=query_heads, query_tokens=query_tokens, device=q.device,
    )  # fmt: skip
    tensors = torch_ops.tensors_of(cache)
    return partial(
        torch_ops.decode_into, q, torch.empty_like(q), None, *tensors.values(),
        scratch.workspace, scratch.error_word, str(cache.format), cache.keep_first,
        cache.keep_last,
    )  # fmt: skip


CALLERS = {METHOD: method_call, OPERATOR: operator_call}


def host_rows(case: Case, fmt: KvFormat, device: torch.device) -> list[Row]:
    """A row per way to call. No call waits: the queue of a GPU takes more than CALLS."""
    (cache,) = caches(case, fmt, ZONES, 1, device)
    q = queries(case, device)
    rows = []
    for name, make in CALLERS.items():
        call = make(cache, q)
        if call is None:
            continue
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
    Console(width=120).print(table)
    if args.output is not None:
        save(args.output, Results(facts, rows))


if __name__ == "__main__":
    main()
