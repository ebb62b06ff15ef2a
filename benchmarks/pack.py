# SPDX-License-Identifier: Apache-2.0
"""Prefill pack: 16-bit K and V of long sequences into low-bit pages, beside a plain copy.

python benchmarks/pack.py --output benchmarks/results/pack.json
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baselines import Device, ceiling_rows
from measure import machine, time_us
from results import Results, Row, completed, save
from rich.console import Console
from rich.table import Table
from suites import FORMATS, INT4, INT4_PER_TOKEN
from work import Effort

import bitdecoding
from bitdecoding import KvFormat

PACK_FORMATS = (*FORMATS, INT4_PER_TOKEN, f"{INT4}_norm")


def pack_bytes(fmt: KvFormat, batch: int, heads: int, tokens: int) -> int:
    """Bytes a pack must move once: fp16 K and V read, whole page records written."""
    pages = tokens // fmt.page_tokens
    read = 2 * 2 * batch * heads * pages * fmt.page_tokens * fmt.head_dim
    return read + batch * heads * pages * fmt.page_bytes()


def pack_row(name: str, k: Any, v: Any, iterations: int) -> Row:
    """One result row; ``k`` and ``v`` are (B, S, H, D)."""
    fmt = KvFormat.parse(name)
    batch, tokens, heads, _ = k.shape
    pages = tokens // fmt.page_tokens
    pool = torch.empty((batch * pages, heads, fmt.page_bytes()), dtype=torch.uint8, device=k.device)
    table = torch.randperm(batch * pages, device=k.device).to(torch.int32).view(batch, pages)
    call = partial(bitdecoding.pack_pages, k, v, pool, table, format=fmt, keep_first=16)
    moved = pack_bytes(fmt, batch, heads, tokens)
    return {"format": name, "kernel": "pack_pages", "bytes": moved} | time_us([call], iterations)


def copy_row(k: Any, v: Any, iterations: int) -> Row:
    """torch's device copy of K and V: the rate a kernel that reads and writes can hope for."""
    target_k, target_v = torch.empty_like(k), torch.empty_like(v)

    def copy() -> None:
        target_k.copy_(k)
        target_v.copy_(v)

    moved = 4 * k.numel() * k.element_size()
    row = {"format": "float16", "kernel": "torch copy_", "bytes": moved}
    return row | time_us([copy], iterations)


def print_rows(rows: list[Row]) -> None:
    table = Table("format", "kernel", "time us", "p10", "p90", "GB", "TB/s", "of C")
    for row in rows:
        names = ("time_us", "p10_us", "p90_us")
        table.add_row(
            row["format"], row["kernel"], *(str(row[name]) for name in names),
            f"{row['bytes'] / 1e9:.2f}", str(row["tb_per_s"]), str(row["fraction_of_ceiling"]),
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads-kv", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128, choices=(128,))
    parser.add_argument("--formats", nargs="+", default=PACK_FORMATS)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--read-command", metavar="COMMAND", help="as of decode.py")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    facts = machine()
    where = Device(torch.device("cuda", torch.cuda.current_device()), facts["l2_bytes"])
    reads = ceiling_rows(where, Effort(), args.read_command, torch.cuda.empty_cache)

    shape = (args.batch, args.tokens, args.heads_kv, args.head_dim)
    k, v = (torch.randn(shape, dtype=torch.float16, device=where.device) for _ in range(2))
    case = {
        "batch": args.batch,
        "length": args.tokens,
        "heads_kv": args.heads_kv,
        "head_dim": args.head_dim,
    }
    rows = [copy_row(k, v, args.iterations)]
    rows += [pack_row(name, k, v, args.iterations) for name in args.formats]
    done = completed(reads + [case | row for row in rows])
    print_rows(done)
    if args.output is not None:
        save(args.output, Results(facts, done))


if __name__ == "__main__":
    main()
