"""The shipped configurations are valid, and the README's commands exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightm.nets import create
from lightm.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
COMPARISONS = ("quick.yaml",)  # and examples/compare; tested in tests/lab/compare/test_experiment.py
TRAININGS = sorted(path for path in (ROOT / "examples").glob("*.yaml") if path.name not in COMPARISONS)


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_every_example_resolves_to_a_configuration_and_a_network(path: Path) -> None:
    given = TrainConfig.of(path, {}, "train")
    for dims in (2, 3):
        config = given.resolved(dims)
        create(config.network, dims, 1, 2, **config.network_options)


@pytest.mark.slow
def test_an_own_network_and_loss_are_trained_in_fifteen_lines(tmp_path: Path) -> None:
    script = ROOT / "examples" / "own_network.py"
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) <= 15
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "own" / "run" / "report.html").is_file()
    assert "(32, 32)" in done.stdout
    assert done.stderr == "", "the library prints nothing"
