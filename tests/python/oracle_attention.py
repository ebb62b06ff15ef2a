# SPDX-License-Identifier: Apache-2.0
"""The oracle's attention: float64, over the values that the pages and zones of a cache mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from oracle import Doubles, Floats, doubles, hadamard, read_page

from bitdecoding import KvFormat


@dataclass
class Attended:
    """What one sequence attends to, (L, H, D), and the terms that errors are relative to. All but
    the mean as the cache holds it: rotated, and less the mean."""

    k: Doubles
    v: Doubles
    k_terms: Doubles
    v_terms: Doubles
    k_products: Doubles  # code * scale of tokens in pages, 0 of those in the zones
    v_products: Doubles
    k_scales: Doubles
    k_mean: Doubles | None = None  # (H, D)
    k_rotation: int = 0
    v_rotation: int = 0


def attended(cache: Any, b: int) -> Attended:
    """Sequence b read from a cache's arrays: first rows, pages, tail ring."""
    f: KvFormat = cache.format
    pool, side, table, slots, lengths, packed_counts = (
        np.asarray(array)
        for array in (
            cache.pool,
            cache.side,
            cache.block_table,
            cache.slots,
            cache.lengths,
            cache.packed,
        )
    )
    length, packed = int(lengths[b]), int(packed_counts[b])
    rows = side[slots[b]].astype(float)  # (H, 2, F + T, D)
    tail_tokens = rows.shape[2] - cache.keep_first
    first = min(cache.keep_first, packed)
    ring = [cache.keep_first + token % tail_tokens for token in range(packed, length)]
    head_k, head_v = (rows[:, i, :first].transpose(1, 0, 2) for i in range(2))
    tail_k, tail_v = (rows[:, i, ring].transpose(1, 0, 2) for i in range(2))

    page = read_page(f, pool[table[b, : packed // f.page_tokens]])  # (pages, H, P, D)

    def of_pages(x: Doubles) -> Doubles:
        heads, channels = x.shape[1], x.shape[3]
        return doubles(x.transpose(0, 2, 1, 3).reshape(-1, heads, channels)[first:])

    return Attended(
        np.concatenate([head_k, of_pages(page.keys()), tail_k]),
        np.concatenate([head_v, of_pages(page.values()), tail_v]),
        np.concatenate([np.abs(head_k), of_pages(page.key_terms()), np.abs(tail_k)]),
        np.concatenate([np.abs(head_v), of_pages(page.value_terms()), np.abs(tail_v)]),
        np.concatenate([0 * head_k, of_pages(page.key_products()), 0 * tail_k]),
        np.concatenate([0 * head_v, of_pages(page.value_products()), 0 * tail_v]),
        np.concatenate([0 * head_k, of_pages(doubles(page.k_scale)), 0 * tail_k]),
        None if cache.k_mean is None else doubles(cache.k_mean),
        f.k_rotation,
        f.v_rotation,
    )


def block_norms(x: Doubles, block: int) -> Doubles:
    """Of every channel of x (..., D) the norm of its block, which rotations keep: what an error
    may be in one channel. block = 0: |x|."""
    if block == 0:
        return np.abs(x)
    squares = np.sum(x.reshape(*x.shape[:-1], -1, block) ** 2, axis=-1, keepdims=True)
    return np.reshape(np.repeat(np.sqrt(squares), block, axis=-1), x.shape)


def mean_scores(q: Floats, tokens: Attended) -> Doubles:
    """(Hq, Sq): what the mean adds to all scores of q (Sq, Hq, D), but for the softmax scale."""
    if tokens.k_mean is None:
        return np.zeros(q.shape[1::-1])
    mean = np.repeat(tokens.k_mean, q.shape[1] // len(tokens.k_mean), axis=0)
    return doubles(np.einsum("shd,hd->hs", q.astype(float), mean))


@dataclass
class Attention:
    """Output of one sequence and how far a float32 implementation may be from it."""

    out: Doubles  # (Sq, Hq, D)
    lse: Doubles  # (Hq, Sq)
    out_budget: Doubles  # (Sq, Hq, D), without the rounding to the output's type
    lse_budget: Doubles  # (Hq, Sq)


def _mean_size(x: Doubles, block: int) -> Doubles:
    """The root mean square of the block: what roundings within a rotation are relative to."""
    return block_norms(x, block) / math.sqrt(block or 1)


EPSILON = 2.0**-24  # half a unit in the last place of float32


def rounding(operations: int) -> float:
    return 4 * float(np.sqrt(operations)) * EPSILON


def attention(q: Floats, tokens: Attended, softmax_scale: float) -> Attention:
    """q (Sq, Hq, D) over the tokens of one sequence.

    The budget is that of float32 sums whose rounding errors are independent: n of them move a sum
    by at most 4 sqrt(n) EPSILON times its terms' magnitudes, but for one sum in 3000 of the worst
    kind (Higham and Mary, 2019). A score that is off by d changes its weight by the factor exp(d).
    """
    queries, heads, channels = q.shape
    length, kv_heads, _ = tokens.k.shape
    if length == 0:
        zero = np.zeros((queries, heads, channels))
        empty = np.full((heads, queries), -np.inf)
        return Attention(zero, empty, zero, np.zeros_like(empty))
    ratio = heads // kv_heads
    exact = hadamard(q.astype(float), tokens.k_rotation)
    spread = [np.repeat(x, ratio, axis=1) for x in (tokens.k, tokens.k_terms)]
    scores = np.einsum("shd,thd->hst", exact, spread[0]) * softmax_scale  # (Hq, Sq, L)
    size = np.maximum(np.abs(exact), _mean_size(exact, tokens.k_rotation))
    terms = np.einsum("shd,thd->hst", size, spread[1]) * abs(softmax_scale)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    lse = (np.log(total) + top)[..., 0]
    weights /= total
    v, v_terms = (np.repeat(x, ratio, axis=1) for x in (tokens.v, tokens.v_terms))
    out = np.einsum("hst,thd->shd", weights, v)
    magnitude = np.einsum("hst,thd->shd", weights, v_terms)

    score_error = rounding(channels + 16) * terms + 4 * EPSILON * np.abs(scores - top)
    # Only weights that matter: an error of a score counts as much as its weight does.
    worst = np.einsum("hst,hst->hs", weights, score_error)
    by_token = np.einsum("hst,thd->shd", weights * score_error, v_terms)
    sums = rounding(length + 32)
    out_budget = by_token + (worst.T[..., None] + 2 * sums) * magnitude
    if tokens.v_rotation:
        out_budget += rounding(8) * _mean_size(out, tokens.v_rotation)
        out_budget = block_norms(out_budget, tokens.v_rotation)
        out = hadamard(out, tokens.v_rotation)
    lse += softmax_scale * mean_scores(q, tokens)
    lse_budget = worst + sums + 4 * EPSILON * np.abs(lse)
    return Attention(out, lse, 1.1 * out_budget, 1.1 * lse_budget)  # second order: a tenth
