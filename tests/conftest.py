"""Shared fixtures: the folder of real data, when there is one, and a small made data set."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import write_dataset

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when PyTorch is loaded; the command line sets it too
os.environ.setdefault("LIGHTM_CHECK_KERNELS", "1")  # read when the kernels are imported

_SHARED = Path(os.environ.get("LIGHTM_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and golden files beside the project; the test is skipped without it."""
    if not (_SHARED / "fixtures").is_dir():
        pytest.skip(f"no folder of real data beside the project ({_SHARED.name}/ or $LIGHTM_SHARED)")
    return _SHARED


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test preprocesses into its own folder, never into the user's cache."""
    monkeypatch.setenv("LIGHTM_CACHE", str(tmp_path / "lightm-cache"))


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small dataset, 3D NIfTI by default, and returns its folder."""

    def make(name: str = "Dataset001_Small", **options: object) -> Path:
        return write_dataset(tmp_path / name, **options)  # type: ignore[arg-type]

    return make
