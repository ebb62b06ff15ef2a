# SPDX-License-Identifier: Apache-2.0
"""The search for bits per layer, and the distributions of K and V, on tiny random models."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for needed in ("transformers", "rich", "gguf", "matplotlib"):
    pytest.importorskip(needed)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from accuracy import bit_search, distributions  # type: ignore[import-not-found] # noqa: E402
from accuracy.recipes import KIVI2, KIVI2_V_ROTATED  # type: ignore[import-not-found] # noqa: E402
from results import Results  # type: ignore[import-not-found] # noqa: E402
from test_transformers_layers import make_gemma  # noqa: E402
from tiny_models import make_model, tokens  # noqa: E402

from bitdecoding import KvFormat  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FORMAT = KvFormat()


def choices(rng: np.random.Generator) -> list[Any]:
    found = [bit_search.Choice(FORMAT, bits, 0) for bits in (3.0, 3.5, 4.0, 5.0)]
    errors = np.sort(rng.random(4))[::-1]
    return [bit_search.Choice(FORMAT, c.bits, e) for c, e in zip(found, errors, strict=True)]


@pytest.mark.parametrize("bits", [3.0, 3.4, 4.1, 5.0, 9.0])
def test_assignment_against_all_assignments(rng: np.random.Generator, bits: float) -> None:
    layers = [choices(rng) for _ in range(5)]
    found = bit_search.assign(layers, bits)
    assert np.mean([choice.bits for choice in found]) <= bits + 1e-9
    error = sum(choice.error for choice in found)
    allowed = [
        sum(choice.error for choice in picked)
        for picked in itertools.product(*layers)
        if np.mean([choice.bits for choice in picked]) <= bits + 1e-9
    ]
    largest_step = max(layer[0].error - layer[-1].error for layer in layers)
    assert min(allowed) <= error + 1e-12
    assert error <= min(allowed) + largest_step  # the last step may not have fitted
    if bits == 5.0:
        assert error == pytest.approx(min(allowed))


def test_too_few_bits(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match=r"bits = 2.5; allowed: at least 3.000"):
        bit_search.assign([choices(rng)], 2.5)


def test_hull_leaves_out_what_mixtures_beat() -> None:
    points = [(3.0, 1.0), (3.5, 0.9), (4.0, 0.2), (5.0, 0.3), (6.0, 0.1)]
    found = bit_search.convex([bit_search.Choice(FORMAT, b, e) for b, e in points])
    assert [(c.bits, c.error) for c in found] == [(3.0, 1.0), (4.0, 0.2), (6.0, 0.1)]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_search(family: str) -> None:
    model = make_gemma() if family == "gemma" else make_model()
    texts = {name: tokens(1, 330, seed=i)[0] for i, name in enumerate(("one", "two"))}
    rows = bit_search.search(model, tokens(1, 330, seed=9)[0], texts, KIVI2, [4.01])
    searched = [row for row in rows if row["recipe"].startswith("searched")]
    assert len(searched) == 2
    assert all(row["bits_per_element"] <= 4.01 for row in searched)
    named = [layer for layer in searched[0]["layers"] if layer is not None]
    assert len(named) == (1 if family == "gemma" else 2)
    kl = {row["recipe"]: row["kl"] for row in rows if row["text"] == "one"}
    assert kl["K4 V4"] < kl[searched[0]["recipe"]] < kl["K2 V2"]


def test_variants_clip_two_bits_alone() -> None:
    base = KIVI2_V_ROTATED
    for recipe in bit_search.variants(base, 64):
        clips = [recipe.fields.get(f"{part}_clip", 100) for part in ("k", "v")]
        bits = [recipe.fields[f"{part}_bits"] for part in ("k", "v")]
        assert [clip < 100 for clip in clips] == [count == 2 for count in bits]
    assert {r.name for r in bit_search.variants(KIVI2, 64)} >= {"K2 V2", "K4 V2", "K2 V4", "K4 V4"}


def test_distributions(tmp_path: Path) -> None:
    gemma = make_gemma()
    rows = distributions.layer_rows(gemma, tokens(2, 300))
    assert [row["layer"] for row in rows] == [1]
    assert 0 < rows[0]["v"]["norm_p1"] < 1 < rows[0]["v"]["norm_p99"]
    distributions.draw(Results({}, [{"model": "tiny"} | row for row in rows]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"distributions_{name}.svg" for name in ("channels", "norms", "errors")
    }


def test_an_outlier_channel_is_seen_and_rotation_spreads_it() -> None:
    x = torch.randn(1, 2, 256, 64, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 20
    assert 15 < distributions.described(x)["largest_channel"] < 25
    errors = {
        name: distributions.error(x, scheme) for name, scheme in distributions.K_SCHEMES.items()
    }
    assert errors["per token, rotated"] < errors["per token, 32 channels"]
    assert errors["per channel, 32 tokens"] < errors["per token, 32 channels"]


def test_a_score_error_is_that_of_scores() -> None:
    k = torch.randn(1, 2, 256, 64, generator=torch.Generator().manual_seed(0)).half().float()
    scheme = distributions.K_SCHEMES["the same, rotated"]
    ones = torch.ones(1, 2, 3, 64)
    found = distributions.score_error(k, ones, scheme)
    assert found == pytest.approx(2 * distributions.score_error(k, ones / 2, scheme), rel=1e-3)
    # sums of 64 channels' errors, each about a third of a deviation at two bits
    assert 0.2 * 8 < found < 0.5 * 8
