"""Preprocessed cases on disk: one folder per case, named after all that it depends on, complete or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from lightm.datasets.cases import Case
from lightm.errors import LightMError
from lightm.files import file_hash, write_text
from lightm.images.io import split_path
from lightm.labels import IGNORE_INDEX
from lightm.preparation.plan import Plan

# Raised whenever preprocessing gives other numbers, so that older results are left alone.
CODE_VERSION = 2

_FOREGROUND_VOXELS = 2000
# A file changed again within the clock's grain keeps its time: hashes of files this young are not remembered.
_RACY_SECONDS = 2.0
_LEFTOVER_SECONDS = 24 * 3600


@dataclass(frozen=True)
class PreprocessedCase:
    """One case as a network sees it, in a folder of the cache.

    image_path: (C, *spatial) float32. label_path: (*spatial) uint8 class indices, 255 ignored; None without labels.
    meta: id, shape, voxels of each class index, hash of the native geometry, key.
    """

    id: str
    image_path: Path
    label_path: Path | None
    meta: dict[str, Any]

    def image(self) -> np.ndarray:
        """Return the image (C, *spatial) float32, mapped from disk and read only."""
        return np.load(self.image_path, mmap_mode="r")

    def label(self) -> np.ndarray:
        """Return class indices (*spatial) uint8, 255 ignored, mapped from disk; raises LightMError without labels."""
        if self.label_path is None:
            raise LightMError(f"case {self.id} has no label map; give its label, or leave it out of training")
        return np.load(self.label_path, mmap_mode="r")

    def foreground(self) -> dict[int, np.ndarray]:
        """Return up to 2000 voxel coordinates (K, ndim) for each class index from 1 on that occurs."""
        with np.load(self.image_path.parent / "foreground.npz") as stored:
            return {int(index): stored[index] for index in stored.files}


def default_cache_dir() -> Path:
    """Return the folder of $LIGHTM_CACHE or, without it, lightm in the platform's folder for caches."""
    given = os.environ.get("LIGHTM_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("lightm", appauthor=False))


def case_key(case: Case, plan: Plan, hashes: FileHashes, *, trust_image_geometry: bool = False) -> str:
    """Return a hash of all that a preprocessed case depends on: contents of its files, plan, version of the code."""
    depends = {
        "version": CODE_VERSION,
        "plan": plan.model_dump(include={"spatial_dims", "spacing_mm", "ignore_label", "normalization"}, mode="json"),
        "values": list(plan.values),
        "images": [hashes.of(file) for file in case.images],
        "label": None if case.label is None else hashes.of(case.label),
        "id": case.id,
        **({"trust_image_geometry": True} if trust_image_geometry else {}),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def find(folder: Path, case_id: str) -> PreprocessedCase | None:
    """Return the case stored in a folder, or None where it is absent or incomplete."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    image, label = folder / "image.npy", folder / "label.npy" if meta.get("has_label") else None
    whole = all(file.is_file() for file in (image, label, folder / "foreground.npz") if file is not None)
    return PreprocessedCase(case_id, image, label, meta) if whole else None


def store(
    folder: Path, case_id: str, image: np.ndarray, label: np.ndarray | None, meta: dict[str, Any]
) -> PreprocessedCase:
    """Write a case into a folder that appears only when complete; raises LightMError when the disk refuses."""
    temporary = folder.with_name(f".tmp-{uuid.uuid4().hex[:12]}")
    foreground, voxels = _foreground(case_id, label)
    facts = {"id": case_id, "shape": list(image.shape[1:]), "has_label": label is not None, "class_voxels": voxels}
    try:
        temporary.mkdir(parents=True)
        _save(temporary / "image.npy", image)
        if label is not None:
            _save(temporary / "label.npy", label)
        np.savez(temporary / "foreground.npz", **foreground)
        (temporary / "meta.json").write_text(json.dumps({**facts, **meta}, indent=1), encoding="utf-8")
        if find(folder, case_id) is None:
            shutil.rmtree(folder, ignore_errors=True)
            # Another process may have been quicker; its result is the same.
            with suppress(FileExistsError, PermissionError):
                os.rename(temporary, folder)
    except OSError as error:
        if find(folder, case_id) is None:
            raise LightMError(
                f"{folder}: case {case_id} cannot be stored ({error.strerror or error}); check the free space, or set "
                "LIGHTM_CACHE to another folder"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    stored = find(folder, case_id)
    if stored is None:
        raise LightMError(f"{folder}: case {case_id} cannot be stored; check the folder's rights, or set LIGHTM_CACHE")
    return stored


def _save(path: Path, array: np.ndarray) -> None:
    """np.save, which does not notice a disk that is full for the last few kilobytes alone."""
    np.save(path, array)
    try:
        np.load(path, mmap_mode="r")
    except ValueError:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed more than a day ago left half written."""
    for leftover in folder.glob(".tmp-*"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


HASHES = "hashes.json"
"""The file of a cache folder that keeps them."""


class FileHashes:
    """Hashes of files' contents, remembered by path, size and time of change: unchanged files are not read again."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError):
            content = json.loads(file.read_text(encoding="utf-8"))
            self._known = content if isinstance(content, dict) else {}
        self._changed = False

    def of(self, file: Path) -> str:
        """Return size and SHA-256 of the content; raises InputError for a file that cannot be read."""
        file, _ = split_path(file)
        name = str(file.resolve())
        try:
            facts = file.stat()
        except OSError:
            return file_hash(file)  # says what is wrong
        state = [facts.st_size, facts.st_mtime_ns]
        known = self._known.get(name)
        if known is not None and known[:2] == state:
            return str(known[2])
        content = file_hash(file)
        if time.time() - facts.st_mtime > _RACY_SECONDS:
            self._known[name] = [*state, content]
            self._changed = True
        return content

    def save(self) -> None:
        """Write what was learnt, for the next run."""
        if self._changed:
            write_text(self._file, json.dumps(self._known))
            self._changed = False


def _foreground(case_id: str, label: np.ndarray | None) -> tuple[dict[str, Any], dict[str, int]]:
    if label is None:
        return {}, {}
    rng = np.random.default_rng(zlib.crc32(case_id.encode()))
    counts = np.bincount(label.ravel(), minlength=256)
    foreground: dict[str, Any] = {}
    for index in (int(index) for index in np.flatnonzero(counts[:IGNORE_INDEX]) if index > 0):
        places = np.flatnonzero(label == index)
        if places.size > _FOREGROUND_VOXELS:
            places = np.sort(rng.choice(places, _FOREGROUND_VOXELS, replace=False))
        foreground[str(index)] = np.stack(np.unravel_index(places, label.shape), axis=1).astype(np.int32)
    return foreground, {str(index): int(count) for index, count in enumerate(counts[:IGNORE_INDEX]) if count}
