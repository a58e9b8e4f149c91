"""The page of a comparison: complete, unfinished, without its data, with names that are no HTML."""

from __future__ import annotations

import csv
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightm.lab.compare.report import write_page
from lightm.lab.compare.results import read_comparison
from lightm.lab.compare.statistics import summarize_comparison
from tests.lab.compare.made import make_comparison

_VOID = {"meta", "img", "link", "br"}


class Checker(HTMLParser):
    """Follows open tags, and gathers images and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_of(folder: Path) -> tuple[str, Checker]:
    """Write the page of a comparison; its text with single spaces, and what was parsed."""
    comparison = read_comparison(folder)
    steps: list[tuple[str, int, int]] = []
    path = write_page(
        comparison, summarize_comparison(comparison, bootstrap=100), progress=lambda *step: steps.append(step)
    )
    assert steps
    assert all(0 <= done <= total for _, done, total in steps)
    assert path == folder / "comparison.html"
    html = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert all(source.startswith("data:image/png;base64,") for source in checker.images)
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert "<script" not in html
    return " ".join("".join(checker.words).split()), checker


@pytest.mark.slow
def test_a_whole_comparison_in_3d(tmp_path: Path) -> None:
    folder = make_comparison(
        tmp_path, images=True, cases=6, seeds=(0,), methods={"lightm-small": 0.9, "unet_plain": 0.6}
    )
    comparison = read_comparison(folder)
    summary = summarize_comparison(comparison, bootstrap=100)
    words, checker = page_of(folder)
    baseline, other = summary.methods
    assert f"{baseline.overall.dsc.mean:.3f}" in words
    assert other.overall.dsc.difference is not None
    assert other.overall.dsc.difference.verdict == "worse"
    assert f"unet_plain is worse by {-other.overall.dsc.difference.mean:.3f}" in words  # type: ignore[operator]
    for expected in ("For research only", "2 of 2 trainings are finished", "6 to test", "12 epochs", "1 seed (",
                     "Worst case of lightm-small", "lightm compare experiment.yaml",
                     comparison.plan.fingerprint.data_hash):  # fmt: skip
        assert expected in words
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert {
        "curves.png",
        "curves.svg",
        "differences.png",
        "size.svg",
        "case_1_slices.png",
        "case_1_surfaces.png",
    } <= figures
    assert len(checker.images) == len([name for name in figures if name.endswith(".png")])
    with (folder / "tables" / "size.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["class_name"] for row in rows} == {"liver", "tumour"}
    first = {row["method"]: float(row["dsc"]) for row in rows if row["class_name"] == "liver"}
    # one liver a case: its Dice is that of the case
    assert first["lightm-small"] == pytest.approx(baseline.classes["liver"].dsc.mean, abs=1e-9)


@pytest.mark.slow
def test_2d_has_no_surfaces(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path, images=True, spatial_dims=2, cases=3, seeds=(0,), methods={"lightm-small": 0.8})
    words, _ = page_of(folder)
    assert "No other method has a result yet" in words
    assert "One seed per method" in words
    names = {path.name for path in (folder / "figures").iterdir()}
    assert "case_1_slices.png" in names
    assert not any("surfaces" in name for name in names)


@pytest.mark.slow
def test_an_unfinished_grid_and_a_data_set_that_is_gone(tmp_path: Path) -> None:
    folder = make_comparison(
        tmp_path, images=True, cases=3, seeds=(0, 1), leave_out=[("unet_plain", 1)], fail=[("segresnet", 0)]
    )
    (folder / "figures").mkdir()
    (folder / "figures" / "case_9_slices.png").write_bytes(b"of an earlier call")
    shutil.rmtree(folder / "data")
    words, _ = page_of(folder)
    assert "4 of 6 trainings are finished, 1 failed and 1 have not run" in words
    assert "loss is not finite in step 17" in words
    assert "The images could not be opened" in words
    assert not (folder / "figures" / "case_9_slices.png").exists()
    assert not (folder / "tables" / "size.csv").exists()


def test_no_baseline_no_histories_and_undefined_distances(tmp_path: Path) -> None:
    folder = make_comparison(
        tmp_path,
        cases=3,
        seeds=(0,),
        leave_out=[("lightm-small", 0)],
        score=lambda *_: "missed",
        classes=["<b>organ</b>"],
    )
    for path in folder.glob("trials/*/history.csv"):
        path.write_text("epoch,train_loss\n", encoding="utf-8")
    (folder / "networks.json").unlink()
    words, _ = page_of(folder)
    assert "The baseline, lightm-small, has no result" in words
    assert "No training history could be read" in words
    assert "operations were not measured" in words
    html = (folder / "comparison.html").read_text(encoding="utf-8")
    assert "<b>organ" not in html
    assert "&lt;b&gt;organ" in html
