# SPDX-License-Identifier: Apache-2.0
"""How far predictions through one cache are from those through another, token by token."""

from __future__ import annotations

import torch


class Agreement:
    """Collects blocks of logits of a cache beside those of the 16-bit one; per row of the batch."""

    def __init__(self) -> None:
        self._nll: list[torch.Tensor] = []  # each (B, n)
        self._reference_nll: list[torch.Tensor] = []
        self._kl: list[torch.Tensor] = []
        self._same: list[torch.Tensor] = []

    def add(self, reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """The reference's log-probabilities, logits (B, n, V) float32, what came next (B, n). Row
        by row: vocabularies are large."""
        rows = [_compare(*row) for row in zip(reference, logits, targets, strict=True)]
        columns = [torch.stack(column) for column in zip(*rows, strict=True)]
        places = (self._nll, self._reference_nll, self._kl, self._same)
        for place, column in zip(places, columns, strict=True):
            place.append(column)

    def rows(self) -> list[dict[str, float]]:
        """Of every row of the batch."""
        nll, reference = torch.cat(self._nll, 1), torch.cat(self._reference_nll, 1)
        kl, same = torch.cat(self._kl, 1), torch.cat(self._same, 1)
        return [
            {
                "perplexity": _rounded(nll[b].double().mean().exp()),
                "perplexity_16bit": _rounded(reference[b].double().mean().exp()),
                "kl": _rounded(kl[b].double().mean()),
                "kl_p99": _rounded(kl[b].double().quantile(0.99)),
                "top1": _rounded(same[b].double().mean()),
                "positions": kl.shape[1],
            }
            for b in range(len(kl))
        ]


def _compare(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """(n, V) and (n,) -> nll, the reference's nll, KL(reference || logits) in nats, same top-1."""
    p, q = reference, logits.log_softmax(-1)
    same = p.argmax(-1) == q.argmax(-1)
    nll, reference_nll = (-x.gather(-1, targets[:, None])[:, 0] for x in (q, p))
    kl = (p.exp() * (p - q)).sum(-1)
    return nll, reference_nll, kl, same


def _rounded(x: torch.Tensor) -> float:
    return float(f"{float(x):.6g}")
