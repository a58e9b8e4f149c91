"""A data set as BraTS, four channels in one 4D file and overlapping regions: check, train, predict, evaluate."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import lightm
from lightm.cli import main

REGIONS = {"whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing tumour": [3]}


@pytest.mark.slow
def test_brain_phantoms_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lightm", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capsys.readouterr().out

    run("phantoms", "brain", "data", "--cases", "8", "--size", "24")
    checked = json.loads(run("check", "data", "--json"))
    assert checked["ok"]
    assert not checked["problems"]
    assert checked["summary"]["region_cases"] == dict.fromkeys(REGIONS, 8)
    assert checked["summary"]["channels"] == ["FLAIR", "T1w", "T1gd", "T2w"]
    options = [
        "--network",
        "lightm-small",
        "--patch-size",
        "16,16,16",
        "--val-patches",
        "4",
        "--no-postprocess",
        "--device",
        "cpu",
    ]
    run("train", "data", "-o", "run", "--epochs", "1", "--steps-per-epoch", "40", "--lr", "0.02", *options)
    model = json.loads(Path("run/model/model.json").read_text())
    assert (model["plan"]["regions"], model["network"]["out_channels"]) == (REGIONS, 3)
    scores = json.loads(Path("run/evaluation/metrics.json").read_text())
    assert scores["labels"] == REGIONS
    found = {entry["class_name"]: entry["dsc"]["mean"] for entry in scores["classes"]}
    assert found["whole tumour"] > 0.3, found
    assert "tumour core [2, 3]" in Path("run/report.html").read_text()
    run(
        "predict",
        "-i",
        "data/imagesTr",
        "-o",
        "out",
        "-m",
        "run",
        "--save-probabilities",
        "--statistics",
        "--max-memory",
        "8GB",
    )
    maps = sorted(Path("out").glob("*.nii.gz"))
    assert len(maps) == 8
    assert {int(v) for path in maps for v in np.unique(lightm.read_volume(path).data)} <= {0, 1, 2, 3}
    again = json.loads(run("evaluate", "out", "--labels", "data/labelsTr", "--json"))
    assert again["labels"] == REGIONS
    rows = {(row["case"], row["class_name"]): row for row in again["rows"]}
    for row in scores["rows"]:
        assert rows[row["case"], row["class_name"]]["dsc"] == row["dsc"]
