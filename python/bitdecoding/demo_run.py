# SPDX-License-Identifier: Apache-2.0
"""The measurements of the demo: one prefill, then the same tokens through 16-bit and packed caches.

The 16-bit cache is transformers' own: DynamicLayer holding float16 tensors, read by SDPA. It shares
nothing with ours but the K and V of the prefill that fill both.
"""

from __future__ import annotations

import contextlib
import functools
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging as transformers_logging

from bitdecoding.demo_assets import DemoError
from bitdecoding.transformers import ATTENTION, LowBitCache

Tick = Callable[[], None]


class HalfLayer(DynamicLayer):  # type: ignore[misc]
    """transformers' growing cache layer, stored in float16 whatever the model computes in.

    On a CPU that is the fastest 16-bit cache torch has: converting it and attending in float32
    costs a sixth of its float16 attention (0.9 and 6.5 ms per layer at 4096 tokens, 3 heads).
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states.half(), value_states.half(), *args, **kwargs)
        return keys.to(key_states.dtype), values.to(value_states.dtype)


@dataclass
class Session:
    """A loaded model, the text as tokens, and the K and V of its prompt."""

    model: Any
    tokenizer: Any
    tokens: torch.Tensor  # (prompt_tokens + what follows,) int64
    prompt_tokens: int
    prompt: Cache  # 16-bit K and V of tokens[:prompt_tokens]


@dataclass
class Forced:
    """What teacher-forced decoding gave: logits (steps, vocabulary) float32, seconds per step."""

    logits: torch.Tensor
    step_seconds: float


def load_model(path: Path, device: str) -> tuple[Any, Any]:
    """Model and tokenizer from a Hugging Face directory or a .gguf file; float32 on a CPU."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    directory, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    dtype = torch.float32 if device == "cpu" else torch.float16
    with (
        contextlib.redirect_stderr(io.StringIO()),  # progress bars that cannot be turned off
        mock.patch("gguf.GGUFReader", functools.cache(gguf.GGUFReader)),  # else parsed four times
    ):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    return model.to(device).eval(), tokenizer


def tokenize(model: Any, tokenizer: Any, text: str, prompt_tokens: int, after: int) -> torch.Tensor:
    """The first prompt_tokens + after tokens of the text, on the model's device."""
    wanted = prompt_tokens + after
    room = model.config.get_text_config().max_position_embeddings
    if wanted > room:
        raise DemoError(
            f"--prompt-tokens {prompt_tokens}: with {after} more {wanted} tokens; "
            f"this model has room for {room}"
        )
    # Ten characters per token are more than enough, and the whole text may be megabytes.
    ids = tokenizer(text[: 10 * wanted], return_tensors="pt").input_ids[0]
    if len(ids) < wanted:
        raise DemoError(
            f"the text has {len(ids)} tokens; needed are {wanted}: choose a longer "
            "--text or fewer --prompt-tokens"
        )
    return ids[:wanted].to(model.device)


def prefill(model: Any, tokenizer: Any, tokens: torch.Tensor, prompt_tokens: int) -> Session:
    """Runs the prompt once through the model, with ordinary attention."""
    model.set_attn_implementation("sdpa")
    layers = model.config.get_text_config().num_hidden_layers
    prompt = Cache(layers=[HalfLayer() for _ in range(layers)])
    with torch.no_grad():
        model(tokens[None, :prompt_tokens], past_key_values=prompt, logits_to_keep=1)
    return Session(model, tokenizer, tokens, prompt_tokens, prompt)


def sixteen_bit_cache(session: Session) -> Cache:
    """A new 16-bit cache that holds the prompt."""
    session.model.set_attn_implementation("sdpa")
    cache = Cache(layers=[HalfLayer() for _ in session.prompt.layers])
    for layer, source in zip(cache.layers, session.prompt.layers, strict=True):
        layer.update(source.keys, source.values)
    return cache


def low_bit_cache(session: Session, format: str, after: int) -> LowBitCache:
    """A new packed cache that holds the prompt, with room for ``after`` more tokens."""
    session.model.set_attn_implementation(ATTENTION)
    cache = LowBitCache(session.model.config, format, max_tokens=session.prompt_tokens + after)
    cache.fill(session.prompt)
    return cache


def new_cache(session: Session, recipe: str | None, after: int) -> Cache:
    """A new cache that holds the prompt: packed by ``recipe``, or 16-bit where that is None."""
    return sixteen_bit_cache(session) if recipe is None else low_bit_cache(session, recipe, after)


def move(session: Session, device: str) -> Session:
    """The session on another device. Its model moves there, its prompt is copied."""
    prompt = Cache(layers=[HalfLayer() for _ in session.prompt.layers])
    for layer, source in zip(prompt.layers, session.prompt.layers, strict=True):
        layer.update(source.keys.to(device), source.values.to(device))
    model, tokens = session.model.to(device), session.tokens.to(device)
    return Session(model, session.tokenizer, tokens, session.prompt_tokens, prompt)


def cache_bytes(cache: Cache) -> int:
    """Bytes allocated by a cache of either kind."""
    if isinstance(cache, LowBitCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def teacher_forced(session: Session, cache: Cache, steps: int, tick: Tick) -> Forced:
    """Feeds the next ``steps`` tokens of the text, one at a time, through the cache."""
    logits, seconds = [], []
    with torch.no_grad():
        for token in session.tokens[session.prompt_tokens :][:steps]:
            start = time.perf_counter()
            out = session.model(token.view(1, 1), past_key_values=cache).logits[0, -1]
            logits.append(out.float().cpu())  # also waits for the device
            seconds.append(time.perf_counter() - start)
            tick()
    if isinstance(cache, LowBitCache):
        cache.check()  # a GPU speaks only when asked
    return Forced(torch.stack(logits), sorted(seconds)[len(seconds) // 2])


def free_text(session: Session, cache: Cache, new_tokens: int) -> str:
    """Continues the prompt greedily with model.generate."""
    ids = session.tokens[None, : session.prompt_tokens + 1]  # the last one is not in the cache
    out = session.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    text: str = session.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def agreement(reference: torch.Tensor, logits: torch.Tensor) -> tuple[float, float]:
    """(share of equal most likely tokens, mean KL(reference || logits) in nats), (steps, V)."""
    top1 = (reference.argmax(-1) == logits.argmax(-1)).double().mean()
    return float(top1), float(divergences(reference, logits).mean())


def divergences(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || logits) in nats of every step, (steps, V) -> (steps,) float64."""
    log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
