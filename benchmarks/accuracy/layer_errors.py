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
from bitdecoding.cache_layers import LowBitLayer, NewTokens, SixteenBitLayer
from bitdecoding.transformers import ATTENTION, LowBitCache


class ProbedLayer(SixteenBitLayer):
    """A 16-bit layer that compares what others make of the same step."""

    def __init__(self, probes: Sequence[LowBitLayer], dense: int) -> None:
        super().__init__()
        self.probes, self.dense = probes, dense  # tokens before anything is packed
        self.error = torch.zeros(len(probes), dtype=torch.float64)  # summed squares
        self.signal = torch.zeros((), dtype=torch.float64)

    def attend(
        self, module: Any, query: torch.Tensor, new: NewTokens, mask: Any, scale: float
    ) -> torch.Tensor:
        out = super().attend(module, query, new, mask, scale)
        tokens = query.shape[2]
        counted = new.keys.shape[2] > self.dense
        keys, values = new.keys[:, :, -tokens:], new.values[:, :, -tokens:]
        for index, probe in enumerate(self.probes):
            theirs, _ = probe.update(keys, values)
            found = probe.attend(module, query, theirs, mask, scale)
            if counted:
                self.error[index] += (found - out).double().square().sum().cpu()
        if counted:
            self.signal += out.double().square().sum().cpu()
        return out

    def relative(self) -> list[float]:
        """Of every probe: the error's norm over that of the output."""
        return [float(x) for x in (self.error / self.signal).sqrt()]


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
