# SPDX-License-Identifier: Apache-2.0
"""benchmarks/plots.py: both layouts of results, what is drawn of them, bytes that repeat."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DECODE = BENCHMARKS / "results/decode_h200.json"
INT4, INT2 = "k4v4_c128_v128_p128_d128", "k2v2_c128_v128_p128_d128"
FLASH, CUDNN = "torch SDPA FlashAttention-2", "torch SDPA cuDNN"


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(BENCHMARKS)
    plots, results = (importlib.import_module(name) for name in ("plots", "results"))
    case = plots.Case.parse("8x8x4@1024")
    monkeypatch.setattr(results, "ceiling_case", lambda: case)  # of the rows below
    return plots


def decode_row(name: str, time_us: float, length: int = 1024, **other: Any) -> dict[str, Any]:
    case = {"batch": 8, "heads_kv": 8, "group": 4, "length": length, "mode": "graph"}
    case |= {"case": f"{other.get('batch', 8)}x8x4@{length}", "query_tokens": 1, "head_dim": 128}
    ours = name in (INT4, INT2)
    zones: dict[str, Any] = {"sinks": 16 if ours else None, "recent": 64 if ours else None}
    zones["selection"] = "plan" if ours else None
    kernel = {"format": name if ours else "float16", "kernel": "decode" if ours else name}
    moved = 8 * 8 * length * 2 * 128 * (0.53 if name == INT4 else 0.28 if name == INT2 else 2)
    rate = {"time_us": time_us, "bytes": round(moved), "tb_per_s": moved / time_us / 1e6}
    return {**case, **zones, **kernel, **rate, **other}


def decode_rows() -> list[dict[str, Any]]:
    rows = [decode_row(FLASH, 12.0), decode_row(CUDNN, 8.0), decode_row("torch sum, read", 9.0)]
    rows += [decode_row(INT4, 4.0), decode_row(INT2, 3.0), decode_row(INT4, 5.0, recent=0)]
    rows += [decode_row(CUDNN, 20.0, 4096), decode_row(INT4, 9.0, 4096)]
    rows += [decode_row(INT4, 6.0, 1024, batch=4), decode_row(INT4, 3.0, mode="plain")]
    return rows


def step_row(part: str, name: str, length: int, batch: int = 1) -> dict[str, Any]:
    time = 5000.0 + length / 100
    step: dict[str, Any] = {"part": part, "batch": batch, "without_attention_us": 4600.0}
    step |= {"ms_per_token": time / 1e3, "tokens_per_s": batch * 1e6 / time}
    return decode_row(name, time, length) | step


def series(axes: Any) -> dict[str, list[tuple[float, ...]]]:
    """What is plotted, by label."""
    return {
        line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()]
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def completed(rows: list[dict[str, Any]]) -> Any:
    """With C, here cuDNN's rate, and the share of it."""
    return importlib.import_module("results").completed(rows)


def test_rows_have_facts(plots: Any, tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    rows: list[dict[str, Any]] = [{"time_us": 1.0}, {"time_us": None}]
    path.write_text(json.dumps({"facts": {"sms": 132}, "rows": rows}))
    assert plots.load_rows(path) == [{"sms": 132} | row for row in rows]


def test_fractions(plots: Any) -> None:
    rows = completed(decode_rows())
    (by_length,) = plots.fraction_by_length(rows).axes
    found = series(by_length)
    assert [x for x, _ in found["K4V4"]] == [1024, 4096]
    assert [x for x, _ in found["K2V2"]] == [1024]
    assert by_length.get_title() == "8 x 8 x 4"
    (by_batch,) = plots.fraction_by_batch(rows).axes
    assert [x for x, _ in series(by_batch)["K4V4"]] == [4, 8]
    ragged = [row | {"case": "8x8x4@1024-4096"} for row in rows]
    assert plots.fraction_by_length(ragged) is None


def test_speed_up(plots: Any) -> None:
    flash, cudnn = plots.speed_up(completed(decode_rows())).axes
    assert (flash.get_title(), cudnn.get_title()) == ("over FlashAttention-2", "over cuDNN")
    assert [y for _, y in series(flash)["K4V4"]] == [3.0]
    assert [y for _, y in series(cudnn)["K4V4"]] == [2.0, pytest.approx(20 / 9)]
    assert [y for _, y in series(cudnn)["K2V2"]] == [pytest.approx(8 / 3)]


def test_roofline(plots: Any) -> None:
    """Points lie below memory's line where the share of C is below 1."""
    rows = completed([row | {"sms": 100} for row in decode_rows()])
    (axes,) = plots.roofline(rows).axes
    found = series(axes)
    best = decode_row(CUDNN, 8.0)["tb_per_s"] * 1e3 / 100  # bytes per ns and SM
    for row in filter(plots.is_ours, rows):
        x, y = plots.codes(row) / row["bytes"], plots.codes(row) / row["time_us"] / 1e3 / 100
        assert any((x, y) == pytest.approx(point) for point in found[plots.label(row["format"])])
        assert y == pytest.approx(best * x * row["fraction_of_ceiling"], rel=1e-3)  # rounded
    assert plots.columns_of(rows[0] | {"query_tokens": 3}) == 16
    assert plots.columns_of(rows[0] | {"query_tokens": 99}) == 396


def test_end_to_end(plots: Any) -> None:
    names = (FLASH, CUDNN, INT4)
    rows = [step_row("latency", name, length) for length in (8192, 32768) for name in names]
    assert plots.end_to_end(rows) is None  # no throughput yet
    rows += [step_row("throughput", name, 32768, 27) for name in names]
    rows += [{"part": "agreement", "difference": 0.1}]
    left, right = plots.end_to_end(rows).axes
    found = series(left)
    assert found["K4V4"] == [(8192, 5.08192), (32768, 5.32768)]
    assert found.keys() == {"FlashAttention-2", "cuDNN", "K4V4", "without attention"}
    assert found["without attention"] == [(8192, 4.6), (32768, 4.6)]
    assert [bar.get_width() for bar in right.patches] == [pytest.approx(27e6 / 5327.68)] * 3


def test_committed_results(plots: Any, tmp_path: Path) -> None:
    """They can be drawn, and drawing them twice gives the same bytes."""
    if not DECODE.exists():
        pytest.skip(f"no {DECODE.name}")
    results = {"decode": DECODE, "end_to_end": tmp_path / "absent.json"}
    first = plots.draw(results, tmp_path / "a")
    second = plots.draw(results, tmp_path / "b")
    names = ["fraction_by_length", "fraction_by_batch", "speed_up", "roofline"]
    assert [path.stem for path in first] == names
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
        assert b"<dc:date>" not in a.read_bytes()


def luminance(colour: str) -> float:
    """Of #rrggbb, as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast(plots: Any) -> None:
    for page in ("#ffffff", "#0d1117"):
        for colour in (plots.INK, *plots.COLOURS.values()):
            low, high = sorted((luminance(page), luminance(colour)))
            assert (high + 0.05) / (low + 0.05) >= 3, (page, colour)
