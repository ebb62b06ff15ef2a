# SPDX-License-Identifier: Apache-2.0
"""What a cache of a format asks for: the bytes that PagedKvCache and LowBitCache allocate, and on
CUDA kernels."""

from __future__ import annotations

from dataclasses import dataclass

from bitdecoding import KvFormat, _ext, build_info
from bitdecoding._ext import sequence_extents
from bitdecoding.arrays import count


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the size of its cache."""

    layers: int
    heads_kv: int
    head_dim: int


def sixteen_bit_bytes(shape: ModelShape, tokens: int) -> int:
    """Bytes of one sequence's K and V in 16 bits."""
    return shape.layers * shape.heads_kv * shape.head_dim * 2 * 2 * tokens


def sequence_bytes(
    shape: ModelShape, format: KvFormat, tokens: int, *, keep_first: int = 16, keep_last: int = 64
) -> int:
    """Bytes allocated for one sequence of at most ``tokens`` tokens: pages, the two 16-bit zones
    (first and newest tokens) and its entries in the tables."""
    pages, tail = sequence_extents(
        format, keep_first=keep_first, keep_last=keep_last, max_tokens=tokens
    )
    side = 2 * (keep_first + tail) * shape.head_dim * 2  # K and V, fp16
    tables = 4 * (pages + 3)  # int32: block table, slot, length, packed
    return shape.layers * (shape.heads_kv * (pages * format.page_bytes() + side) + tables)


def decode_kernel(format: KvFormat, columns: int, *, compute_capability: int) -> str:
    """The decode kernel of this build that a call with ``columns`` query columns (query tokens x
    query heads per KV head) gets on a device of that compute capability (90: 9.0). Asks no device.

    Raises NotImplementedError where the build has none for the format and device.
    """
    return _ext.decode_kernel(
        format,
        count("columns", columns, least=1),
        compute_capability=count("compute_capability", compute_capability, least=80),
    )


def has_kernels(format: KvFormat) -> bool:
    """Whether this build can append to and decode caches of the format on some CUDA device."""
    page = f"k{format.k_bits}v{format.v_bits}_{format.k_axis[0]}_d{format.head_dim}"
    kernels = build_info()["kernels"]
    return f"append_{page}" in kernels and any(
        name.startswith("decode_") and f"_{page}_" in name for name in kernels
    )
