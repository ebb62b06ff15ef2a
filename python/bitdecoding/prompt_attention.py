# SPDX-License-Identifier: Apache-2.0
"""Causal attention of new tokens to themselves, in torch, and the merge with the cache's part.

Shapes: query (B, Hq, S, D), keys and values (B, Hkv, S, D), results (B, S, Hq, D), LSE (B, Hq, S)
in natural log. Row b's tokens begin at column leftpad[b]; what lies before is padding: nobody
attends to it, and its own result is 0 with LSE -inf.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

_SCORE_ELEMENTS = 1 << 24  # of one block of score rows: 64 MiB in float32
_FLOOR = torch.finfo(torch.float32).min  # in place of -inf, where -inf - -inf would be NaN


def causal_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    leftpad: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of a first prompt, in the type of its arguments. A padded batch goes row by row:
    every row then computes what it would compute alone, and no (S, S) mask exists."""
    grouped = query.shape[1] != keys.shape[1]
    if leftpad is None:
        out = scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    out = torch.zeros_like(query)
    for b, pad in enumerate(leftpad.tolist()):
        if pad < query.shape[2]:
            q, k, v = (x[b : b + 1, :, pad:] for x in (query, keys, values))
            out[b : b + 1, :, pad:] = scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
            )
    return out.transpose(1, 2)


def causal_attention_with_lse(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    leftpad: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a later prompt and its LSE, both float32 (torch's own function keeps the LSE
    to itself); in blocks of query rows, so that memory stays bounded."""
    batch, heads, tokens, head_dim = query.shape
    kv_heads = keys.shape[1]
    q = query.float().reshape(batch, kv_heads, heads // kv_heads, tokens, head_dim)
    k, v = keys.float(), values.float()
    column = torch.arange(tokens, device=query.device)
    first = column.new_zeros(batch) if leftpad is None else leftpad.to(column)
    rows = max(1, _SCORE_ELEMENTS // (batch * heads * tokens))
    outs, lses = [], []
    for block in column.split(rows):
        visible = (column <= block[:, None]) & (column >= first[:, None, None])  # (B, rows, S)
        scores = q[:, :, :, block].flatten(2, 3) @ k.transpose(2, 3) * scale  # (B, Hkv, G*rows, S)
        scores = scores.unflatten(2, (-1, len(block)))  # (B, Hkv, G, rows, S)
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.clamp_min(_FLOOR)[..., None]).exp()
        out = (weights.flatten(2, 3) @ v).unflatten(2, (-1, len(block)))  # (B, Hkv, G, rows, D)
        outs.append(out.flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs, dim=2).transpose(1, 2), torch.cat(lses, dim=2)


def merge(
    a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """One attention over the union of two sets of tokens, from (out, LSE) over each: float32."""
    total = torch.logaddexp(a[1], b[1]).clamp_min(_FLOOR)  # (B, Hq, S); empty parts weigh 0
    weighed = [out.float() * (lse - total).exp().transpose(1, 2)[..., None] for out, lse in (a, b)]
    return weighed[0] + weighed[1]
