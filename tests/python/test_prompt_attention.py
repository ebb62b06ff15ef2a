# SPDX-License-Identifier: Apache-2.0
"""Causal attention with its LSE, and the merge, against attention written out in float64."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from bitdecoding import prompt_attention  # noqa: E402

B, HQ, HKV, S, D = 3, 6, 2, 50, 16
LEFTPAD = [0, 13, S]
SCALE = 0.3


def inputs() -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, HQ, S, D), (B, HKV, S, D), (B, HKV, S, D)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def exact(q: Any, k: Any, v: Any, visible: Any) -> tuple[Any, Any]:
    """visible (B, S, keys) -> out (B, S, Hq, D), LSE (B, Hq, S)."""
    k, v = (x.double().repeat_interleave(HQ // HKV, 1) for x in (k, v))
    scores = (q.double() @ k.transpose(2, 3) * SCALE).masked_fill(~visible[:, None], -torch.inf)
    out = (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)
    return out, scores.logsumexp(-1)


def causal_mask(leftpad: list[int]) -> Any:
    column = torch.arange(S)
    return (column <= column[:, None]) & (column >= torch.tensor(leftpad)[:, None, None])


@pytest.mark.parametrize("leftpad", [None, LEFTPAD])
@pytest.mark.parametrize("block_rows", [7, S])
def test_causal_attention(
    leftpad: list[int] | None, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_attention, "_SCORE_ELEMENTS", block_rows * B * HQ * S)
    q, k, v = inputs()
    expected, expected_lse = exact(q, k, v, causal_mask(leftpad or [0] * B))
    pad = None if leftpad is None else torch.tensor(leftpad, dtype=torch.int32)
    out, lse = prompt_attention.causal_attention_with_lse(q, k, v, SCALE, pad)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float(), atol=1e-5, rtol=1e-5)
    out = prompt_attention.causal_attention(q, k, v, SCALE, pad)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)


def test_merge_is_attention_over_the_union() -> None:
    q, k, v = inputs()
    everything = torch.ones(B, S, S, dtype=torch.bool)
    everything[2] = False  # a row that sees nothing: 0, LSE -inf
    early = everything & (torch.arange(S) < 20)
    early[1] = False  # an empty part
    parts = [exact(q, k, v, mask) for mask in (early, everything & ~early)]
    merged = prompt_attention.merge(*[(out.float(), lse.float()) for out, lse in parts])
    expected, _ = exact(q, k, v, everything)
    torch.testing.assert_close(merged, expected.float(), atol=1e-5, rtol=1e-5)
