# SPDX-License-Identifier: Apache-2.0
"""Caches of recipes, and what they take of memory."""

from __future__ import annotations

from typing import Any

from accuracy.recipes import Recipe
from bitdecoding import KvFormat, transformers
from bitdecoding.cache_layers import LowBitLayer, WindowLayer
from bitdecoding.transformers import LowBitCache


def layer_kinds(config: Any) -> list[str]:
    return transformers.layer_kinds(config.get_text_config(decoder=True))


def head_dim(config: Any) -> int:
    return transformers.head_dim_of(config.get_text_config(decoder=True))


def formats_of(recipe: Recipe, config: Any) -> list[KvFormat | None]:
    return recipe.formats(layer_kinds(config), head_dim(config))


def make(
    recipe: Recipe | None, config: Any, tokens: int, keep_last: int | None = None
) -> LowBitCache:
    """A cache for so many tokens; None: 16-bit. keep_last: where it isn't the recipe's own."""
    if recipe is None:
        return LowBitCache(config, "16-bit")
    if recipe.centred and recipe.k_means is None:
        raise ValueError(f"{recipe.name}: k_means = None; a centred recipe wants its model's")
    return LowBitCache(
        config,
        formats_of(recipe, config),
        max_tokens=tokens,
        keep_first=recipe.keep_first,
        keep_last=recipe.keep_last if keep_last is None else keep_last,
        k_means=recipe.k_means,
    )


def page_tokens(recipe: Recipe, config: Any) -> int:
    return int(recipe.format(head_dim(config)).page_tokens)


def sizes(cache: LowBitCache, tokens: int) -> dict[str, float]:
    """Of a filled cache's full-attention layers: bits_per_element of the packed formats, scales
    and all, and what is allocated in all for so many tokens a row, with the 16-bit zones."""
    full = [layer for layer in cache.layers if not isinstance(layer, WindowLayer)]
    rows, nbytes, elements, bits = 1, 0, 0, 0.0
    for layer in full:
        if isinstance(layer, LowBitLayer):
            assert layer.cache is not None
            heads, dim = int(layer.cache.pool.shape[1]), layer.format.head_dim
            rows, bits = layer.batch_size, bits + layer.format.bits_per_element
        else:
            rows, heads, _, dim = layer.keys.shape
            bits += 16
        nbytes += layer.nbytes
        elements += 2 * heads * dim
    return {
        "bits_per_element": round(bits / len(full), 3),
        "bytes_per_token": round(nbytes / rows / tokens, 1),
        "bits_with_zones": round(8 * nbytes / rows / tokens / elements, 3),
    }
