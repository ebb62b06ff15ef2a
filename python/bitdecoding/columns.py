# SPDX-License-Identifier: Apache-2.0
"""Which columns of a batch are tokens and which are padding: the attention masks, checked.

Padding never enters a cache, so a mask becomes one number per row: where its new tokens begin.
"""

from __future__ import annotations

from typing import Any

import torch


class Columns:
    """Which columns of the batch hold tokens and which padding, shared by all layers."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._real: torch.Tensor | None = None  # (B, columns) bool, True = token; None: all are
        self._columns = 0
        self._last: tuple[Any, ...] = ()  # the last question ...
        self._answer: torch.Tensor | None = None  # ... which every layer of a step asks again

    def leftpad(
        self, mask: torch.Tensor | None, batch: int, seen: int, tokens: int
    ) -> torch.Tensor | None:
        """int32 (B,): where each row of the ``tokens`` new columns begins; None = all at 0.

        mask  (B, seen + tokens), True or 1 = token; None = no padding anywhere.
        Raises ValueError for right padding, holes, or a mask that contradicts earlier ones.
        """
        if self._last and self._last[0] is mask and self._last[1:] == (batch, seen, tokens):
            return self._answer
        answer = None
        if mask is not None or self._real is not None:
            answer = self._checked(mask, batch, seen, tokens)
        self._columns = seen + tokens
        self._last = (mask, batch, seen, tokens)
        self._answer = answer
        return answer

    def longest(self) -> int:
        """Tokens of the row with the least padding, new ones included."""
        return self._columns if self._real is None else int(self._real.sum(1).max())

    def _checked(
        self, mask: torch.Tensor | None, batch: int, seen: int, tokens: int
    ) -> torch.Tensor | None:
        """leftpad() where somebody says or said something of padding."""
        real = torch.ones(batch, seen + tokens, dtype=torch.bool)
        past = real[:, :seen] if self._real is None else self._real
        if mask is not None:
            real = _checked_mask(mask, batch, seen + tokens)
        if not torch.equal(past[:, : seen + tokens], real[:, : past.shape[1]]):
            raise ValueError(
                "attention_mask differs from the one the cache was filled with in columns "
                f"0..{seen - 1}; allowed: the same columns, then those of the new tokens"
            )
        pad = tokens - real[:, seen:].sum(1)  # (B,)
        if not torch.equal(real[:, seen:], torch.arange(tokens) >= pad[:, None]):
            raise ValueError("attention_mask has holes or right padding; allowed: left padding")
        self._real = None if bool(real.all()) else real
        return pad.to(torch.int32) if bool(pad.any()) else None


def _checked_mask(mask: Any, batch: int, columns: int) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise NotImplementedError(
            "an attention_mask that is not 2-D (batch, tokens) is not supported with a LowBitCache"
        )
    if tuple(mask.shape) != (batch, columns):
        raise ValueError(
            f"attention_mask: shape {tuple(mask.shape)}; allowed: ({batch}, {columns}), "
            "all tokens of the cache and the new ones"
        )
    return mask.to(device="cpu", dtype=torch.bool)
