# SPDX-License-Identifier: Apache-2.0
"""A cache as the operators take it: its tensors, zones and scratch, in the order of arguments."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from bitdecoding import PagedKvCache, torch_ops


@dataclass
class OpCache:
    """The memory of `cache` through torch.ops.bitdecoding alone."""

    cache: PagedKvCache
    scratch: torch_ops.Scratch

    @classmethod
    def of(cls, cache: PagedKvCache, query_heads: int, query_tokens: int = 1) -> OpCache:
        batch, heads = len(cache.lengths), int(cache.pool.shape[1])
        scratch = torch_ops.scratch(
            cache.format,
            batch=batch,
            num_kv_heads=heads,
            query_heads=query_heads,
            query_tokens=query_tokens,
            device=getattr(cache.pool, "device", "cpu"),
        )
        return cls(cache, scratch)

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """What all operators but pack take, by name. The same tensors each time: torch.compile
        doesn't see that two made of one NumPy array share memory."""
        mean = self.cache.k_mean
        return {
            **torch_ops.tensors_of(self.cache),
            "k_mean": None if mean is None else torch.as_tensor(mean),
            "error_word": self.scratch.error_word,
            "format": str(self.cache.format),
            "keep_first": self.cache.keep_first,
            "keep_last": self.cache.keep_last,
        }

    def append_arguments(self) -> dict[str, Any]:
        return {**self.state, "counters": self.scratch.counters}

    def decode_arguments(self) -> dict[str, Any]:
        return {**self.state, "workspace": self.scratch.workspace}

    def step(self, k: Any, v: Any, counts: Any, q: Any) -> tuple[Any, Any]:
        """k, v (B, n, H, D), of which counts (B,) are tokens; q (B, Sq, Hq, D) -> out, lse."""
        torch_ops.append(k, v, **self.append_arguments(), num_tokens=counts)
        out, lse = torch_ops.decode(q, **self.decode_arguments())
        return out, lse
