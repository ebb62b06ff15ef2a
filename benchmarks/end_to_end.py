# SPDX-License-Identifier: Apache-2.0
"""Decode steps of a whole model, Llama-3.1-8B's shape with random weights: low-bit caches beside
torch's FlashAttention-2 and cuDNN over contiguous 16-bit ones, CUDA graphs on both sides.

python benchmarks/end_to_end.py --output benchmarks/results/end_to_end_h200.json
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baselines import BACKENDS
from decode import converter
from decode_cases import Zones
from llama_step import (
    LLAMA_8B,
    TINY,
    Attention,
    Llama,
    LowBitAttention,
    Shape,
    SixteenBitAttention,
    largest_batch,
    without_attention,
)
from measure import graph_time_us, machine
from results import Results, Row, save
from rich.console import Console
from rich.table import Table
from step_agreement import agreement_rows
from suites import FORMATS
from work import UNTIMED

from bitdecoding import KvFormat
from bitdecoding.plan import sequence_bytes, sixteen_bit_bytes

LENGTHS = (8192, 32768, 131072)  # of one sequence
THROUGHPUT_LENGTH = 32768
WARM_UP = 4  # steps before the timed ones: one eager, three replays


@dataclass(frozen=True)
class Contender:
    """An attention over a kind of cache. ``make(batch, length)``: sequences of random tokens, such
    that the timed steps attend to ``length`` tokens, on average or exactly."""

    label: Row
    make: Callable[[int, int], Any]
    bytes_per_sequence: Callable[[int], int]


def low_bit(shape: Shape, name: str, args: argparse.Namespace) -> Contender:
    fmt, zones = KvFormat.parse(name), args.zones

    def make(batch: int, length: int) -> LowBitAttention:
        return LowBitAttention.random(
            shape, fmt, zones, batch=batch, start=length - before_length(args.replays),
            most=length + args.replays, device=args.device,
        )  # fmt: skip

    def bytes_per_sequence(length: int) -> int:
        return sequence_bytes(
            shape.cached, fmt, length + args.replays,
            keep_first=zones.sinks, keep_last=zones.recent,
        )  # fmt: skip

    label = {"format": name, "sinks": zones.sinks, "recent": zones.recent, "kernel": None}
    return Contender(label, make, bytes_per_sequence)


def sixteen_bit(shape: Shape, name: str, args: argparse.Namespace) -> Contender:
    def make(batch: int, length: int) -> SixteenBitAttention:
        return SixteenBitAttention.random(
            shape, batch=batch, length=length, backend=BACKENDS[name], device=args.device,
            dtype=torch.bfloat16,
        )  # fmt: skip

    label = {"format": "bfloat16", "sinks": None, "recent": None, "kernel": name}
    return Contender(label, make, partial(sixteen_bit_bytes, shape.cached))


def before_length(replays: int) -> int:
    """How many tokens before ``length`` a growing cache starts, so that the timed steps lie around
    it."""
    return WARM_UP + replays // 2


def timed_step(model: Llama, attend: Attention, batch: int, length: int, replays: int) -> Row:
    """Time of a step's graph. Every replay continues with the tokens that the one before chose."""
    tokens = torch.randint(model.shape.vocab, (batch,), device=model.device)
    position = torch.tensor([length - before_length(replays)], device=model.device)
    logits: list[torch.Tensor] = []

    def call() -> None:
        logits[:] = [model.step(tokens, position, attend)]

    row = graph_time_us([call], 1, replays, WARM_UP - 1)
    if not bool(logits[0].isfinite().all()):
        raise RuntimeError("the logits are not finite")
    return row


def measure(model: Llama, contender: Contender, batch: int, length: int, rest: Row) -> Row:
    """One row; ``rest`` is the row of the same batch without attention. What can't be timed keeps
    its reason."""
    row = model.shape.case(batch, length).facts() | contender.label | {"mode": "graph"}
    row["cache_bytes"] = batch * contender.bytes_per_sequence(length)
    try:
        attend = contender.make(batch, length)
        if isinstance(attend, LowBitAttention):
            plan = attend.layers[0].plan_decode(query_heads=model.shape.heads)
            row["kernel"] = plan["kernel"]
        found = timed_step(model, attend, batch, length, rest["iterations"])
        attend.check()
    except (RuntimeError, ValueError, LookupError) as error:
        return row | UNTIMED | {"error": str(error).strip().partition("\n")[0]}
    return row | found | shares(found["time_us"], rest["time_us"], batch)


def shares(time_us: float, rest_us: float, batch: int) -> Row:
    """What a step's time means. Attention includes writing the new token to the cache."""
    return {
        "without_attention_us": rest_us,
        "attention_share": round(1 - rest_us / time_us, 3),
        "ms_per_token": round(time_us / 1e3, 3),  # of every sequence
        "tokens_per_s": round(batch * 1e6 / time_us, 1),
    }


def with_speedups(rows: list[Row]) -> list[Row]:
    """``rows`` of one comparison, with tokens per second over those of the best 16-bit row."""
    rates = [row["tokens_per_s"] for row in rows if row["sinks"] is None and "error" not in row]
    best = max(rates, default=None)
    return [
        row | {"speedup_best_16bit": round(row["tokens_per_s"] / best, 3)}
        if best is not None and "error" not in row
        else row
        for row in rows
    ]


def release() -> None:
    """Gives the memory of the last contender back before the next one is made."""
    gc.collect()
    torch.cuda.empty_cache()


def latency(model: Llama, contenders: list[Contender], args: argparse.Namespace) -> list[Row]:
    """One sequence of each length."""
    rows = []
    for length in args.lengths:
        rest = timed_step(model, without_attention, 1, length, args.replays)
        found = []
        for contender in contenders:
            found.append(measure(model, contender, 1, length, rest))
            release()
        rows += with_speedups(found)
    return rows


def throughput(model: Llama, contenders: list[Contender], args: argparse.Namespace) -> list[Row]:
    """As many sequences as fit in the memory that is free beside the weights."""
    rows = []
    length = args.throughput_length
    for contender in contenders:
        release()
        free, _ = torch.cuda.mem_get_info()
        margin, each = args.margin_gib << 30, contender.bytes_per_sequence(length)
        batch = largest_batch(free, margin, each)
        name = f"{contender.label['format']}, {contender.label['kernel'] or 'ours'}"
        print(
            f"{name}: {free / 2**30:.1f} GiB free, {args.margin_gib} of them stay so, "
            f"{each / 2**30:.3f} for a sequence of {length} tokens: {batch} sequences"
        )
        if batch == 0:
            raise SystemExit(f"--margin-gib {args.margin_gib}: not one sequence fits beside it")
        rest = timed_step(model, without_attention, batch, length, args.replays)
        rows.append(measure(model, contender, batch, length, rest))
    release()
    return with_speedups(rows)


PARTS = {"latency": latency, "throughput": throughput}
STEP_COLUMNS = (
    "batch", "length", "format", "kernel", "ms_per_token", "tokens_per_s", "speedup_best_16bit",
    "attention_share", "error",
)  # fmt: skip
SHOWN = {
    "agreement": ("format", "sinks", "recent", "kernel", "captured", "difference", "limit"),
    "latency": STEP_COLUMNS,
    "throughput": STEP_COLUMNS,
}


def print_rows(part: str, rows: list[Row]) -> None:
    table = Table(*SHOWN[part], title=part)
    for row in rows:
        table.add_row(*("" if row.get(name) is None else str(row[name]) for name in SHOWN[part]))
    Console(width=180).print(table)


def canonical(name: str) -> str:
    return str(KvFormat.parse(name))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("agreement", *PARTS)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument(
        "--formats", nargs="+", type=converter(canonical), default=FORMATS, metavar="FORMAT"
    )
    parser.add_argument(
        "--zones", type=converter(Zones.parse), default=Zones(16, 64), metavar="FIRST/NEWEST"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--throughput-length", type=int, default=THROUGHPUT_LENGTH)
    parser.add_argument("--margin-gib", type=int, default=6, help="memory that is left free")
    parser.add_argument("--replays", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="2 small layers, to try the script")
    parser.add_argument("--output", type=Path, help="write the rows as JSON, after every part")
    args = parser.parse_args()
    least = before_length(args.replays)
    if min(*args.lengths, args.throughput_length) < least:
        parser.error(f"--lengths, --throughput-length: allowed: {least} or more, see --replays")
    return args


def main() -> None:
    args = arguments()
    args.device = torch.device("cuda", torch.cuda.current_device())
    name, shape = ("tiny", TINY) if args.tiny else ("Llama-3.1-8B", LLAMA_8B)
    facts = machine()
    rows: list[Row] = []
    model = None
    for part in args.parts:
        if part == "agreement":
            found = agreement_rows(args.device, args.formats, args.zones)
            of_part = {"part": part, "model": "tiny"}
        else:
            if model is None:
                positions = max(*args.lengths, args.throughput_length) + args.replays
                model = Llama(shape, positions, args.device, torch.bfloat16)
            contenders = [sixteen_bit(shape, sdpa, args) for sdpa in BACKENDS]
            contenders += [low_bit(shape, fmt, args) for fmt in args.formats]
            found = PARTS[part](model, contenders, args)
            of_part = {"part": part, "model": name, "weight_bytes": model.nbytes}
        found = [of_part | row for row in found]
        print_rows(part, found)
        rows += found
        if args.output is not None:
            save(args.output, Results(facts, rows))
    failed = [row for row in rows if "error" in row]
    if failed:
        sys.exit(f"{len(failed)} rows failed: {failed[0]['error']}")


if __name__ == "__main__":
    main()
