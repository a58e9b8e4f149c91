"""PyTorch's own files (`torch.save`), read without executing anything in them: a pickle, and raw storages beside it."""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lightm.errors import InputError
from lightm.nets.released.plain_pickle import (
    MAX_PICKLE_BYTES,
    ForbiddenGlobal,
    PlainUnpickler,
    Storage,
    StoredTensor,
    load_pickle,
)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class TorchFile:
    """A file of `torch.save`: its `content`, in which tensors are `StoredTensor`, and the tensors on demand.

    Both formats are read: zip archives, and the older one of PyTorch before 1.6. Containers, numbers, text, tensors
    and NumPy's numbers are understood; arrays of NumPy are passed over.

    Raises InputError, naming the file: missing, damaged or cut off, of another kind, compressed, or with anything
    else in its pickle, whose name the message gives. Nothing in the file is executed. Cost: the pickle only.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._big = False
        self._places: dict[str, tuple[int, int]] = {}  # key: first byte and bytes of a storage of the older format
        self._folder: str | None = None
        try:
            with self.path.open("rb") as stream:
                start = stream.read(4)
                stream.seek(0)
                self.content = self._open_zip(stream) if start == b"PK\x03\x04" else self._open_legacy(stream)
        except ForbiddenGlobal as error:
            raise InputError(
                f"{self.path}: refused: reading it would need {error}, and a pickle that names other things than "
                "tensors and plain values could execute code. Nothing was executed. If you trust its source, load it "
                "there and save the state dict alone, best as safetensors"
            ) from None
        except FileNotFoundError:
            raise InputError(f"{self.path}: no such file") from None
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path}: cannot be read ({error}); it is damaged or was cut off") from None
        except InputError:
            raise
        except Exception as error:  # a damaged pickle ends in exceptions of any kind
            raise InputError(
                f"{self.path}: not a file of weights that PyTorch wrote, or damaged ({_first_line(error)}); "
                "expected .safetensors, .pth or .pt"
            ) from None

    def _open_zip(self, stream: BinaryIO) -> Any:
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
            if any(re.search(r"(^|/)(code/|constants\.pkl)", name) for name in names):
                raise InputError(f"{self.path}: a TorchScript program, which holds code; save its state dict instead")
            pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
            if len(pickles) != 1:
                raise InputError(f"{self.path}: a zip archive without weights of PyTorch (no data.pkl in it)")
            self._folder = pickles[0].removesuffix("data.pkl")
            if self._folder + "byteorder" in names:
                self._big = self._record(archive, "byteorder", 16) == b"big"
            return load_pickle(io.BytesIO(self._record(archive, "data.pkl", MAX_PICKLE_BYTES)))

    def _record(self, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
        info = archive.getinfo(f"{self._folder}{name}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{self.path}: {name} is compressed, as PyTorch never writes it; refused")
        if info.file_size > limit:
            raise InputError(f"{self.path}: {name} has {info.file_size} bytes where at most {limit} are expected")
        return archive.read(info)

    def _open_legacy(self, stream: BinaryIO) -> Any:
        if load_pickle(stream) != _LEGACY_MAGIC:
            raise pickle.UnpicklingError("a pickle, but not of torch.save")
        load_pickle(stream)  # the protocol's version
        system = load_pickle(stream)
        self._big = not system.get("little_endian", True)
        storages: dict[str, Storage] = {}

        class Noting(PlainUnpickler):
            def persistent_load(self, pid: Any) -> Storage:
                storage = super().persistent_load(pid)
                return storages.setdefault(storage.key, storage)

        content = load_pickle(stream, Noting)
        keys = load_pickle(stream)
        size = self.path.stat().st_size
        for key in keys:
            (numel,) = struct.unpack(">q" if self._big else "<q", stream.read(8))
            storage = storages[str(key)]
            length, first = numel * storage.dtype.itemsize, stream.tell()
            if numel != storage.numel or first + length > size:
                raise pickle.UnpicklingError("its storages are cut off")
            self._places[str(key)] = (first, length)
            stream.seek(first + length)
        return content

    def read(self, wanted: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """Read tensors, contiguous, each in its own type. Raises InputError where bytes are missing or damaged."""
        with contextlib.ExitStack() as stack:
            try:
                stream = stack.enter_context(self.path.open("rb"))
                archive = stack.enter_context(zipfile.ZipFile(stream)) if self._folder is not None else None
                return {name: self._tensor(stored, stream, archive) for name, stored in wanted.items()}
            except (OSError, KeyError, zipfile.BadZipFile, EOFError) as error:
                raise InputError(f"{self.path}: its tensors cannot be read ({error}); the file is damaged") from None

    def _tensor(self, stored: StoredTensor, stream: BinaryIO, archive: zipfile.ZipFile | None) -> Tensor:
        storage, itemsize = stored.storage, stored.storage.dtype.itemsize
        if archive is not None:
            content = self._record(archive, f"data/{storage.key}", storage.numel * itemsize)
        else:
            first, length = self._places[storage.key]
            stream.seek(first)
            content = stream.read(length)
        if len(content) != storage.numel * itemsize:
            raise InputError(f"{self.path}: storage {storage.key} has {len(content)} bytes, not as many as described")
        if not prod(stored.shape):
            return torch.empty(stored.shape, dtype=storage.dtype)
        raw = np.frombuffer(content, dtype=f"u{itemsize}")
        swapped = raw.byteswap() if self._big else raw
        flat = torch.frombuffer(bytearray(swapped.tobytes()), dtype=storage.dtype)
        return flat.as_strided(stored.shape, stored.stride, stored.offset).contiguous()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
