# SPDX-License-Identifier: Apache-2.0
"""The demo's model on low-bit caches: does CUDA predict what the CPU predicts?

The model computes in float32 on both, and one prefill on the CPU fills every cache, so that only
the caches and their attention differ. Then the text is fed token by token. The 16-bit row is
torch's attention on both devices: what float32 sums in another order do.

python benchmarks/demo_agreement.py --output benchmarks/results/demo_agreement_h200.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import machine
from rich.console import Console
from rich.table import Table

from bitdecoding import demo_run
from bitdecoding.demo import CONTENDERS, DemoOptions
from bitdecoding.demo_assets import MODEL, TEXT, fetch

LIMITS = {"mean_kl": 1e-4, "top1": 0.99}  # at most, at least


def prepare(args: argparse.Namespace) -> demo_run.Session:
    """Model, text and the prefill, on the CPU in float32."""
    model, tokenizer = demo_run.load_model(args.model or fetch(MODEL), "cpu")
    text = (args.text or fetch(TEXT)).read_text(encoding="utf-8")
    tokens = demo_run.tokenize(model, tokenizer, text, args.prompt_tokens, args.steps)
    return demo_run.prefill(model, tokenizer, tokens, args.prompt_tokens)


def all_logits(session: demo_run.Session, steps: int) -> dict[str, torch.Tensor]:
    """By contender: (steps, vocabulary) float32 on the CPU."""
    logits = {}
    for name, recipe in CONTENDERS:
        cache = demo_run.new_cache(session, recipe, steps)
        logits[name] = demo_run.teacher_forced(session, cache, steps, tick=lambda: None).logits
        print(f"{session.model.device}: {name} done", flush=True)
    return logits


def compare(cpu: torch.Tensor, cuda: torch.Tensor) -> dict[str, float]:
    kl = demo_run.divergences(cpu, cuda)
    top1, mean_kl = demo_run.agreement(cpu, cuda)
    worst = (cpu - cuda).abs().max() / cpu.std()  # NaN where either has one
    return {
        "mean_kl": mean_kl,
        "max_kl": float(kl.max()),
        "top1": top1,
        "max_logit_difference": float(worst),
    }


def holds(row: dict[str, Any]) -> bool:
    return row["mean_kl"] <= LIMITS["mean_kl"] and row["top1"] >= LIMITS["top1"]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_float32_matmul_precision("highest")  # no TF32
    session = prepare(args)
    on_cpu = all_logits(session, args.steps)
    on_cuda = all_logits(demo_run.move(session, args.device), args.steps)
    rows = []
    for name, recipe in CONTENDERS:
        row: dict[str, Any] = {"cache": name, "format": recipe or "float16"}
        row |= compare(on_cpu[name], on_cuda[name])
        rows.append(row | {"holds": holds(row)})
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    table = Table("cache", "format", "mean KL", "max KL", "top-1", "logits, max", "holds")
    for row in rows:
        numbers = [f"{row[name]:.2e}" for name in ("mean_kl", "max_kl")]
        numbers += [f"{row['top1']:.2%}", f"{row['max_logit_difference']:.1e}"]
        table.add_row(row["cache"], row["format"], *numbers, "yes" if row["holds"] else "NO")
    Console(highlight=False).print(table)


def main() -> int:
    default = DemoOptions()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face directory or .gguf file")
    parser.add_argument("--text", type=Path, help="UTF-8 file instead of the fetched text")
    parser.add_argument("--prompt-tokens", type=int, default=default.prompt_tokens)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    rows = measure(args)
    print_rows(rows)
    if args.output is not None:
        facts = {
            **machine(),
            "transformers": transformers.__version__,
            "model": (args.model or Path(MODEL.member)).name,
            "text": (args.text or Path(TEXT.member)).name,
            "prompt_tokens": args.prompt_tokens,
            "steps": args.steps,
            "limits": LIMITS,
        }
        report = {**facts, "rows": rows}
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
