# SPDX-License-Identifier: Apache-2.0
"""benchmarks/accuracy_plot.py: which family a recipe's marks are of, and where they lie."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("accuracy_plot")


def row(recipe: str, format: str, text: str, kl: float, keep_last: int = 64) -> dict[str, Any]:
    fixed = {"kind": "text", "model": "tiny", "keep_first": 16, "keep_last": keep_last}
    numbers = {"kl": kl, "bits_per_element": 3.0}
    return {"recipe": recipe, "formats": [format], "text": text} | fixed | numbers


def test_points(plot: Any) -> None:
    v_rotated = "k2v2_c32_v32_p128_d64_vr64_kclip85"
    found = plot.points(
        [
            row("plain", "k2v2_c32_v32_p128_d64", "novel", 0.1),
            row("plain", "k2v2_c32_v32_p128_d64", "code", 0.2),
            row("V rotated", v_rotated, "novel", 0.05),
            row("both", "k2v2_c32_v32_p128_d64_kr64_vr64", "novel", 0.02),
            row("other zones", v_rotated, "novel", 0.01, keep_last=128),
        ]
    )
    assert found["K per channel, as it is"] == [(3.0, 0.2, False)]
    assert found["V rotated"] == [(3.0, 0.05, True)]
    assert found["K, V rotated"] == [(3.0, 0.02, False)]


def test_a_panel_per_model(plot: Any) -> None:
    rows = [row("plain", "k2v2_c32_v32_p128_d64", "novel", 0.1)]
    drawing = plot.divergence(plot.Results({}, rows + [one | {"model": "huge"} for one in rows]))
    assert [panel.get_title() for panel in drawing.axes] == ["tiny", "huge"]
