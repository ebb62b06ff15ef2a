# SPDX-License-Identifier: Apache-2.0
"""Two result files row by row: is the second slower than the first?

python benchmarks/compare.py benchmarks/results/decode_h200.json new.json --threshold 0.03
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from results import Results, Row, ceiling, is_ours, load
from rich.console import Console
from rich.table import Table

# What says that two rows measure the same. Which kernel a plan chose is no part of it.
KEY = (
    "case", "batch", "heads_kv", "query_heads", "length", "head_dim", "format", "sinks", "recent",
    "mode", "step", "call", "selection",
)  # fmt: skip
SAME_MACHINE = ("gpu", "cpu", "driver", "nvcc", "torch")
SAME_CEILING = 0.02  # C moves by less from run to run of one machine

Key = tuple[object, ...]


@dataclass(frozen=True)
class Pair:
    """Two rows that measure the same."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        """Time after over time before: above 1 is slower."""
        return float(self.after["time_us"] / self.before["time_us"])


def key_of(row: Row) -> Key:
    """Rivals share their format, so that their name counts."""
    rival = None if is_ours(row) else row["kernel"]
    return (*(row.get(name) for name in KEY), rival)


def paired(before: Results, after: Results) -> tuple[list[Pair], int]:
    """Rows that both have with a time, in the order of ``after``, and how many only one has.

    Profiles and agreements have none.
    """
    old, new = (
        {key_of(row): row for row in one.rows if row.get("time_us") is not None}
        for one in (before, after)
    )
    pairs = [Pair(old[key], row) for key, row in new.items() if key in old]
    return pairs, len(old) + len(new) - 2 * len(pairs)


def slower(pairs: list[Pair], threshold: float) -> list[Pair]:
    """Our rows that take more than 1 + threshold times as long as before."""
    return [pair for pair in pairs if is_ours(pair.after) and pair.ratio > 1 + threshold]


def warnings(before: Results, after: Results) -> list[str]:
    """Why the two may not be comparable."""
    found = []
    for name in SAME_MACHINE:
        old, new = (one.facts.get(name) for one in (before, after))
        if old != new:
            found.append(f"not the same {name}: {old}, {new}")
    rates = [row["tb_per_s"] for row in map(ceiling, (before.rows, after.rows)) if row is not None]
    if len(rates) == 2 and abs(rates[1] / rates[0] - 1) > SAME_CEILING:
        found.append(f"the ceilings differ: {rates[0]} and {rates[1]} TB/s")
    return found


def what(row: Row) -> str:
    """A row's case, in words of the benchmark that made it."""
    if "case" in row:
        zones = "" if row["sinks"] is None else f" {row['sinks']}/{row['recent']}"
        return f"{row['case']}{zones} {row['mode']}"
    names = ("batch", "length", "heads_kv", "query_heads", "step")
    return ", ".join(f"{name} {row[name]}" for name in names if name in row)


def kernels(pair: Pair) -> str:
    names = [str(row.get("kernel", row.get("call"))) for row in (pair.before, pair.after)]
    return " -> ".join(dict.fromkeys(names))


def print_pairs(pairs: list[Pair], threshold: float) -> None:
    table = Table("what", "format", "kernel", "before us", "after us", "ratio", "")
    late = slower(pairs, threshold)
    for pair in pairs:
        mark = "SLOWER" if pair in late else "faster" if pair.ratio < 1 - threshold else ""
        times = [str(row["time_us"]) for row in (pair.before, pair.after)]
        row = pair.after
        table.add_row(
            what(row), row.get("format"), kernels(pair), *times, f"{pair.ratio:.3f}", mark
        )
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=0.03, help="default: 0.03, 3%% slower")
    args = parser.parse_args()
    before, after = load(args.before), load(args.after)
    pairs, alone = paired(before, after)
    print_pairs(pairs, args.threshold)
    print(f"{len(pairs)} rows in both files, {alone} in one")
    for text in warnings(before, after):
        print(f"WARNING: {text}")
    late = slower(pairs, args.threshold)
    if late or not pairs:
        sys.exit(f"{len(late)} rows are slower" if pairs else "nothing to compare")


if __name__ == "__main__":
    main()
