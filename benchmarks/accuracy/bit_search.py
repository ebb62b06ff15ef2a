# SPDX-License-Identifier: Apache-2.0
"""Bits per layer, searched offline against an error budget (after KVTuner).

PYTHONPATH=benchmarks python -m accuracy.bit_search --bits 3 3.5

Every pair of K and V bits, with and without a rotation of K, is tried on every full-attention layer
by itself: the error of its attention output on a calibration text (layer_errors.py). Then the
assignment of the lowest summed squared error is chosen that has at most the wanted bits per
element, by giving bits where they lower the error most per bit. It is validated on other texts
beside the uniform recipes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import Results, Row, save
from rich.console import Console

from accuracy import caches, models, texts
from accuracy.bench import available
from accuracy.command import facts
from accuracy.layer_errors import relative_errors
from accuracy.recipes import RECIPES, WHOLE, Recipe
from accuracy.text_rows import recipe_rows
from bitdecoding import KvFormat

PAIRS = ((2, 2), (2, 4), (4, 2), (4, 4))  # K, V
CALIBRATION_TOKENS = 2048


@dataclass(frozen=True)
class Choice:
    """A format for a layer: its cost in bits per element, and its squared relative error."""

    format: KvFormat
    bits: float
    error: float


def variants(base: Recipe, head_dim: int) -> list[Recipe]:
    """``base`` in every pair of bits, each with and without a rotation of K. Ranges are clipped at
    two bits alone."""
    found = []
    for k, v in PAIRS:
        fields = {**base.fields, "k_bits": k, "v_bits": v}
        for part, bits in (("k", k), ("v", v)):
            if bits == 4:
                fields.pop(f"{part}_clip", None)
        fields.pop("k_rotation", None)
        for name, own in ((f"K{k} V{v}", {}), (f"K{k} V{v}, K rotated", {"k_rotation": WHOLE})):
            found.append(Recipe(name, fields | own, base.keep_first, base.keep_last))
    return [recipe for recipe in found if recipe.why_not(head_dim) is None]


def sensitivities(model: Any, ids: torch.Tensor, recipes: Sequence[Recipe]) -> list[list[Choice]]:
    """Per full-attention layer its choices; ids (B, S) of a calibration text."""
    dim = caches.head_dim(model.config)
    errors = relative_errors(model, ids, recipes)
    per_layer: list[list[Choice]] = []
    for index, kind in enumerate(caches.layer_kinds(model.config)):
        if kind != "full_attention":
            continue
        choices = []
        for recipe in recipes:
            format, error = recipe.format(dim), errors[recipe.name][index]
            assert error is not None
            choices.append(Choice(format, format.bits_per_element, error**2))
        per_layer.append(choices)
    return per_layer


def convex(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of error over bits, in rising order of bits: no mixture
    of two others is cheaper and better."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bits, c.error)):
        if hull and (choice.error >= hull[-1].error or choice.bits == hull[-1].bits):
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(a: Choice, b: Choice) -> float:
    """Error that b saves per bit that it costs more."""
    return (a.error - b.error) / (b.bits - a.bits)


def assign(layers: Sequence[Sequence[Choice]], bits: float) -> list[Choice]:
    """One choice per layer with a mean of at most ``bits``: from the cheapest of each, the step
    along a layer's hull that saves most per bit comes first. On hulls that is optimal but for the
    last step, which may not fit.

    Raises ValueError where even the cheapest need more."""
    hulls = [convex(choices) for choices in layers]
    places = [0] * len(hulls)
    left = bits * len(hulls) - sum(hull[0].bits for hull in hulls)
    if left < -1e-9:
        least = sum(hull[0].bits for hull in hulls) / len(hulls)
        raise ValueError(
            f"bits = {bits}; allowed: at least {least:.3f}, the cheapest of all layers"
        )
    while True:
        steps = [
            (_gain(hull[at], hull[at + 1]), layer)
            for layer, (hull, at) in enumerate(zip(hulls, places, strict=True))
            if at + 1 < len(hull) and hull[at + 1].bits - hull[at].bits <= left + 1e-9
        ]
        if not steps:
            return [hull[at] for hull, at in zip(hulls, places, strict=True)]
        _, layer = max(steps)
        hull, at = hulls[layer], places[layer]
        left -= hull[at + 1].bits - hull[at].bits
        places[layer] += 1


def layered(base: Recipe, kinds: Sequence[str], found: Sequence[Choice]) -> Recipe:
    """What LowBitCache takes."""
    rest = iter(found)
    formats = [next(rest).format if kind == "full_attention" else None for kind in kinds]
    name = f"searched, {sum(c.bits for c in found) / len(found):.3f} bits"
    return Recipe(name, base.fields, base.keep_first, base.keep_last, layers=tuple(formats))


def search(
    model: Any,
    calibration: torch.Tensor,
    ids: Mapping[str, torch.Tensor],
    base: Recipe,
    budgets: Sequence[float],
) -> list[Row]:
    """Rows of the assignment for every budget and of every uniform variant, on texts of (S,)
    tokens."""
    config = model.config
    uniform, _ = available(variants(base, caches.head_dim(config)), config, model.device.type)
    choices = sensitivities(model, calibration[None], uniform)
    kinds = caches.layer_kinds(config)
    found = [layered(base, kinds, assign(choices, bits)) for bits in budgets]
    stacked = torch.stack(list(ids.values())).to(model.device)
    rows = recipe_rows(model, stacked, list(ids), [*found, *uniform], lambda: None)
    layers = {one.name: [None if f is None else str(f) for f in one.layers or ()] for one in found}
    return [
        row | ({"layers": layers[name]} if (name := row["recipe"]) in layers else {})
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits per layer under a budget.")
    parser.add_argument("--models", nargs="+", choices=list(models.MODELS), default=models.MODELS)
    parser.add_argument(
        "--recipe",
        choices=list(RECIPES),
        default="kivi-2 g32/whole, V rotated, clipped",
        help="but its bits",
    )
    parser.add_argument(
        "--bits", type=float, nargs="+", default=[3.0, 3.5], help="per element, mean, at most"
    )
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    for name in args.models:
        loaded = models.load(name, args.device)
        calibration = texts.calibration(loaded.tokenizer, CALIBRATION_TOKENS).to(args.device)
        ids = {text: texts.tokens(loaded.tokenizer, text, args.context) for text in texts.TEXTS}
        found = search(loaded.model, calibration, ids, RECIPES[args.recipe], args.bits)
        rows += [{"model": name} | row for row in found]
    console = Console(highlight=False)
    for row in rows:
        numbers = f"{row['bits_per_element']} bits, KL {row['kl']}, {row['perplexity']}"
        console.print(f"{row['model']}, {row['text']}, {row['recipe']}: {numbers}", markup=False)
    if args.output is not None:
        save(args.output, Results(facts(args.device), rows))


if __name__ == "__main__":
    main()
