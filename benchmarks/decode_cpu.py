# SPDX-License-Identifier: Apache-2.0
"""Decode attention on the CPU: low-bit caches beside torch's SDPA in float32 on the same tokens.

python benchmarks/decode_cpu.py --output benchmarks/results/decode_cpu.json
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import source_hashes
from results import Results, Row, save
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

import bitdecoding

# (query heads, KV heads, head_dim): SmolLM2-135M and Llama-3.1-8B
SHAPES = ((9, 3, 64), (32, 8, 128))
FORMATS = ("k4v4_c128_v{d}_p128_d{d}", "k4v2_c128_v32_p128_d{d}", "k2v2_c32_v32_p128_d{d}")


def median_us(call: Callable[[], Any], iterations: int) -> dict[str, Any]:
    """Median, 10th and 90th percentile of single calls, after warm-up."""
    for _ in range(5):
        call()
    times = []
    for _ in range(iterations):
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    p10, median, p90 = np.percentile(times, [10, 50, 90])
    return {"time_us": round(median, 1), "p10_us": round(p10, 1), "p90_us": round(p90, 1)}


def measure(shape: tuple[int, int, int], args: argparse.Namespace) -> list[Row]:
    query_heads, kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, args.tokens, kv_heads, head_dim, generator=generator)
    q = torch.randn(1, 1, query_heads, head_dim, generator=generator)
    case = {
        "batch": 1,
        "length": args.tokens,
        "query_heads": query_heads,
        "heads_kv": kv_heads,
        "head_dim": head_dim,
    }

    qt, kt, vt = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # (B, H, S, D)
    group = query_heads // kv_heads
    kr, vr = (x.repeat_interleave(group, 1) for x in (kt, vt))
    calls: dict[str, Callable[[], Any]] = {
        "torch SDPA fp32, enable_gqa": lambda: scaled_dot_product_attention(
            qt, kt, vt, enable_gqa=True
        ),
        "torch SDPA fp32, KV heads repeated before": lambda: scaled_dot_product_attention(
            qt, kr, vr
        ),
    }
    for pattern in FORMATS:
        cache = bitdecoding.PagedKvCache(
            pattern.format(d=head_dim),
            batch=1,
            num_kv_heads=kv_heads,
            max_tokens=args.tokens,
        )
        cache.append(k, v)
        calls[str(cache.format)] = lambda cache=cache: cache.decode(q, threads=args.threads)
    rows = []
    for name, call in calls.items():
        ours = not name.startswith("torch")
        names = {"format": name if ours else "float32", "kernel": "decode" if ours else name}
        found = median_us(call, args.iterations) | {"iterations": args.iterations}
        rows.append(case | names | found)
    return rows


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = {
        "threads": args.threads,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "commit": bitdecoding.build_info()["git"],
        "sources": source_hashes(),
    }
    rows = [row for shape in SHAPES for row in measure(shape, args)]

    table = Table("heads", "D", "kernel", "time us", "p10", "p90")
    for row in rows:
        table.add_row(
            f"{row['query_heads']}/{row['heads_kv']}", str(row["head_dim"]),
            row["format"] if row["kernel"] == "decode" else row["kernel"],
            *(str(row[name]) for name in ("time_us", "p10_us", "p90_us")),
        )  # fmt: skip
    Console().print(table)
    if args.output is not None:
        save(args.output, Results(facts, rows))


if __name__ == "__main__":
    main()
