# SPDX-License-Identifier: Apache-2.0
"""decode: within the float32 budget of a float64 oracle that reads the same bytes."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle_attention
import oracle_layout
import pytest
from cache_contents import poison_unattended, scattered_cache
from samples import FORMATS, family
from test_append import boundaries

from bitdecoding import KvFormat, PagedKvCache

# Half a unit in the last place of the output: relative, and absolute among subnormals.
ROUNDING = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 0.0), "float32": (2.0**-24, 0.0)}


def assert_attends(
    cache: PagedKvCache,
    q: npt.NDArray[Any],
    out: npt.NDArray[Any],
    lse: npt.NDArray[np.float32] | None = None,
    *,
    softmax_scale: float | None = None,
    dtype: str = "float32",
) -> None:
    """q, out (B, Sq, Hq, D), lse (B, Hq, Sq): every sequence is within its budget."""
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    relative, absolute = ROUNDING[dtype]
    for b in range(len(q)):
        exact = oracle_attention.attention(q[b], oracle_attention.attended(cache, b), scale)
        budget = exact.out_budget + relative * np.abs(exact.out) + absolute
        _assert_within(out[b], exact.out, budget, f"{cache!r}: out of sequence {b}")
        if lse is not None:
            name = f"{cache!r}: lse of sequence {b}"
            _assert_within(lse[b], exact.lse, exact.lse_budget, name)


def _assert_within(
    found: npt.NDArray[Any], exact: npt.NDArray[Any], budget: npt.NDArray[Any], what: str
) -> None:
    assert found.shape == exact.shape, what
    found = found.astype(float)
    same = found == exact  # -inf, and exact zeros whose budget is 0
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0, np.abs(found - exact))
    good = error <= budget
    if not np.all(good):
        with np.errstate(divide="ignore", invalid="ignore"):
            used = np.where(same, 0, error / budget)
        at = np.unravel_index(np.argmax(np.where(np.isnan(used), np.inf, used)), used.shape)
        norm = np.linalg.norm(error) / max(float(np.linalg.norm(exact)), 1e-30)
        pytest.fail(
            f"{what}: {np.sum(~good)} values outside the budget; "
            f"largest error {np.max(error):.3g}, relative error {norm:.3g}; worst at {at}: "
            f"{found[at]} instead of {exact[at]}, {used[at]:.3g} of its budget {budget[at]:.3g}"
        )


def filled_cache(
    f: KvFormat,
    lengths: list[int],
    *,
    heads: int,
    keep_first: int,
    keep_last: int,
    rng: np.random.Generator,
    kind: str = "normal",
) -> PagedKvCache:
    cache = scattered_cache(
        f,
        batch=len(lengths),
        heads=heads,
        max_tokens=max(lengths),
        keep_first=keep_first,
        keep_last=keep_last,
        rng=rng,
    )
    shape = (len(lengths), max(lengths), heads, f.head_dim)
    k, v = (family(kind, shape, rng) for _ in range(2))
    cache.append(k, v, num_tokens=np.array(lengths, np.int32))
    return cache


@pytest.mark.parametrize("f", FORMATS, ids=str)
@pytest.mark.parametrize("zones", [(0, 0), (16, 64), (5, 7), (64, 1), (1, 200)], ids=str)
def test_every_boundary_length(
    f: KvFormat, zones: tuple[int, int], rng: np.random.Generator
) -> None:
    keep_first, keep_last = zones
    lengths = boundaries(f, keep_first, keep_last)
    cache = filled_cache(f, lengths, heads=2, keep_first=keep_first, keep_last=keep_last, rng=rng)
    q = rng.standard_normal((len(lengths), 2, 6, f.head_dim)).astype(np.float32)
    out, lse = cache.decode(q, return_softmax_lse=True)
    assert_attends(cache, q, out, lse)
    empty = lengths.index(0)
    assert np.all(out[empty] == 0)
    assert np.all(np.isneginf(lse[empty]))

    poison_unattended(cache)
    again, lse_again = cache.decode(q, return_softmax_lse=True)
    assert np.array_equal(out, again)
    assert np.array_equal(lse, lse_again)


@pytest.mark.parametrize("kind", ["normal", "outliers", "constant", "huge", "tiny"])
def test_every_finite_family(kind: str, rng: np.random.Generator) -> None:
    for f in FORMATS:
        cache = filled_cache(f, [333], heads=1, keep_first=4, keep_last=20, rng=rng, kind=kind)
        scale = 1e-4 if kind == "huge" else None  # else one token takes all the weight
        q = rng.standard_normal((1, 1, 4, f.head_dim)).astype(np.float32)
        out, lse = cache.decode(q, softmax_scale=scale, return_softmax_lse=True)
        assert_attends(cache, q, out, lse, softmax_scale=scale)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("ratio", [1, 3, 8])
def test_dtypes_head_ratios_and_strides(
    dtype: str, ratio: int, torch: Any, rng: np.random.Generator
) -> None:
    f = FORMATS[1]
    cache = filled_cache(f, [200, 0, 77], heads=3, keep_first=16, keep_last=9, rng=rng)
    x = torch.from_numpy(rng.standard_normal((3, 3 * ratio, 2, f.head_dim)))
    q = x.to(getattr(torch, dtype)).requires_grad_().transpose(1, 2)  # from (B, Hq, Sq, D)
    out, lse = cache.decode(q, return_softmax_lse=True, threads=2)
    assert isinstance(out, torch.Tensor)
    assert isinstance(lse, torch.Tensor)
    assert (out.dtype, out.shape, lse.dtype) == (q.dtype, q.shape, torch.float32)
    exact_q, exact_out = (t.detach().float().numpy() for t in (q, out))
    assert_attends(cache, exact_q, exact_out, lse.numpy(), dtype=dtype)


def test_out_is_written_and_returned(torch: Any, rng: np.random.Generator) -> None:
    f = FORMATS[0]
    cache = filled_cache(f, [300], heads=1, keep_first=16, keep_last=64, rng=rng)
    q = rng.standard_normal((1, 1, 2, f.head_dim)).astype(np.float16)
    out = np.full_like(q, 7)
    expected = cache.decode(q)
    assert type(expected) is np.ndarray
    assert cache.decode(q, out=out) is out
    assert np.array_equal(out, expected)
    tensor = torch.zeros(q.shape, dtype=torch.float16)
    assert cache.decode(torch.from_numpy(q), out=tensor) is tensor
    assert np.array_equal(tensor.numpy(), expected)
    mixed, lse = cache.decode(q, out=tensor.numpy(), return_softmax_lse=True)  # one memory, NumPy
    assert np.array_equal(mixed, expected)
    assert lse.shape == (1, 2, 1)


def test_threads_agree(rng: np.random.Generator) -> None:
    f = FORMATS[2]
    lengths = [1000, 3, 512]
    cache = filled_cache(f, lengths, heads=2, keep_first=16, keep_last=64, rng=rng)
    q = rng.standard_normal((3, 1, 4, f.head_dim)).astype(np.float32)
    for threads in (1, 2, 3, 7):
        out, lse = cache.decode(q, return_softmax_lse=True, threads=threads)
        assert_attends(cache, q, out, lse)
        assert np.array_equal(out, cache.decode(q, threads=threads)), "bits repeat"


@pytest.mark.parametrize("where", ["page", "tail", "first"])
def test_nan_stays_in_its_sequence_and_head(where: str, rng: np.random.Generator) -> None:
    f = FORMATS[0]
    k, v = (family("normal", (2, 400, 2, f.head_dim), rng) for _ in range(2))
    k[1, {"page": 100, "tail": 399, "first": 2}[where], 1, 5] = np.nan
    cache = PagedKvCache(f, batch=2, num_kv_heads=2, max_tokens=400)
    cache.append(k, v)
    q = rng.standard_normal((2, 1, 4, f.head_dim)).astype(np.float32)
    out, lse = cache.decode(q, return_softmax_lse=True)
    assert np.all(np.isnan(out[1, :, 2:]))
    assert np.all(np.isnan(lse[1, 2:]))
    assert np.all(np.isfinite(out[0]))
    assert np.all(np.isfinite(out[1, :, :2]))


def test_large_scores_do_not_overflow(rng: np.random.Generator) -> None:
    f = FORMATS[0]
    cache = filled_cache(f, [300], heads=1, keep_first=4, keep_last=9, rng=rng, kind="outliers")
    q = 100 * rng.standard_normal((1, 1, 2, f.head_dim)).astype(np.float32)
    for scale in (1.0, -1.0):
        out, lse = cache.decode(q, softmax_scale=scale, return_softmax_lse=True)
        assert_attends(cache, q, out, lse, softmax_scale=scale)


@pytest.mark.parametrize("section", ["k_groups", "k_codes", "v_codes", "v_parameters"])
def test_one_wrong_bit_exceeds_the_budget(section: str, rng: np.random.Generator) -> None:
    f = FORMATS[2]
    cache = filled_cache(f, [300], heads=1, keep_first=0, keep_last=64, rng=rng)
    q = rng.standard_normal((1, 1, 1, f.head_dim)).astype(np.float32)
    out = cache.decode(q)
    byte = getattr(oracle_layout.chunks(f)[0], section) + 1  # of a scale: its exponent
    cache.pool[cache.block_table[0, 0], 0, byte] ^= 4
    with pytest.raises(pytest.fail.Exception, match="outside the budget"):
        assert_attends(cache, q, out)
    assert_attends(cache, q, cache.decode(q))


def test_sixteen_bit_tokens_do_not_depend_on_rotations(rng: np.random.Generator) -> None:
    """Only the rounding of K' and V' to fp16 differs; lse is that of the keys as given."""
    k, v = rng.standard_normal((2, 2, 300, 2, 128)).astype(np.float16)
    q = rng.standard_normal((2, 2, 6, 128)).astype(np.float32)
    mean = (3 * rng.standard_normal((2, 128))).astype(np.float16)
    results = []
    for suffix, k_mean in (("", None), ("_kr128_vr64", None), ("_kr16", mean), ("_vr128", mean)):
        f = KvFormat.parse("k4v4_c128_v128_p128_d128" + suffix)
        cache = PagedKvCache(
            f, batch=2, num_kv_heads=2, max_tokens=300, keep_last=300, k_mean=k_mean
        )
        cache.append(k, v)
        results.append(cache.decode(q, return_softmax_lse=True))
    for out, lse in results[1:]:
        assert np.max(np.abs(out - results[0][0])) < 2e-3
        assert np.max(np.abs(lse - results[0][1])) < 2e-3


def test_rotations_make_outlier_channels_cheap(rng: np.random.Generator) -> None:
    k, v = (family("outliers", (1, 512, 1, 128), rng) / 10 for _ in range(2))
    q = rng.standard_normal((1, 1, 4, 128)).astype(np.float32)
    errors = []
    for suffix in ("", "_kr128_vr128"):
        f = KvFormat.parse("k4v4_t128_v128_p128_d128" + suffix)
        outputs = []
        for keep_last in (0, 512):
            cache = PagedKvCache(
                f, batch=1, num_kv_heads=1, max_tokens=512, keep_first=0, keep_last=keep_last
            )
            cache.append(k, v)
            outputs.append(cache.decode(q, softmax_scale=0.01))
        errors.append(np.linalg.norm(outputs[0] - outputs[1]))
    assert errors[1] < 0.7 * errors[0]


def test_no_queries_and_no_sequences() -> None:
    f = FORMATS[0]
    cache = PagedKvCache(f, batch=2, num_kv_heads=2, max_tokens=10)
    out, lse = cache.decode(np.zeros((2, 0, 4, f.head_dim), np.float16), return_softmax_lse=True)
    assert (out.shape, lse.shape) == ((2, 0, 4, f.head_dim), (2, 4, 0))


def test_other_threads_run_meanwhile(rng: np.random.Generator) -> None:
    f = FORMATS[0]
    cache = filled_cache(f, [20000], heads=4, keep_first=16, keep_last=64, rng=rng)
    q = rng.standard_normal((1, 8, 16, f.head_dim)).astype(np.float32)
    worker = threading.Thread(target=cache.decode, args=(q,), kwargs={"threads": 1})
    begin = last = time.perf_counter()
    longest = 0.0
    worker.start()
    while worker.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    total = time.perf_counter() - begin
    assert longest < 0.7 * total, f"the interpreter stood still for {longest} of {total} s"
