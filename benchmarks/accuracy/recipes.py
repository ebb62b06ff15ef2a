# SPDX-License-Identifier: Apache-2.0
"""The recipes that the bench compares: formats, 16-bit zones, layers left in 16 bit. Data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bitdecoding import KvFormat, recipes

WHOLE = recipes.WHOLE


@dataclass(frozen=True)
class Recipe(recipes.Recipe):
    """A recipe of the library and what the bench does with it. Names here say everything, so that
    rows can be told apart."""

    long: bool = False  # it also writes freely, which takes a step per token
    k_means: Sequence[Any] | None = field(default=None, compare=False, repr=False)  # if centred
    chosen: bool = False  # calibration rotates K of the layers where that helps: it fills
    layers: tuple[KvFormat | None, ...] | None = None  # formats of their own

    def formats(self, kinds: Sequence[str], head_dim: int) -> list[KvFormat | None]:
        if self.layers is not None:
            return list(self.layers)
        if self.chosen:
            raise ValueError(
                f"{self.name}: layers = None; it wants what its model's calibration chose"
            )
        return super().formats(kinds, head_dim)

    def why_not(self, head_dim: int) -> str | None:
        """Why this build has no such recipe; None: it has."""
        try:
            self.format(head_dim)
        except (TypeError, ValueError) as error:
            return str(error).splitlines()[0]
        return None


def kivi(name: str, bits: tuple[int, int], groups: tuple[int, int], **more: Any) -> Recipe:
    """K per channel, V per token; groups of K in tokens, of V in channels."""
    codes = {"k_bits": bits[0], "v_bits": bits[1], "k_group": groups[0], "v_group": groups[1]}
    options = {k: more.pop(k) for k in ("edges", "centred", "chosen", "long") if k in more}
    return Recipe(name, {**codes, **more}, **options)


def token(name: str, bits: tuple[int, int], group: int, **more: Any) -> Recipe:
    """K and V per token."""
    return kivi(name, bits, (group, group), k_axis="token", **more)


def with_zones(recipe: Recipe, first: int, last: int) -> Recipe:
    name = f"{recipe.name}, zones {first}/{last}"
    return replace(recipe, name=name, keep_first=first, keep_last=last, long=False)


def clipped(recipe: Recipe, long: bool = False) -> Recipe:
    """Two-bit codes divide less than the whole range: by CLIPS, found on one text of SmolLM2, where
    the whole head of V are 64 channels."""
    found = dict(recipe.fields)
    for part in ("k", "v"):
        if found[f"{part}_bits"] == 2:
            group = found[f"{part}_group"]
            found[f"{part}_clip"] = CLIPS[min(group, 64) if part == "v" else group]
    return replace(recipe, name=f"{recipe.name}, clipped", fields=found, long=long)


CLIPS = {32: 85, 64: 80, 128: 75}  # percent, by the size of a group
# Rotating K spreads what channel-wise groups confine: it helps where no channel is far larger than
# the others (SmolLM2) and ruins K where one is (Gemma 3). V's rotation helps in both.
ROTATED = {"k_rotation": WHOLE, "v_rotation": WHOLE}
V_ROTATED = {"v_rotation": WHOLE}
KIVI4 = kivi("kivi-4 g128", (4, 4), (128, WHOLE), long=True)
KIVI2 = kivi("kivi-2 g32", (2, 2), (32, 32), long=True)
K4V2 = kivi("k4v2 g128/32", (4, 2), (128, 32), long=True)
KIVI2_ROTATED = kivi("kivi-2 g32, rotated", (2, 2), (32, 32), **ROTATED)
K4V2_ROTATED = kivi("k4v2 g128/32, rotated", (4, 2), (128, 32), **ROTATED, long=True)
OSCAR = kivi("oscar", (2, 2), (32, 32), **ROTATED, token_norm=True)
KIVI2_V_ROTATED = clipped(kivi("kivi-2 g32, V rotated", (2, 2), (32, 32), **V_ROTATED), long=True)
KIVI2_ALL_ROTATED = clipped(KIVI2_ROTATED, long=True)

PLAIN = (
    KIVI4,
    kivi("kivi-4 g64", (4, 4), (64, 64)),
    kivi("kivi-4 g32", (4, 4), (32, 64)),
    token("token-4 g64", (4, 4), 64),
    K4V2,
    kivi("k2v4 g32", (2, 4), (32, WHOLE)),
    kivi("kivi-2 g128", (2, 2), (128, WHOLE)),
    kivi("kivi-2 g64", (2, 2), (64, 64)),
    KIVI2,
    kivi("kivi-2 g32, norms", (2, 2), (32, 32), token_norm=True),
    token("token-2 g32", (2, 2), 32),
    kivi("kivi-2 g32, first and last layer 16-bit", (2, 2), (32, 32), edges=1),
)
TRANSFORMED = (
    token("hadamard-4", (4, 4), 64, **ROTATED, long=True),
    token("hadamard-4, centred", (4, 4), 64, **ROTATED, centred=True, long=True),
    token("hadamard-4, blocks of 16", (4, 4), 64, k_rotation=16, v_rotation=16),
    token("hadamard-4, blocks of 64", (4, 4), 64, k_rotation=64, v_rotation=64),
    kivi("kivi-4 g128, V rotated", (4, 4), (128, WHOLE), **V_ROTATED),
    kivi("kivi-4 g128, rotated", (4, 4), (128, WHOLE), **ROTATED, long=True),
    kivi("k4v2 g128/32, V rotated", (4, 2), (128, 32), **V_ROTATED),
    K4V2_ROTATED,
    kivi("k4v2 g128/whole, rotated", (4, 2), (128, WHOLE), **ROTATED),
    kivi("k4v2 g128/whole, rotated, clip 90", (4, 2), (128, WHOLE), **ROTATED, v_clip=90),
    kivi("k2v4 g32, rotated", (2, 4), (32, WHOLE), **ROTATED),
    KIVI2_ROTATED,
    kivi("kivi-2 g32, blocks of 16 rotated", (2, 2), (32, 32), k_rotation=16, v_rotation=16),
    kivi("kivi-2 g64, rotated", (2, 2), (64, 64), **ROTATED),
    OSCAR,
    kivi("block-4", (4, 4), (32, 32), k_axis="block", **ROTATED, long=True),
    kivi("block-4, not rotated", (4, 4), (32, 32), k_axis="block"),
    kivi("block-2", (2, 2), (32, 32), k_axis="block", **ROTATED),
)
CLIPPED = (
    clipped(KIVI2),
    KIVI2_V_ROTATED,
    KIVI2_ALL_ROTATED,
    clipped(kivi("kivi-2 g32/whole, V rotated", (2, 2), (32, WHOLE), **V_ROTATED), long=True),
    clipped(kivi("kivi-2 g64, V rotated", (2, 2), (64, 64), **V_ROTATED)),
    clipped(kivi("kivi-2 g128, V rotated", (2, 2), (128, WHOLE), **V_ROTATED), long=True),
    clipped(kivi("kivi-2 g32, V rotated, norms", (2, 2), (32, 32), **V_ROTATED, token_norm=True)),
    clipped(kivi("k4v2 g128/32, V rotated", (4, 2), (128, 32), **V_ROTATED), long=True),
    clipped(kivi("k4v2 g128/whole, V rotated", (4, 2), (128, WHOLE), **V_ROTATED)),
    kivi("kivi-4 g32, V rotated", (4, 4), (32, 64), **V_ROTATED),
    clipped(OSCAR, long=True),
    clipped(K4V2_ROTATED),
    clipped(kivi("k4v2 g128/whole, rotated", (4, 2), (128, WHOLE), **ROTATED), long=True),
    clipped(kivi("k2v4 g32, rotated", (2, 4), (32, WHOLE), **ROTATED)),
    clipped(kivi("kivi-2 g32/whole, rotated", (2, 2), (32, WHOLE), **ROTATED)),
    clipped(kivi("kivi-2 g64, rotated", (2, 2), (64, 64), **ROTATED)),
    clipped(kivi("kivi-2 g128, rotated", (2, 2), (128, WHOLE), **ROTATED)),
    clipped(kivi("kivi-2 g128, rotated, norms", (2, 2), (128, WHOLE), **ROTATED, token_norm=True)),
)
CHOSEN = tuple(
    replace(recipe, name=f"{recipe.name}, K where it helps", chosen=True, long=True)
    for recipe in (
        kivi("kivi-4 g128, V rotated", (4, 4), (128, WHOLE), **V_ROTATED),
        kivi("k4v2 g128/32, V rotated", (4, 2), (128, 32), **V_ROTATED),
        clipped(kivi("kivi-2 g32/whole, V rotated", (2, 2), (32, WHOLE), **V_ROTATED)),
        clipped(kivi("kivi-2 g128, V rotated", (2, 2), (128, WHOLE), **V_ROTATED)),
    )
)
ZONES = tuple(
    with_zones(recipe, first, last)
    for recipe in (KIVI4, KIVI2, KIVI2_V_ROTATED)
    for first, last in ((0, 0), (0, 64), (16, 128), (64, 256))
)
RECIPES = {recipe.name: recipe for recipe in (*PLAIN, *TRANSFORMED, *CLIPPED, *CHOSEN, *ZONES)}
REDUCED = (KIVI4.name, K4V2.name, KIVI2.name, KIVI2_V_ROTATED.name)
# What is recommended, what it is chosen over, and the baselines of the targets.
FEW = (
    KIVI4.name,
    "kivi-4 g128, V rotated",
    "kivi-4 g128, rotated",
    "hadamard-4",
    "hadamard-4, centred",
    "token-4 g64",
    K4V2.name,
    "k4v2 g128/32, V rotated",
    K4V2_ROTATED.name,
    "k4v2 g128/32, rotated, clipped",
    "k4v2 g128/whole, V rotated, clipped",
    "k4v2 g128/whole, rotated, clipped",
    "kivi-2 g128",
    "kivi-2 g128, V rotated, clipped",
    "kivi-2 g128, rotated, clipped",
    KIVI2.name,
    "kivi-2 g32, clipped",
    KIVI2_V_ROTATED.name,
    KIVI2_ALL_ROTATED.name,
    "kivi-2 g32/whole, V rotated, clipped",
    "kivi-2 g32/whole, rotated, clipped",
    "oscar, clipped",
    *(recipe.name for recipe in CHOSEN),
)
