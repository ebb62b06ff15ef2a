# SPDX-License-Identifier: Apache-2.0
"""Every bad argument: the right exception, a message that names argument, value and what is
allowed, and not one byte of the cache changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cache_contents import ARRAYS, contents
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdecoding import KvFormat, PagedKvCache, pack_pages

F = KvFormat(k_bits=2, k_group=32, v_group=64, page_tokens=64, head_dim=64)
B, S, H = 2, 9, 2


def filled_cache() -> PagedKvCache:
    cache = PagedKvCache(F, batch=B, num_kv_heads=H, max_tokens=200, keep_first=4, keep_last=10)
    x = np.random.default_rng(7).standard_normal((B, 150, H, F.head_dim)).astype(np.float32)
    cache.append(x, -x)
    return cache


def rows(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape or (B, S, H, F.head_dim), dtype)


def ints(*values: int) -> Any:
    return np.array(values, np.int32)


def read_only(x: Any) -> Any:
    x.flags.writeable = False
    return x


def misaligned(x: Any) -> Any:
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:]
    return raw.view(x.dtype).reshape(x.shape)


# argument -> a bad value, exception, words of its message
BAD_APPENDS: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"k": [[1.0]]}, TypeError, ["k = list", "NumPy array"]),
    ({"v": None}, TypeError, ["v = NoneType", "NumPy array"]),
    (
        {"k": rows(dtype=np.float64)},
        TypeError,
        ["k: dtype = float64", "float16, bfloat16, float32"],
    ),
    ({"v": rows(dtype=np.int8)}, TypeError, ["v: dtype = int8", "float16, bfloat16, float32"]),
    ({"k": rows(dtype=">f4")}, TypeError, ["k = ", "NumPy array"]),
    ({"k": rows(B, S, F.head_dim)}, ValueError, ["k: shape = (2, 9, 64)", "(any, any, 2, 64)"]),
    ({"k": rows(B, S, H, 128)}, ValueError, ["k: shape = (2, 9, 2, 128)", "(any, any, 2, 64)"]),
    ({"v": rows(B, S + 1, H, 64)}, ValueError, ["v: shape = (2, 10, 2, 64)", "(2, 9, 2, 64)"]),
    ({"k": rows(3, S, H, 64), "v": rows(3, S, H, 64)}, ValueError, ["3", "allowed: 2", "batch"]),
    ({"k": rows(B, S, H, 128)[..., ::2]}, ValueError, ["k: stride", "= 2", "allowed: 1"]),
    ({"v": misaligned(rows())}, ValueError, ["v: address", "multiples of 4"]),
    ({"leftpad": ints(0)}, ValueError, ["leftpad: shape = (1,)", "(2,)"]),
    ({"leftpad": np.zeros(B, np.int64)}, TypeError, ["leftpad: dtype = int64", "int32"]),
    ({"leftpad": [0, 0]}, TypeError, ["leftpad = list", "NumPy array"]),
    ({"leftpad": ints(0, -1)}, ValueError, ["leftpad[1] = -1", "0 to 9"]),
    ({"leftpad": ints(10, 0)}, ValueError, ["leftpad[0] = 10", "0 to 9"]),
    (
        {"k": rows(B, 50, H, 64), "v": rows(B, 50, H, 64), "leftpad": ints(-1, 0)},
        ValueError,
        ["leftpad[0] = -1"],
    ),
    ({"leftpad": ints(-(2**31), 0)}, ValueError, ["leftpad[0] = -2147483648", "0 to 9"]),
    ({"num_tokens": ints(0, 10)}, ValueError, ["num_tokens[1] = 10", "0 to 9"]),
    ({"num_tokens": ints(-1, 1)}, ValueError, ["num_tokens[0] = -1", "0 to 9"]),
    (
        {"num_tokens": ints(0, 5), "leftpad": ints(0, 5)},
        ValueError,
        ["num_tokens[1] = 5", "0 to 4"],
    ),
    ({"num_tokens": ints(1, 9, 1, 9)[::2]}, ValueError, ["num_tokens: strides = (2,)", "contig"]),
    ({"threads": -1}, ValueError, ["threads = -1", "0"]),
    ({"threads": 1.5}, TypeError, ["threads = 1.5", "int"]),
    ({"threads": 2**40}, ValueError, ["threads = 1099511627776", "0 to"]),
    ({"stream": 0}, ValueError, ["stream = 0", "None", "cpu"]),
    ({"stream": 1.0}, TypeError, ["stream = 1.0", "int"]),
    ({"k": rows(B, 51, H, 64), "v": rows(B, 51, H, 64)}, ValueError, ["201", "200 (max_tokens)"]),
]

BAD_DECODES: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"q": [1.0]}, TypeError, ["q = list", "NumPy array"]),
    ({"q": rows(B, 1, 4, 64, dtype=np.int32)}, TypeError, ["q: dtype = int32", "bfloat16"]),
    ({"q": rows(B, 4, 64)}, ValueError, ["q: shape = (2, 4, 64)", "(2, any, any, 64)"]),
    ({"q": rows(B, 1, 4, 128)}, ValueError, ["q: shape = (2, 1, 4, 128)", "(2, any, any, 64)"]),
    ({"q": rows(3, 1, 4, 64)}, ValueError, ["q: shape = (3, 1, 4, 64)", "(2, any, any, 64)"]),
    ({"q": rows(B, 1, 3, 64), "out": None}, ValueError, ["query_heads = 3", "multiples", "2"]),
    ({"q": rows(B, 1, 0, 64), "out": None}, ValueError, ["query_heads = 0", "multiples"]),
    ({"q": rows(B, 1, 4, 128)[..., ::2]}, ValueError, ["q: stride", "= 2", "allowed: 1"]),
    ({"out": rows(B, 1, 4, 64, dtype=np.float16)}, TypeError, ["out: dtype = float16", "float32"]),
    ({"out": rows(B, 1, 2, 64)}, ValueError, ["out: shape = (2, 1, 2, 64)", "(2, 1, 4, 64)"]),
    ({"out": rows(B, 4, 1, 64).transpose(0, 2, 1, 3)[:, ::-1, :, ::-1]}, ValueError, ["out: str"]),
    ({"out": read_only(rows(B, 1, 4, 64))}, ValueError, ["out = a read-only array", "written"]),
    ({"out": [0.0]}, TypeError, ["out = list", "NumPy array"]),
    ({"softmax_scale": float("nan")}, ValueError, ["softmax_scale = nan", "finite"]),
    ({"softmax_scale": float("inf")}, ValueError, ["softmax_scale = inf", "finite"]),
    ({"softmax_scale": "1"}, TypeError, ["softmax_scale = '1'", "number"]),
    ({"softmax_scale": 10**400}, TypeError, ["softmax_scale = 1", "number"]),
    ({"threads": -2}, ValueError, ["threads = -2", "0"]),
    ({"threads": None}, TypeError, ["threads = None", "int"]),
    ({"stream": 3}, ValueError, ["stream = 3", "None", "cpu"]),
    ({"kernel": "decode_x"}, ValueError, ["kernel = 'decode_x'", "None", "cpu"]),
]

BAD_PACKS: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    (
        {"pool": np.zeros((4, H, F.page_bytes()), np.int8)},
        TypeError,
        ["pool: dtype = int8", "uint8"],
    ),
    (
        {"pool": np.zeros((4, H, 17), np.uint8)},
        ValueError,
        ["pool: shape = (4, 2, 17)", "any, any"],
    ),
    (
        {"pool": np.zeros((8, H, F.page_bytes()), np.uint8)[::2]},
        ValueError,
        ["pool: strides", "contiguous"],
    ),
    (
        {"pool": read_only(np.zeros((4, H, F.page_bytes()), np.uint8))},
        ValueError,
        ["pool = a read-only array"],
    ),
    (
        {"pool": np.zeros(4 * H * F.page_bytes() + 8, np.uint8)[8:].reshape(4, H, -1)},
        ValueError,
        ["pool: address", "multiples of 16"],
    ),
    ({"block_table": ints(0, 1)}, ValueError, ["block_table: shape = (2,)", "(2, any)"]),
    ({"block_table": np.zeros((B, 2))}, TypeError, ["block_table: dtype = float64", "int32"]),
    (
        {"block_table": ints(0, 1, 2, 4).reshape(2, 2)},
        ValueError,
        ["block_table[1, 1] = 4", "0 to 3"],
    ),
    ({"block_table": ints(0, -1, 2, 3).reshape(2, 2)}, ValueError, ["block_table[0, 1] = -1"]),
    ({"block_table": ints(0, 1, 2, 1).reshape(2, 2)}, ValueError, ["block_table[1, 1] = 1", "own"]),
    ({"block_table": ints(0, 1).reshape(2, 1)}, ValueError, ["first_page", "allowed"]),
    ({"first_page": ints(0, 1)}, ValueError, ["first_page[1] = 1", "allowed"]),
    ({"first_page": ints(-1, 0)}, ValueError, ["first_page[0] = -1", "allowed"]),
    ({"keep_first": 65}, ValueError, ["keep_first = 65", "page_tokens (64)"]),
    ({"keep_first": -1}, ValueError, ["keep_first = -1", "0"]),
    ({"keep_first": 1.5}, TypeError, ["keep_first = 1.5", "int"]),
    ({"format": "k3"}, ValueError, ["format = 'k3'", "allowed"]),
    ({"format": 4}, TypeError, ["format = 4", "KvFormat"]),
    ({"stream": 1}, ValueError, ["stream = 1", "None", "cpu"]),
    ({"stream": "0"}, TypeError, ["stream = '0'", "int"]),
    ({"stream": -1}, ValueError, ["stream = -1", "0 to"]),
    ({"num_tokens": ints(129, 0)}, ValueError, ["num_tokens[0] = 129", "0 to 128"]),
    ({"threads": -1}, ValueError, ["threads = -1"]),
    ({"threads": "2"}, TypeError, ["threads = '2'", "int"]),
]


def expect_refusal(
    call: Callable[[], object],
    error: type[Exception],
    words: list[str],
    before: Callable[[], bytes],
) -> None:
    snapshot = before()
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    text = str(caught.value)
    assert all(word in text for word in [*words, "allowed"]), text
    assert before() == snapshot


def name_of(case: Any) -> str | None:
    return "-".join(case) if isinstance(case, dict) else None


@pytest.mark.parametrize(("bad", "error", "words"), BAD_APPENDS, ids=name_of)
def test_append(bad: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    cache = filled_cache()
    arguments = {"k": rows(), "v": rows(), **bad}
    k, v = arguments.pop("k"), arguments.pop("v")
    expect_refusal(lambda: cache.append(k, v, **arguments), error, words, lambda: contents(cache))


@pytest.mark.parametrize(("bad", "error", "words"), BAD_DECODES, ids=name_of)
def test_decode(bad: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    cache = filled_cache()
    arguments = {"q": rows(B, 1, 4, 64), "out": rows(B, 1, 4, 64), **bad}
    q, out = arguments.pop("q"), arguments["out"]

    def state() -> bytes:
        return contents(cache) + (out.tobytes() if isinstance(out, np.ndarray) else b"")

    expect_refusal(lambda: cache.decode(q, **arguments), error, words, state)


@pytest.mark.parametrize(("bad", "error", "words"), BAD_PACKS, ids=name_of)
def test_pack(bad: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    arguments = {
        "k": rows(B, 128, H, 64),
        "v": rows(B, 128, H, 64),
        "pool": np.full((4, H, F.page_bytes()), 3, np.uint8),
        "block_table": ints(0, 1, 2, 3).reshape(2, 2),
        "format": F,
        **bad,
    }
    positional = [arguments.pop(name) for name in ("k", "v", "pool", "block_table")]
    expect_refusal(
        lambda: pack_pages(*positional, **arguments), error, words, positional[2].tobytes
    )


BAD_CACHES: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"format": "int4"}, ValueError, ["format = 'int4'"]),
    ({"format": None}, TypeError, ["format = None", "KvFormat"]),
    ({"format": 128}, TypeError, ["format = 128", "KvFormat"]),
    ({"batch": 0}, ValueError, ["batch = 0", "1 to"]),
    ({"batch": 2.0}, TypeError, ["batch = 2.0", "int"]),
    ({"num_kv_heads": -1}, ValueError, ["num_kv_heads = -1", "1 to"]),
    ({"max_tokens": -1}, ValueError, ["max_tokens = -1", "0 to"]),
    ({"max_tokens": 2**40}, ValueError, ["max_tokens = 1099511627776", "0 to"]),
    ({"keep_first": 65}, ValueError, ["keep_first = 65", "page_tokens (64)"]),
    ({"keep_last": -1}, ValueError, ["keep_last = -1", "0 to"]),
    ({"keep_last": 2**29}, ValueError, ["keep_last = 536870912", "0 to"]),
    ({"device": "tpu"}, ValueError, ["device = 'tpu'", "'cpu'"]),
    ({"device": "cuda:x"}, ValueError, ["device = 'cuda:x'", "'cpu'"]),
]


@pytest.mark.parametrize(("bad", "error", "words"), BAD_CACHES, ids=name_of)
def test_cache(bad: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    arguments = {"format": F, "batch": 1, "num_kv_heads": 1, "max_tokens": 100, **bad}
    expect_refusal(lambda: PagedKvCache(**arguments), error, words, bytes)


def wrapped(**bad: Any) -> PagedKvCache:
    cache = filled_cache()
    arrays = {name: getattr(cache, name) for name in ARRAYS}
    named = {"format": F, **arrays, "keep_first": 4, "keep_last": 10, **bad}
    return PagedKvCache.wrap(**named)


BAD_WRAPS: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"pool": np.zeros((4, H, 100), np.uint8)}, ValueError, ["pool: shape = (4, 2, 100)"]),
    (
        {"pool": read_only(np.zeros((4, H, F.page_bytes()), np.uint8))},
        ValueError,
        ["pool = a read"],
    ),
    ({"side": np.zeros((B, H, 2, 100, 64), np.float32)}, TypeError, ["side: dtype = float32"]),
    ({"side": np.zeros((B, 1, 2, 100, 64), np.float16)}, ValueError, ["side: shape", "(any, 2, 2"]),
    ({"side": np.zeros((B, H, 2, 20, 64), np.float16)}, ValueError, ["tail_tokens = 16", "80 or"]),
    ({"side": np.zeros((B, H, 2, 2, 64), np.float16)}, ValueError, ["tail_tokens = -2", "80 or"]),
    (
        {"side": read_only(np.zeros((B, H, 2, 84, 64), np.float16))},
        ValueError,
        ["side = a read-only"],
    ),
    (
        {"block_table": np.zeros((B, 2), np.int64)},
        TypeError,
        ["block_table: dtype = int64", "int32"],
    ),
    ({"block_table": np.zeros((1, 2), np.int32)}, ValueError, ["block_table: shape = (1, 2)"]),
    ({"slots": ints(0)}, ValueError, ["slots: shape = (1,)", "(2,)"]),
    ({"lengths": read_only(ints(0, 0))}, ValueError, ["lengths = a read-only array"]),
    ({"lengths": ints(0, 0, 0, 0)[::2]}, ValueError, ["lengths: strides = (2,)"]),
    ({"packed": ints(0)}, ValueError, ["packed: shape = (1,)", "(2,)"]),
    ({"packed": [0, 0]}, TypeError, ["packed = list"]),
    ({"keep_first": 100}, ValueError, ["keep_first = 100", "page_tokens (64)"]),
    ({"keep_first": "4"}, TypeError, ["keep_first = '4'", "int"]),
    ({"format": 5}, TypeError, ["format = 5", "KvFormat"]),
    ({"keep_last": 17}, ValueError, ["tail_tokens = 80", "96 or more"]),
    ({"k_mean": np.zeros((H, 64), np.float32)}, TypeError, ["k_mean: dtype = float32"]),
    ({"k_mean": np.zeros((H, 32), np.float16)}, ValueError, ["k_mean: shape = (2, 32)", "(2, 64)"]),
    (
        {"k_mean": np.zeros((H, 128), np.float16)[:, ::2]},
        ValueError,
        ["k_mean: strides = (128, 2)", "contiguous"],
    ),
    (
        {"k_mean": np.zeros(H * 64 + 1, np.float16)[1:].reshape(H, 64)},
        ValueError,
        ["k_mean address = ", "multiples of 16"],
    ),
]


@pytest.mark.parametrize(("bad", "error", "words"), BAD_WRAPS, ids=name_of)
def test_wrap(bad: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    expect_refusal(lambda: wrapped(**bad), error, words, bytes)


BAD_FORMATS: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"k_bits": 4.0}, TypeError, ["k_bits = 4.0", "int"]),
    ({"v_bits": 3}, ValueError, ["v_bits = 3", "2, 4"]),
    ({"k_group": None}, TypeError, ["k_group = None", "int"]),
    ({"page_tokens": 2**40}, TypeError, ["page_tokens = 1099511627776", "int"]),
    ({"head_dim": "64"}, TypeError, ["head_dim = '64'", "int"]),
    ({"k_axis": 1}, TypeError, ["k_axis = 1", "'channel', 'token', 'block'"]),
    ({"k_axis": "head"}, ValueError, ["k_axis = 'head'", "'channel', 'token', 'block'"]),
    ({"token_norm": 2}, TypeError, ["token_norm = 2", "bool"]),
    ({"k_rotation": True}, ValueError, ["k_rotation = 1", "0, 16, 64, 128"]),
    ({"bits": 4}, TypeError, ["bits = 4", "k_bits, v_bits"]),
]


@pytest.mark.parametrize(("bad", "error", "words"), BAD_FORMATS, ids=name_of)
def test_format(bad: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    expect_refusal(lambda: KvFormat(**bad), error, words, bytes)


@pytest.mark.parametrize("name", [None, 4, b"k4v4_c128_v128_p128_d128"])
def test_format_name(name: Any) -> None:
    expect_refusal(lambda: KvFormat.parse(name), TypeError, [f"name = {name}", "str"], bytes)


def test_read_only_inputs_are_welcome() -> None:
    cache = filled_cache()
    arrays = {name: getattr(cache, name) for name in ARRAYS}
    arrays["block_table"] = read_only(arrays["block_table"].copy())
    arrays["slots"] = read_only(arrays["slots"].copy())
    again = PagedKvCache.wrap(F, **arrays, keep_first=4, keep_last=10)
    again.append(read_only(rows()), read_only(rows()), num_tokens=read_only(ints(3, 4)))
    again.decode(read_only(rows(B, 1, 4, 64)))
    assert cache.lengths.tolist() == [153, 154]


def test_one_device(torch: Any) -> None:
    cache = filled_cache()
    elsewhere = torch.ones(B, S, H, 64, device="meta")
    with pytest.raises((TypeError, ValueError), match="k"):
        cache.append(elsewhere, elsewhere)


# ---- random damage ----


@given(
    array=st.sampled_from(["block_table", "slots", "lengths", "packed"]),
    value=st.one_of(st.integers(-(2**31), -1), st.integers(300, 2**31 - 1)),
    b=st.integers(0, 1),
)
@settings(max_examples=150)
def test_damaged_tables_are_refused(array: str, value: int, b: int) -> None:
    cache = filled_cache()
    getattr(cache, array)[b, ...] = value
    out = np.full((B, 1, 4, F.head_dim), 5, np.float32)

    def state() -> bytes:
        return contents(cache) + out.tobytes()

    words = [f"[{b}", str(value)]
    expect_refusal(cache.check, ValueError, words, state)
    expect_refusal(lambda: cache.decode(out, out=out), ValueError, words, state)
    expect_refusal(lambda: cache.append(rows(), rows()), ValueError, words, state)


@given(
    shape=st.lists(st.integers(0, 3), min_size=0, max_size=6),
    dtype=st.sampled_from(["f2", "f4", "f8", "i4", "i8", "u1", "?", "c8", ">f4"]),
    argument=st.sampled_from(["k", "v", "leftpad", "num_tokens", "q", "out"]),
)
@settings(max_examples=200)
def test_arrays_of_any_shape_and_dtype(shape: list[int], dtype: str, argument: str) -> None:
    cache = filled_cache()
    snapshot = contents(cache)
    bad = np.zeros(shape, dtype)
    arguments: dict[str, Any] = {"k": rows(), "v": rows()}
    if argument in ("q", "out"):
        arguments = {"q": rows(B, 1, 4, 64), "out": rows(B, 1, 4, 64)}
        operation: Callable[..., object] = cache.decode
    else:
        operation = cache.append
    arguments[argument] = bad
    fits = argument in ("leftpad", "num_tokens") and shape == [2] and dtype == "i4"
    if fits:
        operation(**arguments)
        return
    with pytest.raises((TypeError, ValueError), match=f"{argument}.*allowed"):
        operation(**arguments)
    assert contents(cache) == snapshot
