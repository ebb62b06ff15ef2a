# SPDX-License-Identifier: Apache-2.0
"""Do the steps of end_to_end.py compute the same? A small model, the same prompt in every cache,
the same tokens fed to every model.

Differences are of all logits, in Euclidean norm, and relative to what leaving attention out
changes: 0 is no difference, 1 is that attention is lost. Where all tokens are in the 16-bit zone,
nothing but rounding may differ; the limit of int4 contains its quantisation of normal values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from decode_cases import Zones
from llama_step import TINY, Attention, Llama, LowBitAttention, SixteenBitAttention
from torch.nn.attention import SDPBackend

from bitdecoding import KvFormat, PagedKvCache, Workspace

Row = dict[str, Any]

BATCH, PROMPT, STEPS = 2, 300, 24  # with 64 recent tokens a page is completed on the way
ZONES_LIMIT = 0.05
INT4_LIMIT = 0.2  # seen: 0.10


def agreement_rows(
    device: torch.device, formats: Sequence[str], zones: Zones, seed: int = 0
) -> list[Row]:
    """A row per attention; one beyond its limit has "error". float32 on a CPU, float16 and replays
    of a graph on CUDA, as far as a cache's length is no part of what is captured."""
    torch.manual_seed(seed)
    cuda = device.type == "cuda"
    model = Llama(TINY, PROMPT + STEPS, device, torch.float16 if cuda else torch.float32)
    size = (TINY.layers, 2, BATCH, PROMPT, TINY.heads_kv, TINY.head_dim)
    prompt = torch.randn(size, device=device, dtype=model.dtype)
    tokens = torch.randint(TINY.vocab, (STEPS, BATCH), device=device)

    def logits(attend: Attention, captured: bool = False) -> torch.Tensor:
        return forced_logits(model, attend, tokens, captured)

    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if cuda else (None,)
    reference = logits(sixteen_bit(prompt, backends[0]))
    lost = (logits(lambda layer, q, k, v: torch.zeros_like(q)) - reference).norm()

    def row(attend: Attention, label: Row, limit: float | None, captured: bool) -> Row:
        difference = float((logits(attend, captured) - reference).norm() / lost)
        found = label | {"captured": captured, "difference": round(difference, 5), "limit": limit}
        if limit is not None and not difference <= limit:
            found["error"] = f"difference = {difference:.3g}; allowed: at most {limit}"
        return found

    sixteen = {"format": str(model.dtype).removeprefix("torch."), "sinks": None, "recent": None}
    rows = [
        row(sixteen_bit(prompt, backend), sixteen | {"kernel": backend.name}, ZONES_LIMIT, False)
        for backend in backends[1:]
    ]
    for name, zone in [(formats[0], Zones(0, PROMPT + STEPS)), *((f, zones) for f in formats)]:
        label = {"format": name, "sinks": zone.sinks, "recent": zone.recent, "kernel": None}
        attend = low_bit(prompt, name, zone)
        rows.append(row(attend, label, limit_of(name, zone), cuda))
        attend.check()
    return rows


def limit_of(name: str, zones: Zones) -> float | None:
    """None: more is lost than a limit could tell from a fault."""
    if zones.recent >= PROMPT + STEPS:
        return ZONES_LIMIT
    fmt = KvFormat.parse(name)
    return INT4_LIMIT if fmt.k_bits == fmt.v_bits == 4 else None


def sixteen_bit(prompt: torch.Tensor, backend: SDPBackend | None) -> SixteenBitAttention:
    """prompt (layers, 2, B, PROMPT, Hkv, D), with room for STEPS more tokens."""
    layers, both, batch, _, heads, head_dim = prompt.shape
    kv = prompt.new_zeros(layers, both, batch, heads, PROMPT + STEPS, head_dim)
    kv[:, :, :, :, :PROMPT] = prompt.transpose(3, 4)
    return SixteenBitAttention(kv, PROMPT, backend)


def low_bit(prompt: torch.Tensor, name: str, zones: Zones) -> LowBitAttention:
    device = prompt.device
    shared = {"workspace": Workspace(device)} if device.type == "cuda" else {}
    layers = []
    for k, v in prompt:
        cache = PagedKvCache(
            name,
            batch=BATCH,
            num_kv_heads=TINY.heads_kv,
            max_tokens=PROMPT + STEPS,
            keep_first=zones.sinks,
            keep_last=zones.recent,
            device=device,
            **shared,
        )
        cache.append(k, v)
        layers.append(cache)
    return LowBitAttention(layers)


def forced_logits(
    model: Llama, attend: Attention, tokens: torch.Tensor, captured: bool
) -> torch.Tensor:
    """Logits (STEPS, B, vocab), float32, of tokens (STEPS, B) that follow the prompt. Captured: the
    first step runs outside, as every kernel's first call must, the others are replays."""
    held, position = tokens[0].clone(), torch.tensor([PROMPT], device=tokens.device)
    run: Callable[[], torch.Tensor] = lambda: model.step(held, position, attend)  # noqa: E731
    logits = []
    for index, chosen in enumerate(tokens):
        if isinstance(attend, SixteenBitAttention):
            attend.length = PROMPT + index + 1
        held.copy_(chosen)
        logits.append(run().float())
        if captured and index == 0:
            run = replay_of(run)
    return torch.stack(logits)


def replay_of(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A captured ``step``; the tensor it returns is written again by the next replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay
