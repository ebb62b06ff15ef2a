# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of README.md and benchmarks/README.md from the committed results.

python benchmarks/summary.py            python benchmarks/summary.py --check
"""

from __future__ import annotations

import argparse
import os
import textwrap
from pathlib import Path

from pages import updated, write
from provenance import RESULTS, ROOT, standing, standings
from results import CUDNN, FLASH, Results, Row, best_sixteen_bit, ceiling, load
from shapes import Case, tagged
from suites import FORMATS, PLAN
from target_table import section as target_section
from targets import load_runs

RESULT = RESULTS / "decode_h200.json"
README, BENCHMARKS = ROOT / "README.md", ROOT / "benchmarks/README.md"
BASELINES = {FLASH: "FlashAttention-2", CUDNN: "cuDNN"}
ZONES = (16, 64)
# Columns of the table, where the run has them.
COLUMNS = (*FORMATS[:3], "k2v2_c32_v32_p128_d128", FORMATS[3])


def label(name: str) -> str:
    """k2v2_c32_v32_p128_d128_norm as K2V2, groups of 32, norms."""
    codes, k_group, v_group, _, _, *norm = name.split("_")
    if k_group[0] == "b":
        return f"{codes.upper()} in blocks"
    groups = list(dict.fromkeys((k_group[1:], v_group[1:])))
    text = codes.upper() + (" per token" if k_group[0] == "t" else "")
    text += "" if groups == ["128"] else f", groups of {' and '.join(groups)}"
    return text + (", norms" if norm else "")


def microseconds(time: float) -> str:
    return f"{time:.0f} us" if time >= 100 else f"{time:.1f} us"


def eight_cases() -> list[Case]:
    return tagged("large") + tagged("single")


def our_cells(rows: list[Row], cases: list[Case]) -> dict[tuple[str, str], Row]:
    """By case and format: the row of the plan's kernel in graph replays, with zones."""
    names = [str(case) for case in cases]
    ours = [
        row
        for row in rows
        if (row.get("selection"), row.get("mode")) == (PLAN, "graph")
        and (row["sinks"], row["recent"]) == ZONES
        and row["case"] in names
        and row["format"] in COLUMNS
    ]
    cells = {(row["case"], row["format"]): row for row in ours}
    if len(cells) != len(ours):
        raise ValueError("a case and format has more than one row")
    return cells


def cell(row: Row | None) -> str:
    """Time, speed-up over the best 16-bit time, share of C."""
    if row is None or row["time_us"] is None:
        return "not timed"
    parts = [microseconds(row["time_us"])]
    if row["speedup_best_16bit"] is not None:
        parts.append(f"{row['speedup_best_16bit']:.2f}x")
    return ", ".join([*parts, f"{row['fraction_of_ceiling']:.2f}"])


def table(rows: list[Row], cases: list[Case]) -> str:
    """Per case the best 16-bit time and, of every format, time, speed-up and share of C."""
    cells = our_cells(rows, cases)
    formats = [name for name in COLUMNS if any(name == fmt for _, fmt in cells)]
    lines = [["B x Hkv x G, L", "best 16-bit", *map(label, formats)]]
    lines.append(["---"] * len(lines[0]))
    for case in cases:
        best = best_sixteen_bit(rows, str(case))
        line = [f"{case.batch} x {case.heads_kv} x {case.group}, {case.length}"]
        if best is None:
            line.append("not timed")
        else:
            line.append(f"{microseconds(best['time_us'])}, {BASELINES[best['kernel']]}")
        line += [cell(cells.get((str(case), name))) for name in formats]
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def decode_section(results: Results, link: str) -> str:
    """What stands between the markers of decode; ``link`` leads to the result file."""
    best = ceiling(results.rows)
    if best is None:
        raise ValueError(f"{link}: no row of a read rate")
    sinks, recent = ZONES
    facts = results.facts
    text = (
        "Decode attention, one query token per sequence, head_dim 128, groups of 128 unless said, "
        f"{sinks} first and {recent} recent tokens in fp16, cold memory, graph replays: median "
        "time, speed-up over the faster of torch's FlashAttention-2 and cuDNN on fp16 K and V, "
        f"share of C. C = {best['tb_per_s']:.2f} TB/s is the best read rate of the run "
        f"({best['kernel']}). B: sequences, Hkv: KV heads, G: query heads per KV head, L: tokens. "
        f"{facts['gpu']}, driver {facts['driver']}, CUDA {facts['nvcc']}, torch {facts['torch']}, "
        f"{standing(RESULT, facts['commit'])} ([{link}]({link})):"
    )
    wrapped = textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)
    return f"{wrapped}\n\n{table(results.rows, eight_cases())}"


def documents() -> dict[Path, str]:
    """Both READMEs as the results want them."""
    results = load(RESULT)
    texts = {}
    for path in (README, BENCHMARKS):
        link = os.path.relpath(RESULT, path.parent)
        texts[path] = updated(path.read_text(), "decode", decode_section(results, link))
    texts[BENCHMARKS] = updated(texts[BENCHMARKS], "targets", target_section(load_runs()))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it would")
    args = parser.parse_args()
    write(documents(), "summary.py", args.check)
    print("\n".join(standings()))


if __name__ == "__main__":
    main()
