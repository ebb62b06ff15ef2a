# SPDX-License-Identifier: Apache-2.0
"""The accuracy bench's blocks see what one token after another sees, and its fake quantisation
agrees with the packed cache, on tiny random models."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("rich")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from accuracy import caches, cross_check, fake_cache, forcing  # type: ignore[import-not-found] # noqa: E402
from accuracy.agreement import Agreement  # type: ignore[import-not-found] # noqa: E402
from accuracy.fake import hadamard  # type: ignore[import-not-found] # noqa: E402
from accuracy.recipes import KIVI2, RECIPES, kivi, token, with_zones  # type: ignore[import-not-found] # noqa: E402
from test_transformers_layers import make_gemma  # noqa: E402
from tiny_models import make_model, tokens  # noqa: E402

from bitdecoding.calibration import key_means  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOKENS = 420


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.mark.parametrize("page_tokens", [64, 128])
@pytest.mark.parametrize("keep_last", [0, 1, 64, 130])
@pytest.mark.parametrize("count", [1, 63, 64, 500])
def test_schedule(page_tokens: int, keep_last: int, count: int) -> None:
    """When a block's tokens attend, as many are packed as after each of them by itself."""
    plan = forcing.schedule(count, page_tokens, keep_last)
    assert sum(plan.blocks) == count
    start = 0
    for size in plan.blocks:
        if size == 1 and keep_last == 0 and start > 0:  # it is appended first
            seen = page_tokens * ((start + 1) // page_tokens)
        else:
            seen = page_tokens * (max(0, start - plan.keep_last) // page_tokens)
        for i in range(start, start + size):
            assert seen == page_tokens * (max(0, i + 1 - keep_last) // page_tokens)
        start += size


def divergence(a: Any, b: Any, ids: Any, first: int) -> float:
    """Mean KL(a || b) from position ``first`` on."""
    found = Agreement()
    found.add(a[:, first:].log_softmax(-1), b[:, first:], ids[:, first:])
    return max(float(row["kl"]) for row in found.rows())


@pytest.mark.parametrize("zones", [(16, 64), (0, 0), (4, 130)])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_blocks_equal_one_by_one(model: Any, family: str, zones: tuple[int, int]) -> None:
    if family == "gemma":
        model = make_gemma()
    recipe, ids = with_zones(KIVI2, *zones), tokens(2, TOKENS)
    plan = forcing.schedule(TOKENS, 128, recipe.keep_last)

    def logits(cache: Any, blocks: Any) -> Any:
        return torch.cat(list(forcing.forced(model, cache, ids, blocks)), 1)

    alone = logits(caches.make(recipe, model.config, TOKENS), (1,) * TOKENS)
    in_blocks = logits(caches.make(recipe, model.config, TOKENS, plan.keep_last), plan.blocks)
    shifted = logits(  # a cache that packs a token later
        caches.make(recipe, model.config, TOKENS, plan.keep_last + 1), plan.blocks
    )
    sixteen = logits(caches.make(None, model.config, TOKENS), plan.blocks)
    lost = divergence(sixteen, alone, ids, plan.dense)
    assert divergence(alone, in_blocks, ids, plan.dense) < 2e-3 * lost
    assert divergence(alone, shifted, ids, plan.dense) > 2e-2 * lost


@pytest.mark.parametrize(
    "recipe",
    [
        kivi("kivi-4", (4, 4), (128, 64)),
        kivi("k2v4, norms", (2, 4), (32, 32), token_norm=True),
        kivi("pages of 64", (4, 2), (64, 32), page_tokens=64),
        token("token-2", (2, 2), 32),
        kivi("edges", (2, 2), (32, 32), edges=1),
        with_zones(KIVI2, 0, 0),
    ],
    ids=lambda recipe: recipe.name,
)
def test_fake_quantisation_agrees(model: Any, recipe: Any) -> None:
    if recipe.edges:
        config = model.config
        assert caches.formats_of(recipe, config) == [None] * config.num_hidden_layers
        return
    (row,) = cross_check.cross_check_rows(model, tokens(1, TOKENS), ["text"], recipe)
    assert "error" not in row
    assert row["difference"] < 2e-4


def test_fake_quantisation_agrees_on_means(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, recipe = tokens(1, TOKENS), RECIPES["hadamard-4, centred"]
    means = [None if mean is None else 50 * mean for mean in key_means(model, ids)]
    with_means = replace(recipe, k_means=means)
    (row,) = cross_check.cross_check_rows(model, ids, ["text"], with_means)
    assert "error" not in row
    make = fake_cache.make
    without = replace(recipe, k_means=None)
    monkeypatch.setattr(fake_cache, "make", lambda recipe, config: make(without, config))
    (row,) = cross_check.cross_check_rows(model, ids, ["text"], with_means)
    assert "allowed" in row["error"]


def test_a_fake_of_another_recipe_does_not_agree(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = fake_cache.make
    other = with_zones(KIVI2, 0, 0)
    monkeypatch.setattr(fake_cache, "make", lambda recipe, config: make(other, config))
    (row,) = cross_check.cross_check_rows(model, tokens(1, TOKENS), ["text"], KIVI2)
    assert "allowed" in row["error"]


def test_a_nan_does_not_agree(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever layer has it."""
    differences = iter([0.0, float("nan")])
    found = lambda layer: next(differences)  # noqa: E731
    monkeypatch.setattr(cross_check.ComparedLayer, "difference", found)
    (row,) = cross_check.cross_check_rows(model, tokens(1, TOKENS), ["text"], KIVI2)
    assert row["error"] == "difference = nan; allowed: at most 0.02"


def test_a_cross_check_needs_packed_tokens(model: Any) -> None:
    with pytest.raises(ValueError, match="tokens = 223; allowed: 224 or more"):
        cross_check.cross_check_rows(model, tokens(1, 223), ["text"], KIVI2)


@pytest.mark.parametrize("block", [16, 64])
def test_hadamard(block: int) -> None:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    y = hadamard(x, block)
    assert torch.allclose(hadamard(y, block), x, atol=1e-5)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1))
    matrix = hadamard(torch.eye(128), block)
    assert torch.equal(matrix[:block, :block].abs(), torch.full((block, block), block**-0.5))
    assert not matrix[:block, block:].any()
