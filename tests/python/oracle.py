# SPDX-License-Identifier: Apache-2.0
"""The oracle: page bytes in NumPy, from docs/format.md alone, sharing no code.

The quantiser works in float32, as the format defines it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from oracle_layout import (
    CHUNK,
    Bytes,
    Chunk,
    Halves,
    Ints,
    channel_order,
    chunks,
    get_elements,
    k_code_bits,
    page_bytes,
    put_elements,
    token_order,
    v_code_bits,
)

from bitdecoding import KvFormat

Floats = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]

BLOCKS = {2: (3.5, 1.5), 4: (10.0, 7.5)}  # bits: largest magnitude where e = 0, the code of 0
NAN16 = np.uint16(0x7FFF).view(np.float16)


def to_half(values: npt.NDArray[Any]) -> Halves:
    """What becomes of every key and value first: nearest-even fp16, saturating, one NaN."""
    exact = np.asarray(values).astype(np.float32)
    halves = np.clip(exact, np.float32(-65504), np.float32(65504)).astype(np.float16)
    return np.where(np.isnan(exact), NAN16, halves)


def arrived(x: npt.NDArray[Any], rotation: int, mean: npt.NDArray[Any] | None = None) -> Halves:
    """K or V (..., H, D) as a cache holds it: fp16, less mean (H, D), rotated; float32 between."""
    exact = to_half(x).astype(np.float32)
    if mean is not None:
        exact = exact - np.asarray(mean).astype(np.float32)
    with np.errstate(invalid="ignore"):
        return to_half(hadamard(exact, rotation))


def hadamard(x: npt.NDArray[Any], block: int) -> npt.NDArray[Any]:
    """H of every `block` channels of x (..., D), in the type of x; block = 0: x."""
    if block == 0:
        return x
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    distance = 1
    while distance < block:
        pairs = blocks.reshape(*blocks.shape[:-1], block // (2 * distance), 2, distance)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        blocks = np.stack([a + b, a - b], axis=-2).reshape(blocks.shape)
        distance *= 2
    scale: Any = x.dtype.type(1 / np.sqrt(block))
    return np.reshape(blocks * scale, x.shape)


def doubles(values: npt.NDArray[Any]) -> Doubles:
    return np.asarray(values, np.float64)


@dataclass
class Page:
    """Pages in the clear. Leading modes are anything; parameters are spread to every element."""

    k_codes: npt.NDArray[np.uint8]  # (..., P, D)
    v_codes: npt.NDArray[np.uint8]  # (..., P, D)
    k_scale: Halves  # (..., P, D)
    k_zero: Halves
    v_scale: Halves
    v_zero: Halves
    norms: Halves  # (..., P); ones where the format has none

    def keys(self) -> Doubles:
        return _value(self.k_codes, self.k_scale, self.k_zero) * doubles(self.norms[..., None])

    def values(self) -> Doubles:
        return _value(self.v_codes, self.v_scale, self.v_zero)

    def key_terms(self) -> Doubles:
        """|code * scale| + |zero|, what rounding errors are relative to."""
        terms = _terms(self.k_codes, self.k_scale, self.k_zero)
        return terms * doubles(self.norms[..., None])

    def key_products(self) -> Doubles:
        """code * scale, without the zero: what a scaled query is multiplied with."""
        return doubles(self.k_codes) * doubles(self.k_scale) * doubles(self.norms[..., None])

    def value_products(self) -> Doubles:
        return doubles(self.v_codes) * doubles(self.v_scale)

    def value_terms(self) -> Doubles:
        return _terms(self.v_codes, self.v_scale, self.v_zero)


def _value(code: npt.NDArray[Any], scale: Halves, zero: Halves) -> Doubles:
    return doubles(code) * doubles(scale) + doubles(zero)


def _terms(code: npt.NDArray[Any], scale: Halves, zero: Halves) -> Doubles:
    return doubles(code) * doubles(scale) + np.abs(doubles(zero))


def quantize(
    values: Halves, excluded: npt.NDArray[np.bool_], bits: int, axis: int, clip: int = 100
) -> tuple[npt.NDArray[np.uint8], Halves, Halves]:
    """Codes, scale, zero of groups along `axis`; excluded elements don't widen their group."""
    x = values.astype(np.float32)
    top = np.float32(2**bits - 1)
    low = np.min(np.where(excluded, np.inf, x), axis=axis, keepdims=True).astype(np.float32)
    high = np.max(np.where(excluded, -np.inf, x), axis=axis, keepdims=True).astype(np.float32)
    has_nan = np.any(np.isnan(x) & ~excluded, axis=axis, keepdims=True)
    empty = np.all(excluded | np.zeros(x.shape, bool), axis=axis, keepdims=True)
    usable = ~(has_nan | empty)

    low, high = np.where(usable, low, np.float32(0)), np.where(usable, high, np.float32(0))
    margin = doubles(np.float32(100 - clip) * np.float32(0.005))
    width = doubles(high - low)  # the products are exact in double precision
    low, high = (
        (doubles(end) + sign * width * margin).astype(np.float32)
        for end, sign in ((low, 1), (high, -1))
    )
    zero = low.astype(np.float16) + np.float16(0)  # -0 becomes +0
    step = (high - zero.astype(np.float32)) / top
    scale = np.maximum(step, np.float32(0)).astype(np.float16)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale.astype(np.float32), np.float32(0))
        scaled = (x - zero.astype(np.float32)) * inverse.astype(np.float32)
    codes = np.rint(np.clip(np.where(np.isnan(scaled), 0, scaled), 0, top)).astype(np.uint8)
    codes = np.where(has_nan, 0, codes).astype(np.uint8)
    return codes, np.where(has_nan, NAN16, scale), np.where(has_nan, NAN16, zero)


def block_scale(exponents: Bytes) -> Halves:
    scales: Halves = (exponents.astype(np.uint16) << 10).view(np.float16)
    scales[exponents == 31] = NAN16
    return scales


def block_zero(scale: Halves, bits: int) -> Halves:
    """+0 where the scale is 0."""
    zero: Halves = np.float16(0) - scale * np.float16(BLOCKS[bits][1])
    return zero


def quantize_blocks(values: Halves, bits: int) -> tuple[npt.NDArray[np.uint8], Halves, Halves]:
    """Codes (..., 32), scale and zero (..., 1) of blocks (..., 32)."""
    largest = np.max(np.abs(doubles(values)), axis=-1, keepdims=True)
    limits = np.ldexp(BLOCKS[bits][0], np.arange(-14, 16))
    exponents = 1 + np.sum(largest > limits, axis=-1, keepdims=True)
    exponents = np.where(np.isnan(largest), 31, np.where(largest == 0, 0, exponents))
    scale = block_scale(exponents.astype(np.uint8))
    zero = block_zero(scale, bits)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale.astype(np.float32), np.float32(0))
        scaled = (values.astype(np.float32) - zero.astype(np.float32)) * inverse
    codes = np.rint(np.clip(np.where(np.isnan(scaled), 0, scaled), 0, 2**bits - 1))
    return codes.astype(np.uint8), scale, zero


def token_norms(k: Halves) -> Halves:
    """(..., D) -> (...): channel c joins sum c % 32 in rising order; sums are halved pairwise."""
    squares = k.astype(np.float32) ** 2
    sums = np.zeros((*k.shape[:-1], 32), np.float32)
    for begin in range(0, k.shape[-1], 32):
        sums = sums + squares[..., begin : begin + 32]
    width = 16
    while width > 0:
        sums[..., :width] += sums[..., width : 2 * width]
        width //= 2
    return to_half(np.sqrt(sums[..., 0]))


def normalized(k: Halves, norms: Halves) -> Halves:
    length = norms.astype(np.float32)[..., None]
    with np.errstate(divide="ignore"):
        inverse = np.where(length != 0, np.float32(1) / length, np.float32(0))
    return to_half(k.astype(np.float32) * inverse)


def quantize_page(f: KvFormat, k: Halves, v: Halves, first_tokens: int = 0) -> Page:
    """k, v (..., P, D). `first_tokens`: how many of these tokens keep_first covers."""
    lead, (tokens, channels) = k.shape[:-2], k.shape[-2:]
    norms = token_norms(k) if f.token_norm else np.ones((*lead, tokens), np.float16)
    coded = normalized(k, norms) if f.token_norm else k
    if f.k_axis == "channel":
        grouped = coded.reshape(*lead, tokens // f.k_group, f.k_group, channels)
        excluded = (np.arange(tokens) < first_tokens).reshape(-1, f.k_group, 1)
        k_parts = quantize(grouped, excluded, f.k_bits, -2, f.k_clip)
    else:
        grouped = coded.reshape(*lead, tokens, channels // f.k_group, f.k_group)
        k_parts = quantize(grouped, np.zeros((1, 1, 1), bool), f.k_bits, -1, f.k_clip)
    v_grouped = v.reshape(*lead, tokens, channels // f.v_group, f.v_group)
    v_parts = quantize(v_grouped, np.zeros((1, 1, 1), bool), f.v_bits, -1, f.v_clip)
    if f.k_axis == "block":
        k_parts = quantize_blocks(grouped, f.k_bits)
        v_parts = quantize_blocks(v_grouped, f.v_bits)

    def spread(part: npt.NDArray[Any], like: Halves) -> npt.NDArray[Any]:
        return np.broadcast_to(part, like.shape).reshape(k.shape)

    k_codes, k_scale, k_zero = (spread(part, grouped) for part in k_parts)
    v_codes, v_scale, v_zero = (spread(part, v_grouped) for part in v_parts)
    return Page(k_codes, v_codes, k_scale, k_zero, v_scale, v_zero, norms)


def write_page(f: KvFormat, page: Page) -> Bytes:
    """(..., page_bytes)"""
    record = np.zeros((*page.k_codes.shape[:-2], page_bytes(f)), np.uint8)
    for index, chunk in enumerate(chunks(f)):
        tokens = slice(index * CHUNK, (index + 1) * CHUNK)
        for bits, offset, places, codes in (
            (f.k_bits, chunk.k_codes, k_code_bits(f.k_bits, f.head_dim), page.k_codes),
            (f.v_bits, chunk.v_codes, v_code_bits(f.v_bits, f.head_dim), page.v_codes),
        ):
            for field in range(0, 8, bits):  # codes of one field of all bytes at once
                of_field = places % 8 == field
                byte = offset + places[of_field] // 8
                record[..., byte] |= codes[..., tokens, :][..., of_field] << np.uint8(field)
        for values, offset, elements in _parameters(f, index, chunk, page):
            put_elements(record, offset, elements, values)
    return record


def _parameters(
    f: KvFormat, index: int, chunk: Chunk, page: Page
) -> list[tuple[Halves | Bytes, int, Ints]]:
    """(values, byte offset, element numbers) of every plane of parameters of a chunk."""
    begin = index * CHUNK
    tokens = slice(begin, begin + CHUNK)
    planes: list[tuple[Halves | Bytes, int, Ints]] = []
    for group in range(chunk.groups_here):
        token = begin + group * f.k_group
        offset = chunk.k_groups + group * 2 * f.head_dim * 2
        order = channel_order(f.head_dim)
        planes.append((page.k_scale[..., token, :], offset, order))
        planes.append((page.k_zero[..., token, :], offset + 2 * f.head_dim, order))
    per_token = [(chunk.v_parameters, f.v_group, page.v_scale, page.v_zero)]
    if f.k_axis != "channel":
        per_token.append((chunk.k_parameters, f.k_group, page.k_scale, page.k_zero))
    for offset, group_channels, scale, zero in per_token:
        for group in range(f.head_dim // group_channels):
            plane = offset + group * chunk.plane
            channel = group * group_channels
            if f.k_axis == "block":
                raw = np.ascontiguousarray(scale[..., tokens, channel]).view(np.uint16)
                planes.append(((raw >> 10).astype(np.uint8), plane, token_order()))
                continue
            planes.append((scale[..., tokens, channel], plane, token_order()))
            planes.append((zero[..., tokens, channel], plane + 2 * CHUNK, token_order()))
    if f.token_norm:
        planes.append((page.norms[..., tokens], chunk.norms, token_order()))
    return planes


def read_page(f: KvFormat, record: Bytes) -> Page:
    """(..., page_bytes) -> pages in the clear."""
    shape = (*record.shape[:-1], f.page_tokens, f.head_dim)
    k_codes, v_codes = (np.zeros(shape, np.uint8) for _ in range(2))
    k_scale, k_zero, v_scale, v_zero = (np.zeros(shape, np.float16) for _ in range(4))
    norms = np.ones(shape[:-1], np.float16)
    page = Page(k_codes, v_codes, k_scale, k_zero, v_scale, v_zero, norms)
    for index, chunk in enumerate(chunks(f)):
        begin = index * CHUNK
        tokens = slice(begin, begin + CHUNK)
        for bits, offset, places, codes in (
            (f.k_bits, chunk.k_codes, k_code_bits(f.k_bits, f.head_dim), page.k_codes),
            (f.v_bits, chunk.v_codes, v_code_bits(f.v_bits, f.head_dim), page.v_codes),
        ):
            byte = record[..., offset + places // 8]
            codes[..., tokens, :] = byte >> (places % 8).astype(np.uint8) & (2**bits - 1)
        for group in range(chunk.groups_here):
            members = slice(begin + group * f.k_group, begin + (group + 1) * f.k_group)
            offset = chunk.k_groups + group * 2 * f.head_dim * 2
            order = channel_order(f.head_dim)
            page.k_scale[..., members, :] = get_elements(record, offset, order)[..., None, :]
            page.k_zero[..., members, :] = get_elements(record, offset + 2 * f.head_dim, order)[
                ..., None, :
            ]
        per_token = [(chunk.v_parameters, f.v_group, f.v_bits, page.v_scale, page.v_zero)]
        if f.k_axis != "channel":
            per_token.append((chunk.k_parameters, f.k_group, f.k_bits, page.k_scale, page.k_zero))
        for offset, group_channels, bits, scale, zero in per_token:
            for group in range(f.head_dim // group_channels):
                members = slice(group * group_channels, (group + 1) * group_channels)
                plane = offset + group * chunk.plane
                order = token_order()
                if f.k_axis == "block":
                    scales = block_scale(record[..., plane + order])[..., None]
                    scale[..., tokens, members] = scales
                    zero[..., tokens, members] = block_zero(scales, bits)
                    continue
                scale[..., tokens, members] = get_elements(record, plane, order)[..., None]
                zero[..., tokens, members] = get_elements(record, plane + 2 * CHUNK, order)[
                    ..., None
                ]
        if f.token_norm:
            page.norms[..., tokens] = get_elements(record, chunk.norms, token_order())
    return page


def pack(f: KvFormat, k: Halves, v: Halves, first_tokens: int = 0) -> Bytes:
    """The whole pages of k, v (T, H, D), as they have arrived, from a page boundary on ->
    (pages, H, page_bytes)."""
    tokens, heads, channels = k.shape
    pages = tokens // f.page_tokens
    shape = (pages, f.page_tokens, heads, channels)
    whole = pages * f.page_tokens
    k, v = (x[:whole].reshape(shape).transpose(0, 2, 1, 3) for x in (k, v))  # (pages, H, P, D)
    records = write_page(f, quantize_page(f, k, v))
    if first_tokens > 0 and pages > 0:
        records[0] = write_page(f, quantize_page(f, k[0], v[0], first_tokens))
    return records
