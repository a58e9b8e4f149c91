"""The page for programmers: its code runs from top to bottom."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from lightm.images.io import FORMATS
from lightm.losses import LOSSES
from lightm.nets import NETWORKS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own-code.md"


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    registries = (NETWORKS, LOSSES, FORMATS)
    for registry in registries:
        monkeypatch.setattr(registry, "_items", dict(registry._items))  # type: ignore[attr-defined]
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="monai")
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
