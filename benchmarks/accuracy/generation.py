# SPDX-License-Identifier: Apache-2.0
"""Long free generation: where a packed cache's greedy text leaves the 16-bit one's, and how much
either repeats itself."""

from __future__ import annotations

from typing import Any

import torch

from accuracy import caches
from accuracy.recipes import Recipe
from bitdecoding.transformers import ATTENTION

GRAM = 4  # tokens of what counts as a repetition


def greedy(model: Any, ids: torch.Tensor, recipe: Recipe | None, new: int) -> torch.Tensor:
    """ids (B, S) -> the ``new`` most likely tokens that follow, (B, new) on the CPU."""
    model.set_attn_implementation(ATTENTION)
    cache = caches.make(recipe, model.config, ids.shape[1] + new)
    found, step = [], ids
    for _ in range(new):
        with torch.no_grad():
            options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            step = model(step, **options).logits[:, -1].argmax(-1, keepdim=True)
        found.append(step)
    cache.check()
    return torch.cat(found, 1).cpu()


def divergence(reference: torch.Tensor, found: torch.Tensor) -> list[int]:
    """Per row: how many tokens are the same before the first that differs."""
    same = (reference == found).long().cumprod(1)
    return [int(x) for x in same.sum(1)]


def repetition(tokens: torch.Tensor) -> list[float]:
    """Per row: the share of runs of GRAM tokens that were there before."""
    rates = []
    for row in tokens.tolist():
        grams = [tuple(row[i : i + GRAM]) for i in range(len(row) - GRAM + 1)]
        rates.append(round(1 - len(set(grams)) / max(1, len(grams)), 4))
    return rates
