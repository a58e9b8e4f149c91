"""The report: complete, self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightm.errors import InputError
from lightm.evaluation.evaluation import load_evaluation
from lightm.evaluation.report import representative_cases, write_report
from lightm.evaluation.run_folder import case_loader, read_run


class Page(HTMLParser):
    """Collects the text, the tags and the addresses of a page."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.open
    return page


def test_report_says_what_whole_validation_cases_chose(make_run: Callable[..., Path]) -> None:
    run = make_run(evaluate=False)
    assert "whole validation cases chose" not in read(write_report(run)).text
    (run / "model").mkdir()
    model: dict[str, Any] = {"training": {}, "postprocess": {"steps": [], "why": "3 validation cases, fewer than 10"}}
    (run / "model" / "model.json").write_text(json.dumps(model), encoding="utf-8")
    assert "Here: 3 validation cases, fewer than 10." in read(write_report(run)).text
    dsc = {"best": {"organ": 0.91, "lesion": 0.42}, "last": {"organ": 0.93, "lesion": 0.44}}
    whole = {"cases": 12, "kept": "last", "epochs": {"best": 7, "last": 9}, "dsc": dsc}
    trial = {"step": {"rule": "fill_holes", "value": 1}, "what": "fill holes in <organ>", "taken": False, "why": "no"}
    record = {"cases": 12, "dsc_before": {"1": 0.93, "2": 0.44}, "dsc_after": {"1": 0.93, "2": 0.57}, "tried": [trial]}
    model = {"training": {"whole_cases": whole}, "postprocess": record}
    (run / "model" / "model.json").write_text(json.dumps(model), encoding="utf-8")
    text = read(write_report(run)).text
    assert "best by pseudo Dice, epoch 7 0.910 0.420 no last, epoch 9 0.930 0.440 yes" in text
    assert "Class DSC before DSC after organ 0.930 0.930 lesion 0.440 0.570" in text
    assert "fill holes in <organ> not taken no" in text


@pytest.mark.slow
def test_report_tells_everything(make_run: Callable[..., Path]) -> None:
    run = make_run()
    seen: list[int] = []
    path = write_report(run, progress=lambda _, done, total: seen.append(done * 100 // total))
    assert path == run / "report.html"
    page = read(path)
    overall = load_evaluation(run / "evaluation" / "metrics.json").overall
    for expected in (
        f"{overall.dsc.mean:.3f}",
        f"{overall.dsc.low:.3f} – {overall.dsc.high:.3f}",
        f"{overall.hd95_mm.mean:.2f}",
        "HD95 (mm)",
        "2,468,013",
        "13 min",
        "lightm train <data> --seed 7",
        "c0ffee" * 10,
        "torch 2.13.0",
        "ce+arsl",
        "16 x 16 x 16",
        "Worst case: d",
        "Median case: c",
        "Best case: a",
        "lesion: missed",
        "3D CT images of the data set Dataset001_Test",
        "It learned from 2 cases; 1 other decided",
        "none of which it saw while learning",
        "For research only.",
    ):
        assert expected in page.text, expected
    assert "Not a test" not in page.text
    assert page.tags.count("img") == 2 + 3 + 3  # curves, strip; slices and surfaces of three cases
    assert seen == sorted(seen)
    assert seen[-1] == 100


@pytest.mark.slow
def test_report_needs_nothing_else(make_run: Callable[..., Path]) -> None:
    path = write_report(make_run())
    page, html = read(path), path.read_text(encoding="utf-8")
    assert page.addresses
    for address in page.addresses:
        assert address.startswith("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(address.split(",", 1)[1]))) as image:
            assert image.width > 800
    assert not {"script", "link", "iframe", "object", "a"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", html)
    assert path.stat().st_size < 5_000_000


def test_report_in_2d_speaks_of_pixels_and_has_no_surfaces(make_run: Callable[..., Path]) -> None:
    page = read(write_report(make_run(dims=2)))
    assert page.tags.count("img") == 2 + 3
    assert "HD95 (px)" in page.text
    assert "Label, pixels" in page.text
    assert "axial" not in page.text


def test_names_from_files_are_text_and_never_markup(make_run: Callable[..., Path]) -> None:
    run = make_run(names=("a",))
    metrics = run / "evaluation" / "metrics.json"
    evil = "<b>&\"'</b>"
    content = json.loads(metrics.read_text(encoding="utf-8"))
    for row in content["rows"]:
        row["case"] = evil
    content["labels"] = {"<i>organ": 1, "lesion": 2}
    for row in (*content["rows"], *content["classes"]):
        row["class_name"] = row["class_name"].replace("organ", "<i>organ")
    content["nsd_tolerance_mm"] = {"<i>organ": 1.0, "lesion": 2.0}
    metrics.write_text(json.dumps(content), encoding="utf-8")
    path = write_report(run)
    page = read(path)
    assert "b" not in page.tags
    assert "i" not in page.tags
    assert evil in page.text
    assert "<i>organ 1 mm, lesion 2 mm" in page.text
    assert f"Only case: {evil}" in page.text
    assert "Not drawn:" in page.text  # the data set knows no such case


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gone", "said", "images"),
    [
        ("evaluation", "No evaluation yet", 1),
        ("predictions", "holds no predictions", 2),
        ("history.csv", "No training history", 4),
        ("run.json", "The command is not recorded", 5),
        ("config.yaml", "names no data set", 2),
        ("plan.yaml", "Worst case: d", 5),
        ("split.json", "Worst case: d", 5),
    ],
)
def test_a_missing_part_is_named(make_run: Callable[..., Path], gone: str, said: str, images: int) -> None:
    run = make_run(dims=2)
    target = run / gone
    target.rename(run.parent / "away")
    page = read(write_report(run))
    assert said in page.text
    assert page.tags.count("img") == images


def test_images_that_moved_are_named(make_run: Callable[..., Path]) -> None:
    run = make_run()
    (run.parent / "Dataset001_Test").rename(run.parent / "elsewhere")
    assert "The images could not be opened" in read(write_report(run)).text


@pytest.mark.slow
def test_one_broken_prediction_leaves_the_other_cases(make_run: Callable[..., Path]) -> None:
    run = make_run()
    (run / "predictions" / "d.nii.gz").write_bytes(b"broken")
    page = read(write_report(run))
    assert "Not drawn:" in page.text
    assert page.tags.count("img") == 2 + 2 + 2


@pytest.mark.slow
def test_training_cases_and_unfinished_runs_are_marked(make_run: Callable[..., Path]) -> None:
    run = make_run()
    (run / "split.json").write_text(json.dumps({"train": ["a", "b"], "val": [], "test": ["c", "d"]}), encoding="utf-8")
    (run / "run.json").write_text(json.dumps({"status": "running"}), encoding="utf-8")
    page = read(write_report(run))
    assert "Not a test: 2 of the 4 evaluated cases" in page.text
    assert "none of which it saw" not in page.text
    assert "Training is not finished" in page.text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("network: lightm-unet\n", encoding="utf-8")
    out = tmp_path / "new" / "page.html"
    assert write_report(tmp_path, out=out) == out
    page = read(out)
    for said in ("No evaluation yet", "No training history", "The command is not recorded", "lightm-unet"):
        assert said in page.text
    assert "img" not in page.tags


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        write_report(tmp_path / "none")
    with pytest.raises(InputError, match="no part of a run"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(InputError, match=r"run\.json: holds list"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"run\.json: cannot be read"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_worst_median_and_best(make_run: Callable[..., Path]) -> None:
    evaluation = load_evaluation(make_run() / "evaluation" / "metrics.json")
    chosen = representative_cases(evaluation)
    assert [(what, case) for what, case, _ in chosen] == [("worst", "d"), ("median", "c"), ("best", "a")]
    assert chosen[0][2] < chosen[1][2] < chosen[2][2] == 1.0
    for count, names in ((1, ["only"]), (2, ["worst", "best"]), (0, [])):
        kept = evaluation.model_copy(update={"rows": [r for r in evaluation.rows if r.case in "abcd"[:count]]})
        assert [what for what, *_ in representative_cases(kept)] == names


def test_window_and_settings_come_from_the_plan_and_the_recipe(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    assert run.window == (0.0, 60.0)
    assert run.setting("loss") == "ce+arsl"
    assert run.setting("seed") == 7
    images = case_loader(run)("b")
    assert images.image.shape == images.label.shape == images.pred.shape == (14, 16, 18)
    assert images.spacing_mm == pytest.approx((2.0, 1.0, 1.0))


def test_import_stays_light() -> None:
    code = (
        "import sys, lightm.evaluation; "
        "heavy = {'matplotlib', 'torch', 'skimage', 'scipy', 'nibabel'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
