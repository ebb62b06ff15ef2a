# SPDX-License-Identifier: Apache-2.0
"""One decode step of a Llama in plain torch, with random weights and a choice of attention.

Everything but attention is the same for all caches. An attention is called once per layer with the
new token's q (B, 1, Hq, D), k and v (B, 1, Hkv, D), after the rotary embedding; it stores k and v
and returns (B, 1, Hq, D).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from decode_cases import Zones, caches
from shapes import Case
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from bitdecoding import KvFormat, PagedKvCache
from bitdecoding._ext import sequence_extents
from bitdecoding.plan import ModelShape

Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

ROTARY_BASE = 500000.0
NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int  # query heads, Hq
    heads_kv: int
    head_dim: int
    ffn: int
    vocab: int

    def case(self, batch: int, length: int) -> Case:
        group = self.heads // self.heads_kv
        return Case(batch, self.heads_kv, group, length, head_dim=self.head_dim)

    @property
    def cached(self) -> ModelShape:
        return ModelShape(self.layers, self.heads_kv, self.head_dim)


LLAMA_8B = Shape(32, 4096, 32, 8, 128, 14336, 128256)  # Llama-3.1-8B
TINY = Shape(2, 512, 8, 2, 128, 1024, 1000)


class Llama:
    """Random weights: every product keeps the variance of what it is given."""

    def __init__(
        self, shape: Shape, max_positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        s, attended = shape, shape.heads * shape.head_dim
        sizes = {
            "qkv": (attended + 2 * s.heads_kv * s.head_dim, s.hidden),
            "out": (s.hidden, attended),
            "gate_up": (2 * s.ffn, s.hidden),
            "down": (s.hidden, s.ffn),
        }
        self.layers = [
            {name: self._random(*size) for name, size in sizes.items()} for _ in range(s.layers)
        ]
        self.embedding = torch.randn(s.vocab, s.hidden, device=device, dtype=dtype)
        self.lm_head = self._random(s.vocab, s.hidden)
        self.norm = torch.ones(s.hidden, device=device, dtype=dtype)
        self.cos, self.sin = self._rotary_tables(max_positions)

    def _random(self, outputs: int, inputs: int) -> torch.Tensor:
        weight = torch.empty(outputs, inputs, device=self.device, dtype=self.dtype)
        return weight.normal_(std=inputs**-0.5)

    def _rotary_tables(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, (positions, D); the first half of sin is negated: see `_rotate`."""
        half = torch.arange(0, self.shape.head_dim, 2, device=self.device) / self.shape.head_dim
        angles = torch.arange(positions, device=self.device)[:, None] * ROTARY_BASE**-half
        cos, sin = angles.cos(), angles.sin()
        tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return tables[0].to(self.dtype), tables[1].to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that a step reads."""
        matrices = [matrix for layer in self.layers for matrix in layer.values()]
        return sum(matrix.nbytes for matrix in (*matrices, self.lm_head))

    def step(self, tokens: torch.Tensor, position: torch.Tensor, attend: Attention) -> torch.Tensor:
        """Logits (B, vocab) of the tokens (B,) at position (1,), which become the next ones.

        Launches the same kernels on the same memory each time and never waits: it can be captured.
        """
        cos, sin = self.cos[position], self.sin[position]  # (1, D)
        x = embedding(tokens, self.embedding)  # (B, hidden)
        for index, layer in enumerate(self.layers):
            q, k, v = self._project(self._normed(x), layer["qkv"], cos, sin)
            attended = attend(index, q, k, v).reshape(len(x), -1)  # (B, Hq * D)
            x.addmm_(attended, layer["out"].t())
            gate, up = linear(self._normed(x), layer["gate_up"]).chunk(2, -1)  # (B, ffn)
            x.addmm_(silu(gate).mul_(up), layer["down"].t())
        logits = linear(self._normed(x), self.lm_head)
        tokens.copy_(logits.argmax(-1))
        position.add_(1)
        return logits

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (self.shape.hidden,), self.norm, NORM_EPSILON)

    def _project(
        self, x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (B, 1, Hq, D), k and v (B, 1, Hkv, D)."""
        s = self.shape
        qkv = linear(x, weight).view(len(x), 1, -1, s.head_dim)
        qk, v = qkv.split((s.heads + s.heads_kv, s.heads_kv), 2)
        q, k = _rotate(qk, cos, sin).split((s.heads, s.heads_kv), 2)
        return q, k, v


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of x (..., D): rolling by half of D swaps the partners."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def without_attention(
    layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """The rest of a step: queries in the place of what they attend to, nothing stored."""
    return q


class LowBitAttention:
    """Append and decode on one PagedKvCache per layer."""

    def __init__(self, layers: list[PagedKvCache]) -> None:
        self.layers = layers

    @classmethod
    def random(
        cls,
        shape: Shape,
        fmt: KvFormat,
        zones: Zones,
        *,
        batch: int,
        start: int,
        most: int,
        device: torch.device,
    ) -> LowBitAttention:
        """Sequences of ``start`` random tokens with room for ``most``. Pages of all layers lie in
        one pool, shuffled; contents are those of `decode_cases.caches`."""
        layers = caches(shape.case(batch, most), fmt, zones, shape.layers, device)
        pages, _ = sequence_extents(
            fmt, keep_first=zones.sinks, keep_last=zones.recent, max_tokens=start
        )
        for layer in layers:
            layer.lengths.fill_(start)
            layer.packed.fill_(pages * fmt.page_tokens)
        return cls(layers)

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        self.layers[layer].append(k, v)
        return self.layers[layer].decode(q)

    def check(self) -> None:
        for layer in self.layers:
            layer.check()


class SixteenBitAttention:
    """torch's attention over contiguous K and V, the new token written in place as the last of
    ``length`` tokens. A captured call keeps the length it was captured with."""

    def __init__(self, kv: torch.Tensor, length: int, backend: SDPBackend | None = None) -> None:
        self.kv = kv  # (layers, 2, B, Hkv, tokens, D)
        self.length = length
        self.backend = backend  # None: torch's choice

    @classmethod
    def random(
        cls,
        shape: Shape,
        *,
        batch: int,
        length: int,
        backend: SDPBackend,
        device: torch.device,
        dtype: torch.dtype,
    ) -> SixteenBitAttention:
        size = (shape.layers, 2, batch, shape.heads_kv, length, shape.head_dim)
        return cls(torch.randn(size, device=device, dtype=dtype), length, backend)

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        keys, values = self.kv[layer, :, :, :, : self.length]  # (B, Hkv, length, D)
        keys[:, :, -1] = k[:, 0]
        values[:, :, -1] = v[:, 0]
        grouped = q.shape[2] != keys.shape[1]
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            out = scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=grouped)
        return out.transpose(1, 2)

    def check(self) -> None:
        """Nothing can go wrong on the device."""


def largest_batch(free: int, margin: int, per_sequence: int) -> int:
    """How many sequences fit in ``free`` bytes when ``margin`` stay unused; 0: none."""
    return max(0, (free - margin) // per_sequence)
