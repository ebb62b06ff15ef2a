# SPDX-License-Identifier: Apache-2.0
"""What K and V of the models look like, layer by layer, and which transform helps where.

PYTHONPATH=benchmarks python -m accuracy.distributions            measures, saves, draws
PYTHONPATH=benchmarks python -m accuracy.distributions --draw     draws what was saved

A row is one full-attention layer, K after its rotary embedding. Ratios are medians over heads. K's
quantisation is judged by what it does to scores, for a rotation hardly changes the size of K's
error but spreads it over channels that queries look at less.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from plots import OUTPUT, STYLE, add_legend, figure
from provenance import RESULTS
from results import Results, Row, load, save

from accuracy import models, texts
from accuracy.command import facts
from accuracy.fake import Scheme, arrived, fake_quantise, hadamard
from bitdecoding.cache_layers import NewTokens, SixteenBitLayer
from bitdecoding.transformers import ATTENTION, LowBitCache

RESULT = RESULTS / "distributions.json"
TOKENS, PAGE = 2048, 128
QUERIES = 128  # the last ones, whose scores are compared
FIRST = 16  # tokens that recipes keep in 16 bit: no part of any range
WHOLE = 128  # the largest rotation

# Of two bits, whose errors are large enough to tell schemes apart.
K_SCHEMES: Mapping[str, Scheme] = {
    "per channel, 32 tokens": Scheme(2, "channel", 32),
    "the same, rotated": Scheme(2, "channel", 32, WHOLE),
    "the same, rotated, norms": Scheme(2, "channel", 32, WHOLE, "head"),
    "per token, 32 channels": Scheme(2, "token", 32),
    "per token, rotated": Scheme(2, "token", 32, WHOLE),
}
V_SCHEMES: Mapping[str, Scheme] = {
    "per token, 32 channels": Scheme(2, "token", 32),
    "per token, rotated": Scheme(2, "token", 32, WHOLE),
}
COLOURS = ("#3b82c4", "#1a9c7f", "#c9731a", "#b5509c", "#8e7cc3")


class RecordingLayer(SixteenBitLayer):
    """Keeps what went through it."""

    def attend(
        self, module: Any, query: torch.Tensor, new: NewTokens, mask: Any, scale: float
    ) -> torch.Tensor:
        last = query[:, :, -QUERIES:].unflatten(1, (new.keys.shape[1], -1))
        self.queries = last.flatten(2, 3) * scale  # (B, Hkv, G * QUERIES, D)
        self.seen = (new.keys, new.values)  # (B, Hkv, S, D)
        return super().attend(module, query, new, mask, scale)


def layer_rows(model: Any, ids: torch.Tensor) -> list[Row]:
    """A row per full-attention layer; ids (B, S), one forward."""
    cache = LowBitCache(model.config, "16-bit")
    for index, layer in enumerate(cache.layers):
        if type(layer) is SixteenBitLayer:
            cache.layers[index] = RecordingLayer()
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, RecordingLayer):
            k, v = layer.seen
            row: Row = {"layer": index, "k": described(k), "v": described(v)}
            row["k"]["errors"] = {
                name: score_error(k, layer.queries, scheme) for name, scheme in K_SCHEMES.items()
            }
            row["v"]["errors"] = {name: error(v, scheme) for name, scheme in V_SCHEMES.items()}
            rows.append(row)
    return rows


def described(x: torch.Tensor) -> Row:
    """x (B, Hkv, S, D): channels that stand out, norms of tokens."""
    later = x[:, :, FIRST:].float()
    channel = later.square().mean((0, 2)).sqrt()  # (Hkv, D)
    norm = x.float().norm(dim=-1)  # (B, Hkv, S)
    middle = norm[:, :, FIRST:].median(-1, keepdim=True).values
    relative = (norm[:, :, FIRST:] / middle).flatten()
    return {
        "largest_channel": _rounded((channel.amax(1) / channel.median(1).values).median()),
        "rms": _rounded(later.square().mean().sqrt()),
        "largest": _rounded(later.abs().max()),
        "norm_p1": _rounded(relative.quantile(0.01)),
        "norm_p99": _rounded(relative.quantile(0.99)),
        "norm_of_first": _rounded((norm[:, :, :1] / middle).median()),
    }


def changes(x: torch.Tensor, scheme: Scheme, keep_first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens after the first ones, rotated as the scheme has it, and what quantisation changes."""
    kept = arrived(x, min(scheme.rotation, x.shape[-1]))
    read = fake_quantise(kept, scheme, PAGE, keep_first)
    kept = kept[:, :, FIRST : read.shape[2]]
    return kept, read[:, :, FIRST:] - kept


def error(x: torch.Tensor, scheme: Scheme) -> float:
    """Norm of what quantisation changes over the norm of what it quantises."""
    kept, changed = changes(x, scheme, 0)
    return _rounded(changed.norm() / kept.norm())


def score_error(k: torch.Tensor, queries: torch.Tensor, scheme: Scheme) -> float:
    """RMS of what quantisation changes in scores, in nats, but for a shift of all of a query's:
    softmax doesn't see that. queries (B, Hkv, N, D), with the softmax scale in them."""
    _, changed = changes(k, scheme, FIRST)
    rotated = hadamard(queries.float(), min(scheme.rotation, k.shape[-1]))
    scores = rotated @ changed.transpose(2, 3)  # (B, Hkv, N, tokens)
    return _rounded((scores - scores.mean(-1, keepdim=True)).square().mean().sqrt())


def _rounded(x: torch.Tensor) -> float:
    return float(f"{float(x):.4g}")


def measure(names: Sequence[str], device: str) -> Results:
    rows = []
    for name in names:
        loaded = models.load(name, device)
        ids = torch.stack([texts.tokens(loaded.tokenizer, text, TOKENS) for text in texts.TEXTS])
        rows += [{"model": name} | row for row in layer_rows(loaded.model, ids.to(device))]
    return Results(facts(device) | {"texts": list(texts.TEXTS), "tokens": TOKENS}, rows)


def draw(results: Results, output: Path) -> None:
    names = list(dict.fromkeys(row["model"] for row in results.rows))
    of = {name: [row for row in results.rows if row["model"] == name] for name in names}
    with matplotlib.rc_context(STYLE):
        drawings = {"channels": channels(of), "norms": norms(of), "errors": errors(of)}
        for name, drawing in drawings.items():
            drawing.savefig(output / f"distributions_{name}.svg", metadata={"Date": None})


def channels(of: Mapping[str, Sequence[Row]]) -> Figure:
    """How far the largest channel stands out, by layer."""
    drawing, axes = figure(len(of), 2, 3.6, 2.4)
    for one, (name, rows) in zip(axes, of.items(), strict=True):
        for colour, part in zip(COLOURS, "kv", strict=False):
            found = [row[part]["largest_channel"] for row in rows]
            one.plot(_layers(rows), found, "o-", color=colour, label=part.upper())
        one.set(title=name, xlabel="layer", ylabel="largest channel / median (RMS)", ylim=(0, None))
    add_legend(drawing)
    return drawing


def norms(of: Mapping[str, Sequence[Row]]) -> Figure:
    """Norms of K's and V's tokens over their median: the first token, 1% and 99%."""
    drawing, axes = figure(2 * len(of), 2, 3.6, 2.4)
    panels = [(name, rows, part) for name, rows in of.items() for part in "kv"]
    for one, (name, rows, part) in zip(axes, panels, strict=True):
        for colour, (field, label) in zip(
            COLOURS,
            {"norm_p99": "99%", "norm_p1": "1%", "norm_of_first": "first token"}.items(),
            strict=False,
        ):
            found = [row[part][field] for row in rows]
            one.plot(_layers(rows), found, "o-", color=colour, label=label)
        one.set(title=f"{name}, {part.upper()}", xlabel="layer", ylabel="norm / median")
        one.set_yscale("log")
    add_legend(drawing)
    return drawing


def errors(of: Mapping[str, Sequence[Row]]) -> Figure:
    """Errors of 2-bit schemes, by layer: of K in its scores, of V in itself."""
    drawing, axes = figure(2 * len(of), 2, 3.6, 2.6)
    colours = dict(zip(K_SCHEMES, COLOURS, strict=True))
    panels = [(name, rows, part) for name, rows in of.items() for part in "kv"]
    for one, (name, rows, part) in zip(axes, panels, strict=True):
        for scheme in rows[0][part]["errors"]:
            found = [row[part]["errors"][scheme] for row in rows]
            one.plot(_layers(rows), found, "o-", color=colours[scheme], label=scheme)
        one.set(title=f"{name}, {part.upper()}", xlabel="layer")
        one.set_ylabel("RMS error of scores, nats" if part == "k" else "error / norm")
        one.set_ylim(0, None)
    add_legend(drawing)
    return drawing


def _layers(rows: Sequence[Row]) -> list[int]:
    return [row["layer"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description="Distributions of K and V, as plots.")
    parser.add_argument("--draw", action="store_true", help="what was saved; measure nothing")
    parser.add_argument("--models", nargs="+", default=list(models.MODELS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULT)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the plots")
    args = parser.parse_args()
    if not args.draw:
        save(args.results, measure(args.models, args.device))
    draw(load(args.results), args.output)


if __name__ == "__main__":
    main()
