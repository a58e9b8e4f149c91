"""Runs over many cases: going on after an end of any kind, locks, faults, and what is recorded."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from lightm.errors import InputError, LightMError
from lightm.evaluation.folder import evaluate_folder
from lightm.images.io import read_volume
from lightm.inference import predict_folder
from lightm.inference.predictor import Predictor
from lightm.inference.record import Record
from tests.messages import on_message

from .factories import MODEL, Threshold, add

ROOT = Path(__file__).parents[2]

CHILD = """
import json, sys, time
from pathlib import Path
import lightm.nets.folder
from tests.inference.factories import Threshold

inputs, out = map(Path, sys.argv[1:])

class Stuck(Threshold):
    def forward(self, x):
        if len(list(out.glob("*.nii.gz"))) == 2:
            time.sleep(600)
        return super().forward(x)

content = json.loads(Path("model/model.json").read_text())
lightm.nets.folder.load_model = lambda folder: (Stuck(0.0), content)
from lightm.inference import predict_folder
predict_folder("model", inputs, out)
"""


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for index, name in enumerate("abcd"):
        add(tmp_path / "in" / f"{name}_0000.nii.gz", seed=index)
    return tmp_path / "in"


def maps(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.nii.gz")}


def load(out: Path) -> Record:
    return Record.model_validate_json((out / "prediction.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_killed_run_holds_its_folder_while_it_lives_and_goes_on(
    model: dict[str, Any], scans: Path, tmp_path: Path
) -> None:
    predict_folder(MODEL, scans, tmp_path / "whole")
    expected = maps(tmp_path / "whole")
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(scans), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while len(load(out).cases if (out / "prediction.json").exists() else []) < 2:
            assert child.poll() is None, child.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for resume in (False, True):
            with pytest.raises(InputError, match=f"in use: prediction by process {child.pid} "):
                predict_folder(MODEL, scans, out, resume=resume, overwrite=not resume)
    finally:
        child.kill()
        child.communicate()
    assert maps(out) == {name: expected[name] for name in ("a.nii.gz", "b.nii.gz")}
    (out / ".c.nii.gz.0123456789ab.tmp").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"resume an unfinished run \(--resume\)"):
        predict_folder(MODEL, scans, out)
    before = (out / "a.nii.gz").stat().st_mtime_ns
    written = predict_folder(MODEL, scans, out, resume=True)
    assert [path.name for path in written] == [f"{name}.nii.gz" for name in "abcd"]
    assert maps(out) == expected
    assert (out / "a.nii.gz").stat().st_mtime_ns == before
    assert sorted(path.name for path in out.iterdir()) == [*sorted(expected), "prediction.json"]
    assert [entry.case for entry in load(out).cases] == list("abcd")


class Interrupted(Threshold):
    """Raises in the third call."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(0.0)
        self.error, self.calls = error, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return super().forward(x)


def use(network: Threshold, content: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    content["plan"]["patch_size"] = [16, 16, 16]  # one window a case
    patch.setattr("lightm.nets.folder.load_model", lambda folder: (network, content))


def test_ctrl_c_ends_the_run_and_leaves_it_ready_to_go_on(
    model: dict[str, Any], scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    use(Interrupted(KeyboardInterrupt()), model, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        predict_folder(MODEL, scans, out, statistics=True, report=tmp_path / "report.json")
    assert sorted(path.name for path in out.iterdir()) == ["a.nii.gz", "b.nii.gz", "prediction.json"]
    assert len(json.loads((tmp_path / "report.json").read_text())["cases"]) == 2
    use(Threshold(0.0), model, monkeypatch)
    lines: list[str] = []
    steps: list[tuple[int, int]] = []
    with on_message(lines.append, "inference"):
        predict_folder(
            MODEL, scans, out, statistics=True, resume=True,
            progress=lambda what, done, total: steps.append((done, total)) if what == "predict" else None,
        )  # fmt: skip
    assert lines[0] == "2 of 4 case(s) finished earlier"
    assert lines[1].startswith("[3/4] c 9x12x5 ")
    assert "4 case(s) segmented" in lines[-1]
    assert "peak memory" in lines[-1]
    assert steps == [(2, 4), (3, 4), (4, 4)]
    with (out / "statistics.csv").open(newline="", encoding="utf-8") as file:  # of both runs
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == list("abcd")
    image = read_volume(scans / "a_0000.nii.gz").data
    assert float(rows[0]["mean"]) == pytest.approx(float(image[image > 0].mean()), rel=1e-4)
    assert int(rows[0]["voxels"]) == int((image > 0).sum())


def test_continue_refuses_what_is_not_the_same(model: dict[str, Any], scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict_folder(MODEL, scans, out, cases=["a", "b"])

    def refused(message: str, inputs: Path = scans, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            predict_folder(MODEL, inputs, out, resume=True, **options)

    refused("overlap was 0.5, is 0.25", overlap=0.25)
    refused("statistics was False, is True", statistics=True)
    refused("exclude each other", overwrite=True)
    refused("case 'a' is finished, but not in the input", cases=["b", "c"])
    add(tmp_path / "other" / "a_0000.nii.gz", seed=7)
    add(tmp_path / "other" / "b_0000.nii.gz", seed=8)
    refused("the image of case 'a' changed since", tmp_path / "other")
    description = json.loads((MODEL / "model.json").read_text())
    (MODEL / "model.json").write_text(json.dumps({**description, "postprocess": {"keep_largest": [[1]]}}))
    refused("made with another model")
    (MODEL / "model.json").write_text(json.dumps(description))
    kept = (out / "a.nii.gz").read_bytes()
    (out / "a.nii.gz").write_bytes(kept[:-1] + b"x")
    refused(r"a\.nii\.gz: changed since it was predicted")
    assert len(maps(out)) == 2
    (out / "a.nii.gz").unlink()
    predict_folder(MODEL, scans, out, resume=True, max_memory=None)
    assert maps(out)["a.nii.gz"] == kept
    assert len(maps(out)) == 4
    (out / "prediction.json").write_text("{}")
    refused("not a record of predictions")
    (out / "prediction.json").unlink()
    refused("already holds files")


def test_continue_of_nothing_starts_anew(model: dict[str, Any], scans: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").touch()
    assert len(predict_folder(MODEL, scans, tmp_path / "out", resume=True)) == 4


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "c_0000.nii.gz: not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "c_0000.nii.gz: not enough memory"),
        (ValueError("odd"), "c_0000.nii.gz: ValueError: odd"),
    ],
)
def test_whatever_happens_in_a_case_is_told_and_the_others_go_on(
    model: dict[str, Any],
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    words: str,
) -> None:
    use(Interrupted(error), model, monkeypatch)
    lines: list[str] = []
    with (
        pytest.raises(LightMError, match=r"1 of 4 cases could not be predicted:\n  case 'c': ") as caught,
        on_message(lines.append, "inference"),
    ):
        predict_folder(MODEL, scans, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert words in str(caught.value)
    assert any(line.startswith("[3/4] c failed: ") for line in lines)
    assert sorted(maps(tmp_path / "out")) == ["a.nii.gz", "b.nii.gz", "d.nii.gz"]
    (fault,) = load(tmp_path / "out").failed
    assert (fault.case, fault.kind) == ("c", type(error).__name__)
    # What nobody foresaw is logged where it came from; a lack of memory says all by itself.
    logged = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(logged) == ("ValueError" in words)
    assert all(record.exc_info and record.exc_info[1] is error for record in logged)
    use(Threshold(0.0), model, monkeypatch)
    predict_folder(MODEL, scans, tmp_path / "out", resume=True)
    assert load(tmp_path / "out").failed == []
    assert len(maps(tmp_path / "out")) == 4


def test_all_that_can_be_asked_for(model: dict[str, Any], scans: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "deep" / "run.json"
    windows: list[tuple[int, int]] = []
    predict_folder(
        MODEL, scans, out, save_probabilities=True, statistics=True, preview=True, report=report,
        progress=lambda what, done, total: windows.append((done, total)) if what == "windows" else None,
    )  # fmt: skip
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    cases = {f"{part}{name}{ending}" for name in "abcd"
             for part, ending in (("", ".nii.gz"), ("probabilities/", ".nii.gz"), ("previews/", ".png"))}  # fmt: skip
    assert names == {*cases, "statistics.csv", "statistics.json", "prediction.json"}
    soft = nibabel.load(out / "probabilities" / "a.nii.gz").get_fdata()
    hard = read_volume(out / "a.nii.gz", kind="label").data
    assert np.array_equal(soft.argmax(axis=-1).T, hard)
    with Image.open(out / "previews" / "a.png") as picture:
        assert picture.size[0] > 300
    assert windows[-1][0] == windows[-1][1] > 1
    record = Record.model_validate_json(report.read_text())
    assert record == load(out)
    assert (record.model.name, record.model.weights_sha256, record.options.statistics) == ("threshold", "0" * 64, True)
    assert record.peak_resident_bytes is None or record.peak_resident_bytes > 10**7
    assert record.finished is not None
    for entry in record.cases:
        assert entry.phases.predict > 0
        assert entry.seconds == pytest.approx(sum(entry.phases.model_dump().values()), abs=0.01)
        assert entry.images[0].bytes == (scans / f"{entry.case}_0000.nii.gz").stat().st_size
        assert {output.path for output in entry.outputs} == {entry.file, *entry.more}
        for output in entry.outputs:
            assert output.sha256 == hashlib.sha256((out / output.path).read_bytes()).hexdigest()
    # What lies in subfolders is no label map, and scoring does not see it.
    scored = evaluate_folder(out, out, labels_map={"bright": 1}, bootstrap=0)
    assert {row.case for row in scored.rows} == set("abcd")
    # The next run over it removes all of that.
    predict_folder(MODEL, scans, out, cases=["b"], overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["b.nii.gz", "prediction.json"]


def test_a_report_replaces_no_other_file(model: dict[str, Any], scans: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("kept")
    for name, message in (("dataset.json", "is there already"), ("run.txt", r"ends in \.json")):
        with pytest.raises(InputError, match=message):
            predict_folder(MODEL, scans, tmp_path / "out", report=tmp_path / name)
    assert (tmp_path / "dataset.json").read_text() == "kept"
    assert not (tmp_path / "out").exists()


def test_with_a_limit_files_are_read_by_the_predictor_and_results_are_the_same(
    model: dict[str, Any], scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"cases": ["a"], "statistics": True, "preview": True}
    predict_folder(MODEL, scans, tmp_path / "free", **asked)  # type: ignore[arg-type]
    monkeypatch.setattr("lightm.inference.one_case.read_volume", None)
    predict_folder(MODEL, scans, tmp_path / "tight", max_memory=1 << 40, **asked)  # type: ignore[arg-type]
    assert maps(tmp_path / "tight") == maps(tmp_path / "free")
    for name in ("statistics.csv", "previews/a.png"):
        assert (tmp_path / "tight" / name).read_bytes() == (tmp_path / "free" / name).read_bytes()


def test_a_full_disk_ends_the_run_with_one_error_and_nothing_torn(
    model: dict[str, Any], scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "b.nii.gz":
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LightMError, match=r"^case 'b': .*b\.nii\.gz: cannot be written \(No space left") as caught:
        predict_folder(MODEL, scans, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "prediction.json"]
    monkeypatch.undo()


def test_a_full_temporary_folder_ends_the_run_too(
    model: dict[str, Any], scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

    monkeypatch.setattr(Predictor, "predict_volumes", full)
    with pytest.raises(LightMError, match=r"^case 'a': /tmp/x: No space left on device"):
        predict_folder(MODEL, scans, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="rights do not bind here")
def test_a_folder_without_rights(model: dict[str, Any], scans: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(LightMError, match="cannot be written"):
        predict_folder(MODEL, scans, tmp_path / "closed" / "out")
