# SPDX-License-Identifier: Apache-2.0
"""KvFormat as a Python value: rules, names, equality, immutability, sizes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import oracle_layout
import pytest
from samples import clipped_formats, legal_formats, rotated_formats

from bitdecoding import KvFormat

FIELDS = (
    "k_bits",
    "v_bits",
    "k_axis",
    "k_group",
    "v_group",
    "page_tokens",
    "head_dim",
    "token_norm",
    "k_rotation",
    "v_rotation",
    "k_clip",
    "v_clip",
)


def test_every_legal_format_round_trips() -> None:
    formats = list({*legal_formats(), *clipped_formats(), *rotated_formats()})
    assert len(formats) == len({str(f) for f in formats})
    for f in formats:
        again = KvFormat(**{field: getattr(f, field) for field in FIELDS})
        assert again == f
        assert hash(again) == hash(f)
        assert KvFormat.parse(str(f)) == f
        assert eval(repr(f)) == f
        assert pickle.loads(pickle.dumps(f)) == copy.deepcopy(f) == copy.copy(f) == f


def test_page_bytes_follow_the_format_page() -> None:
    for f in legal_formats() + rotated_formats():
        assert f.page_bytes() == oracle_layout.page_bytes(f), str(f)
        bits = 8 * f.page_bytes() / (2 * f.page_tokens * f.head_dim)
        assert f.bits_per_element == pytest.approx(bits, rel=1e-15)
    assert KvFormat().page_bytes() == 17408
    assert KvFormat(k_bits=2, v_bits=2).bits_per_element == 2.25


def test_name_says_everything() -> None:
    assert str(KvFormat()) == "k4v4_c128_v128_p128_d128"
    f = KvFormat(
        k_bits=2,
        k_axis="token",
        k_group=32,
        v_group=64,
        page_tokens=64,
        head_dim=64,
        token_norm=True,
        v_rotation=16,
        k_rotation=64,
    )
    assert str(f) == "k2v4_t32_v64_p64_d64_norm_kr64_vr16"
    blocks = KvFormat(v_bits=2, k_axis="block", k_group=32, v_group=32)
    assert str(blocks) == "k4v2_b32_v32_p128_d128"
    assert blocks.bits_per_element == 3.25


def test_values_compare_by_value_and_not_with_others() -> None:
    assert KvFormat(k_bits=2) != KvFormat()
    assert KvFormat() != "k4v4_c128_v128_p128_d128"
    assert {KvFormat(): 1}[KvFormat()] == 1


@pytest.mark.parametrize("field", FIELDS)
def test_fields_cannot_be_set(field: str) -> None:
    f = KvFormat()
    with pytest.raises(AttributeError):
        setattr(f, field, getattr(f, field))
    with pytest.raises(AttributeError):
        f.note = "x"  # type: ignore[attr-defined]
    f.__init__(k_bits=2)  # type: ignore[misc]
    assert f == KvFormat()


@pytest.mark.parametrize(
    ("fields", "wrong", "allowed"),
    [
        ({"k_bits": 3}, "k_bits = 3", "2, 4"),
        ({"v_bits": 8}, "v_bits = 8", "2, 4"),
        ({"k_axis": "row"}, "k_axis = 'row'", "'channel', 'token', 'block'"),
        ({"k_axis": "block"}, "k_group = 128", "32"),
        ({"k_axis": "block", "k_group": 32}, "v_group = 128", "32"),
        (
            {"k_axis": "block", "k_group": 32, "v_group": 32, "token_norm": True},
            "token_norm = 1",
            "false",
        ),
        ({"k_group": 96}, "k_group = 96", "32, 64, 128"),
        ({"k_group": 128, "page_tokens": 64}, "k_group = 128", "page_tokens"),
        (
            {"k_group": 128, "head_dim": 64, "v_group": 64, "k_axis": "token"},
            "k_group = 128",
            "head_dim",
        ),
        ({"v_group": 128, "head_dim": 64}, "v_group = 128", "head_dim"),
        ({"page_tokens": 256}, "page_tokens = 256", "64, 128"),
        ({"head_dim": 96}, "head_dim = 96", "64, 128, 256"),
        ({"k_clip": 49}, "k_clip = 49", "50 to 100"),
        ({"v_clip": 101}, "v_clip = 101", "50 to 100"),
        ({"v_clip": 85, "k_axis": "block", "k_group": 32, "v_group": 32}, "v_clip = 85", "100"),
        ({"k_rotation": 32}, "k_rotation = 32", "0, 16, 64, 128 channels"),
        ({"v_rotation": 128, "head_dim": 64, "v_group": 64}, "v_rotation = 128", "head_dim"),
    ],
)
def test_illegal_fields_are_named(fields: dict[str, Any], wrong: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong}; allowed: .*{allowed}"):
        KvFormat(**fields)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "k4v4",
        "k4v4_c128_v128_p128_d128 ",
        "k4v4_c0128_v128_p128_d128",
        "int4",
        "k4v4_c128_v128_p128_d128_kclip100",
        "k4v4_c128_v128_p128_d128_vclip90_kclip90",
    ],
)
def test_names_are_read_strictly(name: str) -> None:
    with pytest.raises(ValueError, match=r"format = .*allowed: k<bits>"):
        KvFormat.parse(name)


def test_wrong_types() -> None:
    with pytest.raises(TypeError):
        KvFormat(k_bits="4")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        KvFormat(4, 4)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        KvFormat.parse(4)  # type: ignore[arg-type]
