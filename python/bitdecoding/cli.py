# SPDX-License-Identifier: Apache-2.0
"""The console script ``bitdecoding``: demo, info, plan."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import platform
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bitdecoding import KvFormat, build_info
from bitdecoding.arrays import LARGEST
from bitdecoding.demo import DemoOptions, run_demo
from bitdecoding.demo_assets import DemoError
from bitdecoding.plan import ModelShape, has_kernels, sequence_bytes, sixteen_bit_bytes
from bitdecoding.recipes import COMMON, RECIPES, resolve_format
from bitdecoding.tables import print_table

QUICK = DemoOptions(prompt_tokens=1024, steps=64, new_tokens=16)
_GB = 10**9


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 0 for success, 1 for a demo that fails its checks, 2 for what cannot run."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except (DemoError, NotImplementedError, ValueError) as error:
        print(f"bitdecoding {options.command}: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bitdecoding", description="Low-bit KV caches.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands.add_parser("demo", help="a real model on 16-bit and low-bit caches"))
    info = commands.add_parser("info", help="build, device, formats, kernels")
    info.set_defaults(run=_info)
    _add_plan(commands.add_parser("plan", help="tokens per GB of each format"))
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    default = DemoOptions()
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores")
    parser.add_argument("--model", type=Path, help="Hugging Face directory or .gguf file")
    parser.add_argument("--text", type=Path, help="UTF-8 file instead of the fetched text")
    parser.add_argument("--prompt-tokens", type=_positive, help=f"[{default.prompt_tokens}]")
    parser.add_argument("--steps", type=_positive, help=f"compared tokens [{default.steps}]")
    parser.add_argument("--new-tokens", type=_positive, help=f"free text [{default.new_tokens}]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.set_defaults(run=_demo)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=_positive, required=True)
    parser.add_argument("--heads-kv", type=_positive, required=True)
    parser.add_argument("--head-dim", type=_positive, required=True)
    parser.add_argument("--context", type=_positive, default=32768, help="tokens of a sequence")
    parser.add_argument("--memory", type=_gigabytes, help="GB for caches: how many fit")
    parser.add_argument("--format", action="append", help="a recipe or a canonical name; again")
    parser.add_argument("--keep-first", type=_count, default=16, help="first tokens in 16 bit")
    parser.add_argument("--keep-last", type=_count, default=64, help="newest tokens in 16 bit")
    parser.set_defaults(run=_plan)


def _count(text: str, *, least: int = 0) -> int:
    if not text.isdecimal() or not least <= float(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text}; allowed: {least} to {LARGEST}")
    return int(text)


_positive = partial(_count, least=1)


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}; allowed: a number above 0")
    return value


def _demo(options: argparse.Namespace) -> int:
    base = QUICK if options.quick else DemoOptions()
    return run_demo(
        DemoOptions(
            model=options.model,
            text=options.text,
            prompt_tokens=options.prompt_tokens or base.prompt_tokens,
            steps=options.steps or base.steps,
            new_tokens=options.new_tokens or base.new_tokens,
            device=options.device,
            json=options.json,
        )
    )


def _info(options: argparse.Namespace) -> int:
    facts = build_info()
    for key in ("version", "format_version", "git", "compiler", "cuda", "cuda_driver"):
        print(f"{key:<15}{facts[key] or 'none'}")
    print(f"{'architectures':<15}{' '.join(facts['architectures']) or 'none'}")
    print(f"{'cpu':<15}{platform.machine()}, {os.cpu_count()} threads")
    for line in _gpus():
        print(f"{'gpu':<15}{line}")
    print_table(
        ("name", "format", "bits"),
        [(name, *_describe(recipe.format(128))) for name, recipe in RECIPES.items()],
        title="recipes for heads of 128 channels (bits per element with scales and zero-points)",
    )
    print("kernels")
    _print_kernels(facts["kernels"] or ["none (CPU only)"])
    return 0


def _print_kernels(names: Sequence[str]) -> None:
    """Those of one operation and architecture together, a few on a line."""
    for start in dict.fromkeys(name.partition("_k")[0] for name in names):
        group = " ".join(name for name in names if name.partition("_k")[0] == start)
        print(textwrap.fill(group, 100, initial_indent="  ", subsequent_indent="  "))


def _gpus() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return ["unknown (torch is not installed)"]
    import torch

    return [_gpu(torch.cuda, i) for i in range(torch.cuda.device_count())] or ["none"]


def _gpu(cuda: Any, index: int) -> str:
    major, minor = cuda.get_device_capability(index)
    return f"{cuda.get_device_name(index)} (compute capability {major}.{minor})"


def _describe(format: KvFormat) -> tuple[str, str]:
    return str(format), f"{format.bits_per_element:.2f}"


def _plan(options: argparse.Namespace) -> int:
    shape = ModelShape(options.layers, options.heads_kv, options.head_dim)
    tokens = options.context
    base = sixteen_bit_bytes(shape, tokens)
    names = options.format or COMMON
    formats = [resolve_format(name, shape.head_dim) for name in names]
    zones = {"keep_first": options.keep_first, "keep_last": options.keep_last}
    header = ["cache", "format", "CUDA", "bits", "MB each", "tokens/GB", "smaller"]
    rows = [["16-bit", "", "", "16.00", *_sizes(base, base, tokens)]]
    for name, format in zip(names, formats, strict=True):
        size = sequence_bytes(shape, format, tokens, **zones)
        label = name if name in RECIPES else ""
        bits = f"{format.bits_per_element:.2f}"
        cuda = "yes" if has_kernels(format) else "no"
        rows.append([label, str(format), cuda, bits, *_sizes(size, base, tokens)])
    if options.memory is not None:
        header.append(f"in {options.memory:g} GB")
        sizes = [base, *(sequence_bytes(shape, f, tokens, **zones) for f in formats)]
        for row, size in zip(rows, sizes, strict=True):
            row.append(str(int(options.memory * _GB // size)))
    title = (
        f"{shape.layers} layers, {shape.heads_kv} KV heads, head_dim {shape.head_dim}: sequences "
        f"of {tokens} tokens, {options.keep_first} first and {options.keep_last} newest in 16 bit"
    )
    caption = (
        "All that is allocated counts: pages, 16-bit zones, tables. 1 GB = 10^9 bytes. "
        "CUDA: whether this build has kernels for the format."
    )
    print_table(header, rows, title=title, caption=caption)
    return 0


def _sizes(size: int, base: int, tokens: int) -> tuple[str, str, str]:
    return f"{size / 1e6:.1f}", f"{tokens * _GB // size:,}", f"{base / size:.2f}x"


if __name__ == "__main__":
    sys.exit(main())
