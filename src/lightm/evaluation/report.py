"""The report of a run: one HTML file that needs nothing else to be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightm.errors import LightMError
from lightm.evaluation.evaluation import METRICS, Evaluation, Statistic
from lightm.evaluation.figures import case_strip, curves
from lightm.evaluation.html import duration, embed, number, render
from lightm.evaluation.metrics import STATUSES
from lightm.evaluation.overlays import overlay
from lightm.evaluation.run_folder import CaseImages, RunFolder, case_loader, read_run
from lightm.evaluation.surfaces import surface_figure
from lightm.files import write_text
from lightm.progress import Progress

_DIGITS = {"dsc": 3, "iou": 3, "hd95_mm": 2, "nsd": 3}


def write_report(run_dir: Path, *, out: Path | None = None, progress: Progress | None = None) -> Path:
    """Write a run's report as one self-contained HTML file and return its path (`run_dir/report.html`).

    It holds the key numbers with intervals, per-class and per-case tables, training curves, the worst, median
    and best case (by mean DSC over classes) as overlays and surfaces, and all that is needed to repeat the run.
    A part of the run that is missing is named as missing. Images are embedded; no script, no outside address.

    Raises `InputError` for a folder that is no run and for parts that cannot be read. Takes a few seconds and
    the memory of one case.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    steps = _Steps(progress)
    figures: dict[str, str] = {}
    if run.history:
        steps.next("curves")
        figures["curves"] = embed(curves(run.history))
    if run.evaluation is not None:
        steps.next("per-case plot")
        figures["strip"] = embed(case_strip(run.evaluation))
    shown, problem = _cases(run, steps)
    html = _render(
        run=run,
        name=run_dir.resolve().name,
        evaluation=run.evaluation,
        key_numbers=_key_numbers(run),
        table=_case_table(run.evaluation) if run.evaluation else [],
        figures=figures,
        shown=shown,
        cases_problem=problem,
        facts=_facts(run),
        documents=_documents(run),
    )
    target = Path(out) if out is not None else run_dir / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, html)
    steps.done()
    return target


def representative_cases(evaluation: Evaluation) -> list[tuple[str, str, float]]:
    """Return (what, case, mean DSC) of the worst, median and best case; fewer when there are fewer cases."""
    ranked = sorted(evaluation.case_dsc().items(), key=lambda item: (item[1], item[0]))
    if not ranked:
        return []
    places = {"worst": 0, "median": (len(ranked) - 1) // 2, "best": len(ranked) - 1}
    if len(ranked) == 1:
        places = {"only": 0}
    elif len(ranked) == 2:
        places = {"worst": 0, "best": 1}
    return [(what, *ranked[index]) for what, index in places.items()]


class _Steps:
    """Progress in eight steps: two plots, three overlays, three surfaces."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.count = progress, 0

    def next(self, what: str) -> None:
        if self.progress is not None:
            self.progress(f"report: {what}", self.count, 8)
        self.count += 1

    def done(self) -> None:
        if self.progress is not None:
            self.progress("report", 8, 8)


def _cases(run: RunFolder, steps: _Steps) -> tuple[list[dict[str, Any]], str]:
    """Draw the representative cases; where that is impossible say why instead."""
    if run.evaluation is None:
        return [], "There is no evaluation yet, so no case can be called worst, median or best."
    if not run.predictions:
        return [], "The run holds no predictions, so there is nothing to draw."
    try:
        load = case_loader(run)
    except LightMError as error:
        return [], f"The images could not be opened: {error}"
    drawn: list[dict[str, Any]] = []
    for what, case, dsc in representative_cases(run.evaluation):
        entry: dict[str, Any] = {"what": what, "case": case, "dsc": dsc, "problem": "", "surface": ""}
        entry["rows"] = [row for row in run.evaluation.rows if row.case == case]
        try:
            images = load(case)
        except LightMError as error:
            entry["problem"] = str(error)
        else:
            entry.update(_draw(images, run, steps, f"{what} case"))
        drawn.append(entry)
    return drawn, ""


def _draw(images: CaseImages, run: RunFolder, steps: _Steps, what: str) -> dict[str, str]:
    classes = run.evaluation.labels if run.evaluation is not None else {}
    steps.next(f"{what}, slices")
    drawn = {
        "overlay": embed(
            overlay(images.image, images.label, images.pred, images.spacing_mm, classes, window=run.window)
        )
    }
    steps.next(f"{what}, surfaces")
    if images.label.ndim == 3:
        drawn["surface"] = embed(surface_figure(images.label, images.pred, images.spacing_mm, classes))
    return drawn


def _render(**values: Any) -> str:
    return render(
        "report.html.j2",
        metrics=METRICS,
        digits=_DIGITS,
        statuses=STATUSES,
        headings=_headings(values["evaluation"]),
        **values,
    )


def _headings(evaluation: Evaluation | None) -> dict[str, str]:
    unit = evaluation.distance_unit if evaluation is not None else "mm"
    return {"dsc": "DSC", "iou": "IoU", "hd95_mm": f"HD95 ({unit})", "nsd": "NSD"}


def _key_numbers(run: RunFolder) -> list[dict[str, str]]:
    """Return the cards at the top: value, what it is, and its interval or unit."""
    cards: list[dict[str, str]] = []
    if run.evaluation is not None:
        overall = run.evaluation.overall
        several = len(run.evaluation.classes) > 1
        over = "mean over classes" if several else run.evaluation.classes[0].class_name
        unit = "pixels" if run.evaluation.distance_unit == "px" else "mm"
        for metric, title, better in (
            ("dsc", "Dice (DSC)", "1 is perfect"),
            ("iou", "mIoU" if several else "IoU", "1 is perfect"),
            ("hd95_mm", f"HD95, {unit}", "0 is perfect"),
            ("nsd", "NSD (surface Dice)", "1 is perfect"),
        ):
            statistic: Statistic = getattr(overall, metric)
            interval = ""
            if statistic.low is not None and statistic.high is not None:
                digits = _DIGITS[metric]
                interval = f"{statistic.low:.{digits}f} – {statistic.high:.{digits}f}"
            cards.append(
                {
                    "title": title,
                    "value": number(statistic.mean, _DIGITS[metric]),
                    "note": interval or "no interval: fewer than two cases",
                    "small": f"{'95% interval; ' if interval else ''}{over}; {better}",
                }
            )
    if parameters := run.record.get("parameters"):
        cards.append(
            {
                "title": "Parameters",
                "value": f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters:,}",
                "note": f"{parameters:,} numbers learned",
                "small": "counted from the tensors",
            }
        )
    if run.record.get("train_seconds") is not None:
        epochs = len(run.history.get("epoch", []))
        cards.append(
            {
                "title": "Training time",
                "value": duration(run.record["train_seconds"]),
                "note": f"{epochs} epochs" if epochs else "",
                "small": str(run.record.get("backend", "")),
            }
        )
    return cards


def _case_table(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the cases, worst first, each with its rows; a case without any defined DSC comes last."""
    dsc = evaluation.case_dsc()
    ranked = sorted(evaluation.cases, key=lambda case: (dsc.get(case, 2.0), case))
    return [
        {"case": case, "dsc": dsc.get(case), "rows": [row for row in evaluation.rows if row.case == case]}
        for case in ranked
    ]


def _facts(run: RunFolder) -> dict[str, list[tuple[str, str]]]:
    """Return what one needs to repeat the run, in groups of (name, value)."""
    record, plan, config = run.record, run.plan, run.config
    parts = {part: run.split.get(part) or [] for part in ("train", "val", "test")}
    counts = {part: len(ids) for part, ids in parts.items()}
    fingerprint = plan.get("fingerprint") if isinstance(plan.get("fingerprint"), dict) else {}
    normalisation = [c.get("scheme", "?") for c in plan.get("normalization") or [] if isinstance(c, dict)]
    groups: dict[str, list[tuple[str, Any]]] = {
        "Run": [
            ("Status", record.get("status")),
            ("Stopped because", record.get("stopped_because")),
            ("Started", record.get("started")),
            ("Finished", record.get("finished")),
            ("Seed", record.get("seed", config.get("seed"))),
            ("Machine", record.get("machine")),
            ("Backend", record.get("backend")),
            ("Versions", _join(record.get("versions"))),
        ],
        "Network and training": [
            ("Network", record.get("network", config.get("network"))),
            ("Network options", _join(config.get("network_options"))),
            ("Parameters", f"{record['parameters']:,}" if record.get("parameters") else None),
            ("Recipe", config.get("recipe")),
            ("Loss", run.setting("loss")),
            ("Optimiser", run.setting("optimizer")),
            ("Learning rate", run.setting("lr")),
            ("Batch size", plan.get("batch_size")),
            ("Patch size", _join(plan.get("patch_size"), " x ")),
        ],
        "Data": [
            ("Data set", plan.get("dataset") or config.get("dataset")),
            ("Data hash (SHA-256)", record.get("data_hash") or (fingerprint or {}).get("data_hash")),
            ("Channels", _join(plan.get("channels"))),
            ("Classes", _join(plan.get("labels"))),
            ("Resampled to, mm (array order)", _join(plan.get("spacing_mm"), " x ")),
            ("Normalisation", _join(normalisation)),
            (
                "Split",
                f"{counts['train']} to train, {counts['val']} to choose, {counts['test']} to test"
                if run.split
                else None,
            ),
            (
                "Split drawn",
                _join({k: run.split[k] for k in ("kind", "seed", "fold") if run.split.get(k) is not None}),
            ),
        ],
    }
    shown = {
        title: [(name, str(value)) for name, value in rows if value not in (None, "", [], {})]
        for title, rows in groups.items()
    }
    return {title: rows for title, rows in shown.items() if rows}


def _documents(run: RunFolder) -> list[tuple[str, str]]:
    names = ("config.yaml", "plan.yaml", "split.json")
    return [(n, (run.path / n).read_text(encoding="utf-8")) for n in names if (run.path / n).is_file()]


def _join(value: Any, separator: str = ", ") -> str:
    if isinstance(value, dict):
        return separator.join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return separator.join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    return "" if value is None else str(value)
