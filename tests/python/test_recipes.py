# SPDX-License-Identifier: Apache-2.0
"""Recipes are formats; the recommended ones; the version of the bytes that they are written in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import bitdecoding
from bitdecoding import KvFormat
from bitdecoding.recipes import COMMON, RECIPES, Recipe, resolve_format

HEAD_DIMS = (64, 128, 256)
FULL, WINDOW = "full_attention", "sliding_attention"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_recipe_is_a_format(name: str, head_dim: int) -> None:
    recipe = RECIPES[name]
    format = recipe.format(head_dim)
    assert recipe.name == name
    assert format.head_dim == head_dim
    assert (recipe.keep_first, recipe.keep_last) == (16, 64)  # LowBitCache's defaults
    if not recipe.edges:
        assert resolve_format(name, head_dim) == format


@pytest.mark.parametrize(("name", "bits"), [("int4", 4), ("int3", 3), ("int2", 2)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_short_names_are_what_is_recommended(name: str, bits: int, head_dim: int) -> None:
    format = KvFormat.recommended(bits=bits, head_dim=head_dim)
    assert resolve_format(name, head_dim) == format
    assert format.k_bits + format.v_bits == 2 * bits
    assert set(COMMON) <= set(RECIPES)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 5, "head_dim": 128}, ValueError, "bits = 5; allowed: 2, 3, 4"),
        ({"bits": 4, "head_dim": 96}, ValueError, "head_dim = 96; allowed: 64, 128, 256"),
        ({"bits": "4", "head_dim": 64}, TypeError, "bits = '4'; allowed: 2, 3, 4"),
        ({"bits": 4, "head_dim": None}, TypeError, "head_dim = None; allowed: an int"),
    ],
)
def test_what_is_not_recommended_for(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        KvFormat.recommended(**arguments)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("k4v2", "k4v2_c128_v32_p128_d64"),
        ("kivi-2-g128", "k2v2_c128_v64_p128_d64"),
        ("hadamard-4-16", "k4v4_t64_v64_p128_d64_kr16_vr16"),
        ("oscar", "k2v2_c32_v32_p128_d64_norm_kr64_vr64_kclip85_vclip85"),
        ("block-2", "k2v2_b32_v32_p128_d64_kr64_vr64"),
        ("k4v4_t32_v32_p64_d64", "k4v4_t32_v32_p64_d64"),
        (KvFormat(head_dim=64, v_group=64), "k4v4_c128_v64_p128_d64"),
    ],
)
def test_resolve_format(recipe: KvFormat | str, name: str) -> None:
    assert str(resolve_format(recipe, 64)) == name


def test_channels_are_those_of_a_head_and_tokens_are_not() -> None:
    assert str(RECIPES["hadamard-2-g128"].format(64)).startswith("k2v2_c128_v64_p128_d64_kr64")
    assert str(RECIPES["kivi-4-g128"].format(256)) == "k4v4_c128_v128_p128_d256"
    wide = Recipe("wide", {"k_axis": "token", "k_group": 128, "v_group": 128})
    assert str(wide.format(64)) == "k4v4_t64_v64_p128_d64"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("int5", "int4, int3, int2, k4v2"),
        ("k4v4_c128_v128_p128_d128", "this model has 64"),
        ("kivi-2-edges", "leaves the first and last layers in 16 bit"),
    ],
)
def test_formats_that_do_not_fit(recipe: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_format(recipe, 64)


def test_format_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"format = 4; allowed: .*int4, int3, int2"):
        resolve_format(4, 64)  # type: ignore[arg-type]


def test_edges_are_of_the_full_attention_layers() -> None:
    recipe = RECIPES["kivi-2-edges"]
    formats = recipe.formats([FULL, WINDOW, FULL, WINDOW, FULL, FULL], 128)
    assert [f is None for f in formats] == [True, True, False, True, False, True]
    assert set(formats) == {None, recipe.format(128)}
    assert RECIPES["int2"].formats([FULL, WINDOW], 128) == [RECIPES["int2"].format(128), None]


def test_the_docs_and_the_library_write_one_version() -> None:
    page = (ROOT / "docs/format.md").read_text()
    assert re.findall(r"\*\*format version (\d+)\*\*", page) == ["1"]
    assert bitdecoding.build_info()["format_version"] == 1
