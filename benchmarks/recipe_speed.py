# SPDX-License-Identifier: Apache-2.0
"""Writes what docs/accuracy.md says of speed from the results of decode.py and append.py.

python benchmarks/recipe_speed.py            python benchmarks/recipe_speed.py --check
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable

from accuracy_tables import PAGE, table
from pages import source, updated, write
from provenance import RESULTS
from results import Results, Row, is_ours, load
from shapes import Case, tagged
from suites import APPEND_FORMATS, RECIPES, SUITES, untransformed
from summary import microseconds

RESULT = RESULTS / "recipes_h200.json"
APPEND = RESULTS / "append_h200.json"
ZONES = (16, 64)
MOST_US = 2.0  # that a transform may add to a decode step
NOT_TIMED = "not timed"


def plain(name: str) -> str:
    """The same codes in whole groups: k2v2_c32_v32_p128_d128_norm -> k2v2_c128_v128_p128_d128."""
    return re.sub(r"_[ctb]\d+_v\d+_(p\d+_d\d+).*", r"_c128_v128_\1", name)


def decode_rows(results: Results) -> dict[tuple[str, str], Row]:
    """By (case, format): what plans choose, in graphs, with the usual zones. Timed rows alone."""
    return {
        (row["case"], row["format"]): row
        for row in results.rows
        if "case" in row
        and is_ours(row)
        and (row["mode"], row["selection"]) == ("graph", "plan")
        and (row["sinks"], row["recent"]) == ZONES
        and row["time_us"] is not None
    }


def title(case: Case) -> str:
    tokens = f", {case.query_tokens} query tokens" if case.query_tokens > 1 else ""
    return f"{case.batch} x {case.heads_kv} x {case.group}, {case.length}{tokens}"


def speed_table(results: Results) -> str:
    """Per recipe and shape the time, and the plain format's time over it."""
    rows, cases = decode_rows(results), tagged("recipes")

    def cell(case: Case, name: str) -> str:
        row, base = rows.get((str(case), name)), rows.get((str(case), plain(name)))
        if row is None or base is None:
            return NOT_TIMED
        return f"{microseconds(row['time_us'])}, {base['time_us'] / row['time_us']:.2f}"

    lines = [[f"`{name}`", *(cell(case, name) for case in cases)] for name in RECIPES]
    return table(["format", *map(title, cases)], lines)


def verdict(added: Iterable[float | None]) -> str:
    found = list(added)
    if any(one is not None and one > MOST_US for one in found):
        return "**no**"
    return NOT_TIMED if None in found else "yes"


def append_times(results: Results) -> dict[str, Row]:
    """By format: appends of one token that complete no page."""
    return {
        row["format"]: row
        for row in results.rows
        if row.get("step") == "plain" and row["time_us"] is not None
    }


def added_line(name: str, times: list[tuple[float, float] | None]) -> list[str]:
    """What a format's transforms cost: (time, what they add) of each column."""
    cells = [
        NOT_TIMED if one is None else f"{one[1]:+.2f} us, {(one[0] - one[1]) / one[0]:.2f}"
        for one in times
    ]
    return [f"`{name}`", *cells, verdict(None if one is None else one[1] for one in times)]


def transform_table(results: Results) -> str:
    """What a transform adds to a decode call, and what is left of the speed."""
    rows, cases = decode_rows(results), tagged("recipes")

    def times(case: Case, name: str) -> tuple[float, float] | None:
        row = rows.get((str(case), name), {})
        return (row["time_us"], row["added_us"]) if "added_us" in row else None

    lines = [
        added_line(name, [times(case, name) for case in cases])
        for name in RECIPES
        if name != untransformed(name)
    ]
    return table(["format", *map(title, cases), "at most 2 us"], lines)


def append_table(results: Results) -> str:
    found = {name: row["time_us"] for name, row in append_times(results).items()}

    def times(name: str) -> tuple[float, float] | None:
        base = untransformed(name)
        return (found[name], found[name] - found[base]) if {name, base} <= set(found) else None

    lines = [
        added_line(name, [times(name)])
        for name in APPEND_FORMATS
        if untransformed(name) in APPEND_FORMATS and name != untransformed(name)
    ]
    return table(["format", "64 sequences x 8 heads", "at most 2 us"], lines)


def wide_table(results: Results) -> str:
    """head_dim 256: time, share of C, speed-up over the best 16-bit time."""
    rows, formats = decode_rows(results), SUITES["head256"].formats

    def cell(case: Case, name: str) -> str:
        row = rows.get((str(case), name))
        if row is None:
            return NOT_TIMED
        parts = [microseconds(row["time_us"])]
        if row["fraction_of_ceiling"] is not None:
            parts.append(f"{row['fraction_of_ceiling']:.2f} of C")
        if row["speedup_best_16bit"] is not None:
            parts.append(f"{row['speedup_best_16bit']:.2f}x")
        return ", ".join(parts)

    cases = tagged("head256")
    lines = [[title(case), *(cell(case, name) for name in formats)] for case in cases]
    return table(["B x Hkv x G, L", *(f"`{name}`" for name in formats)], lines)


def document(text: str, decode: Results | None, append: Results | None) -> str:
    """The page with what the results give; sections without results stay as they are."""
    if decode is not None:
        said = source(RESULT, decode.facts)
        text = updated(text, "speed", f"{said}\n{speed_table(decode)}")
        text = updated(text, "transforms", transform_table(decode))
        text = updated(text, "speed-256", wide_table(decode))
    if append is not None:
        text = updated(text, "append", f"{source(APPEND, append.facts)}\n{append_table(append)}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it would")
    args = parser.parse_args()
    decode, append = (load(path) if path.exists() else None for path in (RESULT, APPEND))
    write({PAGE: document(PAGE.read_text(), decode, append)}, "recipe_speed.py", args.check)


if __name__ == "__main__":
    main()
