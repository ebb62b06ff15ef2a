# SPDX-License-Identifier: Apache-2.0
"""Writes the decode table of README.md and benchmarks/README.md from the committed result.

python benchmarks/summary.py            python benchmarks/summary.py --check
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/decode_h200.json"
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks/README.md")
BEGIN, END = "<!-- decode:begin -->\n", "<!-- decode:end -->\n"
BASELINES = {
    "torch SDPA FlashAttention-2": "FlashAttention-2",
    "torch SDPA cuDNN": "cuDNN",
}
# The rates that C is the largest of: cuDNN in the first case, a plain read of its K and V.
READS = ("torch SDPA cuDNN", "torch sum, read")
ZONES = (16, 64)

Row = dict[str, Any]
Shape = tuple[int, ...]


def shape_of(row: Row) -> Shape:
    return tuple(row[name] for name in ("batch", "heads_kv", "group", "length"))


def ceiling(rows: list[Row]) -> Row:
    """The row of the best read rate, C."""
    first = shape_of(rows[0])
    reads = [row for row in rows if row["kernel"] in READS and shape_of(row) == first]
    return max(reads, key=lambda row: row["tb_per_s"])


def label(name: str) -> str:
    """k2v2_c32_v32_p128_d128 as K2V2, groups of 32."""
    codes, k_group, v_group, *_ = name.split("_")
    groups = list(dict.fromkeys((k_group[1:], v_group[1:])))
    text = codes.upper() + (" per token" if k_group[0] == "t" else "")
    return text if groups == ["128"] else f"{text}, groups of {' and '.join(groups)}"


def microseconds(time: float) -> str:
    return f"{time:.0f} us" if time >= 100 else f"{time:.1f} us"


def table(rows: list[Row]) -> str:
    """Per case the best 16-bit time and, of every format, time, speed-up and share of C."""
    timed = [row for row in rows if row["mode"] == "graph" and row["time_us"] is not None]
    best_rate = ceiling(timed)["tb_per_s"]
    ours = [row for row in timed if (row["sinks"], row["recent"]) == ZONES]
    formats = list(dict.fromkeys(row["format"] for row in ours))
    cells = {(shape_of(row), row["format"]): row for row in ours}
    if len(cells) != len(ours):
        raise ValueError("a case and format has more than one row")
    lines = [["B x Hkv x G, L", "best 16-bit", *map(label, formats)]]
    lines.append(["---"] * len(lines[0]))
    for shape in dict.fromkeys(shape_of(row) for row in rows):
        batch, heads_kv, group, length = shape
        baselines = [r for r in timed if shape_of(r) == shape and r["kernel"] in BASELINES]
        best = min(baselines, key=lambda row: row["time_us"])
        line = [f"{batch} x {heads_kv} x {group}, {length}"]
        line.append(f"{microseconds(best['time_us'])}, {BASELINES[best['kernel']]}")
        for name in formats:
            row = cells.get((shape, name))
            if row is None:
                line.append("not timed")
                continue
            speed_up = best["time_us"] / row["time_us"]
            share = row["tb_per_s"] / best_rate
            line.append(f"{microseconds(row['time_us'])}, {speed_up:.2f}x, {share:.2f}")
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def section(rows: list[Row], link: str) -> str:
    """What stands between the markers; ``link`` leads to the result file."""
    best = ceiling([row for row in rows if row["mode"] == "graph" and row["time_us"] is not None])
    sinks, recent = ZONES
    text = (
        "Decode attention, one query token per sequence, head_dim 128, groups of 128 unless said, "
        f"{sinks} first and {recent} recent tokens in fp16, cold memory, graph replays: median "
        "time, speed-up over the faster of torch's FlashAttention-2 and cuDNN on fp16 K and V, "
        f"share of C. C = {best['tb_per_s']:.2f} TB/s is the best read rate of the run "
        f"({best['kernel']}). B: sequences, Hkv: KV heads, G: query heads per KV head, L: tokens. "
        f"{best['gpu']}, driver {best['driver']}, CUDA {best['nvcc']}, torch {best['torch']}, "
        f"commit {best['commit']} ([{link}]({link})):"
    )
    wrapped = textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)
    return f"{wrapped}\n\n{table(rows)}"


def updated(text: str, content: str) -> str:
    """``text`` with ``content`` between the markers."""
    head, _, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"no {BEGIN.strip()} ... {END.strip()}")
    return f"{head}{BEGIN}\n{content}\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it would")
    args = parser.parse_args()
    rows = json.loads(RESULT.read_text())
    for document in DOCUMENTS:
        old = document.read_text()
        new = updated(old, section(rows, os.path.relpath(RESULT, document.parent)))
        if args.check and new != old:
            sys.exit(f"{document.name} is older than {RESULT.name}: run benchmarks/summary.py")
        if not args.check:
            document.write_text(new)


if __name__ == "__main__":
    main()
