# SPDX-License-Identifier: Apache-2.0
"""How far decode with 16-bit arithmetic may be from the oracle, and how far it was.

Of a call's whole output the error's norm is at most RELATIVE of the output's norm; no element is
off by more than WORST of its row's root mean square; no lse by more than LSE. To each is added

- what rounding Q' = q * scale to fp16 can do where K has scales per channel, and q itself where it
  is rotated. A product is off by
  at most 2^-11 of itself (2^-12 to 2^-11, as its leading digits are), so a score by at most
  d = 2^-11 * sum |q * scale * code| * |softmax_scale|. Weights w then change by factors between
  exp(-d) and exp(d), and since sum w (v - out) = 0, an output moves by at most
  sum w (exp(d) - 1) |v - out| / sum w exp(-d); lse moves by at most log sum w exp(d).
- what tensor cores do to any long sum: an MMA aligns its 16 products and the sum so far to the
  largest and cuts each off at 2^-24 of it, so head_dim / 16 of them take at most
  17 * 2^-24 * head_dim / 16 of sum |q * scale * code| (or of sum |q k| where that is more) from a
  score, with the effect above. Where K has scales per token, and the bound above is none, there is
  more to it. Seen on an H200 with outliers of 300 in q: 2-bit K is off by more than 4-bit K, up to
  4e-3 in an lse of 200. Nothing documents it; it is as if fp16 subnormals, which codes are, aligned
  by the exponent of 2^-14, and a product counted as max |q| * scale * 2^10 however small its code.
- where the kernel multiplies bytes (up to 4 query columns), what 16-bit fixed point does to q or
  Q': 2^-15 of a column's largest at most, times every code. Of the weights it takes 2^-17 of the
  heaviest of 64 tokens, which RELATIVE covers as it covers the rounding of weights to fp16.
- what the output's type does: below fp16's normal numbers half of its spacing, 2^-25; in one
  element half a unit in the last place of a bf16, 2^-8 of it, which alone can exceed WORST.
- only where a test asks for it (`cancels`), what rounding P' = P * scale can do where a group of V
  holds both ordinary values and saturated infinities: code * scale and zero are 65504 and cancel.
  Roundings of at most 2^-11 each, independent: 2^-11 * sqrt(sum (w code scale)^2).
An fp16 output beyond 65504 counts as 65504: whether it becomes inf is a matter of one rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from oracle import Doubles, hadamard
from oracle_attention import Attended, block_norms, mean_scores

RELATIVE = {"float16": 1e-3, "bfloat16": 4e-3}
WORST = 1e-2
LSE = 1e-3
ELEMENT_ROUNDING = {"float16": 0.0, "bfloat16": 2.0**-8}
SPACING = {"float16": 2.0**-25, "bfloat16": 0.0}
ROUNDING = 2.0**-11  # of one value to fp16
MMA_CHANNELS = 16
MMA_CUT = (MMA_CHANNELS + 1) * 2.0**-24  # of one MMA
SUBNORMAL_ALIGNMENT = 2.0**10  # of the code 1: 2^-14 / 2^-24
FIXED_POINT = 2.0**-15  # of a column's largest magnitude, for every code


@dataclass
class Expected:
    """Exact results of a batch, and what rounding Q' can do to them: to fp16, and to bytes."""

    out: Doubles  # (B, Sq, Hq, D)
    lse: Doubles  # (B, Hq, Sq)
    out_bound: Doubles
    lse_bound: Doubles
    bytes_out_bound: Doubles
    bytes_lse_bound: Doubles

    def mapped(self, change: Callable[[Doubles], Doubles]) -> Expected:
        """Of a changed batch: `change` makes one array from another."""
        return Expected(*(change(getattr(self, part.name)) for part in fields(self)))


def expect(
    q: npt.NDArray[Any],
    sequences: list[Attended],
    softmax_scale: float,
    *,
    rounded: bool,
    cancels: bool = False,
) -> Expected:
    """q (B, Sq, Hq, D); `rounded`: the format has K scales per channel."""
    with np.errstate(invalid="ignore", over="ignore"):
        results = [
            _attention(row.astype(float), tokens, softmax_scale, rounded, cancels)
            for row, tokens in zip(q, sequences, strict=True)
        ]
    return Expected(*(np.stack(parts) for parts in zip(*results, strict=True)))


def _attention(
    q: Doubles, tokens: Attended, softmax_scale: float, rounded: bool, cancels: bool
) -> tuple[Doubles, ...]:
    queries, heads, channels = q.shape
    length, kv_heads, _ = tokens.k.shape
    if length == 0:
        zero, empty = np.zeros(q.shape), np.full((heads, queries), -np.inf)
        none = np.zeros(empty.shape)
        return zero, empty, zero, none, zero, none
    ratio = heads // kv_heads
    mean_lse = softmax_scale * mean_scores(q, tokens)
    q = hadamard(q, tokens.k_rotation)
    # columns of a KV head: (H, ratio * Sq, D)
    columns = q.reshape(queries, kv_heads, ratio, channels).transpose(1, 2, 0, 3)
    columns = columns.reshape(kv_heads, ratio * queries, channels)
    k, v = (x.transpose(1, 0, 2) for x in (tokens.k, tokens.v))  # (H, L, D)
    scores = softmax_scale * (columns @ k.swapaxes(1, 2))  # (H, columns, L)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    lse = (np.log(total) + top)[..., 0]
    weights /= total
    out = weights @ v
    products = tokens.k_products.transpose(1, 2, 0)  # (H, D, L)
    terms = np.maximum(products, np.abs(k).swapaxes(1, 2))
    error = MMA_CUT * channels / MMA_CHANNELS * (np.abs(columns) @ terms)
    if rounded:
        error += ROUNDING * (np.abs(columns) @ products)
    else:
        scales = tokens.k_scales.transpose(1, 2, 0).max(axis=1, keepdims=True)  # (H, 1, L)
        largest = np.abs(columns).max(axis=2, keepdims=True) * scales * SUBNORMAL_ALIGNMENT
        error += MMA_CUT * channels / MMA_CHANNELS * largest
    size = np.abs(columns)
    if tokens.k_rotation:
        error += ROUNDING * (size @ terms)
    if rounded:  # Q' = q * scale, and a code is the product's share of its channel's largest
        fixed = channels * np.max(size * products.max(axis=2)[:, None, :], axis=2, keepdims=True)
    else:
        fixed = size.max(axis=2, keepdims=True) * products.sum(axis=1, keepdims=True)
    bounds: list[Doubles] = []
    for errors in (error, error + FIXED_POINT * fixed):
        out_bound, lse_bound = _bounds(weights, abs(softmax_scale) * errors, v, out)
        if cancels:
            v_products = tokens.v_products.transpose(1, 0, 2)  # (H, L, D)
            out_bound = out_bound + ROUNDING * np.sqrt(weights**2 @ v_products**2)
        bounds += (block_norms(out_bound, tokens.v_rotation), lse_bound)
    out = hadamard(out, tokens.v_rotation)

    def of_heads(x: Doubles) -> Doubles:
        """(H, columns, ..) -> (Hq, Sq, ..); outputs (Sq, Hq, D)"""
        x = x.reshape(heads, queries, *x.shape[2:])
        return x.swapaxes(0, 1) if x.ndim == 3 else x

    out, lse, *bounds = (of_heads(x) for x in (out, lse, *bounds))
    return out, lse + mean_lse, *bounds


def _bounds(weights: Doubles, error: Doubles, v: Doubles, out: Doubles) -> tuple[Doubles, Doubles]:
    """Of out (H, columns, D) and lse (H, columns), scores (H, columns, L) being off by `error`."""
    moved = weights * np.expm1(error)
    sums = moved.sum(axis=-1, keepdims=True)
    # sum moved |v - out| <= sqrt(sum moved * sum moved (v - out)^2)
    squares = moved @ v**2 - 2 * out * (moved @ v) + sums * out**2
    spread = np.sqrt(sums * np.maximum(squares, 0))
    least = np.sum(weights * np.exp(-error), axis=-1, keepdims=True)
    return spread / least, np.log1p(sums[..., 0])


@dataclass
class Worst:
    """The largest errors of calls of one kind."""

    calls: int = 0
    relative: float = 0.0  # error's norm / output's norm
    share: float = 0.0  # of what is allowed
    element: float = 0.0  # error / root mean square of the row
    lse: float = 0.0


@dataclass
class Summary:
    """What the tests found: (kind of test, type of the output) -> its worst."""

    found: dict[tuple[str, str], Worst] = field(default_factory=dict)

    def lines(self) -> list[str]:
        rows = [f"{'decode against the oracle':40} calls  relative  of budget   element       lse"]
        for (kind, dtype), w in sorted(self.found.items()):
            rows.append(
                f"{kind + ' ' + dtype:40} {w.calls:5}  {w.relative:8.2e} {w.share:10.2f}"
                f"  {w.element:8.2e}  {w.lse:8.2e}"
            )
        return rows if len(rows) > 1 else []


SUMMARY = Summary()


def assert_close(
    out: npt.NDArray[Any],
    lse: npt.NDArray[Any] | None,
    expected: Expected,
    dtype: str,
    *,
    kind: str,
    what: str,
    of_bytes: bool = False,
) -> None:
    """out (B, Sq, Hq, D), lse (B, Hq, Sq) as found; `kind` is the line of the summary, `of_bytes`:
    by a kernel that multiplies bytes."""
    assert out.shape == expected.out.shape, what
    exact, found = expected.out, out.astype(float)
    if dtype == "float16":
        exact, found = (np.clip(x, -65504, 65504) for x in (exact, found))
    spoilt = np.isnan(exact)
    assert np.array_equal(np.isnan(found), spoilt), (
        f"{what}: {np.sum(np.isnan(found) & ~spoilt)} NaN where none belongs (sequences "
        f"{np.unique(np.nonzero(np.isnan(found) & ~spoilt)[0])}), "
        f"{np.sum(~np.isnan(found) & spoilt)} missing"
    )
    with np.errstate(invalid="ignore"):
        error = np.where(spoilt | (found == exact), 0, np.abs(found - exact))
    size = np.where(spoilt, 0, np.abs(exact))
    out_bound = expected.bytes_out_bound if of_bytes else expected.out_bound
    bound = np.where(spoilt, 0, out_bound)
    norm = float(np.linalg.norm(size))
    rounding = SPACING[dtype] * float(np.sqrt(exact.size))
    allowed = RELATIVE[dtype] * norm + float(np.linalg.norm(bound)) + rounding
    deviation = float(np.linalg.norm(error))
    rms = np.sqrt(np.mean(size**2, axis=-1, keepdims=True))  # of a row of D
    limits = WORST * rms + bound + ELEMENT_ROUNDING[dtype] * size + SPACING[dtype]
    worst = np.max(error / np.maximum(rms, 1e-30), initial=0.0)

    entry = SUMMARY.found.setdefault((kind, dtype), Worst())
    entry.calls += 1
    entry.relative = max(entry.relative, deviation / max(norm, 1e-30))
    entry.share = max(entry.share, deviation / max(allowed, 1e-30))
    entry.element = max(entry.element, float(worst))

    report = f"{what}: relative error {deviation / max(norm, 1e-30):.3g}, worst element {worst:.3g}"
    assert deviation <= allowed, f"{report}; allowed {allowed / max(norm, 1e-30):.3g}"
    bad = np.argwhere(error > limits)
    assert len(bad) == 0, f"{report}; {len(bad)} elements beyond their limit, first {bad[0]}"
    if lse is not None:
        lse_bound = expected.bytes_lse_bound if of_bytes else expected.lse_bound
        _assert_lse(lse, expected.lse, lse_bound, entry, what)


def _assert_lse(
    lse: npt.NDArray[Any], exact: Doubles, bound: Doubles, entry: Worst, what: str
) -> None:
    found = lse.astype(float)
    assert found.shape == exact.shape, what
    same = (found == exact) | (np.isnan(found) & np.isnan(exact))  # -inf of empty sequences
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0, np.abs(found - exact))
        limits = LSE + bound + 2.0**-24 * np.abs(exact)  # it is a float32
    entry.lse = max(entry.lse, float(np.max(error, initial=0.0)))
    bad = np.argwhere(~same & ~(error <= limits))
    assert len(bad) == 0, (
        f"{what}: lse at {bad[0]} is {found[tuple(bad[0])]} instead of {exact[tuple(bad[0])]}, "
        f"allowed error {limits[tuple(bad[0])]:.3g}"
    )
