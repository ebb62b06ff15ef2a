# SPDX-License-Identifier: Apache-2.0
"""Caches, queries and exact results for the tests of CUDA decode, built once for all kernels.

A kernel of the table serves one page configuration (bits, axis of K, head_dim); the kernels of a
configuration share the cases. The random numbers are new in every run, see `SEED`.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import seeds
from cache_contents import ARRAYS, poison_unattended, scattered_cache
from half_budget import Expected, expect
from oracle_attention import attended
from samples import FAMILIES, Floats32, cuda_formats, family, legal_formats

from bitdecoding import KvFormat, PagedKvCache

# The last four: see `keys_and_values`.
KINDS = (*FAMILIES, "v_scales", "k_scales", "sinks", "sinks_and_scales")
# Where scores would grow so large that one token takes all the weight, or beyond float32's digits.
SCALES = {"huge": 1e-5, "beyond_fp16": 1e-5, "inf": 1e-5, "k_scales": 1e-4}

SINK_TOKENS = 4
SINK_OCTAVES = 20
SINK_QUERY = 8.0  # channel 0 of every query, where there are sinks


def rng_of(*key: object) -> np.random.Generator:
    """Numbers that depend on the run's seed and on `key` alone, not on the order of tests."""
    return np.random.default_rng([seeds.SEED, zlib.crc32(repr(key).encode())])


@dataclass(frozen=True)
class Page:
    """What a kernel fixes of a format."""

    k_bits: int
    v_bits: int
    k_axis: str
    head_dim: int
    whole_groups: bool = False  # a kernel that serves no others: those of wgmma

    @classmethod
    def of_kernel(cls, name: str) -> Page:
        """decode_sm90_k4v2_c_d128_n8"""
        _, _, bits, axis, head_dim, tile = name.split("_")
        return cls(
            int(bits[1]),
            int(bits[3]),
            {"c": "channel", "t": "token", "b": "block"}[axis],
            int(head_dim[1:]),
            whole_groups=tile in ("n32", "n64"),
        )

    @classmethod
    def of_format(cls, f: KvFormat) -> Page:
        return cls(f.k_bits, f.v_bits, f.k_axis, f.head_dim)


def has_whole_groups(f: KvFormat) -> bool:
    """One K scale per channel and chunk, or per token, one V scale per token, no norms. (Per token:
    per 128 channels.)"""
    channels = min(f.head_dim, 128)
    whole_k = f.k_group >= 64 if f.k_axis == "channel" else f.k_group == channels
    return whole_k and f.v_group == channels and not f.token_norm


@functools.cache
def formats_of(page: Page) -> tuple[KvFormat, ...]:
    fixed = replace(page, whole_groups=False)
    found = (f for f in legal_formats() if Page.of_format(f) == fixed)
    return tuple(f for f in found if has_whole_groups(f) or not page.whole_groups)


@functools.cache
def rotated_formats_of(page: Page) -> tuple[KvFormat, ...]:
    """A few pairs of rotations, each with another format of the page."""
    pairs = ((128, 128), (64, 0), (0, 64), (16, 64), (64, 16))
    fitting = [pair for pair in pairs if max(pair) <= page.head_dim]
    formats = formats_of(page)
    rotated = []
    for number, (k, v) in enumerate(fitting):
        base = formats[(5 * number + 3) % len(formats)]
        suffix = (f"_kr{k}" if k else "") + (f"_vr{v}" if v else "")
        rotated.append(KvFormat.parse(str(base) + suffix))
    return tuple(rotated)


PAGES = sorted({Page.of_format(f) for f in cuda_formats()}, key=repr)


@dataclass(frozen=True)
class Contents:
    format: KvFormat
    lengths: tuple[int, ...]
    heads: int = 1
    keep_first: int = 16
    keep_last: int = 64
    kind: str = "normal"


@dataclass(frozen=True)
class Queries:
    ratio: int  # query heads per KV head
    tokens: int = 1
    dtype: str = "float16"
    lse: bool = True
    kind: str = "normal"  # or "outliers": channels of 300, a head of zeros
    softmax_scale: float | None = None


Cases = list[tuple[Contents, tuple[Queries, ...]]]


@dataclass
class Case:
    contents: Contents
    queries: Queries
    scale: float
    q: Any  # torch (B, Sq, Hq, D) on the CPU
    expected: Expected


@dataclass
class Built:
    """A cache in shuffled, poisoned NumPy memory and what calls on it must return."""

    cache: PagedKvCache
    cases: list[Case]


@functools.cache
def build(contents: Contents, queries: tuple[Queries, ...]) -> Built:
    rng = rng_of(contents)
    cache = scattered_cache(
        contents.format,
        batch=len(contents.lengths),
        heads=contents.heads,
        max_tokens=max(contents.lengths),
        keep_first=contents.keep_first,
        keep_last=contents.keep_last,
        rng=rng,
    )
    k, v = keys_and_values(contents, rng)
    cache.append(k, v, num_tokens=np.array(contents.lengths, np.int32))
    sequences = [attended(cache, b) for b in range(len(contents.lengths))]
    poison_unattended(cache)
    cases = []
    rounded = contents.format.k_axis == "channel"
    for given in queries:
        scale = given.softmax_scale or SCALES.get(contents.kind)
        scale = scale or 1 / math.sqrt(contents.format.head_dim)
        q = make_queries(contents, given)
        cancels = contents.kind == "inf"
        expected = expect(q.float().numpy(), sequences, scale, rounded=rounded, cancels=cancels)
        cases.append(Case(contents, given, scale, q, expected))
    return Built(cache, cases)


def build_many(contents: Contents, queries: tuple[Queries, ...], times: int) -> Built:
    """A batch in which every sequence, with its query, stands `times` times: they share pages and
    slots. It has as much work as many long sequences, and one exact result."""
    one = build(contents, queries)
    arrays: dict[str, Any] = {"pool": one.cache.pool, "side": one.cache.side}
    for name in ("slots", "lengths", "packed"):
        arrays[name] = np.tile(getattr(one.cache, name), times)
    arrays["block_table"] = np.tile(one.cache.block_table, (times, 1))
    cache = PagedKvCache.wrap(
        contents.format,
        **arrays,
        keep_first=contents.keep_first,
        keep_last=contents.keep_last,
        k_mean=one.cache.k_mean,
    )
    cases = []
    for case in one.cases:
        expected = case.expected.mapped(lambda part: np.concatenate([part] * times))
        q = case.q.repeat(times, 1, 1, 1)
        cases.append(Case(contents, case.queries, case.scale, q, expected))
    return Built(cache, cases)


def keys_and_values(c: Contents, rng: np.random.Generator) -> tuple[Floats32, Floats32]:
    """(B, S, H, D) of a family of samples.py, or of

    nan                 normal, and one NaN in each sequence but the second, see there
    v_scales            V groups whose scales lie between 1e-4 and 3000, token by token
    k_scales            K groups whose scales lie between 1e-3 and 3000
    sinks               four first tokens 20 octaves of score above the rest, whose V is 0: all of
                        the output comes from tokens that weigh 2^-20
    sinks_and_scales    both: V scales of about 400 behind the sinks
    """
    f, tokens = c.format, max(c.lengths)
    shape = (len(c.lengths), tokens, c.heads, f.head_dim)
    plain = c.kind if c.kind in FAMILIES and c.kind != "nan" else "normal"
    k, v = (family(plain, shape, rng) for _ in range(2))
    if c.kind == "nan":
        v[0, 2, -1, 3] = np.nan  # of a first token: where that is kept in fp16, this channel alone
        k[2, 40, 0, 7] = np.nan
        v[3, 100, -1, 5] = np.nan
    elif c.kind == "v_scales":
        v = _spread(shape, (1e-4, 3000), 2**f.v_bits - 1, (*shape[:3], 1), rng)
    elif c.kind == "k_scales":
        by_channel = (shape[0], -(-tokens // 128), c.heads, f.head_dim)
        sizes = by_channel if f.k_axis == "channel" else (*shape[:3], 1)
        k = _spread(shape, (1e-3, 3000), 2**f.k_bits - 1, sizes, rng)
    elif c.kind.startswith("sinks"):
        height = SINK_OCTAVES * math.log(2) * math.sqrt(f.head_dim) / SINK_QUERY
        k[..., 0] = 0
        k[:, :SINK_TOKENS] = 0  # exact in 2 bits, so that the gap is what it should be
        k[:, :SINK_TOKENS, :, 0] = height
        v *= 400 * (2**f.v_bits - 1) / 5 if c.kind == "sinks_and_scales" else 1
        v[:, :SINK_TOKENS] = 0
    return k, v


def _spread(
    shape: tuple[int, ...],
    scales: tuple[float, float],
    steps: int,
    sizes: tuple[int, ...],
    rng: np.random.Generator,
) -> Floats32:
    """Values over `steps` times a scale; scales log-uniform, one for each of `sizes`."""
    low, high = (math.log(x) for x in scales)
    scale = np.exp(rng.uniform(low, high, sizes))
    if sizes[1] != shape[1]:  # one for 128 tokens
        scale = np.repeat(scale, 128, axis=1)[:, : shape[1]]
    values: Floats32 = (scale * steps * (rng.random(shape) - 0.3)).astype(np.float32)
    return values


def make_queries(c: Contents, given: Queries) -> Any:
    import torch

    rng = rng_of(c, given)
    heads = c.heads * given.ratio
    q = rng.standard_normal((len(c.lengths), given.tokens, heads, c.format.head_dim))
    if given.kind == "outliers":
        channels = rng.choice(c.format.head_dim, 3, replace=False)
        q[..., channels] = 300 * rng.choice([-1, 1], (*q.shape[:-1], 3))
        q[:, :, -1] = 0
    if c.kind.startswith("sinks"):
        q[..., 0] = SINK_QUERY
    return torch.from_numpy(q).to(getattr(torch, given.dtype))


# ---- to a device and back ----


def on_device(cache: PagedKvCache, device: str) -> PagedKvCache:
    """A copy of a NumPy cache on a device; on the CPU the cache itself."""
    if device == "cpu":
        return cache
    import torch

    arrays = {name: torch.from_numpy(getattr(cache, name)).to(device) for name in ARRAYS}
    mean = None if cache.k_mean is None else torch.from_numpy(cache.k_mean).to(device)
    return PagedKvCache.wrap(
        cache.format, **arrays, keep_first=cache.keep_first, keep_last=cache.keep_last, k_mean=mean
    )


def on_host(cache: PagedKvCache) -> PagedKvCache:
    """A NumPy copy of a cache."""
    arrays: dict[str, Any] = {name: np.array(_numpy(getattr(cache, name))) for name in ARRAYS}
    mean = None if cache.k_mean is None else np.array(_numpy(cache.k_mean))
    return PagedKvCache.wrap(
        cache.format, **arrays, keep_first=cache.keep_first, keep_last=cache.keep_last, k_mean=mean
    )


def _numpy(array: Any) -> npt.NDArray[Any]:
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


# ---- which cases ----


def shape_cases(page: Page) -> Cases:
    """Lengths around all boundaries, long ones, zones, head ratios, query tokens, both types."""
    formats = formats_of(page)
    pick = [formats[i * len(formats) // 7] for i in range(7)]
    half, brain = "float16", "bfloat16"
    short = (0, 1, 15, 16, 17, 63, 64, 127, 128, 129)
    return [
        (
            Contents(pick[0], short, 2, 16, 64),
            (Queries(4), Queries(3, 2, brain), Queries(16, lse=False)),
        ),
        (
            Contents(pick[1], (640, 2000, 5, 5000), 1, 0, 0),
            (Queries(8), Queries(32, 1, brain), Queries(1, 5, half)),
        ),
        (
            Contents(pick[2], (5000, 0, 300, 64), 1, 5, 30),
            (Queries(12), Queries(5, 3, brain), Queries(1, dtype=brain, lse=False)),
        ),
        (
            Contents(pick[3], (2000, 129, 1, 640), 3, 50, 200),
            (Queries(24, 1, brain), Queries(1), Queries(4, 4)),
        ),
        (
            Contents(pick[4], (700, 64, 65, 200), 2, pick[4].page_tokens, 40),
            (Queries(8), Queries(16, dtype=brain)),
        ),
        (Contents(pick[5], short, 1, 0, 0), (Queries(3), Queries(8, dtype=brain))),
        (Contents(pick[6], (128,) * 70, 1, 50, 64), (Queries(4),)),
    ]


MANY = 120  # repetitions: 28000 chunks, more than 16 for each warp of an H200


def many_cases(page: Page) -> Cases:
    """For `build_many`: whole groups and others, zones that end in a page's chunks and between."""
    formats = [f for f in formats_of(page) if f.page_tokens == 128]
    largest = max(formats, key=lambda f: (f.k_group, f.v_group, not f.token_norm))
    cases: Cases = []
    zones = ((0, 0), (16, 64), (64, 0), (100, 30), (128, 64))
    for i, (first, last) in enumerate(zones):
        f = largest if i % 2 == 0 else formats[(7 * i) % len(formats)]
        both = (Queries(4), Queries(8, 2, "bfloat16"))
        cases.append((Contents(f, (4000, 3571, 90), 2, first, last), both[: 1 + i % 2]))
    return cases


ZONES = ((0, 0), (16, 64), (5, 30), (50, 200), (64, 0))


def format_cases(f: KvFormat) -> Cases:
    """Small ragged batches in the format; zones and ratios differ from format to format."""
    index = zlib.crc32(str(f).encode())
    cases: Cases = []
    for turn in range(2):
        keep_first, keep_last = ZONES[(index + turn) % len(ZONES)]
        contents = Contents(f, (330, 0, 129, 64, 17, 641), 2, keep_first, keep_last)
        ratio = (4, 1, 7, 8, 12)[(index // 8 + turn) % 5]
        cases.append((contents, (Queries(ratio), Queries(4, 2, "bfloat16"))))
    return cases


def family_cases(page: Page) -> Cases:
    """Every kind of keys, values and queries, and softmax scales of any sign and size."""
    formats = formats_of(page)
    cases: Cases = []
    for i, kind in enumerate(KINDS):
        f = formats[(5 * i + 2) % len(formats)]
        for zones in ((16, 64), (0, 0)):
            contents = Contents(f, (400, 333, 64, 200), 2, *zones, kind)
            both = (Queries(4), Queries(4, dtype="bfloat16"))
            cases.append((contents, both))
    wide = Contents(formats[-1], (500, 77), 2, 16, 64)
    outliers = (
        Queries(4, kind="outliers"),
        Queries(8, dtype="bfloat16", kind="outliers"),
        Queries(3, 2, kind="outliers", softmax_scale=-1 / math.sqrt(page.head_dim)),
    )
    scales = tuple(Queries(4, softmax_scale=scale) for scale in (-0.1, 1e-6, -1e-30, 0.7))
    first = Contents(formats[0], (500, 77), 2, 16, 64)
    return [*cases, (wide, outliers), (first, outliers), (first, scales)]
