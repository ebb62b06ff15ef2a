# SPDX-License-Identifier: Apache-2.0
"""The shapes of shapes.csv: what a decode call runs on, and which table each of them serves."""

from __future__ import annotations

import csv
import random
import re
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).with_name("shapes.csv")
HEAD_DIM = 128  # where a case says nothing else
RAGGED_SEED = 0
PATTERN = re.compile(r"(\d+)x(\d+)x(\d+)@(?:(\d+)-)?(\d+)(?::q(\d+))?(?::d(\d+))?")


@dataclass(frozen=True)
class Case:
    """A decode call; printed and parsed as BxHxG@L, with :q<query tokens> and :d<head_dim> where
    they are not 1 and 128. A range of lengths, 1024-131072, is a ragged batch."""

    batch: int
    heads_kv: int
    group: int  # query heads per KV head
    length: int  # tokens of every sequence; in a ragged batch the most that one may have
    query_tokens: int = 1
    head_dim: int = HEAD_DIM
    min_length: int = 0  # 0: all sequences have `length` tokens

    @classmethod
    def parse(cls, text: str) -> Case:
        match = PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(
                f"case = {text!r}; allowed: batch x KV heads x group @ tokens: 8x8x4@4096, "
                "8x8x4@1024-4096, 8x8x4@4096:q2:d64"
            )
        batch, heads_kv, group, least, length, query_tokens, head_dim = match.groups()
        case = cls(
            batch=int(batch),
            heads_kv=int(heads_kv),
            group=int(group),
            length=int(length),
            query_tokens=int(query_tokens or 1),
            head_dim=int(head_dim or HEAD_DIM),
            min_length=int(least or 0),
        )
        if 0 in astuple(case)[:6] or case.min_length > case.length:
            raise ValueError(f"case = {text!r}; allowed: numbers above 0, a range that rises")
        return case

    def __str__(self) -> str:
        least = f"{self.min_length}-" if self.ragged else ""
        text = f"{self.batch}x{self.heads_kv}x{self.group}@{least}{self.length}"
        text += f":q{self.query_tokens}" if self.query_tokens != 1 else ""
        return text + (f":d{self.head_dim}" if self.head_dim != HEAD_DIM else "")

    @property
    def ragged(self) -> bool:
        return self.min_length != 0

    @property
    def columns(self) -> int:
        """Query columns: queries of one KV head."""
        return self.group * self.query_tokens

    def lengths(self) -> list[int]:
        """Tokens of each sequence. Of a ragged batch: log-uniform, always the same."""
        if not self.ragged:
            return [self.length] * self.batch
        draw = random.Random(RAGGED_SEED).random  # its sequence never changes
        ratio = self.length / self.min_length
        return [round(self.min_length * ratio ** draw()) for _ in range(self.batch)]

    def facts(self) -> dict[str, Any]:
        """The fields of a result row that say which case it is."""
        return {
            "case": str(self),
            "batch": self.batch,
            "heads_kv": self.heads_kv,
            "group": self.group,
            "query_tokens": self.query_tokens,
            "length": self.length,
            "head_dim": self.head_dim,
        }


@dataclass(frozen=True)
class Shape:
    """A line of shapes.csv."""

    name: str
    case: Case
    tags: tuple[str, ...]


@cache
def shapes() -> tuple[Shape, ...]:
    """All lines of shapes.csv, in its order."""
    with SHAPES.open(newline="") as file:
        return tuple(_shape(line) for line in csv.DictReader(file))


def _shape(line: dict[str, str]) -> Shape:
    numbers = {name: int(line[name]) for name in line if name not in ("name", "tags")}
    if numbers["min_length"] == numbers["length"]:
        numbers["min_length"] = 0
    return Shape(line["name"], Case(**numbers), tuple(line["tags"].split()))


def tagged(tag: str) -> list[Case]:
    """The cases with that tag, in the order of shapes.csv."""
    found = [shape.case for shape in shapes() if tag in shape.tags]
    if not found:
        allowed = sorted({tag for shape in shapes() for tag in shape.tags})
        raise ValueError(f"tag = {tag!r}; allowed: {', '.join(allowed)}")
    return found


def ceiling_case() -> Case:
    """The case in which 16-bit attention must read most: its best rate may be the ceiling."""
    return tagged("ceiling")[0]
