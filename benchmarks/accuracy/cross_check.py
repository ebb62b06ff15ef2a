# SPDX-License-Identifier: Apache-2.0
"""The packed cache beside fake quantisation of the same recipe: they must agree.

The two share no code, and every layer gives both the same queries, keys and values: those of a
model on a 16-bit cache. What remains between them are sums in another order, and codes at a
rounding tie. From end to end they could not be compared: a code that flips in one layer moves
the keys of all later ones, and flips more there, until KL between the two is up to a fifth of the
recipe's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from accuracy import caches, fake_cache
from accuracy.forcing import schedule
from accuracy.recipes import Recipe
from bitdecoding.cache_layers import LowBitLayer, NewTokens, SixteenBitLayer
from bitdecoding.transformers import ATTENTION

LIMIT = 0.02  # of the recipe's own error: one code in 30000 that is off by a step makes as much


class ComparedLayer(SixteenBitLayer):
    """A 16-bit layer that gives two others what it gets itself."""

    def __init__(self, packed: LowBitLayer, fake: fake_cache.FakeLayer, dense: int) -> None:
        super().__init__()
        self.packed, self.fake, self.dense = packed, fake, dense
        self.between = self.own = 0.0  # squared: packed - fake, fake - 16 bit

    def attend(
        self, module: Any, query: torch.Tensor, new: NewTokens, mask: Any, scale: float
    ) -> torch.Tensor:
        out = super().attend(module, query, new, mask, scale)
        tokens, found = query.shape[2], []
        for layer in (self.packed, self.fake):
            theirs, _ = layer.update(new.keys[:, :, -tokens:], new.values[:, :, -tokens:])
            found.append(layer.attend(module, query, theirs, mask, scale))
        if new.keys.shape[2] > self.dense:  # nothing is packed before
            packed, fake = found
            self.between += float((packed - fake).double().square().sum())
            self.own += float((fake - out).double().square().sum())
        return out

    def difference(self) -> float:
        return (self.between / self.own) ** 0.5


def cross_check_rows(
    model: Any, ids: torch.Tensor, names: Sequence[str], recipe: Recipe
) -> list[dict[str, Any]]:
    """The row of a text, ids (1, S): how far packed and fake are from each other in the layer where
    that is most, as a share of what the recipe loses there. Beyond LIMIT it has "error"."""
    tokens, config = ids.shape[1], model.config
    plan = schedule(tokens, caches.page_tokens(recipe, config), recipe.keep_last)
    packed, fake = (
        caches.make(recipe, config, tokens, plan.keep_last),
        fake_cache.make(recipe, config),
    )
    cache: Cache = caches.make(None, config, tokens)
    for index, pair in enumerate(zip(packed.layers, fake.layers, strict=True)):
        if isinstance(pair[0], LowBitLayer):
            cache.layers[index] = ComparedLayer(*pair, plan.dense)
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        for block in ids.split(list(plan.blocks), dim=1):
            model.base_model(block, past_key_values=cache, use_cache=True)
    compared = [layer for layer in cache.layers if isinstance(layer, ComparedLayer)]
    worst = max(layer.difference() for layer in compared)
    row = {
        "kind": "cross-check", "text": names[0], "context": tokens, "recipe": recipe.name,
        "difference": float(f"{worst:.4g}"), "limit": LIMIT, "layers": len(compared),
    }  # fmt: skip
    if not worst <= LIMIT:
        row["error"] = f"difference = {row['difference']}; allowed: at most {LIMIT}"
    return [row]
