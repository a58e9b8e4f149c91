"""Limits are read as people write them; what is held is chosen by them; the estimate is what a process grows by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from lightm import memory
from lightm.errors import InputError
from lightm.inference import budget
from lightm.inference.budget import CaseSize, MemoryPlan, case_bytes, choose, estimate_memory, parse_memory

from .factories import PlanMaker


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GB", 2 * 10**9),
        ("800 MB", 8 * 10**8),
        ("1.5GiB", 3 * 2**29),
        ("1.5gib", 3 * 2**29),
        (" 64kB ", 64_000),
        ("7", 7),
        ("2000000000", 2 * 10**9),
        ("0.5 TB", 5 * 10**11),
        ("3b", 3),
        (12345, 12345),
    ],
)
def test_memory_as_people_write_it(text: str | int, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "2 apples", "-1GB", "1,5GB", "0", "0.1B", "nan", "2GB 3", 0, -5, True])
def test_what_is_no_amount_of_memory_is_refused(text: str | int) -> None:
    with pytest.raises(InputError, match="expected"):
        parse_memory(text)


CT = CaseSize((600, 512, 512), (600, 512, 512), (128, 128, 128), 5, 1, 2)


def test_less_is_held_under_a_lower_limit() -> None:
    window = 700_000_000
    limits = [10**10, 3 * 10**9, 22 * 10**8, 18 * 10**8, 10**9]
    held = [choose(CT, window, limit, 4 * 10**8) for limit in limits]
    assert held[0] == MemoryPlan()
    assert held[-1] is None
    for limit, plan in zip(limits, held, strict=True):
        if plan is not None:
            assert case_bytes(CT, window, plan) + 4 * 10**8 + budget.MARGIN <= limit
    counts = [-1 if plan is None else plan.sums + plan.grid + plan.voxels for plan in held]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 2


def test_rules_and_probabilities_are_counted() -> None:
    small = CaseSize((80, 80, 80), (80, 80, 80), (16, 16, 16), 2, 1, 0)
    base = case_bytes(small, 10**6, MemoryPlan())
    assert case_bytes(CaseSize(*vars(small).values()), 10**6, MemoryPlan()) == base
    ruled = CaseSize(**{**vars(small), "shape": (400,) * 3, "grid": (400,) * 3, "rules": True})
    assert case_bytes(ruled, 0, MemoryPlan()) == 7 * 400**3
    assert case_bytes(CaseSize(**{**vars(CT), "probabilities": True}), 0, MemoryPlan()) > case_bytes(
        CT, 0, MemoryPlan()
    )


def test_estimate_grows_with_the_case(make_plan: PlanMaker) -> None:
    plan = make_plan((1.5, 1.5, 1.5), (96, 96, 96))
    at_own = estimate_memory((100, 100, 100), plan)
    assert at_own > 385 * 96**3
    assert estimate_memory((400, 400, 400), plan) - at_own > 3 * (400**3 - 100**3)
    finer = estimate_memory((400, 400, 400), plan, spacing_mm=(0.75, 0.75, 0.75), window_bytes=0)
    assert finer > 400**3 * 2 + 200**3 * 4


def test_peak_remembers_what_a_measurement_reset() -> None:
    if not memory.reset_high_water():
        pytest.skip("the high-water mark cannot be reset here")
    block = np.ones(60_000_000, np.uint8)
    before = budget.peak_resident_bytes()
    del block
    grown = budget.call_bytes(lambda: np.ones(30_000_000, np.uint8))
    assert grown == pytest.approx(30_000_000, rel=0.2)
    after = budget.peak_resident_bytes()
    assert before is not None
    assert after is not None
    assert after > before - 5_000_000  # the system counts pages in batches


CHILD = """
import json, sys, numpy as np, torch
from pathlib import Path
from lightm.inference import Predictor, budget
from lightm.preparation.plan import Plan
from tests.inference.test_bounded import Noise
plan = Plan.model_validate_json(Path(sys.argv[1]).read_text())
limit = None if sys.argv[3] == "none" else int(sys.argv[3])
predictor = Predictor(Noise(3, classes=12), plan, overlap=0, max_memory=limit)
predictor.window_bytes()
labels = predictor.predict_files([Path(sys.argv[2])])
print(json.dumps([budget.peak_resident_bytes(), int(labels.data.astype(np.int64).sum())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is exact on Linux")
def test_a_limit_is_kept(make_plan: PlanMaker, tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).normal(0, 300, (70, 400, 400)).astype(np.int16)
    image = tmp_path / "image.nii.gz"
    nibabel.save(nibabel.Nifti1Image(voxels.T, np.eye(4)), image)
    labels = {"background": 0, **{f"class {n}": n for n in range(1, 12)}}
    plan = make_plan((1.0, 1.0, 1.0), (64, 48, 48), labels=labels)
    (tmp_path / "plan.json").write_text(plan.model_dump_json())

    def child(limit: str) -> tuple[int, int]:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path / "plan.json"), str(image), limit],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
        assert not done.returncode, done.stderr
        peak, total = json.loads(done.stdout.splitlines()[-1])
        return peak, total

    free, expected = child("none")
    limit = free - 200_000_000
    bounded, total = child(str(limit))
    assert bounded <= limit
    assert total == expected
    assert total > 0
