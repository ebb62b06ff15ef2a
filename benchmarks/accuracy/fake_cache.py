# SPDX-License-Identifier: Apache-2.0
"""A cache that quantises in torch and attends with torch: the cross-check of the packed one.

Its layers keep every key and value and give each query what a packed cache would have held for it:
16-bit first and newest tokens, pages in between. One forward over a whole text is enough.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache

from accuracy import caches
from accuracy.fake import Scheme, arrived, fake_quantise, hadamard
from accuracy.recipes import Recipe
from bitdecoding import KvFormat
from bitdecoding.cache_layers import NewTokens, SixteenBitLayer, WindowLayer

BLOCK_CLIPS = {4: 1.25, 2: 1.75}  # docs/format.md: limits of 10 and 3.5 over 8 and 2


def schemes(format: KvFormat) -> tuple[Scheme, Scheme]:
    """Of K and of V. A library without rotations or clips has none."""
    norm = "head" if format.token_norm else ""
    rotations = [getattr(format, name, 0) for name in ("k_rotation", "v_rotation")]
    clips = [getattr(format, name, 100) / 100 for name in ("k_clip", "v_clip")]
    v_axis = "token"
    if format.k_axis == "block":
        clips, v_axis = [BLOCK_CLIPS[format.k_bits], BLOCK_CLIPS[format.v_bits]], "block"
    return (
        Scheme(format.k_bits, format.k_axis, format.k_group, rotations[0], norm, clips[0]),
        Scheme(format.v_bits, v_axis, format.v_group, rotations[1], "", clips[1]),
    )


class FakeLayer(SixteenBitLayer):
    """Attends as if K and V had been packed by schemes, K less a mean (Hkv, D)."""

    def __init__(
        self, recipe: Recipe, k: Scheme, v: Scheme, page_tokens: int, mean: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.k, self.v, self.page, self.mean = k, v, page_tokens, mean
        self.keep_first, self.keep_last = recipe.keep_first, recipe.keep_last

    def attend(
        self, module: Any, query: torch.Tensor, new: NewTokens, mask: Any, scale: float
    ) -> torch.Tensor:
        kept = [
            arrived(new.keys, self.k.rotation, self.mean),
            arrived(new.values, self.v.rotation),
        ]
        read = [
            fake_quantise(x, scheme, self.page, first)
            for x, scheme, first in zip(kept, (self.k, self.v), (self.keep_first, 0), strict=True)
        ]
        q = hadamard(query.float(), self.k.rotation)
        total, out = new.keys.shape[2], torch.empty_like(q)
        row = start = total - query.shape[2]
        while row < total:
            packed = self.page * (max(0, row + 1 - self.keep_last) // self.page)
            end = min(total, max(row + 1, packed + self.page + self.keep_last - 1))
            first = min(self.keep_first, packed)
            keys, values = (
                torch.cat([x[:, :, :first], y[:, :, first:packed], x[:, :, packed:end]], 2)
                for x, y in zip(kept, read, strict=True)
            )
            rows = torch.arange(row, end, device=q.device)
            visible = torch.arange(end, device=q.device) <= rows[:, None]
            out[:, :, row - start : end - start] = scaled_dot_product_attention(
                q[:, :, row - start : end - start],
                keys,
                values,
                attn_mask=visible,
                scale=scale,
                enable_gqa=True,
            )
            row = end
        return hadamard(out, self.v.rotation).transpose(1, 2).to(query.dtype)


def make(recipe: Recipe, config: Any) -> Cache:
    """For the attention implementation of LowBitCache."""
    layers: list[Any] = []
    formats = caches.formats_of(recipe, config)
    means = recipe.k_means or [None] * len(formats)
    for kind, format, mean in zip(caches.layer_kinds(config), formats, means, strict=True):
        if kind != "full_attention":
            layers.append(WindowLayer(config.get_text_config(decoder=True).sliding_window))
        elif format is None:
            layers.append(SixteenBitLayer())
        else:
            own = None if mean is None else mean.float()
            layers.append(FakeLayer(recipe, *schemes(format), format.page_tokens, own))
    return Cache(layers=layers)
