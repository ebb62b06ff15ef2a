# SPDX-License-Identifier: Apache-2.0
"""Draws the results as SVG files that can be read on light and dark pages.

python benchmarks/plots.py            python benchmarks/plots.py --output /tmp/plots

The same results give the same bytes (with the same matplotlib).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from provenance import RESULTS, ROOT
from results import Row, load
from shapes import HEAD_DIM, Case
from suites import PLAN
from summary import BASELINES, label
from targets import TENSOR_RATE, ZONES

OUTPUT = ROOT / "docs/plots"

Key = tuple[Any, ...]

# Mid-tones: contrast of 3 and more with white and with a dark page.
INK = "#767b83"
COLOURS = {
    "k4v4_c128_v128_p128_d128": "#3b82c4",
    "k4v2_c128_v128_p128_d128": "#1a9c7f",
    "k2v2_c128_v128_p128_d128": "#c9731a",
    "k2v2_c32_v32_p128_d128": "#b5509c",
    "k2v2_c32_v32_p128_d128_norm": "#8e7cc3",
    "k4v4_t128_v128_p128_d128": "#8f8a1d",
    "k2v2_t128_v128_p128_d128": "#d0504a",
}
DASHES = dict(zip(BASELINES, ("--", "-"), strict=True))
STYLE: dict[str, Any] = {
    "svg.hashsalt": "bitdecoding",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.6,
}
STYLE |= dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"),
    INK,
)

MARKERS = {8: "o", 16: "s", 32: "^", 64: "D"}
H200_SMS = 132  # where the facts don't say
MOST_PANELS = 6
LEAST_WIDTH = 6.4  # inches; the legend has the figure's width


def load_rows(path: Path) -> list[Row]:
    """The rows of a result file with the facts of the run in each."""
    results = load(path)
    return [results.facts | row for row in results.rows]


def shape_of(row: Row) -> Key:
    return tuple(row[name] for name in ("batch", "heads_kv", "group", "length"))


def is_timed(row: Row) -> bool:
    return row.get("mode") == "graph" and row["time_us"] is not None


def is_ours(row: Row) -> bool:
    """With zones, by the kernel that the plan chose."""
    return (
        is_timed(row)
        and (row.get("sinks"), row.get("recent")) == ZONES
        and row["selection"] == PLAN
    )


def is_plain(row: Row) -> bool:
    """One query token, head_dim 128, all sequences equally long: what most plots show."""
    case = Case.parse(row["case"])
    return (case.query_tokens, case.head_dim, case.ragged) == (1, HEAD_DIM, False)


def grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def colour(name: str) -> str:
    return COLOURS.get(name, INK)


def tokens(value: float, _: Any = None) -> str:
    """131072 as 128k"""
    if value >= 1 << 20:
        return f"{value / (1 << 20):g}M"
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def figure(panels: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """``panels`` axes, at most ``columns`` side by side, of about ``width`` x ``height`` inches."""
    columns = min(columns, panels)
    lines = -(-panels // columns)
    size = (max(width * columns, LEAST_WIDTH), height * lines + 0.5)
    drawing = Figure(figsize=size, layout="constrained")
    axes = [drawing.add_subplot(lines, columns, i + 1) for i in range(panels)]
    for one in axes:
        one.patch.set_alpha(0)
    drawing.patch.set_alpha(0)
    return drawing, axes


def add_legend(drawing: Figure) -> None:
    """One legend below all panels."""
    found: dict[str, Any] = {}
    for axes in drawing.axes:
        handles, names = axes.get_legend_handles_labels()
        found |= zip(names, handles, strict=True)
    drawing.legend(
        found.values(),
        found.keys(),
        loc="outside lower center",
        ncols=int(drawing.get_figwidth() / 1.6),
    )


def binary_axis(axes: Axes, values: Iterable[int], text: Callable[..., str]) -> None:
    """A logarithmic x axis with ticks at ``values``, at most eight of them."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 8)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(text))


def fraction_against(
    rows: list[Row], name: str, others: tuple[str, ...], title: str, text: Callable[..., str]
) -> Figure | None:
    """The share of C against the field ``name``, a panel for each of ``others``; None: no two rows
    differ in that field alone."""
    ours = [row for row in rows if is_ours(row) and is_plain(row)]
    panels = grouped(ours, lambda row: tuple(row[other] for other in others))
    counts = {key: len({row[name] for row in found}) for key, found in panels.items()}
    shown = sorted((key for key in panels if counts[key] > 1), key=lambda key: -counts[key])
    if not shown:
        return None
    drawing, axes = figure(len(shown[:MOST_PANELS]), 3, 3.2, 2.5)
    for one, key in zip(axes, shown, strict=False):
        for (fmt,), found in grouped(panels[key], lambda row: (row["format"],)).items():
            found.sort(key=lambda row: row[name])
            one.plot(
                [row[name] for row in found], [row["fraction_of_ceiling"] for row in found],
                marker="o", color=colour(fmt), label=label(fmt),
            )  # fmt: skip
        one.set_ylim(0, 1.02)
        one.set_title(title.format(**dict(zip(others, key, strict=True))))
        binary_axis(one, [row[name] for row in panels[key]], text)
        one.set_xlabel({"length": "tokens", "batch": "sequences"}[name])
        one.set_ylabel("share of C")
    add_legend(drawing)
    return drawing


def fraction_by_length(rows: list[Row]) -> Figure | None:
    others = ("batch", "heads_kv", "group")
    return fraction_against(rows, "length", others, "{batch} x {heads_kv} x {group}", tokens)


def fraction_by_batch(rows: list[Row]) -> Figure | None:
    others = ("heads_kv", "group", "length")
    title = "B x {heads_kv} x {group}, {length} tokens"
    return fraction_against(rows, "batch", others, title, lambda value, _: f"{value:g}")


def speed_up(rows: list[Row]) -> Figure | None:
    """Time of each baseline over ours, against the bytes of the 16-bit cache. Dotted: the most that
    the bytes allow."""
    timed = [row for row in rows if is_timed(row) and is_plain(row)]
    baselines = [row for row in timed if is_baseline(row)]
    ours = grouped(filter(is_ours, timed), shape_of)
    kernels = grouped(baselines, lambda row: (row["kernel"],))
    if not kernels:
        return None
    drawing, axes = figure(len(kernels), 3, 3.6, 3)
    for one, ((kernel,), theirs) in zip(axes, kernels.items(), strict=True):
        pairs = [(base, row) for base in theirs for row in ours.get(shape_of(base), [])]
        for (fmt,), found in grouped_pairs(pairs).items():
            found.sort(key=lambda pair: pair[0]["bytes"])
            one.plot(
                [base["bytes"] / 1e6 for base, _ in found],
                [base["time_us"] / row["time_us"] for base, row in found],
                marker="o", linestyle="", color=colour(fmt), label=label(fmt),
            )  # fmt: skip
            limit = max(base["bytes"] / row["bytes"] for base, row in found)
            one.axhline(limit, color=colour(fmt), linestyle=":", linewidth=1)
        one.axhline(1, color=INK, linewidth=0.8)
        one.set_xscale("log")
        one.set_ylim(bottom=0)
        one.set_title(f"over {BASELINES.get(kernel, kernel)}")
        one.set_xlabel("16-bit K, V, queries, outputs, MB")
        one.set_ylabel("speed-up")
    add_legend(drawing)
    return drawing


def is_baseline(row: Row) -> bool:
    """16-bit attention, not a plain read or copy."""
    return row.get("sinks") is None and ("SDPA" in row["kernel"] or "FlashInfer" in row["kernel"])


def grouped_pairs(pairs: list[tuple[Row, Row]]) -> dict[Key, list[tuple[Row, Row]]]:
    """(baseline, ours) by our format."""
    groups: dict[Key, list[tuple[Row, Row]]] = {}
    for base, row in pairs:
        groups.setdefault((row["format"],), []).append((base, row))
    return groups


def roofline(rows: list[Row]) -> Figure | None:
    """Codes per ns and SM against codes per byte: below C and below the tensor cores' rate."""
    ours = [row for row in rows if is_ours(row) and not Case.parse(row["case"]).ragged]
    if not ours:
        return None
    drawing, (axes,) = figure(1, 1, 6.4, 4)
    sms = ours[0].get("sms", H200_SMS)
    per_byte = ours[0]["ceiling_tb_per_s"] * 1e3 / sms  # bytes per ns and SM
    right = 1.15 * max(codes(row) / row["bytes"] for row in ours)
    axes.plot([0, right], [0, per_byte * right], color=INK)
    axes.annotate("memory at C ", (1, per_byte), va="bottom", ha="right")
    for columns, rate in TENSOR_RATE.items():
        axes.axhline(rate, color=INK, linestyle=":", linewidth=1)
        axes.annotate(f" tensor cores, {columns} columns", (0, rate), va="bottom")
    groups = grouped(ours, lambda row: (row["format"], columns_of(row)))
    for (fmt, columns), found in groups.items():
        axes.plot(
            [codes(row) / row["bytes"] for row in found],
            [codes(row) / row["time_us"] / 1e3 / sms for row in found],
            marker=MARKERS.get(columns, "x"), linestyle="", color=colour(fmt),
            label=label(fmt) + ("" if columns == 8 else f", {columns} columns"),
        )  # fmt: skip
    axes.set_xlim(0, right)
    axes.set_ylim(0, 300)
    axes.set_xlabel("codes per byte that must be read")
    axes.set_ylabel("codes per ns and SM")
    add_legend(drawing)
    return drawing


def codes(row: Row) -> int:
    """Elements of K and V that a call attends to."""
    batch, heads_kv, _, length = shape_of(row)
    return int(2 * batch * heads_kv * length * row["head_dim"])


def columns_of(row: Row) -> int:
    """Query columns, padded to what a kernel is built for."""
    columns = row["group"] * row["query_tokens"]
    return min((width for width in TENSOR_RATE if width >= columns), default=columns)


def end_to_end(rows: list[Row]) -> Figure | None:
    """ms per token against length, and tokens per second at the largest batch."""
    timed = [row for row in rows if "part" in row and is_timed(row)]
    latency = [row for row in timed if row["part"] == "latency"]
    throughput = [row for row in timed if row["part"] == "throughput"]
    if not latency or not throughput:
        return None
    drawing, (left, right) = figure(2, 2, 4, 3)
    for (name,), found in grouped(latency, lambda row: (contender(row),)).items():
        lengths, style = [row["length"] for row in found], line_style(found[0])
        left.plot(lengths, [row["ms_per_token"] for row in found], marker="o", label=name, **style)
    rest = [row["without_attention_us"] / 1e3 for row in found]
    left.plot(lengths, rest, color=INK, linestyle=":", label="without attention")
    left.set_ylim(bottom=0)
    left.set_title("one sequence")
    left.set_xlabel("tokens")
    left.set_ylabel("ms per token")
    binary_axis(left, lengths, tokens)
    for place, row in enumerate(reversed(throughput)):
        style = line_style(row)
        right.barh(place, row["tokens_per_s"], color=style["color"], height=0.6)
        text = f" {row['tokens_per_s']:.0f} ({row['batch']} sequences)"
        right.annotate(text, (row["tokens_per_s"], place), va="center")
    right.set_yticks(range(len(throughput)), [contender(row) for row in reversed(throughput)])
    right.set_xlim(right=1.6 * max(row["tokens_per_s"] for row in throughput))
    right.grid(axis="y", visible=False)
    right.set_title(f"as many sequences of {tokens(throughput[0]['length'])} as fit")
    right.set_xlabel("tokens per second")
    add_legend(drawing)
    return drawing


def contender(row: Row) -> str:
    return BASELINES[row["kernel"]] if row["sinks"] is None else label(row["format"])


def line_style(row: Row) -> dict[str, str]:
    if row["sinks"] is None:
        return {"color": INK, "linestyle": DASHES[row["kernel"]]}
    return {"color": colour(row["format"]), "linestyle": "-"}


# name of the SVG: (result, how it is drawn)
PLOTS: dict[str, tuple[str, Callable[[list[Row]], Figure | None]]] = {
    "fraction_by_length": ("decode", fraction_by_length),
    "fraction_by_batch": ("decode", fraction_by_batch),
    "speed_up": ("decode", speed_up),
    "roofline": ("decode", roofline),
    "end_to_end": ("end_to_end", end_to_end),
}


def draw(results: dict[str, Path], output: Path) -> list[Path]:
    """Writes every plot that the results have data for; returns the files."""
    output.mkdir(parents=True, exist_ok=True)
    rows = {name: load_rows(path) for name, path in results.items() if path.exists()}
    written = []
    with matplotlib.rc_context(STYLE):
        for name, (result, make) in PLOTS.items():
            drawing = make(rows[result]) if result in rows else None
            if drawing is None:
                print(f"{name}: nothing to draw in {results[result].name}")
                continue
            written.append(output / f"{name}.svg")
            drawing.savefig(written[-1], metadata={"Date": None, "Creator": None})
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in dict.fromkeys(result for result, _ in PLOTS.values()):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=Path, default=RESULTS / f"{name}_h200.json")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    args = parser.parse_args()
    results = {name: getattr(args, name) for name in ("decode", "end_to_end")}
    for path in draw(results, args.output):
        print(path)


if __name__ == "__main__":
    main()
