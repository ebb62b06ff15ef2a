# SPDX-License-Identifier: Apache-2.0
"""Host time of single calls from Python: the cache's methods and the torch operators.

python benchmarks/host.py --output benchmarks/results/host.json
"""

from __future__ import annotations

import argparse
import json
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import host_us, machine
from rich.console import Console
from rich.table import Table

import bitdecoding
from bitdecoding import PagedKvCache, torch_ops

FORMAT = "k4v4_c128_v128_p128_d128"
B, H, GROUP, HEAD_DIM = 1, 8, 4, 128


def make_calls(device: str) -> dict[str, Callable[[], Any]]:
    """Calls that find next to nothing to do: the cache is empty and stays so."""
    cache = PagedKvCache(FORMAT, batch=B, num_kv_heads=H, max_tokens=1024, device=device)
    memory = {name: x.to(device) for name, x in torch_ops.tensors_of(cache).items()}
    cache = PagedKvCache.wrap(FORMAT, **memory, keep_first=16, keep_last=64)
    k = torch.randn(B, 1, H, HEAD_DIM, device=device).half()
    q = torch.randn(B, 1, H * GROUP, HEAD_DIM, device=device).half()
    none = torch.zeros(B, dtype=torch.int32, device=device)
    out, lse = torch.empty_like(q), torch.empty(B, H * GROUP, 1, device=device)
    workspace, counters, errors = torch_ops.scratch(
        FORMAT, batch=B, num_kv_heads=H, query_heads=H * GROUP, device=device
    )
    zones = (FORMAT, 16, 64)
    tensors = tuple(memory.values())
    read = (*tensors, workspace, errors, *zones)
    written = (*tensors, counters, errors, *zones)
    return {
        "decode, out given": lambda: cache.decode(q, out=out),
        "decode": lambda: cache.decode(q),
        "decode with lse": lambda: cache.decode(q, return_softmax_lse=True),
        "append": lambda: cache.append(k, k, num_tokens=none),
        "operator decode_into": lambda: torch_ops.decode_into(q, out, None, *read),
        "operator decode_into, lse": lambda: torch_ops.decode_into(q, out, lse, *read),
        "operator decode": lambda: torch_ops.decode(q, *read),
        "operator append": lambda: torch_ops.append(k, k, *written, num_tokens=none),
    }


def cpu_us(call: Callable[[], Any], count: int = 1000) -> float:
    """The whole call, which on a CPU does the work, if there is any. Median."""
    times = timeit.repeat(call, number=count, repeat=9)
    return round(1e6 * float(np.median(times)) / count, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    info = bitdecoding.build_info()
    facts = machine() if cuda else {"torch": torch.__version__, "commit": info["git"]}
    table = Table("call", "host us", title=f"{FORMAT}, {args.device}")
    rows = []
    for name, call in make_calls(args.device).items():
        time = host_us([call]) if cuda else cpu_us(call)
        table.add_row(name, str(time))
        rows.append(
            {"call": name, "host_us": time, "format": FORMAT, "device": args.device} | facts
        )
    Console().print(table)
    if args.output is not None:
        args.output.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
