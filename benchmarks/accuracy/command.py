# SPDX-License-Identifier: Apache-2.0
"""The command line of the accuracy bench: one JSON file, row by row, resumed where it stopped."""

from __future__ import annotations

import argparse
import fnmatch
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import machine
from provenance import ACCURACY, source_hashes
from results import Results, load, save
from rich.console import Console
from rich.progress import Progress

import bitdecoding
from accuracy import models, texts
from accuracy.bench import KINDS, Bench, Sizes, Unit, available, key_of
from accuracy.caches import head_dim
from accuracy.recipes import FEW, RECIPES, REDUCED, Recipe
from bitdecoding.calibration import choose_key_rotations, key_means

NEEDLES = {"smollm2-135m": (1024, 4096, 8000), "gemma-3-270m": (1024, 4096, 16384)}
REDUCED_TEXTS = ("novel", "code")
CALIBRATION_TOKENS = 2048  # for means and rotations of K


def sizes(name: str, args: argparse.Namespace) -> Sizes:
    """Of a model: full or reduced, or --context tokens."""
    if args.reduced:
        return Sizes(args.context or 640, 512, 512, (512,), 256, 32)
    context = args.context or models.MODELS[name].context
    return Sizes(context, min(context, 4096), min(context, 2048), NEEDLES[name], 1024, 256)


def chosen(args: argparse.Namespace) -> list[Recipe]:
    """Recipes whose names match a pattern."""
    patterns = args.recipes or (FEW if args.few else REDUCED if args.reduced else ["*"])
    return [r for r in RECIPES.values() if any(fnmatch.fnmatch(r.name, p) for p in patterns)]


def bench_of(name: str, args: argparse.Namespace, console: Console) -> Bench:
    loaded = models.load(name, args.device)
    wanted = args.texts or (REDUCED_TEXTS if args.reduced else list(texts.TEXTS))
    size = sizes(name, args)
    longest = max(size.context, size.prompt, size.layers, size.cross_check, *size.needles)
    ids = {text: texts.tokens(loaded.tokenizer, text, longest) for text in wanted}
    recipes, missing = available(chosen(args), loaded.model.config, args.device)
    for recipe, reason in missing.items():
        console.print(f"{name}: left out {recipe}: {reason}", markup=False)
    return Bench(loaded.model, loaded.tokenizer, name, ids, calibrated(recipes, loaded), size)


def calibrated(recipes: Sequence[Recipe], loaded: models.Loaded) -> list[Recipe]:
    """The recipes with what they want to know of their model: means of K where they are centred,
    the layers whose K is rotated where that is chosen."""
    if not any(recipe.centred or recipe.chosen for recipe in recipes):
        return list(recipes)
    model, ids = loaded.model, texts.calibration(loaded.tokenizer, CALIBRATION_TOKENS)[None]
    means, found = key_means(model, ids), []
    for recipe in recipes:
        if recipe.chosen:
            base = recipe.format(head_dim(model.config))
            recipe = replace(recipe, layers=tuple(choose_key_rotations(model, ids, base)))
        found.append(replace(recipe, k_means=means) if recipe.centred else recipe)
    return found


def facts(device: str) -> dict[str, Any]:
    found = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": bitdecoding.build_info()["git"],
    }
    found = machine() if device != "cpu" else found
    found["sources"] = source_hashes(parts=ACCURACY)
    found["transformers"] = transformers.__version__
    return found | {"models": "float32 weights and activations"}


def run(units: Sequence[Unit], results: Results, output: Path | None, minutes: float) -> bool:
    """Measures what is missing and saves after every unit; whether everything is there now."""
    begin, present = time.monotonic(), {key_of(row) for row in results.rows}
    missing = [unit for unit in units if not unit.keys <= present]
    with Progress() as progress:
        task = progress.add_task("", total=len(missing))
        for unit in missing:
            if time.monotonic() - begin > 60 * minutes:
                return False
            progress.update(task, description=f"{unit.kind}: {unit.label}")
            started = time.monotonic()
            rows = [r for r in unit.measure(progress.refresh) if key_of(r) not in present]
            seconds = round(time.monotonic() - started, 1)
            progress.console.print(f"{unit.kind}: {unit.label}: {seconds} s", markup=False)
            results.rows += rows
            if output is not None:
                save(output, results)
            progress.advance(task)
    return True


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="How well packed caches predict what 16 bits do.")
    found.add_argument("--models", nargs="+", choices=list(models.MODELS))
    found.add_argument("--texts", nargs="+", choices=list(texts.TEXTS))
    found.add_argument("--recipes", nargs="+", help="names or patterns such as 'kivi-2*'")
    found.add_argument("--few", action="store_true", help="the recipes that bear on the targets")
    found.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    found.add_argument("--context", type=int, help="tokens of every text; default: all there are")
    found.add_argument("--reduced", action="store_true", help="SmolLM2, 640 tokens, few recipes")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so many")
    found.add_argument("--output", type=Path, help="JSON file; what it has is not measured again")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all rows are there; 1: a cross-check failed; 2: the file is of other code; 3: --minutes
    were not enough."""
    args, console = parser().parse_args(arguments), Console(highlight=False)
    torch.set_float32_matmul_precision("highest")  # no TF32
    begin, done = time.monotonic(), True
    results = Results({}, [])
    if args.output is not None and args.output.exists():
        results = load(args.output)
    now = facts(args.device)
    if results.rows and results.facts.get("sources") != now["sources"]:
        console.print(f"{args.output} is of other code: choose another --output or delete it")
        return 2
    results.facts = now
    for name in args.models or (["smollm2-135m"] if args.reduced else list(models.MODELS)):
        bench = bench_of(name, args, console)
        left = args.minutes - (time.monotonic() - begin) / 60
        done &= run(list(bench.units(args.kinds)), results, args.output, left)
        del bench
    errors = [row for row in results.rows if "error" in row]
    for row in errors:
        console.print(f"{row['model']}, {row['recipe']}: {row['error']}", markup=False)
    return 1 if errors else 0 if done else 3
