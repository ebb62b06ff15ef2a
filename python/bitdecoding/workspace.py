# SPDX-License-Identifier: Apache-2.0
"""Workspace: the memory that CUDA calls of a cache need besides the cache."""

from __future__ import annotations

from typing import Any

from bitdecoding._ext import build_info
from bitdecoding.arrays import Array, device_name


class Workspace:
    """Scratch memory of CUDA caches, allocated by torch when a call first needs it.

    Every cache on CUDA has one of its own, unless it is given one: caches whose calls never overlap
    in time, such as those of a model's layers, may share it. What it has outgrown stays allocated
    as long as it lives, because captured graphs may point there; keep it, or a cache that has it,
    as long as such graphs.

    Allocating waits for the device, and is refused while a CUDA graph is captured: make every kind
    of call once before. Later calls of the same shape neither allocate here nor wait.

    Parameters
    ----------
    device : 'cuda' (the current device), 'cuda:<index>' or a torch.device

    Raises ValueError for any other device.
    """

    def __init__(self, device: object = "cuda") -> None:
        name = device_name(device, cpu=False)
        if name == "cuda":
            import torch

            name = f"cuda:{torch.cuda.current_device()}"
        self._device = name
        self._hold()

    def _hold(self) -> None:
        self._allocated: list[Array] = []
        self._decode: Array | None = None
        self._counters: Array | None = None

    @property
    def device(self) -> str:
        """'cuda:<index>'"""
        return self._device

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far."""
        return sum(int(array.nbytes) for array in self._allocated)

    def decode_memory(self, nbytes: int) -> Array:
        """uint8 (nbytes or more,): what a plan of decode asks for. Calls leave its counters 0."""
        if self._decode is None or self._decode.nbytes < nbytes:
            self._decode = self._zeros(nbytes, "uint8")
        return self._decode

    def append_counters(self, batch: int) -> Array:
        """int32 (batch or more,), which calls leave 0."""
        if self._counters is None or len(self._counters) < batch:
            self._counters = self._zeros(batch, "int32")
        return self._counters

    def error_word(self) -> Array:
        """A new int32 (4,), the caller's own: see `bitdecoding.device_errors`."""
        return self._zeros(4, "int32", keep=False)

    def _zeros(self, count: int, dtype: str, keep: bool = True) -> Array:
        if not build_info()["kernels"]:
            raise NotImplementedError(
                f"arrays on {self._device}: this build has no CUDA kernels; allowed: cpu"
            )
        import torch

        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the first call of its kind while a CUDA graph is captured; allowed: after the "
                    "same call outside, which allocates its workspace"
                )
            array = torch.zeros(count, dtype=getattr(torch, dtype), device=self._device)
            torch.cuda.current_stream().synchronize()  # calls may come on any stream
        if keep:  # graphs may point to it for as long as they live
            self._allocated.append(array)
        return array

    def __repr__(self) -> str:
        return f"Workspace('{self._device}')"

    # copy.deepcopy and pickle: a new workspace, shared by the copies of what shares this one.
    def __getstate__(self) -> dict[str, Any]:
        return {"device": self._device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._device = state["device"]
        self._hold()


def workspace_for(device: str, given: Workspace | None) -> Workspace | None:
    """The workspace of a cache whose arrays are on `device`; None on a CPU."""
    if given is not None and (not isinstance(given, Workspace) or given.device != device):
        allowed = "None" if device == "cpu" else f"None, Workspace('{device}')"
        raise ValueError(
            f"workspace = {given!r}; allowed: {allowed}, since the arrays are on {device}"
        )
    return Workspace(device) if given is None and device != "cpu" else given
