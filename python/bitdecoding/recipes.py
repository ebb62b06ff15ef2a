# SPDX-License-Identifier: Apache-2.0
"""Short names of formats, for people who choose by bits: ``int4``, ``k4v2``, ``int2``.

K is quantised per channel and V per token (KIVI). Small groups of K buy more than small groups of
V. SmolLM2-135M (head_dim 64) after 4096 tokens of Shakespeare, 256 steps, 16 first and 64 newest
tokens in 16 bit, against a 16-bit cache (``demo_run.py``):

    K, V bits   K group   V group   bits per element   same top-1   mean KL
      4, 4        128        64          4.375            94.9%      0.0048
      4, 4         64        64          4.500            96.1%      0.0034
      4, 4         32        64          4.750            97.7%      0.0018   int4
      4, 4         32        32          5.000            98.0%      0.0016
      4, 2        128        64          3.375            91.0%      0.0210
      4, 2        128        32          3.625            91.0%      0.0135   k4v2
      4, 2         64        32          3.750            91.4%      0.0133
      2, 2         32        32          3.000            81.6%      0.1089   int2
"""

from __future__ import annotations

from bitdecoding import KvFormat
from bitdecoding.arrays import as_format

MOST_GROUP_CHANNELS = 128

# name: (k_bits, v_bits, k_group in tokens, v_group in channels; None = the whole head, 128 at most)
RECIPES: dict[str, tuple[int, int, int, int | None]] = {
    "int4": (4, 4, 32, None),
    "k4v2": (4, 2, 128, 32),
    "int2": (2, 2, 32, 32),
}


def resolve_format(format: KvFormat | str, head_dim: int) -> KvFormat:
    """The format that a user means, for heads of ``head_dim`` channels.

    ``format`` is a :class:`KvFormat`, its canonical name, or a key of :data:`RECIPES`.
    Raises ValueError for an unknown name and for a format of another head_dim, or TypeError.
    """
    if isinstance(format, str) and format in RECIPES:
        k_bits, v_bits, k_group, v_group = RECIPES[format]
        return KvFormat(
            k_bits=k_bits,
            v_bits=v_bits,
            k_group=k_group,
            v_group=v_group or min(head_dim, MOST_GROUP_CHANNELS),
            head_dim=head_dim,
        )
    try:
        format = as_format(format)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}; or one of {', '.join(RECIPES)}") from None
    if format.head_dim != head_dim:
        raise ValueError(
            f"format = {format}: head_dim {format.head_dim}; this model has {head_dim}"
        )
    return format
