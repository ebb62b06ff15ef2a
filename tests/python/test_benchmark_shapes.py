# SPDX-License-Identifier: Apache-2.0
"""benchmarks/shapes.csv and suites.py: every shape once, what is measured of it, what it reads."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest

from bitdecoding import KvFormat

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("shapes")


@pytest.fixture
def suites(shapes: Any) -> Any:
    return importlib.import_module("suites")


def test_names(shapes: Any) -> None:
    assert shapes.Case.parse("128x8x4@4096") == shapes.Case(128, 8, 4, 4096)
    assert str(shapes.Case(1, 2, 3, 4)) == "1x2x3@4"
    longest = shapes.Case(1, 2, 3, 40, query_tokens=5, head_dim=64, min_length=4)
    assert str(longest) == "1x2x3@4-40:q5:d64"
    assert shapes.Case.parse(str(longest)) == longest
    assert longest.columns == 15
    for text in ("8x8@4096", "0x8x4@4096", "8x8x4", "8x8x4@9-8", "8x8x4@8:q0", "8x8x4@8:d0"):
        with pytest.raises(ValueError, match=f"case = '{text}'; allowed: "):
            shapes.Case.parse(text)


def test_every_shape_is_there_once(shapes: Any) -> None:
    found = shapes.shapes()
    assert len({shape.case for shape in found}) == len(found)
    for shape in found:
        assert shape.name == str(shape.case) == str(shapes.Case.parse(shape.name))
        assert shape.tags


def test_tags(shapes: Any, suites: Any) -> None:
    """Every tag has a meaning, and every suite its shapes."""
    tags = {tag for shape in shapes.shapes() for tag in shape.tags}
    assert tags == {*suites.SUITES, "ceiling", "host"}
    assert len(shapes.tagged("ceiling")) == len(shapes.tagged("host")) == 1
    with pytest.raises(ValueError, match="tag = 'none'; allowed: ceiling, "):
        shapes.tagged("none")


def test_the_grid_is_the_papers(shapes: Any) -> None:
    grid = shapes.tagged("grid")
    heads = {(case.heads_kv * case.group, case.heads_kv) for case in grid}
    assert heads == {(32, 32), (32, 8), (128, 16), (128, 32), (128, 8)}
    for _, heads_kv in heads:
        single = [case.length for case in grid if case.batch == 1 and case.heads_kv == heads_kv]
        assert {min(single), max(single)} == {1024, 262144}
    batches = {case.length for case in grid if case.batch > 1}
    assert batches == {2048, 4096, 8192, 32768}


def test_ragged_lengths(shapes: Any) -> None:
    ragged, equal = sorted(shapes.tagged("ragged"), key=lambda case: not case.ragged)
    lengths = ragged.lengths()
    assert lengths == ragged.lengths()
    assert len(lengths) == ragged.batch == equal.batch == 32
    assert ragged.min_length <= min(lengths) < max(lengths) <= ragged.length
    assert abs(sum(lengths) / 32 - equal.length) <= 0.5  # the same tokens
    below = sum(n < math.sqrt(ragged.min_length * ragged.length) for n in lengths)
    assert 8 <= below <= 24  # half of a log-uniform batch
    assert equal.lengths() == [equal.length] * 32


def test_suites(shapes: Any, suites: Any) -> None:
    for tag, suite in suites.SUITES.items():
        for case in shapes.tagged(tag):
            for name in suite.formats:
                fmt = KvFormat.parse(name)
                assert str(fmt) == name
                assert fmt.head_dim == case.head_dim
    assert {case.columns for case in shapes.tagged("columns")} == {16, 32, 64}
    assert len(suites.RECIPES) == len(set(suites.RECIPES))


def test_planned(shapes: Any, suites: Any) -> None:
    plans = suites.planned(suites.TARGETS)
    first = plans[shapes.ceiling_case()]
    assert first.baselines
    assert len(first.ours) == len(set(first.ours)) == 4 + 2 + 2  # large, token, cp_async
    longest = plans[shapes.tagged("length")[-1]]
    assert not longest.baselines
    assert [one.format for one in longest.ours] == [suites.INT4, suites.INT2]
    both = suites.planned(["large", "large"])
    assert both == suites.planned(["large"])
    assert not any(plan.baselines for plan in suites.planned(["recipes"]).values())
    grid_only = shapes.Case.parse("1x8x16@1024")
    assert grid_only not in plans
    assert grid_only in suites.planned(["grid"])
