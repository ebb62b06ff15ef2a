# SPDX-License-Identifier: Apache-2.0
"""pack_pages on a CPU gives the NumPy quantiser's bytes, in every format, for every input."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest
from samples import FAMILIES, FORMATS, clipped_formats, family, mixed, rotated_formats

from bitdecoding import KvFormat, pack_pages


def assert_pages(
    f: KvFormat,
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    pool: npt.NDArray[np.uint8],
    pages: npt.NDArray[np.int32],
    first_tokens: int = 0,
    note: str = "",
    mean: npt.NDArray[np.float16] | None = None,
) -> None:
    """k, v (T, H, D): the pages of `pool` that they fill hold the oracle's bytes."""
    k, v = oracle.arrived(k, f.k_rotation, mean), oracle.arrived(v, f.v_rotation)
    expected = oracle.pack(f, k, v, first_tokens)
    found = pool[pages[: len(expected)]]
    differing = np.argwhere(found != expected)
    if len(differing) > 0:
        page, head, byte = differing[0]
        pytest.fail(
            f"{f} {note}: {len(differing)} bytes differ, first in page {page} head {head} "
            f"at {byte}: {found[page, head, byte]} instead of {expected[page, head, byte]}"
        )


@pytest.mark.parametrize("axis", ["channel", "token", "block"])
def test_every_format(axis: str, rng: np.random.Generator) -> None:
    for f in [*clipped_formats(), *rotated_formats()]:
        if f.k_axis != axis:
            continue
        tokens = 2 * f.page_tokens + 7
        k, v = (mixed(len(FAMILIES), tokens, 1, f.head_dim, rng) for _ in range(2))
        pool = np.full((2 * len(k), 1, f.page_bytes()), 0xA5, np.uint8)
        table = rng.permutation(len(pool)).astype(np.int32).reshape(len(k), 2)
        keep_first = int(rng.integers(f.page_tokens + 1))
        mean = rng.standard_normal((1, f.head_dim)).astype(np.float16) if keep_first % 2 else None
        pack_pages(k, v, pool, table, format=f, keep_first=keep_first, k_mean=mean)
        for b, kind in enumerate(FAMILIES):
            note = f"{kind} F={keep_first}"
            assert_pages(f, k[b], v[b], pool, table[b], keep_first, note, mean)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_every_family_and_dtype(
    kind: str, dtype: str, rng: np.random.Generator, request: pytest.FixtureRequest
) -> None:
    for f in FORMATS:
        shape = (1, f.page_tokens, 2, f.head_dim)
        with np.errstate(over="ignore"):
            k, v = (family(kind, shape, rng) for _ in range(2))
            if dtype == "float16":
                k, v = k.astype(np.float16), v.astype(np.float16)
        given_k, given_v = k, v
        if dtype == "bfloat16":
            torch = request.getfixturevalue("torch")
            given_k, given_v = (torch.from_numpy(x).bfloat16() for x in (k, v))
            k, v = (x.float().numpy() for x in (given_k, given_v))
        pool = np.zeros((1, 2, f.page_bytes()), np.uint8)
        table = np.zeros((1, 1), np.int32)
        pack_pages(given_k, given_v, pool, table, format=f)
        assert_pages(f, k[0], v[0], pool, table[0], note=f"{kind} {dtype}")


def test_bf16_is_never_read_as_fp16(torch: Any) -> None:
    f = FORMATS[0]
    k = torch.full((1, f.page_tokens, 1, f.head_dim), 3.0, dtype=torch.bfloat16)
    pool = np.zeros((1, 1, f.page_bytes()), np.uint8)
    pack_pages(k, k, pool, np.zeros((1, 1), np.int32), format=f)
    page = oracle.read_page(f, pool[0])
    assert np.all(page.keys() == 3)
    assert np.all(page.values() == 3)


def test_strided_inputs_are_read_in_place(rng: np.random.Generator) -> None:
    f = FORMATS[1]
    k, v = (family("normal", (2, 3, f.page_tokens, f.head_dim), rng) for _ in range(2))
    k = k.transpose(0, 2, 1, 3)  # (B, S, H, D)
    v = v[:, :, ::-1].transpose(0, 2, 1, 3)  # tokens backwards
    pool = np.zeros((2, 3, f.page_bytes()), np.uint8)
    table = np.array([[1], [0]], np.int32)
    pack_pages(k, v, pool, table, format=str(f))
    for b in range(2):
        assert_pages(f, k[b], v[b], pool, table[b])


def test_padding_and_tokens_past_the_last_page_are_never_read(rng: np.random.Generator) -> None:
    f = FORMATS[2]
    counts, pads = [0, 63, 64, 150, 200], [9, 200, 3, 50, 0]
    k, v = (np.full((5, 263, 2, f.head_dim), np.nan, np.float32) for _ in range(2))
    for b, (pad, tokens) in enumerate(zip(pads, counts, strict=True)):
        whole = slice(pad, pad + tokens // 64 * 64)
        k[b, whole] = family("normal", k[b, whole].shape, rng)
        v[b, whole] = family("normal", v[b, whole].shape, rng)
    table = np.full((5, 5), -1, np.int32)
    first_page = np.array([0, 1, 2, 1, 0], np.int32)
    used = {(2, 2): 5, (3, 1): 2, (3, 2): 4, (4, 0): 1, (4, 1): 8, (4, 2): 9}
    for place, page_id in used.items():
        table[place] = page_id
    pool = np.full((10, 2, f.page_bytes()), 0x5A, np.uint8)
    pack_pages(
        k,
        v,
        pool,
        table,
        format=f,
        first_page=first_page,
        leftpad=np.array(pads, np.int32),
        num_tokens=np.array(counts, np.int32),
        keep_first=5,
    )
    for b, (pad, tokens) in enumerate(zip(pads, counts, strict=True)):
        pages = table[b, first_page[b] :]
        run = slice(pad, pad + tokens)
        first_tokens = 5 if first_page[b] == 0 else 0  # later pages hold no first token
        assert_pages(f, k[b, run], v[b, run], pool, pages, first_tokens, f"row {b}")
    untouched = [page for page in range(10) if page not in used.values()]
    assert np.all(pool[untouched] == 0x5A)


def test_threads_do_not_change_bytes(rng: np.random.Generator) -> None:
    f = FORMATS[5]
    k, v = (mixed(8, 3 * f.page_tokens, 3, f.head_dim, rng) for _ in range(2))
    pools = [np.zeros((24, 3, f.page_bytes()), np.uint8) for _ in range(4)]
    table = rng.permutation(24).astype(np.int32).reshape(8, 3)
    for threads, pool in enumerate(pools):
        pack_pages(k, v, pool, table, format=f, threads=threads)
    assert all(np.array_equal(pool, pools[0]) for pool in pools[1:])


def test_torch_and_numpy_give_the_same(torch: Any, rng: np.random.Generator) -> None:
    f = FORMATS[3]
    k, v = (family("outliers", (2, f.page_tokens, 2, f.head_dim), rng) for _ in range(2))
    table = np.array([[1], [0]], np.int32)
    pool = np.zeros((2, 2, f.page_bytes()), np.uint8)
    pack_pages(k, v, pool, table, format=f)
    other = torch.zeros(pool.shape, dtype=torch.uint8)
    needs_grad = torch.from_numpy(k).requires_grad_()
    pack_pages(needs_grad, torch.from_numpy(v), other, torch.from_numpy(table), format=f)
    assert np.array_equal(pool, other.numpy())


def test_no_tokens(rng: np.random.Generator) -> None:
    f = FORMATS[0]
    pool = np.full((1, 2, f.page_bytes()), 1, np.uint8)
    for batch, tokens in ((1, 0), (0, 5), (1, 127)):
        k = np.zeros((batch, tokens, 2, f.head_dim), np.float16)
        pack_pages(k, k, pool, np.zeros((batch, 1), np.int32), format=f)
    assert np.all(pool == 1)
