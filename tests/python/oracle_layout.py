# SPDX-License-Identifier: Apache-2.0
"""Where the bits of the oracle's records lie, from docs/format.md alone, sharing no code."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdecoding import KvFormat

Halves = npt.NDArray[np.float16]
Ints = npt.NDArray[np.integer[Any]]
Bytes = npt.NDArray[np.uint8]

CHUNK = 64  # tokens


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Chunk:
    """Byte offsets of the sections of one chunk of 64 tokens in a record."""

    k_groups: int  # scales, then zeros, of each channel-axis K group that begins in the chunk
    groups_here: int
    plane: int  # from a channel group's parameters to the next one's
    k_codes: int
    v_codes: int
    v_parameters: int
    k_parameters: int  # token axis
    norms: int
    end: int


@functools.cache
def chunks(f: KvFormat) -> tuple[Chunk, ...]:
    result = []
    offset = 0
    for begin in range(0, f.page_tokens, CHUNK):
        groups = sum(begin <= token < begin + CHUNK for token in range(0, f.page_tokens, f.k_group))
        groups = groups if f.k_axis == "channel" else 0
        token_groups = f.head_dim // f.k_group if f.k_axis != "channel" else 0
        plane = CHUNK if f.k_axis == "block" else 2 * CHUNK * 2
        sizes = [
            groups * 2 * f.head_dim * 2,
            CHUNK * f.head_dim * f.k_bits // 8,
            CHUNK * f.head_dim * f.v_bits // 8,
            f.head_dim // f.v_group * plane,
            token_groups * plane,
            CHUNK * 2 if f.token_norm else 0,
        ]
        offsets = [offset]
        for size in sizes:
            offsets.append(offsets[-1] + round_up(size, 16))
        k_groups, k_codes, v_codes, v_parameters, k_parameters, norms, offset = offsets
        result.append(
            Chunk(
                k_groups, groups, plane, k_codes, v_codes, v_parameters, k_parameters, norms, offset
            )
        )
    return tuple(result)


def page_bytes(f: KvFormat) -> int:
    return round_up(chunks(f)[-1].end, 128)


@functools.cache
def k_code_bits(bits: int, head_dim: int) -> Ints:
    """(token 64, channel) -> bit of a chunk's K codes."""
    n, c = np.indices((CHUNK, head_dim))
    words = head_dim * bits // 64  # of one lane and block of 16 tokens
    unit_words = min(words, 4)
    g, r = n % 8, n % 16 // 8
    span, p, q = c // 64, c // 32 % 2, c // 16 % 2
    u, t, h = c // 8 % 2, c % 8 // 2, c % 2
    word, field = (2 * span + r, p + 2 * q) if bits == 2 else (4 * span + 2 * q + r, p)
    unit = n // 16 * (words // unit_words) + word // unit_words
    place = ((unit * 32 + 4 * g + t) * unit_words + word % unit_words) * 4 + 2 * h + u
    return place * 8 + field * bits


@functools.cache
def v_code_bits(bits: int, head_dim: int) -> Ints:
    """(token 64, channel) -> bit of a chunk's V codes."""
    n, c = np.indices((CHUNK, head_dim))
    fields = 8 // bits
    words = head_dim // (8 * fields)
    parts = max(min(words, 4), head_dim // 32)  # of the channels
    part_words = words // parts
    t, h, u = n % 8 // 2, n % 2, n % 16 // 8
    word, field, g = c // (8 * fields), c // 8 % fields, c % 8
    in_part = word % part_words + part_words * (n // 16)
    unit = word // part_words * part_words + in_part // 4
    place = ((unit * 32 + 4 * g + t) * 4 + in_part % 4) * 4 + 2 * h + u
    return place * 8 + field * bits


@functools.cache
def channel_order(head_dim: int) -> Ints:
    """channel -> element of a channel-axis K group's scales (or zeros)."""
    c = np.arange(head_dim)
    return c % 8 // 2 * (head_dim // 4) + c // 8 * 2 + c % 2


@functools.cache
def token_order() -> Ints:
    """token of a chunk -> element of a plane of 64 per-token values."""
    n = np.arange(CHUNK)
    return n % 8 * 8 + n // 8


def put_elements(record: Bytes, offset: int, elements: Ints, values: Halves | Bytes) -> None:
    """Writes fp16 numbers or bytes (..., n) at element numbers `elements` (n) from `offset` on."""
    if values.dtype == np.uint8:
        record[..., offset + elements] = values
        return
    raw = np.ascontiguousarray(values).view(np.uint16)
    record[..., offset + 2 * elements] = (raw & 0xFF).astype(np.uint8)
    record[..., offset + 2 * elements + 1] = (raw >> 8).astype(np.uint8)


def get_elements(record: Bytes, offset: int, elements: Ints) -> Halves:
    low = record[..., offset + 2 * elements].astype(np.uint16)
    high = record[..., offset + 2 * elements + 1].astype(np.uint16)
    return (low | high << 8).view(np.float16)
