# SPDX-License-Identifier: Apache-2.0
"""Recipes: named ways to hold a model's K and V, for people who choose by bits or by method.

``int4``, ``int3`` and ``int2`` are what :meth:`KvFormat.recommended` gives. The others are methods
of the field under its own terms, to compare with; docs/accuracy.md has what each loses and where.

    kivi-4-g64    K per channel, V per token, groups of 64 (KIVI, arXiv 2402.02750)
    k4v2, k2v4    the same with unequal bits, not rotated: K in groups of 128 and 32 tokens
    token-4       K and V per token
    hadamard-4    per token, K and V turned by a Walsh-Hadamard transform over the whole head, or
                  over blocks of 16 or 64 channels (QuaRot, arXiv 2404.00456), K less its mean
    hadamard-2    per channel, turned, in groups of 32 or 128
    oscar         per channel, turned, K divided by its tokens' norms
    block-4       blocks of 32 channels that share a power of two, turned
    -edges        the first and the last layer in 16 bit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitdecoding import KvFormat
from bitdecoding.arrays import as_format

FULL_ATTENTION = "full_attention"  # of a config's layer_types
WHOLE = 128  # channels of a group or a rotation, at most: the whole head, or half of one of 256
_FIELDS = (
    "k_bits", "v_bits", "k_axis", "k_group", "v_group", "page_tokens", "token_norm",
    "k_rotation", "v_rotation", "k_clip", "v_clip",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One way to hold the K and V of a model's full-attention layers.

    fields      of :class:`KvFormat`, but for head_dim; channels of groups and rotations become at
                most those of a head
    keep_first, keep_last   tokens of a sequence that stay in 16 bit, as LowBitCache takes them
    edges       so many first and so many last full-attention layers stay in 16 bit
    centred     K is to be taken less its mean: LowBitCache(k_means=key_means(model, ids)), of
                bitdecoding.calibration. Without it the recipe works, and a rotation spreads the
                offset that a channel of K may have over all others, where it widens every group
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    keep_first: int = 16
    keep_last: int = 64
    edges: int = 0
    centred: bool = False

    def format(self, head_dim: int) -> KvFormat:
        """Of the packed layers. Raises TypeError or ValueError where there is no such format."""
        given = dict(self.fields)
        channels = ["v_group", "k_rotation", "v_rotation"]
        channels += ["k_group"] if given.get("k_axis", "channel") != "channel" else []
        for name in channels:
            if name in given:
                given[name] = min(given[name], head_dim)
        return KvFormat(**given, head_dim=head_dim)

    def formats(self, kinds: Sequence[str], head_dim: int) -> list[KvFormat | None]:
        """Per layer, None: 16-bit. kinds: of the model's layers, as its config names them."""
        full = [i for i, kind in enumerate(kinds) if kind == FULL_ATTENTION]
        packed = full[self.edges : len(full) - self.edges]
        return [self.format(head_dim) if i in packed else None for i in range(len(kinds))]


def fields_of(format: KvFormat) -> dict[str, Any]:
    """What :attr:`Recipe.fields` hold: all but head_dim."""
    return {field: getattr(format, field) for field in _FIELDS}


def recommended(name: str, bits: int) -> Recipe:
    """The library's choice (:meth:`KvFormat.recommended`), which fits every head_dim."""
    return Recipe(name, fields_of(KvFormat.recommended(bits=bits, head_dim=2 * WHOLE)))


def kivi(name: str, k_bits: int, v_bits: int, k_group: int, v_group: int, **more: Any) -> Recipe:
    """Groups of K in tokens, of V in channels; more: fields of KvFormat and of Recipe."""
    codes = {"k_bits": k_bits, "v_bits": v_bits, "k_group": k_group, "v_group": v_group}
    options = {key: more.pop(key) for key in ("edges", "centred") if key in more}
    return Recipe(name, {**codes, **more}, **options)


def token(name: str, bits: int, group: int, **more: Any) -> Recipe:
    """K and V per token, groups in channels."""
    return kivi(name, bits, bits, group, group, k_axis="token", **more)


def block(name: str, bits: int, **more: Any) -> Recipe:
    """K and V in blocks of 32 channels of a token."""
    return kivi(name, bits, bits, 32, 32, k_axis="block", **more)


def turned(channels: int) -> dict[str, int]:
    return {"k_rotation": channels, "v_rotation": channels}


def clipped(percent: int) -> dict[str, int]:
    return {"k_clip": percent, "v_clip": percent}


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        recommended("int4", 4),
        recommended("int3", 3),
        recommended("int2", 2),
        kivi("k4v2", 4, 2, 128, 32),
        kivi("k2v4", 2, 4, 32, WHOLE),
        kivi("kivi-4-g128", 4, 4, 128, WHOLE),
        kivi("kivi-4-g64", 4, 4, 64, 64),
        kivi("kivi-4-g32", 4, 4, 32, 32),
        kivi("kivi-2-g128", 2, 2, 128, WHOLE),
        kivi("kivi-2-g64", 2, 2, 64, 64),
        kivi("kivi-2-g32", 2, 2, 32, 32),
        kivi("kivi-2-edges", 2, 2, 32, 32, edges=1),
        token("token-4", 4, 64),
        token("token-2", 2, 32),
        token("hadamard-4", 4, 64, **turned(WHOLE), centred=True),
        token("hadamard-4-64", 4, 64, **turned(64), centred=True),
        token("hadamard-4-16", 4, 64, **turned(16), centred=True),
        kivi("hadamard-2", 2, 2, 32, 32, **turned(WHOLE), **clipped(85)),
        kivi("hadamard-2-g128", 2, 2, 128, WHOLE, **turned(WHOLE), **clipped(75)),
        kivi("oscar", 2, 2, 32, 32, **turned(WHOLE), **clipped(85), token_norm=True),
        block("block-4", 4, **turned(WHOLE)),
        block("block-2", 2, **turned(WHOLE)),
    )
}
COMMON = ("int4", "k4v2", "int2")  # what `bitdecoding plan` and the demo show


def resolve_format(format: KvFormat | str, head_dim: int) -> KvFormat:
    """The format that a user means, for heads of ``head_dim`` channels.

    ``format`` is a :class:`KvFormat`, its canonical name, or a key of :data:`RECIPES`.
    Raises ValueError for an unknown name, for a recipe whose layers differ and for a format of
    another head_dim, or TypeError.
    """
    if isinstance(format, str) and format in RECIPES:
        recipe = RECIPES[format]
        if recipe.edges:
            raise ValueError(
                f"format = {format!r}: it leaves the first and last layers in 16 bit; allowed: "
                "as the format of a whole LowBitCache"
            )
        return recipe.format(head_dim)
    try:
        format = as_format(format)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}; or one of {', '.join(RECIPES)}") from None
    if format.head_dim != head_dim:
        raise ValueError(
            f"format = {format}: head_dim {format.head_dim}; this model has {head_dim}"
        )
    return format
