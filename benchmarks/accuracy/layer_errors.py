# SPDX-License-Identifier: Apache-2.0
"""The error of the attention output, layer by layer, free of what earlier layers did.

The model runs on a 16-bit cache. Each of its full-attention layers also hands queries, keys and
values to the same layer of every recipe's cache, which packs them and attends as in decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from accuracy import caches
from accuracy.forcing import forced, schedule
from accuracy.recipes import Recipe
from bitdecoding.cache_layers import LowBitLayer, SixteenBitLayer
from bitdecoding.calibration import ProbedLayer
from bitdecoding.transformers import ATTENTION, LowBitCache


def relative_errors(
    model: Any, ids: torch.Tensor, recipes: Sequence[Recipe]
) -> dict[str, list[float | None]]:
    """By recipe: an error per layer of the model, None where it stays 16-bit. ids (B, S). The
    recipes' blocks must begin at the same tokens (text_rows.groups)."""
    config, tokens = model.config, ids.shape[1]
    plan = schedule(tokens, caches.page_tokens(recipes[0], config), recipes[0].keep_last)
    probes = [caches.make(recipe, config, tokens, plan.keep_last) for recipe in recipes]
    reference: LowBitCache = caches.make(None, config, tokens)
    for index, layer in enumerate(reference.layers):
        others = [cache.layers[index] for cache in probes]
        if type(layer) is SixteenBitLayer:
            packed = [other for other in others if isinstance(other, LowBitLayer)]
            reference.layers[index] = ProbedLayer(packed, plan.dense)
    model.set_attn_implementation(ATTENTION)
    for _ in forced(model, reference, ids, plan.blocks):
        pass
    errors: dict[str, list[float | None]] = {recipe.name: [] for recipe in recipes}
    for index, layer in enumerate(reference.layers):
        found = iter(layer.relative() if isinstance(layer, ProbedLayer) else ())
        for recipe, cache in zip(recipes, probes, strict=True):
            packs = isinstance(cache.layers[index], LowBitLayer)
            errors[recipe.name].append(round(next(found), 6) if packs else None)
    return errors
