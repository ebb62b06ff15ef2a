# SPDX-License-Identifier: Apache-2.0
"""Draws docs/plots/accuracy.svg: what recipes lose over what they take, from the results of
accuracy.py.

python benchmarks/accuracy_plot.py            python benchmarks/accuracy_plot.py --output /tmp
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from accuracy_tables import RESULT, by_recipe, codes, of_kind
from matplotlib.figure import Figure
from plots import COLOURS, OUTPUT, STYLE, add_legend, figure
from results import Results, Row, load

from bitdecoding import KvFormat

# What sets a recipe's marks apart; the first that holds.
FAMILIES: dict[str, Callable[[KvFormat], bool]] = {
    "blocks": lambda f: f.k_axis == "block",
    "K per token": lambda f: f.k_axis == "token",
    "K, V rotated": lambda f: f.k_rotation > 0,
    "V rotated": lambda f: f.v_rotation > 0,
    "K per channel, as it is": lambda _: True,
}


def family(row: Row) -> str:
    format = KvFormat.parse(row["formats"][0])
    return next(name for name, holds in FAMILIES.items() if holds(format))


def points(rows: Sequence[Row]) -> dict[str, list[tuple[float, float, bool]]]:
    """By family: bits per element, KL of the worst text, whether codes span less than a range."""
    found: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in FAMILIES}
    for of_recipe in by_recipe(row for row in rows if codes(row) is not None).values():
        one = of_recipe[0]
        worst = max(row["kl"] for row in of_recipe)
        found[family(one)].append((one["bits_per_element"], worst, "clip" in one["formats"][0]))
    return found


def divergence(results: Results) -> Figure:
    """A panel per model; filled marks are clipped."""
    names = list(dict.fromkeys(row["model"] for row in results.rows))
    drawing, axes = figure(len(names), 2, 3.6, 3.2)
    for panel, name in zip(axes, names, strict=True):
        found = points(of_kind(results, "text", name))
        for colour, (label, marks) in zip(COLOURS.values(), found.items(), strict=False):
            for bits, kl, clipped in marks:
                panel.plot(bits, kl, "o", color=colour, fillstyle="full" if clipped else "none")
            panel.plot([], [], "o", color=colour, label=label)
        panel.set(title=name, xlabel="bits per element", ylabel="KL of the worst text, nats")
        panel.set_yscale("log")
    add_legend(drawing)
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULT)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    args = parser.parse_args()
    with matplotlib.rc_context(STYLE):
        drawing = divergence(load(args.results))
        path = args.output / "accuracy.svg"
        drawing.savefig(path, metadata={"Date": None, "Creator": None})
    print(path)


if __name__ == "__main__":
    main()
