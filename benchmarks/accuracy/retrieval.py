# SPDX-License-Identifier: Apache-2.0
"""Needles in a text: does the model still find a word that was said far above?

A sentence "The password of <city> is <word>." lies at some depth of a real text; at its end stands
"The password of <city> is", and the words are ranked by the likelihood of their first token. With
several keys as many such sentences lie in the text, and the wrong answers are the others' words.
The models are small: the 16-bit cache's own score is a row beside every recipe's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accuracy import caches
from accuracy.forcing import last_logits, schedule
from accuracy.models import Tokenizer
from accuracy.recipes import Recipe
from bitdecoding.transformers import ATTENTION

CITIES = ("Lisbon", "Prague", "Oslo", "Vienna", "Athens", "Dublin", "Warsaw", "Madrid")
WORDS = ("orange", "silver", "winter", "garden", "bridge", "coffee", "music", "doctor")
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Questions:
    """A batch of prompts of one length and the tokens to choose from."""

    ids: torch.Tensor  # (B, S)
    answers: torch.Tensor  # (B,) places among `choices`
    choices: torch.Tensor  # (C,) token ids


def questions(tokenizer: Tokenizer, text: torch.Tensor, tokens: int, keys: int) -> Questions:
    """text (at least tokens,), whose first token may be special; keys: needles of a prompt. Row i
    asks for the needle at DEPTHS[i % 5]; two rows per depth, with other cities and words."""
    empty = len(tokenizer(""))  # special tokens in front
    choices = torch.tensor([tokenizer(f"It is {word}")[-1] for word in WORDS])
    if len(set(choices.tolist())) != len(WORDS):
        raise ValueError(f"choices = {choices.tolist()}; allowed: different last tokens")

    def said(sentence: str) -> list[int]:
        return tokenizer(sentence)[empty:]

    rows, answers = [], []
    for row in range(2 * len(DEPTHS)):
        asked, depth = 3 * row % len(CITIES), DEPTHS[row % len(DEPTHS)]
        others = [i for i in range(len(CITIES)) if i != asked][: keys - 1]
        depths = [(depth + (i + 1) / keys) % 1 for i in range(keys - 1)]
        words = [(city + row) % len(WORDS) for city in range(len(CITIES))]
        needles = sorted(
            (d, said(f"\nThe password of {CITIES[c]} is {WORDS[words[c]]}.\n"))
            for d, c in [(depth, asked), *zip(depths, others, strict=True)]
        )
        end = said(f"\nThe password of {CITIES[asked]} is")
        rows.append(_laid(text.tolist(), needles, end, tokens))
        answers.append(words[asked])
    return Questions(torch.tensor(rows), torch.tensor(answers), choices)


def _laid(
    text: list[int], needles: Sequence[tuple[float, list[int]]], end: list[int], tokens: int
) -> list[int]:
    """The text with needles in it, in rising order of depth, and the end: ``tokens`` long."""
    room = tokens - len(end) - sum(len(needle) for _, needle in needles)
    found, taken = [], 0
    for depth, needle in needles:
        cut = max(1, int(depth * room))
        found += text[taken:cut] + needle
        taken = cut
    return found + text[taken:room] + end


def scores(
    model: Any, asked: Questions, recipe: Recipe | None, page_tokens: int = 128, keep_last: int = 64
) -> dict[str, Any]:
    """Share of right answers and by how many nats they lead (or trail) the best wrong one."""
    config, tokens = model.config, asked.ids.shape[1]
    if recipe is not None:
        page_tokens, keep_last = caches.page_tokens(recipe, config), recipe.keep_last
    plan = schedule(tokens, page_tokens, keep_last)
    model.set_attn_implementation(ATTENTION)
    cache = caches.make(recipe, config, tokens, plan.keep_last)
    logits = last_logits(model, cache, asked.ids.to(model.device), plan.blocks).cpu()
    chosen = logits[:, asked.choices].log_softmax(-1)  # (B, C)
    right = chosen.gather(1, asked.answers[:, None])[:, 0]
    wrong = chosen.scatter(1, asked.answers[:, None], -torch.inf).amax(1)
    lead = right - wrong
    return {
        "right": round(float((lead > 0).double().mean()), 3),
        "lead": round(float(lead.mean()), 4),
        "right_by_depth": [
            round(float((lead[i :: len(DEPTHS)] > 0).double().mean()), 3)
            for i in range(len(DEPTHS))
        ],
    }
