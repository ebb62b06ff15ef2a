# SPDX-License-Identifier: Apache-2.0
"""Append of one token per sequence, in CUDA graphs: plain steps, and steps that complete pages.

python benchmarks/append.py --output benchmarks/results/append.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baselines import Device, ceiling_rows
from decode_cases import Zones
from measure import graph_time_us, machine
from results import Results, Row, completed, save
from rich.console import Console
from rich.table import Table
from suites import APPEND_FORMATS
from work import UNTIMED, Effort

import bitdecoding
from bitdecoding import KvFormat, PagedKvCache

ZONES = Zones(16, 64)
PAGES = 8  # of every sequence, before a step
COPIES = 8  # caches, like layers of a model: appends of a graph go to one after the other
PLAIN_ROUNDS = 8  # plain steps of each cache in a graph
STEPS = ("plain", "page")


@dataclass(frozen=True)
class Sizes:
    """B sequences of H KV heads."""

    batch: int
    heads_kv: int


@dataclass
class Step:
    """Caches and what restores their lengths, so that each replay does the same."""

    caches: list[PagedKvCache]
    length: int
    packed: int

    def reset(self) -> None:
        for cache in self.caches:
            cache.lengths[:] = self.length
            cache.packed[:] = self.packed


def append_bytes(step: str, fmt: KvFormat, sizes: Sizes) -> int:
    """Bytes that an append must move once: the new token's K and V, fp16, read and written; where
    a page is completed, its tokens, all from the ring, and its record."""
    token = 2 * 2 * fmt.head_dim
    per_head = 2 * token
    if step == "page":
        per_head += fmt.page_tokens * token + fmt.page_bytes()
    return sizes.batch * sizes.heads_kv * per_head


def make_step(step: str, fmt: KvFormat, sizes: Sizes, copies: int, device: torch.device) -> Step:
    """Caches in which the next append of one token is such a step. They hold random tokens; pages
    are in random order."""
    packed = PAGES * fmt.page_tokens
    # A page is complete once keep_last younger tokens follow it.
    behind = ZONES.recent + (fmt.page_tokens - 1 if step == "page" else 0)
    shared = {"workspace": bitdecoding.Workspace(device)} if device.type == "cuda" else {}
    caches = []
    for _ in range(copies):
        cache = PagedKvCache(
            fmt,
            batch=sizes.batch,
            num_kv_heads=sizes.heads_kv,
            max_tokens=packed + behind + fmt.page_tokens,
            keep_first=ZONES.sinks,
            keep_last=ZONES.recent,
            device=device,
            **shared,
        )
        tables: list[Any] = [torch.as_tensor(x) for x in (cache.side, cache.block_table)]
        tables[0].normal_()
        ids = torch.randperm(tables[1].numel(), device=device).to(torch.int32)
        tables[1].copy_(ids.view_as(tables[1]))
        caches.append(cache)
    made = Step(caches, packed + behind, packed)
    made.reset()
    return made


def append_row(step: str, fmt: KvFormat, sizes: Sizes, where: Device, effort: Effort) -> Row:
    """One result row. Between two replays lengths are restored and the L2 is overwritten."""
    moved = append_bytes(step, fmt, sizes)
    label = {
        "batch": sizes.batch, "heads_kv": sizes.heads_kv, "head_dim": fmt.head_dim,
        "format": str(fmt), "step": step, "mode": "graph", "kernel": "append", "bytes": moved,
    }  # fmt: skip
    flush = torch.empty(4 * where.l2_bytes, dtype=torch.uint8, device=where.device)
    try:
        made = make_step(step, fmt, sizes, COPIES, where.device)
        shape = (sizes.batch, 1, sizes.heads_kv, fmt.head_dim)
        k, v = (torch.randn(shape, dtype=torch.float16, device=where.device) for _ in range(2))
        calls = [partial(cache.append, k, v) for cache in made.caches]
        launches = COPIES * (PLAIN_ROUNDS if step == "plain" else 1)
        found = graph_time_us(
            calls, launches, effort.replays, seconds=effort.seconds,
            before=before_replay(made, flush),
        )  # fmt: skip
        verify(step, made, launches // COPIES)
    except (RuntimeError, ValueError) as error:
        found = UNTIMED | {"error": str(error).strip().partition("\n")[0]}
    return label | found


def before_replay(made: Step, flush: torch.Tensor) -> Callable[[], None]:
    def restore() -> None:
        made.reset()
        flush.zero_()  # last: while the GPU does it, the replay is enqueued

    return restore


def verify(step: str, made: Step, appended: int) -> None:
    """The last replay grew every sequence by its tokens, and by a page or none."""
    for cache in made.caches:
        cache.check()
        page = cache.format.page_tokens if step == "page" else 0
        lengths, packed = torch.as_tensor(cache.lengths), torch.as_tensor(cache.packed)
        if not bool((lengths == made.length + appended).all()):
            raise RuntimeError(f"lengths are not {made.length + appended} after a replay")
        if not bool((packed == made.packed + page).all()):
            raise RuntimeError(f"packed is not {made.packed + page} after a replay")


def print_rows(rows: list[Row]) -> None:
    table = Table("format", "step", "time us", "p10", "p90", "MB", "TB/s", "of C")
    for row in rows:
        names = ("time_us", "p10_us", "p90_us")
        times = [row.get("error", "") if row[name] is None else str(row[name]) for name in names]
        table.add_row(
            row["format"], row["step"], *times, f"{row['bytes'] / 1e6:.2f}",
            str(row["tb_per_s"]), str(row["fraction_of_ceiling"]),
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--heads-kv", type=int, default=8)
    parser.add_argument("--formats", nargs="+", default=APPEND_FORMATS)
    parser.add_argument("--read-command", metavar="COMMAND", help="as of decode.py")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    facts = machine()
    where = Device(torch.device("cuda", torch.cuda.current_device()), facts["l2_bytes"])
    rows = ceiling_rows(where, Effort(), args.read_command, torch.cuda.empty_cache)
    sizes = Sizes(args.batch, args.heads_kv)
    for name in args.formats:
        for step in STEPS:
            rows.append(append_row(step, KvFormat.parse(name), sizes, where, Effort()))
            torch.cuda.empty_cache()
    done = completed(rows)
    print_rows([row for row in done if "step" in row])
    if args.output is not None:
        save(args.output, Results(facts, done))


if __name__ == "__main__":
    main()
