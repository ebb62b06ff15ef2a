# SPDX-License-Identifier: Apache-2.0
"""Fake quantisation in torch: what a packed cache reads back, from docs/format.md's definitions.

A second opinion: it shares no code with the library. It also knows what the library doesn't: norms
over all KV heads jointly.
Tensors are float32 (B, Hkv, S, D); tokens are quantised as far as whole pages of them exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HALF_MAX = 65504.0


@dataclass(frozen=True)
class Scheme:
    """How K or V of one layer becomes codes."""

    bits: int
    axis: str  # channel | token | block
    group: int  # tokens of a channel, or channels of a token
    rotation: int = 0  # channels of a Walsh-Hadamard block
    norm: str = ""  # "" | head | joint: the token's norm over its head, over all heads
    clip: float = 1.0  # the part of a range that levels divide; of blocks see `powers`


def rn16(x: torch.Tensor) -> torch.Tensor:
    """The nearest fp16 values, saturated, as float32."""
    return x.clamp(-HALF_MAX, HALF_MAX).half().float()


def hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """The normalised Walsh-Hadamard transform of every ``block`` channels, by butterflies."""
    if block == 0:
        return x
    shape, h = x.shape, 1
    y = x.reshape(*shape[:-1], -1, block)
    while h < block:
        pairs = y.unflatten(-1, (block // (2 * h), 2, h))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        h *= 2
    return (y * torch.tensor(block, dtype=torch.float32).rsqrt()).reshape(shape)


def arrived(x: torch.Tensor, rotation: int, mean: torch.Tensor | None = None) -> torch.Tensor:
    """fp16 values as pages and 16-bit zones hold them; mean (Hkv, D)."""
    x = rn16(x.float())
    if mean is not None:
        x = x - mean[:, None]
    return rn16(hadamard(x, rotation)) if rotation or mean is not None else x


def levels(x: torch.Tensor, bits: int, clip: float, counted: torch.Tensor | None) -> torch.Tensor:
    """x (..., group) through codes with an fp16 scale and zero per group. ``counted`` (same shape,
    bool): which values make the range; the others are clamped into it."""
    low, high = x, x
    if counted is not None:
        low, high = x.masked_fill(~counted, torch.inf), x.masked_fill(~counted, -torch.inf)
    low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    empty = low > high
    low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)
    cut = (high - low) * ((1 - clip) / 2)
    low, high = rn16(low + cut), high - cut
    scale = rn16((high - low) / (2**bits - 1))
    ratio = torch.where(scale == 0, 0, 1 / scale)
    code = ((x - low) * ratio).round().clamp(0, 2**bits - 1)
    return code * scale + low


def powers(x: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    """x (..., group) through symmetric codes whose step is a power of two. ``clip``: how many times
    what the codes reach the largest value may be."""
    top = x.abs().amax(-1, keepdim=True)
    exponent = (top / (clip * 2 ** (bits - 1))).clamp_min(2.0**-40).log2().ceil().clamp(-14, 15)
    step, middle = torch.exp2(exponent), 2 ** (bits - 1) - 0.5
    code = (x / step + middle).round().clamp(0, 2**bits - 1)
    return torch.where(top == 0, 0, (code - middle) * step)


def norms(x: torch.Tensor, kind: str) -> torch.Tensor:
    squares = x.square().sum(-1, keepdim=True)
    if kind == "joint":
        squares = squares.sum(1, keepdim=True)
    return rn16(squares.sqrt())


def fake_quantise(x: torch.Tensor, scheme: Scheme, page: int, keep_first: int = 0) -> torch.Tensor:
    """x (B, Hkv, S, D) as ``arrived`` gave it -> what reading its whole pages gives, S div page
    pages of it. Positions below ``keep_first`` widen no range of a channel."""
    x = x[:, :, : x.shape[2] // page * page]
    norm = norms(x, scheme.norm) if scheme.norm else None
    if norm is not None:
        x = rn16(torch.where(norm == 0, 0, x * (1 / norm)))
    if scheme.axis == "channel":
        y = x.transpose(2, 3).unflatten(3, (-1, scheme.group))  # (B, Hkv, D, groups, group)
        position = torch.arange(x.shape[2], device=x.device).view(-1, scheme.group)
        counted = (position >= keep_first).expand(y.shape) if keep_first else None
        y = levels(y, scheme.bits, scheme.clip, counted).flatten(3).transpose(2, 3)
    else:
        y = x.unflatten(3, (-1, scheme.group))
        if scheme.axis == "block":
            y = powers(y, scheme.bits, scheme.clip)
        else:
            y = levels(y, scheme.bits, scheme.clip, None)
        y = y.flatten(3)
    return y if norm is None else y * norm
