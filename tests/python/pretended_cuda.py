# SPDX-License-Identifier: Apache-2.0
"""Arrays that claim to be on a CUDA device: what the host checks of them needs no such device."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

CUDA = 2  # DLPack's device type
KINDS = {"i": 0, "u": 1, "f": 2}


class Managed(ctypes.Structure):
    """DLManagedTensor of DLPack, without a deleter."""

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
        array = self._array
        extents = ctypes.c_int64 * array.ndim
        shape = extents(*array.shape)
        strides = extents(*(stride // array.itemsize for stride in array.strides))
        managed = Managed(
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
        self._lent.append((managed, shape, strides))
        capsule: object = new_capsule(ctypes.addressof(managed), b"dltensor", None)
        return capsule
