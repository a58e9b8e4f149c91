"""Pickles of tensors and plain values, read without executing anything.

A pickle may call any function when it is read. Here only the few globals that checkpoints need are known, and none of
them is given out: each is stood for by an object of this module that makes a plain value, so that nothing of the
interpreter can be reached or changed. Every other global ends the reading. Tensors stay descriptions.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from math import prod
from typing import Any, BinaryIO

import numpy as np
import torch

# The pickle holds names, shapes and settings only; those of nnU-Net's checkpoints are below 1 MB.
MAX_PICKLE_BYTES = 16 << 20
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class ForbiddenGlobal(pickle.UnpicklingError):
    """The pickle wants something that is not on the list; nothing of it was executed."""


class Storage:
    """Where a tensor's bytes are: a key of the file, with type and number of elements."""

    __slots__ = ("dtype", "key", "numel")

    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self.key, self.dtype, self.numel = key, dtype, numel


class StoredTensor:
    """A tensor that was not read yet."""

    __slots__ = ("offset", "shape", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any) -> None:
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise pickle.UnpicklingError("a tensor with an impossible description")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        elements = prod(shape)
        if elements and (last >= storage.numel or elements > storage.numel):
            raise pickle.UnpicklingError(f"a tensor of shape {tuple(shape)} in a storage of {storage.numel} elements")
        self.storage, self.offset, self.shape, self.stride = storage, offset, tuple(shape), tuple(stride)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return int(prod(self.shape)) * self.storage.dtype.itemsize


class _Stand:
    """Stands for an allowed global; can be called and compared, not changed."""

    __slots__ = ("_make", "value")

    def __init__(self, make: Callable[..., Any] | None = None, value: Any = None) -> None:
        self._make, self.value = make, value

    def __call__(self, *args: Any) -> Any:
        if self._make is None:
            raise pickle.UnpicklingError("a value is called as if it were a function")
        return self._make(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a global is changed")


class _Dict(dict):
    """An OrderedDict of the file; what else was set on it, as a state dict's `_metadata`, is left out."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""


class _Array:
    """An array of NumPy; its content is left out."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""


class _NumpyType:
    """A dtype of NumPy: kind and size, and the order of bytes that its state says."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]


def _numpy_scalar(kind: Any, content: Any = b"") -> Any:
    if not isinstance(kind, _NumpyType) or not re.fullmatch(r"[biuf][1248]", kind.code) or kind.code == "f1":
        raise pickle.UnpicklingError("a NumPy scalar that is no number")
    return np.frombuffer(content, np.dtype(kind.order + kind.code), count=1)[0].item()


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise pickle.UnpicklingError("a parameter without a tensor")
    return data


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes in an unexpected encoding")
    return text.encode("latin1")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    return StoredTensor(storage, offset, shape, stride)


_MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda items=(): _Dict(items),
    "collections.defaultdict": lambda factory=None, items=(): _Dict(items),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda kind="cpu", *index: str(kind),
    "numpy.dtype": _NumpyType,
    "numpy.ndarray": lambda *_: _Array(),
    "_codecs.encode": _encoded,
    **{f"{module}.set": set for module in ("builtins", "__builtin__")},
    **{f"{module}.dict": lambda: _Dict() for module in ("builtins", "__builtin__")},
    **{f"numpy.{module}.multiarray.scalar": _numpy_scalar for module in ("core", "_core")},
    **{f"numpy.{module}.multiarray._reconstruct": lambda *_: _Array() for module in ("core", "_core")},
}


class PlainUnpickler(pickle.Unpickler):
    """Reads what checkpoints hold; ForbiddenGlobal for everything else, before anything of it is executed."""

    def find_class(self, module: str, name: str) -> _Stand:
        full = f"{module}.{name}"
        if full in _MAKERS:
            return _Stand(_MAKERS[full])
        if module == "torch" and name in _STORAGES:
            return _Stand(value=_STORAGES[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return _Stand(value=getattr(torch, name))
        raise ForbiddenGlobal(full)

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, numel, *view = pid
        known = kind == "storage" and isinstance(dtype, _Stand) and isinstance(dtype.value, torch.dtype)
        if not known or type(numel) is not int or numel < 0 or any(part is not None for part in view):
            raise pickle.UnpicklingError("a storage with an impossible description")
        return Storage(str(key), dtype.value, numel)


def load_pickle(stream: BinaryIO, kind: type[PlainUnpickler] = PlainUnpickler) -> Any:
    """Read one pickle and leave the stream behind it.

    Its instructions are looked through first: an end that is missing, counts beyond the data, and positions of the
    memo that would reserve gigabytes are found before anything is made.
    """
    start = stream.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream), start=1):
        if stream.tell() - start > MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError(f"its pickle is longer than {MAX_PICKLE_BYTES >> 20} MB")
        if "PUT" in opcode.name and isinstance(argument, int) and argument > count:
            raise pickle.UnpicklingError("its pickle has an impossible memo")
        if opcode.name.startswith("EXT"):  # numbers for globals, which find_class may not see
            raise pickle.UnpicklingError("its pickle uses the registry of extensions")
    end = stream.tell()
    stream.seek(start)
    return kind(io.BytesIO(stream.read(end - start)), encoding="latin1").load()
