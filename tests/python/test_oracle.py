# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: docs/format.md's worked example, its inverse, and attention on paper."""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path

import numpy as np
import oracle
import oracle_attention
import oracle_layout
import pytest
from samples import FAMILIES, family, legal_formats

from bitdecoding import KvFormat, pack_pages

FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "format.md"
EXAMPLES = re.findall(r"```kv-page\n(.*?)```", FORMAT_PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_worked_example(example: str) -> None:
    head, sizes, *lines = (line for line in example.splitlines() if not line.startswith("#"))
    f = KvFormat.parse(head.split()[1])
    first_tokens = int(head.split()[3])
    token, channel = np.indices((f.page_tokens, f.head_dim))
    k = ((13 * token + 29 * channel + token * channel) % 251 - 125) / 8
    k = np.where(token < 4, 16, 1) * k
    v = ((7 * token + 31 * channel + 3 * token * channel) % 127 - 63) / 16
    arrived = oracle.arrived(k, f.k_rotation), oracle.arrived(v, f.v_rotation)
    page = oracle.quantize_page(f, *arrived, first_tokens)
    record = oracle.write_page(f, page)
    assert sizes.split()[:2] == ["bytes", str(len(record))]
    assert int(sizes.split()[3], 16) == zlib.crc32(record.tobytes())

    assert len(lines) > 10
    for line in lines:
        kind, *fields = line.split()
        if kind == "norm":
            place, byte, raw = int(fields[0]), int(fields[1]), int(fields[2], 16)
            assert page.norms[place].view(np.uint16) == raw
            assert record[byte : byte + 2].view(np.uint16)[0] == raw
            continue
        n, c, byte, bit, code = (int(text) for text in fields[:5])
        codes = page.k_codes if kind == "K" else page.v_codes
        scale, zero = (page.k_scale, page.k_zero) if kind == "K" else (page.v_scale, page.v_zero)
        bits = f.k_bits if kind == "K" else f.v_bits
        assert codes[n, c] == code
        assert record[byte] >> bit & (2**bits - 1) == code
        value = float(code) * float(scale[n, c]) + float(zero[n, c])
        assert value == pytest.approx(float(fields[-1]), rel=1e-8)
        if f.k_axis == "block":
            exponent = int(scale[n, c].view(np.uint16)) >> 10
            assert record[int(fields[5])] == int(fields[6]) == exponent
            continue
        for parameter, (place_text, raw_text) in ((scale, fields[5:7]), (zero, fields[7:9])):
            assert parameter[n, c].view(np.uint16) == int(raw_text, 16)
            place = int(place_text)
            assert record[place : place + 2].view(np.uint16)[0] == int(raw_text, 16)

    pool = np.zeros((1, 1, f.page_bytes()), np.uint8)
    rows_k, rows_v = (x.astype(np.float32)[None, :, None] for x in (k, v))  # (B, S, H, D)
    pack_pages(rows_k, rows_v, pool, np.zeros((1, 1), np.int32), format=f, keep_first=first_tokens)
    assert np.array_equal(pool[0, 0], record)


def test_examples_were_found() -> None:
    assert len(EXAMPLES) == 5


def test_reading_inverts_writing(rng: np.random.Generator) -> None:
    for f in legal_formats()[::7]:
        shape = (2, f.page_tokens, f.head_dim)
        k, v = (oracle.to_half(family("nan", shape, rng)) for _ in range(2))
        written = oracle.quantize_page(f, k, v, first_tokens=9)
        read = oracle.read_page(f, oracle.write_page(f, written))
        for name in ("k_codes", "v_codes"):
            assert np.array_equal(getattr(read, name), getattr(written, name)), (str(f), name)
        for name in ("k_scale", "k_zero", "v_scale", "v_zero", "norms"):
            found, expected = (
                np.ascontiguousarray(getattr(page, name)).view(np.uint16)
                for page in (read, written)
            )
            assert np.array_equal(found, expected), (str(f), name)


def test_every_bit_of_the_codes_is_used_once() -> None:
    for bits in (2, 4):
        for head_dim in (64, 128, 256):
            for places in (oracle_layout.k_code_bits, oracle_layout.v_code_bits):
                found = np.sort(places(bits, head_dim).ravel())
                assert np.array_equal(found, np.arange(0, 64 * head_dim * bits, bits))


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "nan"])
def test_quantised_values_are_near(kind: str, rng: np.random.Generator) -> None:
    f = KvFormat()
    k, v = (oracle.to_half(family(kind, (128, 128), rng)) for _ in range(2))
    page = oracle.quantize_page(f, k, v)
    for values, exact, scale in ((page.keys(), k, page.k_scale), (page.values(), v, page.v_scale)):
        # Half a step, and the rounding of the scale to fp16 over all 15 steps.
        allowed = scale.astype(float) * (0.5 + 15 * 2.0**-10) + 16 * 2.0**-25
        assert np.all(np.abs(values - exact.astype(float)) <= allowed)


def test_attention_on_paper() -> None:
    one, zero = np.ones((2, 1, 1)), np.zeros((2, 1, 1))
    tokens = oracle_attention.Attended(
        one * [[[0.0]], [[1.0]]], one * [[[3.0]], [[7.0]]], one, 7 * one, zero, zero, zero
    )
    result = oracle_attention.attention(np.full((1, 1, 1), 2.0), tokens, 0.5)
    weight = 1 / (1 + math.exp(-1))  # of the second token: its score is 1, the other's 0
    assert result.out[0, 0, 0] == pytest.approx(3 + 4 * weight)
    assert result.lse[0, 0] == pytest.approx(math.log(1 + math.e))
    assert 0 < result.out_budget[0, 0, 0] < 1e-4
