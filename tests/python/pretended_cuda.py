# SPDX-License-Identifier: Apache-2.0
"""Arrays that claim to be on a CUDA device: what the host checks of them needs no such device."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

CUDA = 2  # DLPack's device type
KINDS = {"i": 0, "u": 1, "f": 2}


class Tensor(ctypes.Structure):
    """DLTensor of DLPack."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    """DLManagedTensor of DLPack, without a deleter."""

    _fields_ = (
        ("tensor", Tensor),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class PretendedCuda:
    """`array`, said to be on cuda:<device>. Its memory must not be touched."""

    def __init__(self, array: npt.NDArray[Any], device: int = 0) -> None:
        self._array = array
        self._device = device
        self._lent: list[Any] = []
        self.shape = array.shape
        self.dtype = array.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._device

    def __dlpack__(self, **_: Any) -> object:
        managed = Managed(tensor=self._describe())
        self._lent.append(managed)
        capsule: object = new_capsule(ctypes.addressof(managed), b"dltensor", None)
        return capsule

    def _describe(self) -> Tensor:
        array = self._array
        extents = ctypes.c_int64 * array.ndim
        shape = extents(*array.shape)
        strides = extents(*(stride // array.itemsize for stride in array.strides))
        self._lent.append((shape, strides))
        return Tensor(
            data=array.ctypes.data,
            device_type=CUDA,
            device_id=self._device,
            ndim=array.ndim,
            code=KINDS[np.dtype(array.dtype).kind],
            bits=8 * array.itemsize,
            lanes=1,
            shape=shape,
            strides=strides,
        )


ToView = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Tensor))
CurrentStream = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
)


class ExchangeTable(ctypes.Structure):
    """DLPackExchangeAPI of DLPack 1."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("to_managed", ctypes.c_void_p),
        ("from_managed", ctypes.c_void_p),
        ("to_view", ToView),
        ("current_stream", CurrentStream),
    )


class PretendedLibrary(PretendedCuda):
    """A PretendedCuda of a library that has DLPack's table of C functions."""

    asked: list[tuple[int, int]] = []  # noqa: RUF012 (of the library's stream: device type, index)

    @staticmethod
    def _view(array: PretendedLibrary, view: Any) -> int:
        view[0] = array._describe()
        return 0

    @staticmethod
    def _stream(device_type: int, device: int, stream: Any) -> int:
        PretendedLibrary.asked.append((device_type, device))
        stream[0] = 1234
        return 0


TABLE_NAME = b"dlpack_exchange_api"  # a capsule points to its name
TABLE = ExchangeTable(
    major=1,
    minor=3,
    to_view=ToView(PretendedLibrary._view),
    current_stream=CurrentStream(PretendedLibrary._stream),
)
PretendedLibrary.__dlpack_c_exchange_api__ = new_capsule(  # type: ignore[attr-defined]
    ctypes.addressof(TABLE), TABLE_NAME, None
)
