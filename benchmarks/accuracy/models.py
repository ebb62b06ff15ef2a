# SPDX-License-Identifier: Apache-2.0
"""The models: SmolLM2-135M-Instruct and Gemma 3 270m, from their GGUF files.

transformers reads the weights of both and the tokenizer of the first. What it makes of Gemma's
SentencePiece vocabulary is wrong ("capital" becomes c/ap/it/al, without <bos>), so that one is
built here from the file's tokens and scores: perplexity on English, about 70 against 600, tells
them apart.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import torch
from tokenizers import AddedToken, decoders, normalizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.convert_slow_tokenizer import generate_merges

from accuracy.assets import GEMMA, fetch_joined
from bitdecoding.demo_assets import MODEL, fetch
from bitdecoding.demo_run import load_model

Tokenizer = Callable[[str], list[int]]  # text to ids, with <bos> where the model wants one

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # token types of GGUF


@dataclass(frozen=True)
class ModelSource:
    """Where a model is and how far it reads."""

    fetch: Callable[[], Path]
    context: int


MODELS = {
    "smollm2-135m": ModelSource(lambda: fetch(MODEL), 8192),
    "gemma-3-270m": ModelSource(lambda: fetch_joined(GEMMA), 32768),
}


@dataclass(frozen=True)
class Loaded:
    model: Any
    tokenizer: Tokenizer


def load(name: str, device: str) -> Loaded:
    """Model in float32 on the device, and its tokenizer. What was made of the GGUF file is kept
    beside it: reading it again takes minutes."""
    path = MODELS[name].fetch()
    kept = path.with_suffix("") if name.startswith("gemma") else None
    if kept is None:
        model, tokenizer = load_model(path, "cpu")
        return Loaded(model.to(device), lambda text: tokenizer(text).input_ids)
    if not (kept / "weights.pt").exists():
        _keep(path, kept)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(kept), dtype=torch.float32)
    model.load_state_dict(torch.load(kept / "weights.pt"))
    fast, bos = FastTokenizer.from_file(str(kept / "tokenizer.json")), model.config.bos_token_id
    return Loaded(
        model.to(device).eval(),
        lambda text: [bos, *fast.encode(text, add_special_tokens=False).ids],
    )


def _keep(path: Path, directory: Path) -> None:
    """Config, weights and tokenizer of a GGUF file with a SentencePiece vocabulary."""
    directory.mkdir(exist_ok=True)
    with (
        contextlib.redirect_stderr(io.StringIO()),  # progress bars that can't be turned off
        mock.patch("gguf.GGUFReader", functools.cache(gguf.GGUFReader)),  # else parsed thrice
    ):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        reader = gguf.GGUFReader(path)
    sentence_piece(reader).save(str(directory / "tokenizer.json"))
    del model.config.quantization_config  # its values are no longer quantised
    model.config.save_pretrained(directory)
    partial = directory / "weights.partial"
    torch.save(model.state_dict(), partial)
    partial.replace(directory / "weights.pt")


def sentence_piece(reader: Any) -> FastTokenizer:
    """The BPE of a GGUF file with tokens and scores: of all pairs that are a token together, the
    one with the highest score is joined first; bytes stand for what no token spells."""
    fields = reader.fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    scores = fields["tokenizer.ggml.scores"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    vocab = {token: index for index, token in enumerate(tokens)}
    pieces = [(t, s) for t, s, kind in zip(tokens, scores, kinds, strict=True) if kind == _NORMAL]
    merges = generate_merges(vocab, pieces)
    fast = FastTokenizer(BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    fast.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    whole = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    fast.add_tokens([AddedToken(token, normalized=False) for token in whole])
    return fast
