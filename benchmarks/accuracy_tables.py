# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/accuracy.md from the results of accuracy.py.

python benchmarks/accuracy_tables.py            python benchmarks/accuracy_tables.py --check
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean

from pages import source, updated, write
from provenance import RESULTS, ROOT, standing
from results import Results, Row, load

RESULT = RESULTS / "accuracy_h200.json"
SEARCHED = RESULTS / "bit_search_h200.json"
CROSS_CHECK = RESULTS / "cross_check_cpu.json"
PAGE = ROOT / "docs/accuracy.md"
ZONES = (16, 64)

# What was aimed at with those zones: recipe pattern, most perplexity above 16 bit, most KL.
FOUR_BITS, MIXED, TWO_BITS, PLAIN_TWO = (4, 4), (4, 2), (2, 2), "kivi-2 g32"
LIMITS = {FOUR_BITS: (0.005, 0.003), MIXED: (0.01, 0.01)}


def increase(row: Row) -> float:
    """Perplexity above that of 16 bit, as a share."""
    return float(row["perplexity"] / row["perplexity_16bit"] - 1)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def of_kind(results: Results, kind: str, model: str) -> list[Row]:
    return [row for row in results.rows if (row["kind"], row["model"]) == (kind, model)]


def by_recipe(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["recipe"], []).append(row)
    return found


def mean_and_worst(values: Sequence[float], text: Callable[[float], str]) -> str:
    return f"{text(mean(values))} ({text(max(values))})"


def text_table(results: Results, model: str) -> str:
    """Per recipe what it takes and loses: mean and, in brackets, worst over the texts."""
    lines = []
    found = by_recipe(of_kind(results, "text", model))
    for name, rows in sorted(found.items(), key=lambda item: -item[1][0]["bits_per_element"]):
        lines.append(
            [
                name,
                f"{rows[0]['bits_per_element']:.3f}",
                f"{rows[0]['bytes_per_token']:.0f}",
                mean_and_worst([increase(r) for r in rows], lambda x: f"{x:+.2%}"),
                mean_and_worst([r["kl"] for r in rows], lambda x: f"{x:.4f}"),
                f"{max(r['kl_p99'] for r in rows):.3f}",
                f"{min(r['top1'] for r in rows):.1%}",
            ]
        )
    head = ["recipe", "bits", "bytes a token", "perplexity", "KL", "worst p99", "worst top-1"]
    return table(head, lines)


def codes(row: Row) -> tuple[int, int] | None:
    """K and V bits of a recipe with the zones of the targets; None: it is no part of them."""
    found = {(int(name[1]), int(name[3])) for name in row["formats"]}  # k4v2_...
    if (row["keep_first"], row["keep_last"]) != ZONES or len(found) != 1:
        return None
    return found.pop()


def target_lines(results: Results, model: str) -> list[list[str]]:
    rows = [row for row in of_kind(results, "text", model) if codes(row) is not None]
    lines = []
    for bits, (most_increase, most_kl) in LIMITS.items():
        for name, found in by_recipe(r for r in rows if codes(r) == bits).items():
            worst, kl = max(map(increase, found)), max(row["kl"] for row in found)
            met = "yes" if worst <= most_increase and kl <= most_kl else "**no**"
            aim = f"{most_increase:+.1%}, KL {most_kl}"
            lines.append([model, name, aim, f"{worst:+.2%}, KL {kl:.4f}", met])
    plain = [row for row in rows if row["recipe"] == PLAIN_TWO]
    if plain:
        aim = mean(map(increase, plain)) / 2
        bits = plain[0]["bits_per_element"]
        for name, found in by_recipe(r for r in rows if codes(r) == TWO_BITS).items():
            if name != PLAIN_TWO and found[0]["bits_per_element"] <= bits:
                worst = mean(map(increase, found))
                met = "yes" if worst <= aim else "**no**"
                lines.append([model, name, f"{aim:+.2%} on average", f"{worst:+.2%}", met])
    return lines


def needle_table(results: Results, model: str) -> str:
    rows = of_kind(results, "needle", model)
    columns = sorted({(row["text"], row["context"]) for row in rows})
    lines = []
    for name, found in by_recipe(rows).items():
        cells = {(row["text"], row["context"]): f"{row['right']:.0%}" for row in found}
        lines.append([name, *(cells.get(column, "") for column in columns)])
    return table(["recipe", *(f"{keys}, {tokens} tokens" for keys, tokens in columns)], lines)


def generation_table(results: Results, model: str) -> str:
    lines = [
        [
            name,
            f"{mean(row['same_tokens'] for row in rows):.0f} of {rows[0]['context']}",
            f"{mean(row['repetition'] for row in rows):.1%}",
        ]
        for name, rows in by_recipe(of_kind(results, "generation", model)).items()
    ]
    return table(["recipe", "tokens before it diverges", "repeated runs of 4"], lines)


def layer_table(results: Results, model: str) -> str:
    lines = []
    for row in of_kind(results, "layers", model):
        errors = sorted(error for error in row["errors"] if error is not None)
        cells = [errors[0], errors[len(errors) // 2], errors[-1]]
        lines.append([row["recipe"], *(f"{cell:.3f}" for cell in cells)])
    return table(["recipe", "least", "median", "largest"], lines)


def search_table(results: Results) -> str:
    """Per model: assignments that were searched and the same formats on all layers."""
    lines = []
    for name in dict.fromkeys(row["model"] for row in results.rows):
        found = by_recipe(row for row in results.rows if row["model"] == name)
        for recipe, rows in sorted(found.items(), key=lambda item: -item[1][0]["bits_per_element"]):
            lines.append(
                [
                    name,
                    recipe,
                    f"{rows[0]['bits_per_element']:.3f}",
                    mean_and_worst([increase(r) for r in rows], lambda x: f"{x:+.2%}"),
                    mean_and_worst([r["kl"] for r in rows], lambda x: f"{x:.4f}"),
                ]
            )
    return table(["model", "layers", "bits", "perplexity", "KL"], lines)


def cross_check_line(results: Results) -> str:
    rows = [row for row in results.rows if row["kind"] == "cross-check"]
    if not rows:
        return "Not measured.\n"
    share = max(row["difference"] for row in rows)
    tokens = max(row["context"] for row in rows)
    failed = [row["recipe"] for row in rows if "error" in row]
    said = (
        f"{len(failed)} of them beyond the limit: {', '.join(failed)}" if failed else "all within"
    )
    return (
        f"{len(rows)} recipes and models on a CPU, {tokens} tokens, {said}; the largest difference "
        f"between cache and fake is {share:.2%} of what the recipe loses in that layer "
        f"({standing(CROSS_CHECK, results.facts['commit'])}, "
        f"[results](../benchmarks/results/{CROSS_CHECK.name})).\n"
    )


def sections(results: Results) -> dict[str, str]:
    """By the name of its markers: what stands between them."""
    names = list(dict.fromkeys(row["model"] for row in results.rows))

    def per_model(kind: str, one: Callable[[Results, str], str]) -> str:
        measured = [name for name in names if of_kind(results, kind, name)]
        found = [f"{name}:\n\n{one(results, name)}" for name in measured]
        return "\n".join(found) or "Not measured.\n"

    facts = results.facts
    device = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    said = (
        f"{device}, torch {facts['torch']}, transformers {facts['transformers']}, "
        f"{standing(RESULT, facts['commit'])} ([results](../benchmarks/results/{RESULT.name})).\n"
    )
    targets = [line for name in names for line in target_lines(results, name)]
    head = ["model", "recipe", "aim", "found, worst text", "met"]
    return {
        "source": said,
        "texts": per_model("text", text_table),
        "targets": table(head, targets),
        "needles": per_model("needle", needle_table),
        "generation": per_model("generation", generation_table),
        "layers": per_model("layers", layer_table),
    }


def document(results: Results, searched: Results | None, checked: Results | None, text: str) -> str:
    found = sections(results)
    if searched is not None:
        found["search"] = f"{source(SEARCHED, searched.facts)}\n{search_table(searched)}"
    if checked is not None:
        found["cross-check"] = cross_check_line(checked)
    for name, content in found.items():
        text = updated(text, name, content)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it would")
    parser.add_argument("--results", type=Path, default=RESULT)
    parser.add_argument("--searched", type=Path, default=SEARCHED)
    parser.add_argument("--checked", type=Path, default=CROSS_CHECK)
    args = parser.parse_args()
    searched, checked = (
        load(path) if path.exists() else None for path in (args.searched, args.checked)
    )
    text = document(load(args.results), searched, checked, PAGE.read_text())
    write({PAGE: text}, "accuracy_tables.py", args.check)


if __name__ == "__main__":
    main()
