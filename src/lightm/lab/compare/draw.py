"""All figures of a comparison and the tables of fine detail, written to its folder; what cannot be drawn is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from lightm.errors import LightMError
from lightm.files import write_text
from lightm.lab.compare.bins import bins_csv
from lightm.lab.compare.cases import ChosenCase, case_slices, case_surfaces, choose_cases
from lightm.lab.compare.curves import coefficient_curves, read_histories, training_curves
from lightm.lab.compare.detail_table import Detail, measure_detail
from lightm.lab.compare.figures import bubbles, case_slopes, detail_figure, dice_over_time, forest
from lightm.lab.compare.images import TestImages
from lightm.lab.compare.results import Comparison, FinishedCell
from lightm.lab.compare.style import save
from lightm.lab.compare.summary import Summary
from lightm.progress import Progress


@dataclass
class DrawnCase:
    """One case with its pictures (PNG), or why there are none."""

    chosen: ChosenCase
    seeds: dict[str, int] = field(default_factory=dict)
    slices: bytes | None = None
    surfaces: bytes | None = None
    surfaces_left_out: int = 0
    problem: str = ""


@dataclass
class Drawn:
    """PNG pictures by name, the cases, the fine detail (None where it could not be measured), and what is missing."""

    pictures: dict[str, bytes]
    cases: list[DrawnCase]
    detail: Detail | None
    images_problem: str
    history_problems: list[str]


def write_figures(comparison: Comparison, summary: Summary, *, progress: Progress | None = None) -> Drawn:
    """Draw everything into `figures/` (PNG, and SVG but for slices and surfaces) and `tables/size.csv`, `radius.csv`.

    Figures of an earlier call are replaced. A data set or prediction that is gone leaves out what needs it. Raises
    LightMError, naming the file, when the disk refuses. Cost: about ten seconds, and the reading of every prediction.
    """
    folder = comparison.folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.png"), *folder.glob("*.svg")]:
        old.unlink()
    histories, history_problems = read_histories(comparison)
    pictures: dict[str, bytes] = {}

    def draw(name: str, make: Callable[[], Figure | None]) -> None:
        if progress is not None:
            progress(f"figures: {name}", len(pictures), 8)
        figure = make()
        if figure is not None:
            pictures[name] = save(figure, folder / name)

    draw("differences", lambda: forest(summary))
    draw("cases", lambda: case_slopes(summary))
    draw("curves", lambda: training_curves(comparison, histories) if histories else None)
    draw("coefficients", lambda: coefficient_curves(comparison, histories))
    draw("bubbles", lambda: bubbles(summary))
    draw("time", lambda: dice_over_time(summary))
    detail, problem = None, ""
    chosen = [DrawnCase(case) for case in choose_cases(summary)]
    try:
        images = TestImages(comparison)
    except LightMError as error:
        problem = str(error)
    else:
        found = detail = measure_detail(comparison, summary, images, progress=progress)
        draw("size", lambda: detail_figure(found.size, summary))
        draw("radius", lambda: detail_figure(found.radius, summary))
        for number, case in enumerate(chosen, start=1):
            if progress is not None:
                progress("figures: cases", number - 1, len(chosen))
            _draw_case(case, comparison, summary, images, folder / f"case_{number}")
    tables = comparison.folder / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    for name in ("size", "radius"):
        if detail is not None:
            write_text(tables / f"{name}.csv", bins_csv(getattr(detail, name)))
        else:  # numbers of an earlier call would not belong to this page
            (tables / f"{name}.csv").unlink(missing_ok=True)
    if progress is not None:
        progress("figures", 8, 8)
    return Drawn(pictures, chosen, detail, problem, history_problems)


def _draw_case(case: DrawnCase, comparison: Comparison, summary: Summary, images: TestImages, path: Path) -> None:
    """Draw a case by the first seed of every method that has a prediction of it."""
    name = case.chosen.case
    cells: dict[str, FinishedCell] = {}
    for method, finished in comparison.methods():
        having = [cell for cell in finished if name in images.predictions[cell.record.id]]
        if having:
            cells[method] = having[0]
    case.seeds = {method: cell.cell.seed for method, cell in cells.items()}
    try:
        image = images.image(name)
        found = images.labels(name, list(cells.values()))
    except LightMError as error:
        case.problem = str(error)
        return
    if image.shape != found.label.shape:
        case.problem = f"case {name}: image and label have shapes {image.shape} and {found.label.shape}"
        return
    predictions = {method: found.predictions[cell.record.id] for method, cell in cells.items()}
    if not predictions:
        case.problem = f"case {name}: no training left a prediction of it"
        return
    dsc = _drawn_dsc(summary, name, case.seeds)
    figure = case_slices(
        image, found.label, predictions, dsc, found.spacing_mm, summary.labels, window=images.run.window
    )
    case.slices = save(figure, path.with_name(path.name + "_slices"), vector=False)
    if found.label.ndim == 3:
        surfaces, case.surfaces_left_out = case_surfaces(found.label, predictions, found.spacing_mm, summary.labels)
        case.surfaces = save(surfaces, path.with_name(path.name + "_surfaces"), vector=False)


def _drawn_dsc(summary: Summary, case: str, seeds: dict[str, int]) -> dict[str, float]:
    """Each method's mean DSC over classes by the seed that is drawn: the title belongs to the picture."""
    values: dict[str, list[float]] = {}
    for row in summary.cases:
        if row.case == case and row.dsc is not None and seeds.get(row.method) == row.seed:
            values.setdefault(row.method, []).append(row.dsc)
    return {method: sum(dsc) / len(dsc) for method, dsc in values.items()}
