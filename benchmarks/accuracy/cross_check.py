# SPDX-License-Identifier: Apache-2.0
"""The packed cache beside fake quantisation of the same recipe: they must agree.

The two share no code, and every layer gives both the same queries, keys and values: those of a
model on a 16-bit cache. After a prompt, STEPS tokens follow one by one, so that all of them are
read from the cache. What remains between the two are sums in another order, and codes at a rounding
tie. From end to end they could not be compared: a code that flips in one layer moves the keys of
all later ones, and flips more there, until KL between the two is up to a fifth of the recipe's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from accuracy import caches, fake_cache
from accuracy.recipes import Recipe
from bitdecoding.cache_layers import LowBitLayer
from bitdecoding.calibration import ProbedLayer
from bitdecoding.transformers import ATTENTION

STEPS = 32
LIMIT = 0.02  # of the recipe's own error: one code in 30000 that is off by a step makes as much


class ComparedLayer(ProbedLayer):
    """A 16-bit layer that compares a packed one and a fake one with each other."""

    def __init__(self, packed: LowBitLayer, fake: fake_cache.FakeLayer, dense: int) -> None:
        super().__init__([packed, fake], dense)

    def compare(self, out: torch.Tensor, found: Sequence[torch.Tensor]) -> None:
        packed, fake = found
        self.error += (packed - fake).double().square().sum()
        self.signal += (fake - out).double().square().sum()

    def difference(self) -> float:
        """The norm of packed - fake over that of fake - 16 bit."""
        return self.relative()[0]


def cross_check_rows(
    model: Any, ids: torch.Tensor, names: Sequence[str], recipe: Recipe
) -> list[dict[str, Any]]:
    """The row of a text, ids (1, S): how far packed and fake are from each other in the layer where
    that is most, as a share of what the recipe loses there. Beyond LIMIT it has "error"."""
    tokens, config = ids.shape[1], model.config
    least = recipe.keep_last + caches.page_tokens(recipe, config) + STEPS
    if tokens < least:
        raise ValueError(f"tokens = {tokens}; allowed: {least} or more, so that some are packed")
    prompt = tokens - STEPS
    packed = caches.make(recipe, config, tokens)
    fake = fake_cache.make(recipe, config)
    cache: Cache = caches.make(None, config, tokens)
    for index, pair in enumerate(zip(packed.layers, fake.layers, strict=True)):
        if isinstance(pair[0], LowBitLayer):
            cache.layers[index] = ComparedLayer(*pair, prompt)
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        for block in ids.split([prompt] + STEPS * [1], dim=1):
            model.base_model(block, past_key_values=cache, use_cache=True)
    compared = [layer for layer in cache.layers if isinstance(layer, ComparedLayer)]
    worst = float(torch.tensor([layer.difference() for layer in compared]).max())  # keeps NaN
    row = {
        "kind": "cross-check", "text": names[0], "context": tokens, "recipe": recipe.name,
        "difference": float(f"{worst:.4g}"), "limit": LIMIT, "layers": len(compared),
    }  # fmt: skip
    if not worst <= LIMIT:
        row["error"] = f"difference = {row['difference']}; allowed: at most {LIMIT}"
    return [row]
