"""The report of a run: one HTML file that needs nothing else to be read."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightm.errors import LightMError
from lightm.evaluation.evaluation import DIGITS, METRICS, Evaluation, Statistic
from lightm.evaluation.figures import case_strip, curves, to_png
from lightm.evaluation.metrics import STATUSES
from lightm.evaluation.pictures import overlay, surfaces_figure
from lightm.evaluation.run_folder import RunFolder, case_loader, read_run
from lightm.files import write_text
from lightm.progress import Progress


def write_report(run_dir: Path, *, out: Path | None = None, progress: Progress | None = None) -> Path:
    """Write a run's report as one self-contained HTML file and return its path (`run_dir/report.html`).

    It holds the key numbers with intervals, per-class and per-case tables, training curves, the worst, median and best
    case (by mean DSC over classes) as overlays and surfaces, and all that is needed to repeat the run. Missing parts
    are named. Images are embedded; no script, no outside address. Raises `InputError` for a folder that is no run and
    for parts that cannot be read. Takes a few seconds and the memory of one case.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    begun = 0

    def step(what: str) -> None:
        """Count the next of eight steps: two plots, three overlays, three surfaces."""
        nonlocal begun
        if progress is not None:
            progress(f"report: {what}", begun, 8)
        begun += 1

    figures: dict[str, str] = {}
    if run.history:
        step("curves")
        figures["curves"] = embed(curves(run.history))
    if run.evaluation is not None:
        step("per-case plot")
        figures["strip"] = embed(case_strip(run.evaluation))
    shown, problem = _cases(run, step)
    documents = [run_dir / name for name in ("config.yaml", "plan.yaml", "split.json")]
    unit = "mm" if run.evaluation is None else run.evaluation.distance_unit
    html = render(
        "report.html.j2",
        metrics=METRICS,
        digits=DIGITS,
        statuses=STATUSES,
        headings={"dsc": "DSC", "iou": "IoU", "hd95_mm": f"HD95 ({unit})", "nsd": "NSD"},
        run=run,
        name=run_dir.resolve().name,
        evaluation=run.evaluation,
        key_numbers=_key_numbers(run),
        table=_case_table(run.evaluation),
        figures=figures,
        shown=shown,
        whole=_whole_cases(run),
        cases_problem=problem,
        facts=_facts(run),
        documents=[(path.name, path.read_text(encoding="utf-8")) for path in documents if path.is_file()],
    )
    target = Path(out) if out is not None else run_dir / "report.html"
    write_text(target, html)
    if progress is not None:
        progress("report", 8, 8)
    return target


def representative_cases(evaluation: Evaluation) -> list[tuple[str, str, float]]:
    """Return (what, case, mean DSC) of the worst, median and best case; fewer when there are fewer cases."""
    ranked = sorted(evaluation.case_dsc().items(), key=lambda item: (item[1], item[0]))
    count = len(ranked)
    places = {"worst": 0, "median": (count - 1) // 2, "best": count - 1}
    if count < 3:
        places = ({}, {"only": 0}, {"worst": 0, "best": 1})[count]
    return [(what, *ranked[index]) for what, index in places.items()]


def _cases(run: RunFolder, step: Callable[[str], None]) -> tuple[list[dict[str, Any]], str]:
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
        rows = [row for row in run.evaluation.rows if row.case == case]
        entry: dict[str, Any] = {"what": what, "case": case, "dsc": dsc, "rows": rows, "problem": "", "surface": ""}
        drawn.append(entry)
        try:
            images = load(case)
        except LightMError as error:
            entry["problem"] = str(error)
            continue
        classes, label, pred, spacing = run.evaluation.labels, images.label, images.pred, images.spacing_mm
        step(f"{what} case, slices")
        entry["overlay"] = embed(overlay(images.image, label, pred, spacing, classes, window=run.window))
        step(f"{what} case, surfaces")
        if label.ndim == 3:
            entry["surface"] = embed(surfaces_figure({"label": label, "prediction": pred}, spacing, classes))
    return drawn, ""


def _key_numbers(run: RunFolder) -> list[dict[str, str]]:
    """Return the cards at the top: value, what it is, and its interval or unit."""
    cards: list[dict[str, str]] = []

    def add(title: str, value: str, note: str, small: str) -> None:
        cards.append({"title": title, "value": value, "note": note, "small": small})

    if run.evaluation is not None:
        several = len(run.evaluation.classes) > 1
        over = "mean over classes" if several else run.evaluation.classes[0].class_name
        unit = "pixels" if run.evaluation.distance_unit == "px" else "mm"
        for metric, title, better in (
            ("dsc", "Dice (DSC)", "1 is perfect"),
            ("iou", "mIoU" if several else "IoU", "1 is perfect"),
            ("hd95_mm", f"HD95, {unit}", "0 is perfect"),
            ("nsd", "NSD (surface Dice)", "1 is perfect"),
        ):
            texts = statistic(getattr(run.evaluation.overall, metric), DIGITS[metric])
            small = f"{'95% interval; ' if texts['interval'] else ''}{over}; {better}"
            add(title, texts["mean"], texts["interval"] or "no interval: fewer than two cases", small)
    if parameters := run.record.get("parameters"):
        value = f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters:,}"
        add("Parameters", value, f"{parameters:,} numbers learned", "counted from the tensors")
    if (seconds := run.record.get("train_seconds")) is not None:
        epochs = len(run.history.get("epoch", []))
        note = f"{epochs} epochs" if epochs else ""
        add("Training time", duration(seconds), note, str(run.record.get("backend", "")))
    return cards


def _case_table(evaluation: Evaluation | None) -> list[dict[str, Any]]:
    """Return the cases, worst first, each with its rows; a case without any defined DSC comes last."""
    if evaluation is None:
        return []
    dsc, rows = evaluation.case_dsc(), evaluation.rows
    ranked = sorted(evaluation.cases, key=lambda case: (dsc.get(case, 2.0), case))
    return [{"case": case, "dsc": dsc.get(case), "rows": [r for r in rows if r.case == case]} for case in ranked]


def _whole_cases(run: RunFolder) -> dict[str, Any]:
    """Return what whole validation cases chose: weights, the DSC around post-processing, and the steps tried.

    Empty where the model has none of it, as those of earlier versions.
    """
    record = run.model.get("postprocess") or {}
    names = {str(value): name for name, value in (run.plan.get("labels") or {}).items()}
    whole, after = (run.model.get("training") or {}).get("whole_cases") or {}, record.get("dsc_after") or {}
    tried = record.get("tried") or []
    found = {
        "weights": whole if whole.get("dsc") else None,
        "rows": [(names.get(v, v), dsc, after.get(v)) for v, dsc in (record.get("dsc_before") or {}).items()],
        "tried": [(trial["what"], "taken" if trial["taken"] else "not taken", trial["why"]) for trial in tried],
        "why": record.get("why") or "",
    }
    return found if any(found.values()) else {}


def _facts(run: RunFolder) -> dict[str, list[tuple[str, str]]]:
    """Return what one needs to repeat the run, in groups of (name, value)."""
    record, plan, config = run.record, run.plan, run.config
    train, val, test = (len(run.split.get(part) or []) for part in ("train", "val", "test"))
    fingerprint = plan.get("fingerprint") if isinstance(plan.get("fingerprint"), dict) else {}
    normalisation = [c.get("scheme", "?") for c in plan.get("normalization") or [] if isinstance(c, dict)]
    events = ("status", "stopped because", "started", "finished")
    groups: dict[str, list[tuple[str, Any]]] = {
        "Run": [
            *((name.capitalize(), record.get(name.replace(" ", "_"))) for name in events),
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
            ("Regions" if plan.get("regions") else "Classes", _join(plan.get("regions") or plan.get("labels"))),
            ("Resampled to, mm (array order)", _join(plan.get("spacing_mm"), " x ")),
            ("Normalisation", _join(normalisation)),
            ("Split", f"{train} to train, {val} to choose, {test} to test" if run.split else None),
            ("Split drawn", _join({k: run.split[k] for k in ("kind", "seed", "fold") if run.split.get(k) is not None})),
        ],
    }
    shown = {t: [(name, str(v)) for name, v in rows if v not in (None, "", [], {})] for t, rows in groups.items()}
    return {title: rows for title, rows in shown.items() if rows}


def _join(value: Any, separator: str = ", ") -> str:
    if isinstance(value, dict):
        return separator.join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return separator.join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    return "" if value is None else str(value)


def render(template: str, *, package: str = "lightm.evaluation", **values: Any) -> str:
    """Render a template of `package`, or else of this one, all values escaped; an unknown name in it is an error."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(place, "") for place in (package, "lightm.evaluation")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, seconds=duration, statistic=statistic)
    return environment.get_template(template).render(**values)


def embed(figure: Figure | bytes) -> str:
    """Return a figure, or the bytes of a PNG, as an address that holds the picture itself."""
    picture = figure if isinstance(figure, bytes) else to_png(figure)
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


def number(value: float | None, digits: int = 3) -> str:
    """Return the number with so many digits after the point; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def statistic(statistic: Statistic, digits: int = 3) -> dict[str, str]:
    """Return mean, interval (empty where there is none), median, deviation and count as text."""
    interval = ""
    if statistic.low is not None and statistic.high is not None:
        interval = f"{statistic.low:.{digits}f} – {statistic.high:.{digits}f}"
    return {
        "mean": number(statistic.mean, digits),
        "interval": interval,
        "median": number(statistic.median, digits),
        "sd": number(statistic.sd, digits),
        "n": str(statistic.n),
    }


def duration(seconds: float) -> str:
    """Return seconds in the unit a reader expects: 93.0 s, 12 min, 2.4 h."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
