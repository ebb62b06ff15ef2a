# SPDX-License-Identifier: Apache-2.0
"""The accuracy bench from its units of work to its file, on a tiny random model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("gguf")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from accuracy import bench, command, generation, layer_errors, retrieval  # type: ignore[import-not-found] # noqa: E402
from accuracy.agreement import Agreement  # type: ignore[import-not-found] # noqa: E402
from accuracy.recipes import FEW, KIVI2, KIVI4, RECIPES, kivi, with_zones  # type: ignore[import-not-found] # noqa: E402
from results import Results, load, save  # type: ignore[import-not-found] # noqa: E402
from test_transformers_layers import make_gemma  # noqa: E402
from tiny_models import make_model, tokens  # noqa: E402

from bitdecoding import KvFormat  # noqa: E402
from bitdecoding.calibration import key_means  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SIZES = bench.Sizes(400, 300, 300, (250,), 200, 8)


def tokenizer(text: str) -> list[int]:
    """A token per character, and one in front."""
    return [1, *(3 + ord(c) % 120 for c in text)]


def make_bench(model: Any, recipes: list[Any]) -> Any:
    texts = {name: tokens(1, 400, seed=i)[0] for i, name in enumerate(("one", "two"))}
    return bench.Bench(model, tokenizer, "tiny", texts, recipes, SIZES)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that end in different characters, for a tokenizer of characters."""
    monkeypatch.setattr(retrieval, "WORDS", tuple("abcdefgh"))


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_run_and_its_resumption(tmp_path: Path, family: str) -> None:
    model = make_gemma() if family == "gemma" else make_model()
    centred = replace(RECIPES["hadamard-4, centred"], k_means=key_means(model, tokens(1, 300, 5)))
    recipes = [KIVI4, KIVI2, with_zones(KIVI2, 0, 0), centred]
    output = tmp_path / "accuracy.json"
    kinds = [kind for kind in bench.KINDS if kind != "baseline"]

    def units() -> list[Any]:
        return list(make_bench(model, recipes).units(kinds))

    assert not command.run(units(), Results({}, []), output, minutes=-1)  # no time
    assert command.run(units()[:2], Results({}, []), output, minutes=9)
    part = load(output)
    assert {row["kind"] for row in part.rows} == {"text"}
    assert len(part.rows) == 2 * 4
    before = list(part.rows)
    assert command.run(units(), part, output, minutes=9)
    found = load(output).rows
    assert found[: len(before)] == before  # not measured again
    assert {bench.key_of(row) for row in found} == frozenset().union(*(u.keys for u in units()))
    assert len({bench.key_of(row) for row in found}) == len(found)
    kl = {(r["recipe"], r["text"]): r["kl"] for r in found if r["kind"] == "text"}
    assert 0 < kl["kivi-4 g128", "one"] < kl["kivi-2 g32", "one"]
    assert kl["kivi-2 g32", "one"] < kl["kivi-2 g32, zones 0/0", "one"]
    assert not any("error" in row for row in found)


def test_agreement_against_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, logits = torch.randn(2, 2, 50, 9, generator=generator)
    targets = torch.randint(9, (2, 50), generator=generator)
    found = Agreement()
    for part in (slice(0, 20), slice(20, 50)):
        found.add(reference[:, part].log_softmax(-1), logits[:, part], targets[:, part])
    p, q = reference.double().softmax(-1), logits.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    nll = -q.gather(-1, targets[..., None]).log()
    for b, row in enumerate(found.rows()):
        assert row["kl"] == pytest.approx(float(kl[b].mean()), rel=1e-4)
        assert row["kl_p99"] == pytest.approx(float(kl[b].quantile(0.99)), rel=1e-4)
        assert row["perplexity"] == pytest.approx(float(nll[b].mean().exp()), rel=1e-4)
        same = (reference[b].argmax(-1) == logits[b].argmax(-1)).double().mean()
        assert row["top1"] == pytest.approx(float(same))
        assert row["positions"] == 50


def test_layer_errors_shrink_with_bits_and_skip_16_bit_layers() -> None:
    gemma = make_gemma()
    ids = tokens(2, 300)
    found = layer_errors.relative_errors(gemma, ids, [KIVI4, KIVI2])
    four, two = found["kivi-4 g128"], found["kivi-2 g32"]
    assert four[0] is two[0] is four[2] is two[2] is None
    assert 0 < 2 * four[1] < two[1] < 1


def test_layer_errors_do_not_add_up() -> None:
    """A layer's error is the same whether or not layers before it are packed."""
    model, ids = make_model(), tokens(1, 300)
    both = layer_errors.relative_errors(model, ids, [KIVI2])[KIVI2.name]

    class Second:  # the second layer alone
        name, keep_first, keep_last = "second", 16, 64
        centred, k_means = False, None

        def format(self, head_dim: int) -> Any:
            return KIVI2.format(head_dim)

        def formats(self, kinds: list[str], head_dim: int) -> list[Any]:
            return [None, KIVI2.format(head_dim)]

    alone = layer_errors.relative_errors(model, ids, [Second()])["second"]
    assert alone == [None, both[1]]


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("keys", [1, 8])
def test_questions(keys: int) -> None:
    text = torch.full((500,), 2)
    asked = retrieval.questions(tokenizer, text, 500, keys)
    assert asked.ids.shape == (10, 500)
    pattern = tokenizer("password of")[1:]
    for row, answer in zip(asked.ids.tolist(), asked.answers.tolist(), strict=True):
        places = [i for i in range(500) if row[i : i + len(pattern)] == pattern]
        assert len(places) == keys + 1  # the needles and the question
        end = row[places[-1] :]  # "password of <city> is"
        (said,) = [i for i in places[:-1] if row[i : i + len(end)] == end]
        assert row[said + len(end) + 1] == asked.choices[answer]  # after a space


def test_divergence_and_repetition() -> None:
    a = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    assert generation.divergence(a, torch.tensor([[1, 2, 9, 4], [1, 2, 3, 4]])) == [2, 4]
    loop = torch.tensor([[1, 2, 3, 4] * 5, list(range(20))])
    assert generation.repetition(loop) == [round(1 - 4 / 17, 4), 0]


def test_recipes_are_formats_or_say_why_not() -> None:
    for recipe in RECIPES.values():
        for head_dim in (64, 128):
            reason = recipe.why_not(head_dim)
            transformed = {"k_rotation", "v_rotation", "k_clip", "v_clip"} & set(recipe.fields)
            assert reason is None or transformed or recipe.fields.get("k_axis") == "block"
    assert KIVI4.format(64).v_group == 64
    wrong = kivi("wrong", (3, 4), (128, 64))
    assert "k_bits = 3" in str(wrong.why_not(64))
    config = make_model().config
    found = bench.available([KIVI2, wrong], config, "cpu")
    assert found == ([KIVI2], {"wrong": wrong.why_not(64)})


def test_what_is_recommended_is_measured() -> None:
    assert set(FEW) <= set(RECIPES)
    for head_dim in (64, 128, 256):
        measured = [RECIPES[name].format(head_dim) for name in FEW]
        for bits in (4, 3, 2):
            assert KvFormat.recommended(bits=bits, head_dim=head_dim) in measured


def test_which_recipes_are_chosen() -> None:
    def names(*arguments: str) -> list[str]:
        return [recipe.name for recipe in command.chosen(command.parser().parse_args(arguments))]

    assert names() == list(RECIPES)
    assert sorted(names("--few")) == sorted(names("--few", "--reduced")) == sorted(FEW)
    assert names("--few", "--recipes", "oscar") == ["oscar"]


def test_centred_recipes_get_the_means_of_their_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, centred = make_gemma(), RECIPES["hadamard-4, centred"]
    ids = tokens(1, command.CALIBRATION_TOKENS)[0]
    monkeypatch.setattr(command.texts, "calibration", lambda tokenizer, count: ids[:count])
    loaded = command.models.Loaded(model, tokenizer)
    plain, found = command.calibrated([KIVI2, centred], loaded)
    assert plain is KIVI2
    assert [mean is None for mean in found.k_means] == [True, False, True]
    assert torch.equal(found.k_means[1], key_means(model, ids[None])[1])
    with pytest.raises(ValueError, match="hadamard-4, centred: k_means = None"):
        bench.caches.make(centred, model.config, 300)


def test_a_format_without_a_kernel_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: Any, q: Any) -> None:
        raise ValueError("kernel: none is built for\nmore")

    monkeypatch.setattr(bench.PagedKvCache, "decode", decode)
    found = bench.available([KIVI2], make_model().config, "cpu")
    assert found == ([], {KIVI2.name: "kernel: none is built for"})


def test_edges_are_of_the_full_attention_layers() -> None:
    recipe = kivi("edges", (2, 2), (32, 32), edges=1)
    full, window = "full_attention", "sliding_attention"
    formats = recipe.formats([full, window, full, full], 128)
    assert [f is None for f in formats] == [True, True, False, True]


def test_results_file_holds_facts(tmp_path: Path) -> None:
    facts = command.facts("cpu")
    assert set(facts["sources"]) == {"include", "src", "accuracy"}
    assert json.loads(json.dumps(facts)) == facts


def test_a_file_of_other_code_is_not_resumed(tmp_path: Path) -> None:
    output = tmp_path / "old.json"
    save(output, Results({"sources": {"include": "0"}}, [{"kind": "text"}]))
    before = output.read_bytes()
    assert command.main(["--device", "cpu", "--output", str(output)]) == 2
    assert output.read_bytes() == before
