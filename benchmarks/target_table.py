# SPDX-License-Identifier: Apache-2.0
"""The table of targets.py as Markdown. summary.py puts it into benchmarks/README.md."""

from __future__ import annotations

import textwrap
from collections import Counter

from provenance import standing
from targets import FILES, RESULTS, Line, Run, all_lines

VERDICTS = ("met", "missed", "no limit", "not measured")


def number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    digits = 2 if unit == "x" else 0 if value >= 100 else 1
    return f"{value:.{digits}f} {unit}" if unit != "x" else f"{value:.{digits}f}"


def table(lines: list[Line]) -> str:
    """Markdown. `measured / limit` above 1 is a miss."""
    cells = [["what", "case", "target: at most", "measured", "limit", "measured / limit", ""]]
    cells.append(["---"] * len(cells[0]))
    for line in lines:
        measured = number(line.measured, line.unit)
        known = line.ratio is not None
        limit = number(line.limit, line.unit) if known else ""
        ratio = f"{line.ratio:.2f}" if known else ""
        cells.append([line.what, line.case, line.target, measured, limit, ratio, line.verdict])
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def counted(lines: list[Line]) -> str:
    """How many of each verdict: 3 met, 1 missed, 62 not measured."""
    count = Counter(line.verdict for line in lines)
    return ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS if count[verdict])


def section(runs: dict[str, Run]) -> str:
    """What stands between the markers of benchmarks/README.md."""
    lines = all_lines(**runs)
    text = f"{counted(lines)}."
    for name, run in runs.items():
        rate = run.ceiling()
        if run.results.rows:
            known = "no C" if rate is None else f"C = {rate:.2f} TB/s"
            file = FILES[name]
            commit = run.results.facts["commit"]
            text += f" [{file}](results/{file}): {known}, {standing(RESULTS / file, commit)}."
    wrapped = textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)
    return f"{wrapped}\n\n{table(lines)}"
