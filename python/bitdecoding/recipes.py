# SPDX-License-Identifier: Apache-2.0
"""Short names of formats, for people who choose by bits: ``int4``, ``k4v2``, ``int2``.

K is quantised per channel and V per token (KIVI). Four bits stand one scale per 128 tokens of a
channel; two bits need smaller groups, which cost half a bit (32 elements) or a quarter (64).
"""

from __future__ import annotations

from bitdecoding import KvFormat

# name: (k_bits, v_bits, k_group in tokens, v_group in channels; None = the whole head)
RECIPES: dict[str, tuple[int, int, int, int | None]] = {
    "int4": (4, 4, 128, None),
    "k4v2": (4, 2, 128, 32),
    "int2": (2, 2, 32, 32),
}


def resolve_format(format: KvFormat | str, head_dim: int) -> KvFormat:
    """The format that a user means, for heads of ``head_dim`` channels.

    ``format`` is a :class:`KvFormat`, its canonical name, or a key of :data:`RECIPES`.
    Raises ValueError for an unknown name and for a format of another head_dim.
    """
    if isinstance(format, str) and format in RECIPES:
        k_bits, v_bits, k_group, v_group = RECIPES[format]
        return KvFormat(
            k_bits=k_bits,
            v_bits=v_bits,
            k_group=k_group,
            v_group=v_group or head_dim,
            head_dim=head_dim,
        )
    if isinstance(format, str):
        try:
            format = KvFormat.parse(format)
        except ValueError as error:
            raise ValueError(f"{error}; or one of {', '.join(RECIPES)}") from None
    if format.head_dim != head_dim:
        raise ValueError(
            f"format = {format}: head_dim {format.head_dim}; this model has {head_dim}"
        )
    return format
