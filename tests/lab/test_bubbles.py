"""The comparison picture: scores read from runs, areas, labels that can be read, files written."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lightm.errors import InputError
from lightm.evaluation.evaluation import CaseRow, summarize
from lightm.lab.bubbles import comparison_figure, read_dice, write_comparison
from lightm.lab.complexity.report import Dice, Row

ROWS = [
    Row("lightm-small", "own", parameters=265_811, multiply_adds=int(19.6e9)),
    Row("lightm-unet", "paper", parameters=2_471_422, multiply_adds=int(77.4e9)),
    Row("spm-lightm-unet", "report", parameters=847_230, multiply_adds=int(46.5e9)),
    Row("spm-lightm-unet-shared", "report", parameters=466_350, multiply_adds=int(46.5e9)),
    Row("unetr", "baseline", parameters=93_030_000, multiply_adds=int(176e9)),
    Row("transunet", "baseline", refused="2D only"),
]


def scored(*pairs: tuple[str, float]) -> list[Row]:
    values = dict(pairs)
    return [
        Row(r.name, r.source, r.parameters, r.multiply_adds, dice=(Dice("liver", values[r.name], 0.8, 0.95),))
        for r in ROWS
        if r.name in values
    ]


def make_run(folder: Path, network: str, dsc: float, data: str = "Dataset1") -> Path:
    rows = [
        CaseRow(
            case=f"c{i}",
            class_name="liver",
            status="present",
            dsc=dsc + i / 100,
            iou=0.5,
            hd95_mm=1.0,
            nsd=0.9,
            volume_label_ml=1.0,
            volume_pred_ml=1.0,
            voxels_label=10,
            voxels_pred=10,
        )
        for i in range(3)
    ]
    evaluation = summarize(rows, {"liver": 1}, spatial_dims=3, distance_unit="mm", nsd_tolerance_mm={"liver": 1.0})
    (folder / "evaluation").mkdir(parents=True)
    (folder / "model").mkdir()
    evaluation.to_json(folder / "evaluation" / "metrics.json")
    (folder / "model" / "model.json").write_text(json.dumps({"network": {"name": network}}))
    (folder / "plan.yaml").write_text(f"dataset: {data}\n")
    return folder


def bubbles(figure: Figure) -> dict[float, float]:
    """Diameter of every bubble by its place on the axis of operations."""
    lines = [line for axes in figure.axes for line in axes.lines if line.get_alpha() == 0.35]
    return {round(float(line.get_xdata()[0]), 1): float(line.get_markersize()) for line in lines}  # type: ignore[arg-type, index]


def test_scores_come_from_run_folders_and_from_folders_of_runs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", "lightm-unet", 0.7)
    make_run(tmp_path / "runs" / "a", "lightm-small", 0.8)
    make_run(tmp_path / "runs" / "b", "lightm-small", 0.6, data="Dataset2")
    found = read_dice([one, tmp_path / "runs"])
    assert {name: [d.data for d in scores] for name, scores in found.items()} == {
        "lightm-unet": ["Dataset1"],
        "lightm-small": ["Dataset1", "Dataset2"],
    }
    (score,) = found["lightm-unet"]
    assert score.value == pytest.approx(0.71)
    assert score.low is not None
    assert score.high is not None
    assert 0.699 < score.low < score.value < score.high < 0.721


def test_folders_without_scores_or_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither a run with scores"):
        read_dice([tmp_path])
    run = make_run(tmp_path / "run", "lightm", 0.5)
    (run / "model" / "model.json").unlink()
    with pytest.raises(InputError, match=r"neither model/model.json nor config.yaml names the network"):
        read_dice([run])


def test_areas_are_proportional_to_parameters() -> None:
    large = [row for row in ROWS if row.name in ("lightm-unet", "spm-lightm-unet")]
    sizes = bubbles(comparison_figure(large))
    assert (sizes[77.4] / sizes[46.5]) ** 2 == pytest.approx(2_471_422 / 847_230)
    both = bubbles(comparison_figure(scored(("lightm-unet", 0.8), ("spm-lightm-unet", 0.9))))
    assert (both[77.4] / both[46.5]) ** 2 == pytest.approx(2_471_422 / 847_230)


def test_without_scores_every_network_has_a_line_of_its_own() -> None:
    figure = comparison_figure(ROWS)
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["unetr", "lightm-unet", "spm-lightm-unet", "spm-lightm-unet-shared", "lightm-small"]
    places = axes.get_yticks()
    assert all(b - a >= 20 for a, b in itertools.pairwise(places))  # points: more than a line of text


def test_names_cover_neither_each_other_nor_the_edge() -> None:
    # two networks with the same operations and almost the same score, beside a large bubble
    rows = scored(
        ("lightm-small", 0.85), ("lightm-unet", 0.851), ("spm-lightm-unet", 0.9), ("spm-lightm-unet-shared", 0.9),
        ("unetr", 0.88),
    )  # fmt: skip
    figure = comparison_figure(rows)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert len(boxes) == 5
    frame = axes.get_window_extent()
    for box in boxes.values():
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1
    for one, other in itertools.combinations(boxes.values(), 2):
        assert min(one.x1, other.x1) - max(one.x0, other.x0) < 1 or min(one.y1, other.y1) - max(one.y0, other.y0) < 1


def test_every_data_set_has_its_panel_on_a_logarithmic_axis() -> None:
    rows = [
        Row("lightm", "", 10**6, 10**10, dice=(Dice("liver", 0.9), Dice("lung", 0.8))),
        Row("unet", "", 10**7, 10**11, dice=(Dice("lung", 0.7),)),
    ]
    figure = comparison_figure(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["liver", "lung"]
    assert all(axes.get_xscale() == "log" for axes in figure.axes)
    assert all(axes.get_ylim()[1] > 0.8 for axes in figure.axes)


def test_files_are_written_and_nothing_to_draw_is_said(tmp_path: Path) -> None:
    paths = write_comparison(ROWS, tmp_path / "out")
    assert [path.name for path in paths] == ["comparison.csv", "comparison.md", "comparison.png"]
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert "| unetr | baseline | 93.03 |" in paths[1].read_text(encoding="utf-8")
    assert math.isclose(len(paths[0].read_text(encoding="utf-8").splitlines()), len(ROWS) + 1)
    with pytest.raises(InputError, match="all refuse this size"):
        comparison_figure([ROWS[-1]])
