"""Figures of a comparison: what is drawn where, on made-up comparisons."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from lightm.evaluation.figures import BLUE, VERMILION, new_figure
from lightm.lab.compare.cases import case_slices, case_surfaces, choose_cases
from lightm.lab.compare.figures import (
    bubbles,
    case_slopes,
    coefficient_curves,
    dice_over_time,
    forest,
    looks,
    read_histories,
    save,
    short,
    training_curves,
)
from lightm.lab.compare.results import Comparison, Summary, read_comparison
from lightm.lab.compare.statistics import summarize_comparison
from tests.lab.compare.made import make_comparison


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Summary]:
    folder = make_comparison(tmp_path_factory.mktemp("made"), losses={"ce+dice": 0.0, "ce+arsl": 0.03})
    comparison = read_comparison(folder)
    return comparison, summarize_comparison(comparison, bootstrap=100)


def texts(figure: Figure) -> list[str]:
    """All texts of a figure's axes and legends."""
    found = [text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title, *axes.get_yticklabels()]]
    found += [axes.get_title(loc="left") for axes in figure.axes]
    return [*found, *(text.get_text() for legend in figure.legends for text in legend.get_texts())]


def test_curves_have_a_panel_a_loss_and_the_mean_over_seeds(made: tuple[Comparison, Summary]) -> None:
    comparison, _ = made
    histories, problems = read_histories(comparison)
    assert problems == []
    figure = training_curves(comparison, histories)
    assert len(figure.axes) == 8  # two losses, pseudo Dice, its average; over epochs and over seconds
    assert {"Loss ce+dice", "Loss ce+arsl"} <= set(texts(figure))
    first = histories["lightm-small, ce+dice"]
    (mean,) = [
        line
        for line in figure.axes[4].lines
        if line.get_linewidth() > 1 and line.get_color() == looks(list(histories), comparison.baseline)[
            "lightm-small, ce+dice"].colour
    ]  # fmt: skip
    np.testing.assert_allclose(mean.get_ydata(), np.mean([h["pseudo_dice"] for h in first], axis=0))
    np.testing.assert_allclose(mean.get_xdata(), np.arange(1, 13))
    (timed,) = [
        line for line in figure.axes[5].lines if line.get_color() == mean.get_color() and line.get_linewidth() > 1
    ]
    np.testing.assert_allclose(timed.get_xdata(), 5.0 * np.arange(1, 13))


def test_seeds_of_unequal_length_are_averaged_as_far_as_all_went(tmp_path: Path) -> None:
    comparison = read_comparison(make_comparison(tmp_path, methods={"lightm-small": 0.8}))
    histories, _ = read_histories(comparison)
    seeds = histories["lightm-small"]
    seeds[1] = {key: values[:7] for key, values in seeds[1].items()}
    figure = training_curves(comparison, histories)
    lengths = {len(line.get_xdata()): line.get_linewidth() for line in figure.axes[2].lines}
    assert lengths[12] < 1 < lengths[7]


def test_alpha_and_beta_are_drawn_where_a_history_has_them(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path, methods={"lightm-small": 0.8}, losses={"ce+arsl": 0.0}, seeds=(0,))
    comparison = read_comparison(folder)
    assert coefficient_curves(comparison, read_histories(comparison)[0]) is None
    path = comparison.finished[0].path / "history.csv"
    with path.open(newline="") as file:
        rows = [{**row, "arsl_alpha/liver": 0.4, "arsl_beta/liver": 0.6} for row in csv.DictReader(file)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = coefficient_curves(comparison, read_histories(comparison)[0])
    assert figure is not None
    alpha, beta = figure.axes
    np.testing.assert_allclose(alpha.lines[0].get_ydata(), 0.4)
    np.testing.assert_allclose(beta.lines[0].get_ydata(), 0.6)


def test_the_forest_shows_every_difference_in_the_colour_of_its_verdict(made: tuple[Comparison, Summary]) -> None:
    _, summary = made
    figure = forest(summary)
    assert figure is not None
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    drawn = sorted(float(line.get_xdata()[0]) for line in points)
    expected = [
        scores.dsc.difference.mean
        for method in summary.methods
        for scores in (method.overall, *method.classes.values())
        if scores.dsc.difference is not None
    ]
    np.testing.assert_allclose(drawn, sorted(expected))  # type: ignore[arg-type]
    verdicts = {m.overall.dsc.difference.verdict for m in summary.methods if m.overall.dsc.difference}
    assert "worse" in verdicts
    assert VERMILION in {line.get_color() for line in points}
    assert (BLUE in {line.get_color() for line in points}) == any(
        s.dsc.difference is not None and s.dsc.difference.verdict == "better"
        for m in summary.methods
        for s in (m.overall, *m.classes.values())
    )


def test_nothing_to_compare_has_no_forest(tmp_path: Path) -> None:
    comparison = read_comparison(make_comparison(tmp_path, methods={"lightm-small": 0.8}, seeds=(0,)))
    assert forest(summarize_comparison(comparison, bootstrap=50)) is None


def test_slopes_follow_each_case_through_the_methods(made: tuple[Comparison, Summary]) -> None:
    _, summary = made
    figure = case_slopes(summary)
    liver = figure.axes[0]
    lines = [line for line in liver.lines if len(line.get_xdata()) == len(summary.methods)]
    assert len(lines) == len(summary.test_cases)
    means = [line.get_xdata()[0] for line in liver.lines if line.get_marker() == "|"]
    np.testing.assert_allclose(means, [m.classes["liver"].dsc.mean for m in summary.methods])


def test_cost_figures_name_every_method(made: tuple[Comparison, Summary]) -> None:
    _, summary = made
    names = {method.name for method in summary.methods}
    for figure in (bubbles(summary), dice_over_time(summary)):
        assert figure is not None
        assert all(any(name in text for text in texts(figure)) for name in names)
    without = summary.model_copy(update={"methods": [m.model_copy(update={"cost": None}) for m in summary.methods]})
    assert bubbles(without) is None


def test_chosen_cases_are_worst_median_best_and_the_largest_difference(tmp_path: Path) -> None:
    def score(trial: object, case: int, name: str) -> float:
        base = 0.5 + 0.05 * case
        return base - (0.4 if case == 3 and getattr(trial, "network", "") == "segresnet" else 0.0)

    folder = make_comparison(tmp_path, methods={"lightm-small": 0.8, "segresnet": 0.7}, cases=7, score=score)
    summary = summarize_comparison(read_comparison(folder), bootstrap=50)
    chosen = {case.case: case.what for case in choose_cases(summary)}
    cases = summary.test_cases
    assert "worst" in chosen[cases[0]]
    assert "best" in chosen[cases[6]]
    assert "median" in chosen[cases[3]]
    assert "largest difference" in chosen[cases[3]]
    assert next(c for c in choose_cases(summary) if c.case == cases[3]).dsc["segresnet"] == pytest.approx(0.25)


@pytest.mark.parametrize("dims", [2, 3])
def test_slices_show_the_label_and_every_method_with_its_errors(dims: int) -> None:
    label = np.zeros((12, 14, 16)[:dims], dtype=np.uint8)
    label[(slice(3, 9),) * dims] = 1
    missed = label.copy()
    missed[..., 6:] = 0
    predictions = {"all of it": label, "half of it": missed, "a name $x$ as long as no column is": missed}
    figure = case_slices(label.astype(np.float32), label, predictions, {"all of it": 1.0}, (1.0,) * dims, {"organ": 1})
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 2 * (1 + len(predictions))
    differences = [axes.images[1].get_array() for axes in shown if len(axes.images) == 2]
    wrong = [int((np.asarray(picture)[..., 3] == 1).sum()) for picture in differences]
    assert wrong[0] == 0
    assert wrong[1] == wrong[2] > 0
    assert any("DSC 1.000" in text for text in texts(figure))


def test_surfaces_are_limited_and_say_so() -> None:
    label = np.zeros((10, 10, 10), dtype=np.uint8)
    label[2:8, 2:8, 2:8] = 1
    figure, left_out = case_surfaces(label, {f"m{i}": label for i in range(7)}, (1.0, 1.0, 1.0), {"organ": 1})
    assert (len(figure.axes), left_out) == (6, 2)


def test_looks_differ_for_twelve_methods_and_names_are_shortened() -> None:
    found = looks([f"m{i}" for i in range(12)], "m3")
    assert len({look.colour for look in found.values()}) == 12
    assert len({look.marker for look in found.values()}) == 12
    assert len(short("a" * 30 + "b" * 30, 20)) == 20
    assert short("a$b") == r"a\$b"


def test_saving_twice_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        figure = new_figure(2, 2)
        figure.subplots().plot([0, 1], [0, 1])
        save(figure, tmp_path / name)
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    save(new_figure(2, 2), tmp_path / "c", vector=False)
    assert not (tmp_path / "c.svg").exists()
