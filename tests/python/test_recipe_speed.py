# SPDX-License-Identifier: Apache-2.0
"""benchmarks/recipe_speed.py: what docs/accuracy.md says of times, which transforms cost little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_benchmark_results import CUDNN, FACTS, INT4, benchmarks, module, our_row, result_row

from bitdecoding import KvFormat

__all__ = ["benchmarks"]  # a fixture
CASES = ("8x8x4@131072", "64x8x4@8192", "128x8x8@4096", "1x8x4@8192")
ROTATED = INT4 + "_kr128_vr128"
G32 = "k2v2_c32_v32_p128_d128"
BEST = G32 + "_kr128_vr128_kclip85_vclip85"
V_ROTATED = G32 + "_vr128_kclip85_vclip85"


@pytest.fixture
def speed() -> Any:
    return module("recipe_speed")


def run_of(*rows: dict[str, Any]) -> Any:
    results = module("results")
    return results.Results(FACTS, results.completed(list(rows)))


def make_decode() -> Any:
    wide = "8x8x4@65536:d256"
    rows = [result_row(CUDNN, 0.25, CASES[0]), result_row(CUDNN, 40.0, wide)]
    for case in CASES:
        rows += [our_row(100.0, case), our_row(101.0, case, format=ROTATED, added_us=1.5)]
        rows += [our_row(200.0, case, format=G32), our_row(1.0, case, sinks=0)]
        rows += [our_row(1.0, case, selection="decode_sm80_*"), our_row(1.0, case, mode="plain")]
    rows.append(our_row(203.0, CASES[1], format=BEST, added_us=3.0))
    rows.append(our_row(201.0, CASES[3], format=V_ROTATED, added_us=-1.0))
    rows.append(our_row(50.0, CASES[0], format="k2v2_c128_v128_p128_d128"))
    rows.append(our_row(10.0, wide, format="k4v4_c128_v128_p128_d256", bytes=2 * 10**7))
    return run_of(*rows)


def make_append() -> Any:
    step = {"mode": "graph", "kernel": "append", "bytes": 10**6}
    times = ((INT4, "plain", 3.0), (INT4, "page", 20.0), (ROTATED, "plain", 3.5),
             (ROTATED, "page", 30.0), (G32, "plain", 3.0), (BEST, "plain", None))  # fmt: skip
    rows = [step | {"format": f, "step": s, "time_us": t} for f, s, t in times]
    return run_of(*rows)


def line_of(table: str, name: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if f"`{name}`" in line.split("|")[1]]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_names(speed: Any) -> None:
    assert speed.plain(BEST) == "k2v2_c128_v128_p128_d128"
    assert speed.plain("k4v4_b32_v32_p128_d128") == speed.plain("k4v4_t64_v64_p128_d128") == INT4
    assert speed.plain("k4v2_c128_v32_p64_d64_norm_kr16") == "k4v2_c128_v128_p64_d64"
    assert speed.untransformed(BEST) == speed.untransformed(G32) == G32
    assert speed.untransformed(G32 + "_norm_kr64_vr64") == G32 + "_norm"  # it has other bytes


def test_every_recipe_has_what_it_is_compared_with(speed: Any) -> None:
    recommended = [str(KvFormat.recommended(bits=bits, head_dim=128)) for bits in (4, 3, 2)]
    for name in speed.RECIPES:
        assert {speed.plain(name), speed.untransformed(name)} <= set(speed.RECIPES)
    assert set(recommended) <= set(speed.RECIPES)


def test_speed(speed: Any) -> None:
    table = speed.speed_table(make_decode())
    assert line_of(table, INT4) == ["100 us, 1.00"] * 4
    assert line_of(table, ROTATED) == ["101 us, 0.99"] * 4
    assert line_of(table, G32) == ["200 us, 0.25", *["not timed"] * 3]
    assert line_of(table, "k4v4_b32_v32_p128_d128") == ["not timed"] * 4
    head = "| format | 8 x 8 x 4, 131072 | 64 x 8 x 4, 8192 | 128 x 8 x 8, 4096 | 1 x 8 x 4, 8192 |"
    assert table.startswith(head)


def test_transforms(speed: Any) -> None:
    table = speed.transform_table(make_decode())
    assert line_of(table, ROTATED) == ["+1.50 us, 0.99"] * 4 + ["yes"]
    assert line_of(table, BEST) == [
        "not timed",
        "+3.00 us, 0.99",
        "not timed",
        "not timed",
        "**no**",
    ]
    # One shape is not enough for a yes.
    assert line_of(table, V_ROTATED)[3:] == ["-1.00 us, 1.00", "not timed"]
    assert f"`{G32}`" not in table


def test_appends(speed: Any) -> None:
    table = speed.append_table(make_append())
    assert line_of(table, ROTATED) == ["+0.50 us, 0.86", "yes"]
    assert line_of(table, BEST) == ["not timed", "not timed"]


def test_wide_heads(speed: Any) -> None:
    first = speed.wide_table(make_decode()).splitlines()[2]
    assert first.startswith("| 8 x 8 x 4, 65536 | 10.0 us, 0.50 of C, 4.00x | not timed |")


def test_the_page(speed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = speed.PAGE.read_text()
    assert speed.document(text, None, None) == text
    new = speed.document(text, make_decode(), make_append())
    assert speed.document(new, make_decode(), make_append()) == new
    page, file = tmp_path / "page.md", tmp_path / "recipes.json"
    page.write_text(text)
    module("results").save(file, make_decode())
    for name, value in (("PAGE", page), ("RESULT", file), ("APPEND", tmp_path / "none.json")):
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(module("pages"), "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["recipe_speed.py", "--check"])
    with pytest.raises(SystemExit, match=r"older than the results: run recipe_speed\.py"):
        speed.main()
    monkeypatch.setattr("sys.argv", ["recipe_speed.py"])
    speed.main()
    assert page.read_text() == speed.document(text, make_decode(), None)


def test_the_committed_page_is_of_the_committed_results(
    speed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not speed.RESULT.exists():
        pytest.skip("no results yet")
    monkeypatch.setattr("sys.argv", ["recipe_speed.py", "--check"])
    speed.main()
