# SPDX-License-Identifier: Apache-2.0
"""Perplexity, KL and agreement of caches on texts: a 16-bit one and others read in lock step.

All texts are one batch; every block's logits are compared on the device where they arise. Positions
of the first block count for nothing: no cache has packed anything yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from accuracy import caches
from accuracy.agreement import Agreement
from accuracy.forcing import forced, schedule
from accuracy.recipes import Recipe
from bitdecoding.transformers import ATTENTION

Row = dict[str, Any]
Tick = Callable[[], None]


@dataclass(frozen=True)
class Contender:
    """An empty cache, and what a row says of it once it is full."""

    cache: Cache
    facts: Callable[[], Row]


def recipe_groups(recipes: Sequence[Recipe], config: Any, most: int = 8) -> list[list[Recipe]]:
    """Recipes whose blocks begin at the same tokens, at most so many together."""
    found: dict[tuple[int, int], list[Recipe]] = {}
    for recipe in recipes:
        key = (caches.page_tokens(recipe, config), recipe.keep_last)
        found.setdefault(key, []).append(recipe)
    return [group[i : i + most] for group in found.values() for i in range(0, len(group), most)]


def recipe_rows(
    model: Any, ids: torch.Tensor, names: Sequence[str], recipes: Sequence[Recipe], tick: Tick
) -> list[Row]:
    """A row per recipe and text; ids (texts, S). The recipes are one of `recipe_groups`."""
    tokens, config = ids.shape[1], model.config
    plan = schedule(tokens, caches.page_tokens(recipes[0], config), recipes[0].keep_last)
    contenders = []
    for recipe in recipes:
        cache = caches.make(recipe, config, tokens, plan.keep_last)
        facts = lambda r=recipe, c=cache: recipe_facts(r, c, tokens)  # noqa: E731
        contenders.append(Contender(cache, facts))
    rows = text_rows(model, ids, names, contenders, plan.blocks, tick)
    for contender in contenders:
        contender.cache.check()
    return rows


def text_rows(
    model: Any,
    ids: torch.Tensor,
    names: Sequence[str],
    contenders: Sequence[Contender],
    blocks: tuple[int, ...],
    tick: Tick,
) -> list[Row]:
    """A row per contender and text."""
    tokens, start = ids.shape[1], 0
    model.set_attn_implementation(ATTENTION)
    reference_run = forced(model, caches.make(None, model.config, tokens), ids, blocks)
    runs = [forced(model, contender.cache, ids, blocks) for contender in contenders]
    found = [Agreement() for _ in contenders]
    for index, size in enumerate(blocks):
        counted = min(size, tokens - 1 - start)  # nothing follows the last token
        reference = next(reference_run)[:, :counted].log_softmax(-1)  # once for all contenders
        targets = ids[:, start + 1 : start + 1 + counted]
        for run, agreement in zip(runs, found, strict=True):
            logits = next(run)[:, :counted]
            if index > 0 and counted > 0:
                agreement.add(reference, logits, targets)
        start += size
        tick()
    return [
        {"kind": "text", "text": name, "context": tokens} | contender.facts() | numbers
        for contender, agreement in zip(contenders, found, strict=True)
        for name, numbers in zip(names, agreement.rows(), strict=True)
    ]


def recipe_facts(recipe: Recipe, cache: Any, tokens: int) -> Row:
    return {
        "recipe": recipe.name,
        "formats": sorted({str(f) for f in cache.formats if f is not None}),
        "keep_first": recipe.keep_first,
        "keep_last": recipe.keep_last,
        **caches.sizes(cache, tokens),
    }
