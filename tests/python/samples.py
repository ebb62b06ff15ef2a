# SPDX-License-Identifier: Apache-2.0
"""Formats and values that tests draw from."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdecoding import KvFormat
from bitdecoding.plan import has_kernels

Floats32 = npt.NDArray[np.float32]


def legal_formats() -> list[KvFormat]:
    """Every format that KvFormat accepts, without rotations and clips, which move no byte."""
    formats = []
    for k_bits, v_bits, axis, k_group, v_group, page, channels, norm in itertools.product(
        (2, 4), (2, 4), ("channel", "token"), (32, 64, 128), (32, 64, 128), (64, 128),
        (64, 128, 256), (False, True),
    ):  # fmt: skip
        if v_group > channels or k_group > (page if axis == "channel" else channels):
            continue
        formats.append(
            KvFormat(
                k_bits=k_bits,
                v_bits=v_bits,
                k_axis=axis,
                k_group=k_group,
                v_group=v_group,
                page_tokens=page,
                head_dim=channels,
                token_norm=norm,
            )
        )
    blocks = itertools.product((2, 4), (2, 4), (64, 128), (64, 128, 256))
    return formats + [
        KvFormat.parse(f"k{k_bits}v{v_bits}_b32_v32_p{page}_d{channels}")
        for k_bits, v_bits, page, channels in blocks
    ]


def clipped_formats() -> list[KvFormat]:
    """The same; those that may have clips take turns with them."""
    clips = (85, 50, 77, 99)
    return [
        f
        if f.k_axis == "block"
        else KvFormat.parse(f"{f}_kclip{clips[i % 4]}_vclip{clips[i * 3 % 4]}")
        for i, f in enumerate(legal_formats())
    ]


def cuda_formats() -> list[KvFormat]:
    """Those that the kernel table is to serve: at head_dim 256 it has some pages, not all."""
    return [f for f in clipped_formats() if f.head_dim < 256 or has_kernels(f)]


def rotated_formats() -> list[KvFormat]:
    """Every pair of rotations but none and none, each with another format."""
    rotations = (0, 16, 64, 128)
    formats = legal_formats()
    rotated = []
    for number, (k, v, channels) in enumerate(itertools.product(rotations, rotations, (64, 128))):
        if max(k, v) > channels or max(k, v) == 0:
            continue
        base = [str(f) for f in formats if f.head_dim == channels]
        suffix = (f"_kr{k}" if k else "") + (f"_vr{v}" if v else "")
        rotated.append(KvFormat.parse(base[number * 37 % len(base)] + suffix))
    return rotated


# A few that differ in everything, for tests with many cases of their own.
FORMATS = [
    KvFormat.parse(name)
    for name in (
        "k4v4_c128_v128_p128_d128",
        "k4v2_c64_v64_p128_d64",
        "k2v2_c32_v32_p64_d128",
        "k2v4_t32_v64_p64_d64",
        "k4v4_t128_v128_p128_d128",
        "k2v2_c32_v32_p128_d64_norm",
        "k2v2_c128_v32_p128_d128_kclip75_vclip85",
        "k4v2_b32_v32_p128_d128",
        "k2v4_b32_v32_p64_d64",
        "k4v2_c64_v32_p128_d256",
        "k2v4_c64_v32_p128_d128_norm_kr128_vr64",
        "k4v2_t64_v64_p64_d64_kr16_vr64",
    )
]

FAMILIES = ("normal", "outliers", "constant", "huge", "beyond_fp16", "inf", "nan", "tiny")


def family(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Floats32:
    """Keys or values (..., S, H, D) of one kind, as float32."""
    x: npt.NDArray[Any] = rng.standard_normal(shape)
    if name == "outliers":  # channels 100 times as wide as the rest, and channels far from 0
        wide = rng.choice(shape[-1], shape[-1] // 16, replace=False)
        x[..., wide] *= 100
        x[..., rng.integers(shape[-1])] += 40
    elif name == "constant":
        x[...] = 0.7
        x[..., ::3] = -0.0
    elif name == "huge":
        x = np.clip(6e4 + 3000 * x, -65504, 65504) * np.where(x < 0, -1, 1)
    elif name == "beyond_fp16":
        x = x * 1e6
    elif name in ("inf", "nan"):
        hit = rng.random(shape) < 1 / 400
        x = np.where(hit, np.inf if name == "inf" else np.nan, x) * np.where(x < 0, -1, 1)
    elif name == "tiny":  # fp16 subnormals
        x = x * 3e-7
    return x.astype(np.float32)


def mixed(batch: int, tokens: int, heads: int, channels: int, rng: np.random.Generator) -> Floats32:
    """(B, S, H, D) in which every row is of another family."""
    shape = (tokens, heads, channels)
    return np.stack([family(FAMILIES[b % len(FAMILIES)], shape, rng) for b in range(batch)])
