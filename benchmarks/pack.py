# SPDX-License-Identifier: Apache-2.0
"""Prefill pack: 16-bit K and V of long sequences into low-bit pages, beside a plain copy.

python benchmarks/pack.py --output benchmarks/results/pack.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measure import machine, time_us
from rich.console import Console
from rich.table import Table

import bitdecoding

FORMATS = (
    "k4v4_c128_v128_p128_d128",
    "k4v2_c128_v128_p128_d128",
    "k2v2_c128_v128_p128_d128",
    "k2v2_c32_v32_p128_d128",
    "k4v4_t128_v128_p128_d128",
    "k4v4_c128_v128_p128_d128_norm",
)


def pack_bytes(fmt: bitdecoding.KvFormat, batch: int, heads: int, tokens: int) -> int:
    """Bytes a pack must move once: fp16 K and V read, whole page records written."""
    pages = tokens // fmt.page_tokens
    read = 2 * 2 * batch * heads * pages * fmt.page_tokens * fmt.head_dim
    return read + batch * heads * pages * fmt.page_bytes()


def measure_format(name: str, args: argparse.Namespace, k: Any, v: Any) -> dict[str, Any]:
    """One result row; ``k`` and ``v`` are (B, S, H, D)."""
    fmt = bitdecoding.KvFormat.parse(name)
    batch, tokens, heads, _ = k.shape
    pages = tokens // fmt.page_tokens
    pool = torch.empty((batch * pages, heads, fmt.page_bytes()), dtype=torch.uint8, device=k.device)
    table = torch.randperm(batch * pages, device=k.device).to(torch.int32).view(batch, pages)
    row = time_us(
        [lambda: bitdecoding.pack_pages(k, v, pool, table, format=fmt, keep_first=16)],
        args.iterations,
    )
    moved = pack_bytes(fmt, batch, heads, tokens)
    return {"format": name, "kernel": "pack_pages", "bytes": moved, **row}


def measure_copy(args: argparse.Namespace, k: Any, v: Any) -> dict[str, Any]:
    """torch's device copy of K and V: the rate a kernel that reads and writes can hope for."""
    target_k, target_v = torch.empty_like(k), torch.empty_like(v)

    def copy() -> None:
        target_k.copy_(k)
        target_v.copy_(v)

    moved = 4 * k.numel() * k.element_size()
    return {"format": "float16", "kernel": "torch copy_", "bytes": moved} | time_us(
        [copy], args.iterations
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads-kv", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128, choices=(128,))
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()

    shape = (args.batch, args.tokens, args.heads_kv, args.head_dim)
    k, v = (torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(2))
    case = {"batch": args.batch, "length": args.tokens, "heads_kv": args.heads_kv}
    rows = [measure_copy(args, k, v)] + [measure_format(f, args, k, v) for f in FORMATS]
    rows = [
        case | row | {"tb_per_s": round(row["bytes"] / row["time_us"] / 1e6, 3)} | machine()
        for row in rows
    ]

    table = Table("format", "kernel", "time us", "p10", "p90", "GB", "TB/s")
    for row in rows:
        table.add_row(
            row["format"], row["kernel"], *(str(row[c]) for c in ("time_us", "p10_us", "p90_us")),
            f"{row['bytes'] / 1e9:.2f}", str(row["tb_per_s"]),
        )  # fmt: skip
    Console().print(table)
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
