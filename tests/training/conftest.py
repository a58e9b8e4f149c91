"""Fixtures of the tests of faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import make_balls
from tests.training.faults import OPTIONS, Server


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("cache"))
    yield server
    server.process.communicate(timeout=30)


@pytest.fixture(scope="package")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_balls(tmp_path_factory.mktemp("data") / "Dataset001_Balls", size=24)


@pytest.fixture(scope="package")
def whole(server: Server, balls: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing disturbed, and its seconds once kernels and cache are warm."""
    place = tmp_path_factory.mktemp("whole")
    order = {"do": "train", "data": str(balls), "epochs": 3, **OPTIONS}
    server.finish(run=str(place / "first"), **order)
    return place / "run", server.finish(run=str(place / "run"), **order)
