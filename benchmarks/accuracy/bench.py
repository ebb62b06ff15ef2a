# SPDX-License-Identifier: Apache-2.0
"""The work of a run, in units of a minute or so, each with the keys of the rows that it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from accuracy import caches, quantized_cache
from accuracy.cross_check import cross_check_rows
from accuracy.generation import divergence, greedy, repetition
from accuracy.layer_errors import relative_errors
from accuracy.models import Tokenizer
from accuracy.recipes import Recipe
from accuracy.retrieval import questions, scores
from accuracy.text_rows import Contender, Row, Tick, recipe_groups, recipe_rows, text_rows
from bitdecoding import PagedKvCache

KINDS = ("text", "baseline", "layers", "cross-check", "needle", "generation")


@dataclass(frozen=True)
class Sizes:
    """How much of everything, in tokens."""

    context: int  # of text and baseline
    layers: int
    cross_check: int
    needles: tuple[int, ...]
    prompt: int  # of generation
    new: int


@dataclass(frozen=True)
class Unit:
    """Rows that are measured together; ``keys`` tell whether a file has them already."""

    kind: str
    keys: frozenset[tuple[Any, ...]]
    label: str
    measure: Callable[[Tick], list[Row]]


@dataclass
class Bench:
    """A model, its texts as tokens and the recipes to compare."""

    model: Any
    tokenizer: Tokenizer
    name: str
    texts: dict[str, torch.Tensor]  # by name: (at least sizes.context,) token ids
    recipes: Sequence[Recipe]
    sizes: Sizes
    _reference: dict[Any, Any] = field(default_factory=dict)  # what 16 bits gave, by question

    def units(self, kinds: Sequence[str]) -> Iterator[Unit]:
        makers = {
            "text": self._texts,
            "baseline": self._baselines,
            "layers": self._layers,
            "cross-check": self._cross_checks,
            "needle": self._needles,
            "generation": self._generations,
        }
        for kind in kinds:
            yield from makers[kind]()

    def _ids(self, tokens: int) -> torch.Tensor:
        """(texts, tokens)"""
        return torch.stack([ids[:tokens] for ids in self.texts.values()]).to(self.model.device)

    def _keys(
        self, kind: str, recipes: Sequence[str], tokens: int, texts: Sequence[str]
    ) -> frozenset[tuple[Any, ...]]:
        return frozenset((kind, self.name, t, r, tokens) for r in recipes for t in texts)

    def _labelled(self, rows: list[Row]) -> list[Row]:
        return [{"kind": row["kind"], "model": self.name} | row for row in rows]

    def _texts(self) -> Iterator[Unit]:
        tokens, names = self.sizes.context, list(self.texts)
        for group in recipe_groups(self.recipes, self.model.config):
            keys = self._keys("text", [recipe.name for recipe in group], tokens, names)

            def measure(tick: Tick, group: list[Recipe] = group) -> list[Row]:
                ids = self._ids(tokens)
                return self._labelled(recipe_rows(self.model, ids, names, group, tick))

            yield Unit("text", keys, f"{len(group)} recipes, {tokens} tokens", measure)

    def _baselines(self) -> Iterator[Unit]:
        if quantized_cache.why_not() is not None:
            return
        tokens, names, config = self.sizes.context, list(self.texts), self.model.config
        for bits in quantized_cache.BITS:
            recipe = quantized_cache.contender(bits, config, tokens).facts()["recipe"]
            keys = self._keys("text", [recipe], tokens, names)

            def measure(tick: Tick, bits: int = bits) -> list[Row]:
                one: Contender = quantized_cache.contender(bits, config, tokens)
                blocks = quantized_cache.blocks(tokens)
                rows = text_rows(self.model, self._ids(tokens), names, [one], blocks, tick)
                return self._labelled(rows)

            yield Unit("baseline", keys, f"{recipe}, {tokens} tokens", measure)

    def _layers(self) -> Iterator[Unit]:
        tokens = self.sizes.layers
        for group in recipe_groups(self.recipes, self.model.config):
            keys = self._keys("layers", [recipe.name for recipe in group], tokens, ["all"])

            def measure(tick: Tick, group: list[Recipe] = group) -> list[Row]:
                errors = relative_errors(self.model, self._ids(tokens), group)
                fixed = {"kind": "layers", "text": "all", "context": tokens}
                return self._labelled(
                    [fixed | {"recipe": name, "errors": found} for name, found in errors.items()]
                )

            yield Unit("layers", keys, f"{len(group)} recipes, {tokens} tokens", measure)

    def _cross_checks(self) -> Iterator[Unit]:
        """On a CPU alone, where both sides compute in float32: between a CUDA cache and its caller
        queries and outputs are fp16."""
        if self.model.device.type != "cpu":
            return
        tokens, names = self.sizes.cross_check, list(self.texts)[:1]
        for recipe in self.recipes:
            keys = self._keys("cross-check", [recipe.name], tokens, names)

            def measure(tick: Tick, recipe: Recipe = recipe) -> list[Row]:
                ids = self._ids(tokens)[:1]
                return self._labelled(cross_check_rows(self.model, ids, names, recipe))

            yield Unit("cross-check", keys, recipe.name, measure)

    def _needles(self) -> Iterator[Unit]:
        text = next(iter(self.texts.values()))
        for tokens in self.sizes.needles:
            for keys_of_prompt in (1, 8):
                for recipe in (None, *self._long()):
                    yield self._needle(text, tokens, keys_of_prompt, recipe)

    def _needle(self, text: torch.Tensor, tokens: int, keys: int, recipe: Recipe | None) -> Unit:
        label = "16-bit" if recipe is None else recipe.name

        def measure(tick: Tick) -> list[Row]:
            asked = questions(self.tokenizer, text, tokens, keys)
            row = {"kind": "needle", "text": f"{keys} keys", "context": tokens, "recipe": label}
            return self._labelled([row | scores(self.model, asked, recipe)])

        row_keys = self._keys("needle", [label], tokens, [f"{keys} keys"])
        return Unit("needle", row_keys, f"{label}, {keys} keys, {tokens} tokens", measure)

    def _generations(self) -> Iterator[Unit]:
        names, new = list(self.texts), self.sizes.new
        for recipe in (None, *self._long()):
            label = "16-bit" if recipe is None else recipe.name

            def measure(
                tick: Tick, recipe: Recipe | None = recipe, label: str = label
            ) -> list[Row]:
                if "generation" not in self._reference:
                    self._reference["generation"] = self._written(None)
                reference = self._reference["generation"]
                found = reference if recipe is None else self._written(recipe)
                same, repeats = divergence(reference, found), repetition(found)
                fixed = {"kind": "generation", "context": new, "recipe": label}
                return self._labelled(
                    [
                        fixed | {"text": name, "same_tokens": same[i], "repetition": repeats[i]}
                        for i, name in enumerate(names)
                    ]
                )

            yield Unit("generation", self._keys("generation", [label], new, names), label, measure)

    def _written(self, recipe: Recipe | None) -> torch.Tensor:
        return greedy(self.model, self._ids(self.sizes.prompt), recipe, self.sizes.new)

    def _long(self) -> list[Recipe]:
        return [recipe for recipe in self.recipes if recipe.long]


def key_of(row: Row) -> tuple[Any, ...]:
    """As in Unit.keys."""
    return (row["kind"], row["model"], row["text"], row["recipe"], row["context"])


def available(
    recipes: Sequence[Recipe], config: Any, device: str
) -> tuple[list[Recipe], dict[str, str]]:
    """Those that this build has for the device, and by name why it doesn't have the others."""
    reasons = {recipe.name: _why_not(recipe, config, device) for recipe in recipes}
    missing = {name: reason for name, reason in reasons.items() if reason is not None}
    return [recipe for recipe in recipes if recipe.name not in missing], missing


def _why_not(recipe: Recipe, config: Any, device: str) -> str | None:
    """Formats may be legal and have no kernel: a page of zeros goes through one layer."""
    dim, text = caches.head_dim(config), config.get_text_config(decoder=True)
    if (reason := recipe.why_not(dim)) is not None:
        return reason
    heads, tokens = text.num_key_value_heads, 256
    zeros = torch.zeros(
        1, tokens, text.num_attention_heads, dim, dtype=torch.float16, device=device
    )
    try:
        cache = PagedKvCache(
            recipe.format(dim), batch=1, num_kv_heads=heads, max_tokens=tokens, device=device
        )
        cache.append(zeros[:, :, :heads], zeros[:, :, :heads])
        cache.decode(zeros[:, : cache.format.page_tokens])
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return None
