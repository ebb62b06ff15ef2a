# SPDX-License-Identifier: Apache-2.0
"""What the decode benchmark measures on which shapes: formats, kernels, rivals."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from shapes import Case, tagged

INT4 = "k4v4_c128_v128_p128_d128"
K4V2 = "k4v2_c128_v128_p128_d128"
INT2 = "k2v2_c128_v128_p128_d128"
SMALL_GROUPS = "k2v2_c32_v32_p128_d128_norm"  # the most parameters of the 2-bit formats
INT4_PER_TOKEN = "k4v4_t128_v128_p128_d128"
INT2_PER_TOKEN = "k2v2_t128_v128_p128_d128"
INT4_D64 = "k4v4_c128_v64_p128_d64"
INT2_D64 = "k2v2_c128_v64_p128_d64"
INT4_D256 = "k4v4_c128_v128_p128_d256"
K4V2_D256 = "k4v2_c128_v128_p128_d256"
INT2_D256 = "k2v2_c128_v128_p128_d256"
FORMATS = (INT4, K4V2, INT2, SMALL_GROUPS)

ROTATED = "_kr128_vr128"
ROTATED_INT4 = INT4 + ROTATED
# The groups of 32 that 2 bits want, without a transform and with the most of them.
INT2_G32 = "k2v2_c32_v32_p128_d128"
BEST_INT2 = INT2_G32 + ROTATED + "_kclip85_vclip85"
# KvFormat.recommended(bits=4 | 3 | 2, head_dim=128)
RECOMMENDED_INT4 = INT4 + "_vr128"
RECOMMENDED_INT3 = "k4v2_c128_v32_p128_d128_vr128"
RECOMMENDED_INT2 = "k2v2_c32_v128_p128_d128_vr128_kclip85_vclip80"
# What docs/accuracy.md recommends or compares: groups, then what is done to K and V.
RECIPES = (
    INT4,
    RECOMMENDED_INT4,
    ROTATED_INT4,
    "k4v4_c32_v128_p128_d128",
    K4V2,
    "k4v2_c128_v32_p128_d128",
    RECOMMENDED_INT3,
    "k4v2_c128_v32_p128_d128" + ROTATED,
    INT2,
    INT2 + ROTATED + "_kclip75_vclip75",
    INT2_G32,
    INT2_G32 + "_vr128_kclip85_vclip85",
    BEST_INT2,
    SMALL_GROUPS,
    SMALL_GROUPS + ROTATED,
    "k2v2_c32_v128_p128_d128",
    RECOMMENDED_INT2,
    RECOMMENDED_INT2.replace("_vr128", ROTATED),
    INT4_PER_TOKEN,
    "k4v4_t64_v64_p128_d128",
    "k4v4_t64_v64_p128_d128" + ROTATED,
    "k4v4_b32_v32_p128_d128",
    "k4v4_b32_v32_p128_d128" + ROTATED,
    "k2v2_b32_v32_p128_d128",
    "k2v2_b32_v32_p128_d128" + ROTATED,
)
# Of append.py: two recipes, each beside its groups untransformed.
APPEND_FORMATS = (*FORMATS, INT4_PER_TOKEN, ROTATED_INT4, INT2_G32, BEST_INT2)

PLAN = "plan"  # the kernel that plan_decode chooses


def untransformed(name: str) -> str:
    """The same page bytes as they come: k2v2_c32_v32_p128_d128_norm_vr128_kclip85 ->
    k2v2_c32_v32_p128_d128_norm."""
    return re.sub(r"(_p\d+_d\d+(_norm)?).*", r"\1", name)


@dataclass(frozen=True)
class Suite:
    """What is measured on the shapes with a tag of shapes.csv."""

    formats: tuple[str, ...]
    kernel: str = PLAN  # or a pattern of rows of the kernel table
    baselines: bool = True  # 16-bit attention too, where all sequences are equally long


SUITES = {
    "large": Suite(FORMATS),
    "single": Suite(FORMATS),
    "head64": Suite((INT4_D64, INT2_D64)),
    "head256": Suite((INT4_D256, K4V2_D256, INT2_D256)),
    "token": Suite((INT4_PER_TOKEN, INT2_PER_TOKEN)),
    "columns": Suite((INT4, INT2)),
    "cp_async": Suite((INT4, INT2), kernel="decode_sm80_*"),
    "length": Suite((INT4, INT2), baselines=False),  # at 1M tokens 16 bits don't fit
    "ragged": Suite((INT4, INT2)),
    "recipes": Suite(RECIPES, baselines=False),
    "grid": Suite((INT4, INT2)),
    "quick": Suite((INT4,)),
}
TARGETS = tuple(tag for tag in SUITES if tag not in ("head256", "recipes", "grid", "quick"))


@dataclass(frozen=True)
class Measurement:
    """One row of ours."""

    format: str
    kernel: str


@dataclass
class Plan:
    """What is measured of one case."""

    ours: list[Measurement]
    baselines: bool


def planned(tags: Iterable[str]) -> dict[Case, Plan]:
    """What the suites of these tags measure, case by case; nothing twice."""
    plans: dict[Case, Plan] = {}
    for tag in tags:
        suite = SUITES[tag]
        for case in tagged(tag):
            plan = plans.setdefault(case, Plan([], False))
            plan.baselines |= suite.baselines
            for name in suite.formats:
                one = Measurement(name, suite.kernel)
                if one not in plan.ours:
                    plan.ours.append(one)
    return plans
