# SPDX-License-Identifier: Apache-2.0
"""benchmarks/targets.py: limits by hand, and a table that hides nothing."""

from __future__ import annotations

from typing import Any

import pytest
from test_benchmark_results import CUDNN, FACTS, INT4, benchmarks, module, our_row, result_row

__all__ = ["benchmarks"]  # a fixture
FIRST = "8x8x4@131072"
# 2 TB/s: then 10**6 bytes take 0.5 us.
CEILING = {"time_us": 0.5}


def run_of(*rows: dict[str, Any], **facts: Any) -> Any:
    results = module("results")
    ceiling = result_row(CUDNN, 0.5, FIRST)
    done = results.completed([ceiling, *rows])
    return module("targets").Run(results.Results(FACTS | facts, done))


def line_of(lines: list[Any], what: str, case: str) -> Any:
    (found,) = [line for line in lines if (line.what, line.case) == (what, case)]
    return found


def lines_of(run: Any) -> list[Any]:
    targets = module("targets")
    return [line for target in targets.DECODE_TARGETS for line in target.lines(run)]


def test_shares_of_the_ceiling() -> None:
    rows = [our_row(5.9, FIRST, bytes=19 * 10**5), our_row(7.0, FIRST, selection="decode_sm80_*")]
    rows.append(our_row(6.1, "1x32x1@131072", bytes=19 * 10**5))
    rows.append(our_row(1.0, "8x32x1@32768", sinks=0))
    lines = lines_of(run_of(*rows))
    met = line_of(lines, "int4", FIRST)
    assert met.limit == pytest.approx(1.9 / 2 / 0.95 + 5)
    assert (met.measured, met.verdict) == (5.9, "met")
    assert line_of(lines, "int4", "1x32x1@131072").verdict == "missed"
    absent = line_of(lines, "int4", "8x32x1@32768")  # other zones
    assert (absent.measured, absent.ratio, absent.verdict) == (None, None, "not measured")
    older = line_of(lines, "int4, cp.async kernels", FIRST)
    assert older.limit == pytest.approx(0.5 / 0.80)


def test_shares_of_sixteen_bits() -> None:
    case = "1x8x4@32768"
    rows = [result_row(CUDNN, 10.0, case), our_row(3.2, case), our_row(4.0, "1x8x4@8192")]
    lines = lines_of(run_of(*rows))
    assert line_of(lines, "int4", case).limit == pytest.approx(3.2)
    assert line_of(lines, "int4", case).verdict == "met"
    assert line_of(lines, "int4", "1x8x4@8192").verdict == "no limit"


def test_the_larger_floor() -> None:
    targets, shapes = module("targets"), module("shapes")
    case = shapes.Case.parse("8x8x8@32768:q8")
    codes = 2 * 8 * 8 * 32768 * 128
    tensor = targets.tensor_us(case, 132)
    assert tensor == pytest.approx(codes / (58 * 132) / 1e3)
    limits = []
    for ratio in (0.1, 0.8, 1.4, 3.0):  # of the floors: bytes over tensor
        row = our_row(1.0, str(case), bytes=round(ratio * tensor * 2e6))
        limits.append(targets.larger_floor(run_of(sms=132), row) / tensor)
    assert limits == pytest.approx([1 / 0.85, 1 / 0.70, 1.4 / 0.70, 3 / 0.85], rel=1e-5)
    assert targets.larger_floor(run_of(), our_row(1.0, str(case))) is None


def test_length_ragged_host() -> None:
    targets, shapes = module("targets"), module("shapes")
    lengths = shapes.tagged("length")
    rows = [
        our_row(case.length * (1.2 if case == lengths[0] else 1.0), str(case)) for case in lengths
    ]
    int4, int2 = targets.length_lines(run_of(*rows))
    assert int4.measured == pytest.approx(1.2)
    assert (int4.verdict, int2.verdict) == ("missed", "not measured")
    assert targets.length_lines(run_of(*rows[1:]))[0].verdict == "not measured"

    ragged, equal = sorted(shapes.tagged("ragged"), key=lambda case: not case.ragged)
    rows = [our_row(2.1, str(ragged), bytes=20), our_row(1.0, str(equal), bytes=10)]
    int4, int2 = targets.ragged_lines(run_of(*rows))
    assert int4.measured == pytest.approx(1.05)
    assert (int4.verdict, int2.verdict) == ("met", "not measured")

    call = {"call": targets.METHOD, "mode": "host"}
    method, operator = targets.host_lines(run_of(our_row(9.0, "1x8x4@8192", **call)))
    assert (method.verdict, operator.verdict) == ("met", "not measured")


def test_pack_and_append() -> None:
    targets = module("targets")
    row = {"format": INT4, "kernel": "pack_pages", "batch": 8, "length": 131072, "heads_kv": 8}
    pack = run_of(row | {"time_us": 0.7, "bytes": 10**6})
    int4, int2 = targets.pack_lines(pack)
    assert int4.limit == pytest.approx(0.5 / 0.75)
    assert (int4.verdict, int2.verdict) == ("missed", "not measured")

    row = {"format": INT4, "kernel": "append", "batch": 64, "heads_kv": 8, "bytes": 3 * 10**6}
    rows = [row | {"mode": "graph", "step": step, "time_us": 5.0} for step in ("plain", "page")]
    plain, page, *_ = targets.append_lines(run_of(*rows))
    assert (plain.limit, plain.verdict) == (4.0, "missed")
    assert (page.limit, page.verdict) == (pytest.approx(4 + 1.5 / 0.75), "met")


def test_table() -> None:
    table, targets = module("target_table"), module("targets")
    line = targets.Line("a", "b", "at most", 12.34, 10.0)
    lines = [line, targets.Line("c", "d", "e", 1.055, 1.10, "x"), targets.Line("f", "g", "h")]
    assert table.table(lines).splitlines()[2:] == [
        "| a | b | at most | 12.3 us | 10.0 us | 1.23 | missed |",
        "| c | d | e | 1.05 | 1.10 | 0.96 | met |",
        "| f | g | h |  |  |  | not measured |",
    ]
    assert table.counted(lines) == "1 met, 1 missed, 1 not measured"
    empty = targets.Run(module("results").Results({}, []))
    text = table.section(dict.fromkeys(targets.FILES, empty))
    assert text.startswith("66 not measured.\n\n| what |")


def test_every_decode_target_is_measured() -> None:
    """What the targets ask for is what decode.py measures by default."""
    targets, shapes, suites = module("targets"), module("shapes"), module("suites")
    plans = suites.planned(suites.TARGETS)
    for target in targets.DECODE_TARGETS:
        wanted = suites.Measurement(target.format, suites.SUITES[target.suite].kernel)
        for case in shapes.tagged(target.suite):
            assert wanted in plans[case].ours
