# SPDX-License-Identifier: Apache-2.0
"""Teacher forcing through a packed cache, in blocks, with what every single token would have seen.

Decoding token i appends it and then attends: with i + 1 tokens, R = keep_last and pages of P, the
cache holds P * ((i + 1 - R) div P) tokens in pages. Those stay the same for P tokens on end. Such
a run goes in as one later prompt: the past is read from the cache, packed and 16-bit, the run
itself in 16 bit, and the two are merged by their log-sum-exp. Runs begin at i + 1 = R (mod P),
where the cache must hold i tokens with i + 1 - R of them packed: it is made with keep_last = R - 1.
Where R is 0 the run's first token, which completes a page, goes in by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Schedule:
    """How the tokens of a text are fed, and the keep_last to make the cache with."""

    keep_last: int
    blocks: tuple[int, ...]  # tokens; their sum is the text's length

    @property
    def dense(self) -> int:
        """Tokens of the first block: nothing is packed while they are read."""
        return self.blocks[0]


def schedule(tokens: int, page_tokens: int, keep_last: int) -> Schedule:
    run = [page_tokens] if keep_last else [1, page_tokens - 1]
    blocks = [min(tokens, page_tokens + keep_last - 1)]
    while (left := tokens - sum(blocks)) > 0:
        blocks.append(min(left, run[(len(blocks) - 1) % len(run)]))
    return Schedule(max(0, keep_last - 1), tuple(blocks))


def forced(
    model: Any, cache: Any, ids: torch.Tensor, blocks: tuple[int, ...]
) -> Iterator[torch.Tensor]:
    """Logits (B, n, V) float32 of every block of ids (B, S), on the model's device."""
    for block in ids.split(list(blocks), dim=1):
        with torch.no_grad():
            yield model(block, past_key_values=cache, use_cache=True).logits.float()


def last_logits(model: Any, cache: Any, ids: torch.Tensor, blocks: tuple[int, ...]) -> torch.Tensor:
    """Logits (B, V) float32 after the last token of ids (B, S)."""
    logits = torch.empty(0)
    for block in ids.split(list(blocks), dim=1):
        with torch.no_grad():
            options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            logits = model(block, **options).logits[:, -1].float()
    return logits
