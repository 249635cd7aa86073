"""Where the bytes of a Python object lie: large transfers name an address, and Python copies nothing.

Imported when the first large transfer happens: ctypes takes a while to load on an emulated blade.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer as Data

_WRITABLE = 1  # PyBUF_WRITABLE


class _PyBuffer(ctypes.Structure):
    """Py_buffer of Python's stable ABI."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get = ctypes.pythonapi.PyObject_GetBuffer
_get.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_get.restype = ctypes.c_int
_release = ctypes.pythonapi.PyBuffer_Release
_release.argtypes = (ctypes.POINTER(_PyBuffer),)
_release.restype = None


class Pinned:
    """The contiguous bytes of `data` at a fixed address, until `release` (or until this object goes).

    BufferError when the data are not contiguous, or are to be written and cannot be.
    """

    __slots__ = ("_held", "_view", "address", "length")

    def __init__(self, data: Data, *, writable: bool) -> None:
        self._held = False
        self._view = _PyBuffer()
        _get(data, ctypes.byref(self._view), _WRITABLE if writable else 0)
        self._held = True
        self.address: int = self._view.buf or 0
        self.length: int = self._view.len

    def release(self) -> None:
        """Let the object move, grow or go again."""
        if self._held:
            self._held = False
            _release(ctypes.byref(self._view))

    __del__ = release
