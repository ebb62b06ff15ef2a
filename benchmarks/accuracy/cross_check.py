# SPDX-License-Identifier: Apache-2.0
"""The packed cache against fake quantisation of the same recipe: they must agree.

The two share no code. What remains between them are float32 sums in another order, and codes that
flip at a rounding tie because of them; over many layers that is a few thousandths of what the
recipe itself changes. LIMIT is the bound: KL between the two, as a share of KL to 16 bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from accuracy import caches, fake_cache
from accuracy.agreement import Agreement
from accuracy.forcing import forced, schedule
from accuracy.recipes import Recipe
from bitdecoding.transformers import ATTENTION

LIMIT = 0.05
FLOOR = 1e-5  # nats: what two orders of summation do to a model in float32


def cross_check_rows(
    model: Any, ids: torch.Tensor, names: Sequence[str], recipe: Recipe
) -> list[dict[str, Any]]:
    """A row per text; one beyond the bound has "error". ids (texts, S)."""
    model.set_attn_implementation(ATTENTION)
    tokens, config = ids.shape[1], model.config
    plan = schedule(tokens, caches.page_tokens(recipe, config), recipe.keep_last)
    packed = caches.make(recipe, config, tokens, plan.keep_last)
    logits = torch.cat(list(forced(model, packed, ids, plan.blocks)), dim=1)
    (fake,) = forced(model, fake_cache.make(recipe, config), ids, (tokens,))
    (reference,) = forced(model, caches.make(None, config, tokens), ids, (tokens,))
    between, to_16bit = Agreement(), Agreement()
    counted = slice(plan.dense, tokens - 1)
    targets = ids[:, 1:][:, counted]
    between.add(logits[:, counted].log_softmax(-1), fake[:, counted], targets)
    to_16bit.add(reference[:, counted].log_softmax(-1), logits[:, counted], targets)
    rows = []
    for name, near, far in zip(names, between.rows(), to_16bit.rows(), strict=True):
        row = {
            "kind": "cross-check", "text": name, "context": tokens, "recipe": recipe.name,
            "kl_to_fake": near["kl"], "kl": far["kl"], "limit": LIMIT,
            "perplexity": far["perplexity"], "perplexity_fake": near["perplexity"],
        }  # fmt: skip
        if not near["kl"] <= LIMIT * far["kl"] + FLOOR:
            row["error"] = f"kl_to_fake = {near['kl']}; allowed: {LIMIT} * {far['kl']} + {FLOOR}"
        rows.append(row)
    return rows
