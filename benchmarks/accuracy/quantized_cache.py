# SPDX-License-Identifier: Apache-2.0
"""The baseline: transformers' own QuantizedCache with optimum-quanto, where that is installed.

It quantises everything it holds whenever 128 new tokens have come, K and V in groups of 64 along
their first axis, and what was quantised before is quantised again with them.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers.cache_utils import Cache, QuantoQuantizedLayer

from accuracy import caches
from accuracy.text_rows import Contender, Row
from bitdecoding.cache_layers import NewTokens, SixteenBitLayer, WindowLayer

GROUP, RESIDUAL = 64, 128
BITS = (4, 2)


def why_not() -> str | None:
    """Why this baseline is left out; None: it isn't."""
    missing = find_spec("optimum") is None or find_spec("optimum.quanto") is None
    return "optimum-quanto is not installed" if missing else None


class QuantoLayer(QuantoQuantizedLayer):
    """It under the attention implementation of LowBitCache."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[NewTokens, NewTokens]:
        new = NewTokens(self, *super().update(key_states, value_states, *args, **kwargs))
        return new, new

    attend = SixteenBitLayer.attend


def blocks(tokens: int) -> tuple[int, ...]:
    """What one token after another would see: the 128th new token is the last one that sees the
    127 before it in 16 bit, and what comes after it finds them quantised."""
    found = [min(tokens, RESIDUAL)]
    while (left := tokens - sum(found)) > 0:
        found.append(min(left, RESIDUAL - 1 if len(found) % 2 else 1))
    return tuple(found)


def contender(bits: int, config: Any, tokens: int) -> Contender:
    layers: list[Any] = [
        QuantoLayer(bits, q_group_size=GROUP, residual_length=RESIDUAL)
        if kind == "full_attention"
        else WindowLayer(config.get_text_config(decoder=True).sliding_window)
        for kind in caches.layer_kinds(config)
    ]
    text = config.get_text_config(decoder=True)
    full = caches.layer_kinds(config).count("full_attention")
    elements = 2 * full * text.num_key_value_heads * caches.head_dim(config)

    def facts() -> Row:
        stored = bits + 2 * 16 / GROUP  # scale and shift, in 16 bits as the cache of a 16-bit model
        recent = (tokens - RESIDUAL) % RESIDUAL
        held = (stored * (tokens - recent) + 16 * recent) / tokens
        return {
            "recipe": f"QuantizedCache, quanto, {bits} bits",
            "formats": [],
            "keep_first": 0,
            "keep_last": 0,
            "bits_per_element": round(stored, 3),
            "bytes_per_token": round(held * elements / 8, 1),
            "bits_with_zones": round(held, 3),
        }

    return Contender(Cache(layers=layers), facts)
