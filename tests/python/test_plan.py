# SPDX-License-Identifier: Apache-2.0
"""The planned bytes are those that a cache allocates."""

from __future__ import annotations

import pytest

from bitdecoding import KvFormat, PagedKvCache, build_info
from bitdecoding.plan import ModelShape, decode_kernel, sequence_bytes, sixteen_bit_bytes
from bitdecoding.recipes import COMMON, resolve_format


@pytest.mark.parametrize("recipe", COMMON)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 64, 65, 1000, 4096])
@pytest.mark.parametrize("zones", [(0, 0), (16, 64), (128, 200)])
def test_planned_bytes_are_allocated(
    recipe: str, head_dim: int, tokens: int, zones: tuple[int, int]
) -> None:
    keep_first, keep_last = zones
    format = resolve_format(recipe, head_dim)
    shape = ModelShape(layers=3, heads_kv=2, head_dim=head_dim)
    cache = PagedKvCache(
        format,
        batch=1,
        num_kv_heads=2,
        max_tokens=tokens,
        keep_first=keep_first,
        keep_last=keep_last,
    )
    planned = sequence_bytes(shape, format, tokens, keep_first=keep_first, keep_last=keep_last)
    assert planned == 3 * cache.nbytes


def test_sixteen_bit_bytes() -> None:
    assert sixteen_bit_bytes(ModelShape(layers=32, heads_kv=8, head_dim=128), 1) == 131072


@pytest.mark.parametrize("columns", [1, 5, 64])
@pytest.mark.parametrize("compute_capability", [80, 86, 90])
def test_decode_kernel(columns: int, compute_capability: int) -> None:
    prefix = f"decode_sm{compute_capability // 10}0_k4v4_c_d128_n"
    rows = [name for name in build_info()["kernels"] if name.startswith(prefix)]
    format = KvFormat()
    if rows:
        assert decode_kernel(format, columns, compute_capability=compute_capability) in rows
    else:
        with pytest.raises(NotImplementedError, match="kernel"):
            decode_kernel(format, columns, compute_capability=compute_capability)


def test_head_dim_256_has_kernels_for_some_pages_and_tiles_of_up_to_16_columns() -> None:
    built = build_info()["kernels"]
    for page in ("k4v4_c", "k4v4_t", "k4v2_c", "k2v2_c", "k2v4_c", "k2v2_t"):
        format = KvFormat.parse(f"{page}128_v128_p128_d256")
        row = f"decode_sm90_{page}_d256_n16"
        if row in built:
            assert decode_kernel(format, 64, compute_capability=90) == row
        else:
            with pytest.raises(NotImplementedError, match="kernels"):
                decode_kernel(format, 64, compute_capability=90)


def test_decode_kernel_refuses() -> None:
    with pytest.raises(ValueError, match="columns = 0; allowed: 1 to"):
        decode_kernel(KvFormat(), 0, compute_capability=90)
    with pytest.raises(ValueError, match="compute_capability = 75; allowed: 80 to"):
        decode_kernel(KvFormat(), 1, compute_capability=75)
