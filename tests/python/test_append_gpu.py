# SPDX-License-Identifier: Apache-2.0
"""append on CUDA: the CPU's bytes after every call, and what decode makes of them.

What runs on the CPU backend as well proves the cases where there is no GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import seeds
from cache_contents import ARRAYS, assert_holds, poison_unattended, scattered_cache
from cuda_kernels import DEVICES
from decode_inputs import PAGES, formats_of, on_device, on_host, rng_of
from half_budget import assert_close, expect
from oracle_attention import attended
from samples import FAMILIES, FORMATS, clipped_formats, cuda_formats, mixed, rotated_formats
from test_append import boundaries

from bitdecoding import KvFormat, PagedKvCache

DTYPES = ("float16", "bfloat16")


def int32(values: Any) -> npt.NDArray[np.int32]:
    return np.asarray(values, np.int32)


@dataclass
class Twins:
    """One cache twice: in NumPy memory and on a device, in the same shuffled, poisoned places."""

    host: PagedKvCache
    twin: PagedKvCache
    device: str

    def append(self, k: Any, v: Any, **runs: Any) -> None:
        """k, v: torch, on the CPU; runs: leftpad, num_tokens, NumPy."""
        import torch

        self.host.append(k, v, **runs)
        k, v = k.to(self.device), v.to(self.device)
        given: dict[str, Any] = {
            name: torch.from_numpy(x).to(self.device) for name, x in runs.items()
        }
        self.twin.append(k, v, **given)

    def assert_equal(self, what: str) -> None:
        found = on_host(self.twin)
        for name in ARRAYS:
            ours, theirs = (
                np.ascontiguousarray(getattr(cache, name)).view(np.uint8)
                for cache in (found, self.host)
            )
            if not np.array_equal(ours, theirs):
                places = np.argwhere(ours != theirs)
                pytest.fail(
                    f"{what}: {len(places)} bytes of {name} {ours.shape} differ, first at "
                    f"{places[0]}: {ours[tuple(places[0])]}, CPU {theirs[tuple(places[0])]}"
                )


def twins(
    f: KvFormat, batch: int, heads: int, zones: tuple[int, int], device: str, *key: object
) -> Twins:
    rng = rng_of("twins", f, zones, *key)
    host = scattered_cache(
        f,
        batch=batch,
        heads=heads,
        max_tokens=1200,
        keep_first=zones[0],
        keep_last=zones[1],
        rng=rng,
    )
    return Twins(host, on_device(on_host(host), device), device)


@dataclass
class Step:
    """A ragged append: rows of NaN but for their tokens."""

    k: Any
    v: Any
    runs: dict[str, npt.NDArray[np.int32]]


def random_step(
    shape: tuple[int, int, int], most: int, dtype: str, values: Any, rng: np.random.Generator
) -> Step:
    """shape (B, H, D); `values(batch, tokens, heads, channels, rng)` makes K and V."""
    import torch

    batch, heads, channels = shape
    pads = rng.integers(0, 5, batch)
    counts = rng.integers(0, most + 1, batch)
    counts[rng.integers(batch)] = most
    width = int(np.max(pads + counts)) + int(rng.integers(0, 3))
    rows = np.full((2, batch, width, heads, channels), np.nan, np.float32)
    for x in rows:
        fresh = values(batch, width, heads, channels, rng)
        for b, (pad, count) in enumerate(zip(pads, counts, strict=True)):
            x[b, pad : pad + count] = fresh[b, :count]
    k, v = torch.from_numpy(rows).to(getattr(torch, dtype))
    if rng.integers(2):  # from (B, H, S, D)
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    return Step(k, v, {"leftpad": int32(pads), "num_tokens": int32(counts)})


def normal(
    batch: int, tokens: int, heads: int, channels: int, rng: np.random.Generator
) -> npt.NDArray[np.floating[Any]]:
    return rng.standard_normal((batch, tokens, heads, channels))


ZONES = ((16, 64), (0, 0), (5, 30), (50, 200), (64, 1))


@pytest.mark.parametrize("device", DEVICES)
def test_every_format_after_random_steps(torch: Any, device: str) -> None:
    """Every sequence is of another family, NaN, inf and subnormals among them."""
    formats = cuda_formats() if device == "cuda" else clipped_formats()[::29]
    for i, f in enumerate(formats + rotated_formats()):
        rng = rng_of("steps", f)
        pair = twins(f, len(FAMILIES), 2, ZONES[i % len(ZONES)], device)
        for step, most in enumerate((300, 1, 7, 150, 64)):
            given = random_step((len(FAMILIES), 2, f.head_dim), most, DTYPES[i % 2], mixed, rng)
            pair.append(given.k, given.v, **given.runs)
            pair.assert_equal(f"seed {seeds.SEED}: {f}, zones {ZONES[i % len(ZONES)]}, step {step}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zones", [(0, 0), (16, 64), (5, 7), (64, 1), (1, 200)], ids=str)
def test_every_boundary_length(torch: Any, zones: tuple[int, int], device: str) -> None:
    for f in FORMATS if device == "cuda" else FORMATS[:1]:
        lengths = boundaries(f, *zones)
        pair = twins(f, len(lengths), 1, zones, device)
        rng = rng_of("boundaries", f, zones)
        x = np.stack([mixed(len(lengths), max(lengths), 1, f.head_dim, rng) for _ in range(2)])
        k, v = torch.from_numpy(x).half()
        pair.append(k, v, num_tokens=int32(lengths))
        pair.assert_equal(f"{f}: {zones}")
        found = on_host(pair.twin)
        for b, length in enumerate(lengths):
            assert_holds(found, b, k[b, :length].numpy(), v[b, :length].numpy())
        # One token more each: another boundary.
        pair.append(k[:, :1], v[:, :1])
        pair.assert_equal(f"{f}: {zones} and one more")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("f", FORMATS, ids=str)
def test_tokens_one_by_one(torch: Any, f: KvFormat, device: str) -> None:
    tokens = 2 * f.page_tokens + 43
    pair = twins(f, len(FAMILIES), 1, (3, 40), device)
    rng = rng_of("one by one", f)
    x = np.stack([mixed(len(FAMILIES), tokens, 1, f.head_dim, rng) for _ in range(2)])
    k, v = torch.from_numpy(x).bfloat16()
    for token in range(tokens):
        pair.append(k[:, token : token + 1], v[:, token : token + 1])
        if token % 16 == 15 or token == tokens - 1:
            pair.assert_equal(f"{f}: token {token}")
    found = on_host(pair.twin)
    for b in range(len(FAMILIES)):
        assert_holds(found, b, k[b].float().numpy(), v[b].float().numpy())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.k_bits}{p.v_bits}{p.k_axis}{p.head_dim}")
def test_decode_after_every_append(torch: Any, page: Any, device: str) -> None:
    formats = formats_of(page)
    for f in (formats[len(formats) // 3], formats[-1]):
        for zones in ((16, 64), (0, 0)):
            rng = rng_of("beside decode", f, zones)
            pair = twins(f, 3, 2, zones, device)
            for step, most in enumerate((1, 200, 1, 63, 1, 129)):
                given = random_step((3, 2, f.head_dim), most, DTYPES[step % 2], normal, rng)
                pair.append(given.k, given.v, **given.runs)
                what = f"seed {seeds.SEED}: {f}, zones {zones}, step {step}"
                pair.assert_equal(what)
                assert_attends(torch, pair, DTYPES[step % 2], what, rng)
            if device == "cuda":
                pair.twin.check()


def assert_attends(torch: Any, pair: Twins, dtype: str, what: str, rng: Any) -> None:
    """Decode on the device over what is attended; everything else is poisoned in a copy of it."""
    host = on_host(pair.host)
    f, batch = host.format, len(host.lengths)
    sequences = [attended(host, b) for b in range(batch)]
    poison_unattended(host)
    q = torch.from_numpy(rng.standard_normal((batch, 1, 8, f.head_dim))).to(getattr(torch, dtype))
    scale = 1 / math.sqrt(f.head_dim)
    expected = expect(q.float().numpy(), sequences, scale, rounded=f.k_axis == "channel")
    for cache in (pair.twin, on_device(host, pair.device)):
        out, lse = cache.decode(q.to(pair.device), return_softmax_lse=True)
        assert_close(
            out.float().cpu().numpy(),
            lse.cpu().numpy(),
            expected,
            dtype,
            kind=f"{'cpu: ' if pair.device == 'cpu' else ''}after appends",
            what=what,
        )


@pytest.mark.parametrize("device", DEVICES)
def test_leftpad_alone_and_nothing_at_all(torch: Any, device: str) -> None:
    f = FORMATS[1]
    rng = rng_of("leftpad")
    pair = twins(f, 3, 2, (16, 10), device)
    x = torch.from_numpy(np.stack([mixed(3, 350, 2, f.head_dim, rng) for _ in range(2)])).half()
    pair.append(*x, leftpad=int32([0, 20, 350]))
    pair.append(*x, num_tokens=int32([0, 0, 0]))
    pair.append(x[0, :, :0], x[1, :, :0])
    pair.append(*x)
    pair.assert_equal("leftpad")
    assert on_host(pair.twin).lengths.tolist() == [700, 680, 350]


@pytest.mark.gpu
def test_reset_and_reuse(torch: Any) -> None:
    f = FORMATS[0]
    pair = twins(f, 2, 2, (16, 64), "cuda")
    for _ in range(3):
        given = random_step((2, 2, f.head_dim), 400, "float16", mixed, rng_of("reset"))
        pair.append(given.k, given.v, **given.runs)
        pair.assert_equal("reset")
        pair.host.reset()
        pair.twin.reset()


@pytest.mark.gpu
def test_runs_on_the_stream_it_is_given(torch: Any) -> None:
    f = FORMATS[0]
    rng = rng_of("streams")
    x = torch.from_numpy(np.stack([mixed(2, 400, 2, f.head_dim, rng) for _ in range(2)])).half()
    stream = torch.cuda.Stream()
    for explicit in (False, True):
        pair = twins(f, 2, 2, (16, 64), "cuda")
        pair.host.append(*x)
        ready, late = x.cuda(), torch.zeros_like(x, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # about 0.1 s: any other stream would read the zeros
            late.copy_(ready)
            if not explicit:
                pair.twin.append(*late)
        if explicit:
            pair.twin.append(*late, stream=stream.cuda_stream)
        stream.synchronize()
        pair.assert_equal(f"explicit: {explicit}")


@pytest.mark.gpu
def test_what_the_kernel_cannot_read_is_refused(torch: Any) -> None:
    f = FORMATS[0]
    cache = PagedKvCache(f, batch=2, num_kv_heads=2, max_tokens=300, device="cuda")
    k = torch.zeros(2, 9, 2, f.head_dim, dtype=torch.float16, device="cuda")
    with pytest.raises((TypeError, ValueError), match=r"k.*float32.*allowed.*float16, bfloat16"):
        cache.append(k.float(), k.float())
    odd = torch.zeros(2, 9, 2, f.head_dim + 1, dtype=torch.float16, device="cuda")[..., 1:]
    with pytest.raises(ValueError, match=r"k.*multiple"):
        cache.append(odd, odd)
    with pytest.raises(ValueError, match=r"v: device = cpu; allowed: cuda:0"):
        cache.append(k, k.cpu())
    with pytest.raises(ValueError, match=r"num_tokens: device = cpu; allowed: cuda:0"):
        cache.append(k, k, num_tokens=torch.zeros(2, dtype=torch.int32))
    cache.check()
    assert cache.lengths.tolist() == [0, 0]
