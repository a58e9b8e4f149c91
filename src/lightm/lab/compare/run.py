"""Running a comparison: data, plan and split once, then cell by cell, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightm import __version__
from lightm.config_io import load_yaml
from lightm.datasets.cases import Dataset
from lightm.datasets.discovery import open_dataset
from lightm.datasets.phantoms import make_phantoms
from lightm.datasets.split import Split, load_split
from lightm.errors import InputError
from lightm.files import locked_folder, write_text
from lightm.lab.compare.experiment import Cell, Experiment, load_experiment
from lightm.lab.compare.networks import measure_networks
from lightm.lab.compare.processes import Job, pool, start, wait_for_one
from lightm.lab.compare.results import CELL, CellRecord, Comparison, read_cell, read_comparison
from lightm.lab.complexity import build_network
from lightm.losses import create_loss
from lightm.preparation.cache import default_cache_dir
from lightm.preparation.plan import Plan, load_plan
from lightm.preparation.preprocess import preprocess_dataset
from lightm.progress import Progress
from lightm.training.config import TrainConfig, parse_duration, resolve_config
from lightm.training.prepare import choose_plan, choose_split, with_sizes

Say = Callable[[str], None]

_COMMON = (
    "dataset",
    "labels",
    "phantom",
    "plan",
    "split",
    "split_seed",
    "patch_size",
    "batch_size",
    "spacing_mm",
    "nsd_tolerance_mm",
)
_SCORING_S = 30.0  # a guess at what a cell takes beyond its training, before one has been seen


@dataclass(frozen=True)
class CompareResult:
    """What a call of `compare_experiment` did: the comparison as it stands, cells left to run, and its page."""

    comparison: Comparison
    ran: list[str]
    left: list[str]
    page: Path | None


def compare_experiment(
    experiment: Path | str | Experiment,
    out: Path | str | None = None,
    *,
    dataset: Path | str | None = None,
    jobs: int | None = None,
    total_time: str | float | None = None,
    retry: bool = False,
    progress: Progress | None = None,
    say: Say = print,
) -> CompareResult:
    """Train and score every cell of an experiment that has not been yet, and write tables, figures and one page.

    Arguments:
        experiment: its YAML file, or the model itself.
        out: folder of the comparison, by default `runs/NAME`. One that an earlier call left is completed: finished
            cells stay, a cell cut off goes on from its last checkpoint. Cells may be added to the experiment; what
            cells that are there were made with must not change.
        dataset: folder to use instead of the experiment's data.
        jobs, total_time: replace the experiment's. No cell is begun that, as far as can be told from those before
            it, would end after `total_time` (of this call); running ones are not cut short.
        retry: train cells that failed once more, from the start.

    Each cell runs in a process with an equal share of the cores. A failed cell is recorded, and the others go on.
    Raises InputError for a faulty experiment before anything is written, for a folder in use or of another
    experiment; KeyboardInterrupt passes through once running cells have written their checkpoints.
    """
    given = experiment if isinstance(experiment, Experiment) else load_experiment(experiment)
    if dataset is not None:
        given = given.model_copy(update={"dataset": str(Path(dataset).resolve()), "phantom": None})
    jobs = given.jobs if jobs is None else jobs
    if jobs < 1:
        raise InputError(f"jobs {jobs}: at least one cell must run at a time")
    total_time = given.total_time if total_time is None else total_time
    deadline = None if total_time is None else time.monotonic() + parse_duration(total_time)
    out = Path(out) if out is not None else Path("runs") / given.name.replace(" ", "-")
    _check_folder(out, given)
    with locked_folder(out, "comparison"):
        data = _data(out, given, progress)
        plan, split = _plan_and_split(out, given, data, progress)
        given.save(out / "experiment.yaml")
        preprocess_dataset(
            data, plan, default_cache_dir(), case_ids=[*split.train, *split.val], progress=progress
        )  # once, not by every cell
        ran, left = _run_cells(out, given, data, jobs, deadline, retry, progress, say)
        comparison = read_comparison(out)
        if not comparison.finished:
            return CompareResult(comparison, ran, left, None)
        measure_networks(comparison, out, threads=_cores(), say=say)
        return CompareResult(read_comparison(out), ran, left, write_results(out, progress=progress))


def write_results(out: Path | str, *, progress: Progress | None = None) -> Path:
    """Write results.json, tables/, figures/ and comparison.html of a comparison, and return the page's path.

    Raises InputError for a folder without a comparison or without a finished cell.
    """
    from lightm.lab.compare.page import write_page
    from lightm.lab.compare.statistics import summarize_comparison
    from lightm.lab.compare.tables import write_tables

    comparison = read_comparison(out)
    if not comparison.finished:
        raise InputError(f"{out}: no cell has finished yet; run `lightm compare` again")
    summary = summarize_comparison(comparison)
    summary.to_json(comparison.folder / "results.json")
    write_tables(summary, comparison.folder)
    return write_page(comparison, summary, progress=progress)


def _check_folder(out: Path, given: Experiment) -> None:
    """Raise InputError where `out` holds something else, or cells made with other settings."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder for the comparison with -o")
    path = out / "experiment.yaml"
    if not path.is_file():
        if out.is_dir() and any(p.name not in ("data", "plan.yaml", "split.json") for p in _shown(out)):
            raise InputError(f"{out}: is not empty and holds no comparison; give another folder with -o")
        return
    earlier = load_yaml(path, Experiment)
    for key in _COMMON:
        if getattr(earlier, key) != getattr(given, key):
            raise InputError(
                f"{path}: this comparison was begun with {key} = {getattr(earlier, key)!r}, now it is "
                f"{getattr(given, key)!r}; its cells would not be comparable. Give another folder with -o"
            )
    before = {cell.id: earlier.settings_of(cell) for cell in earlier.cells()}
    for cell in given.cells():
        now, then = given.settings_of(cell), before.get(cell.id)
        if then is None or then == now or not (out / "cells" / cell.id).exists():
            continue
        key = next(key for key in now if now[key] != then[key])
        raise InputError(
            f"{out / 'cells' / cell.id}: was trained with {key} = {then[key]!r}, now it is {now[key]!r}; give another "
            "folder with -o, or another label in the experiment"
        )


def _shown(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _data(out: Path, given: Experiment, progress: Progress | None) -> Dataset:
    if given.phantom is None:
        root = Path(given.dataset or "")
        return open_dataset(root, labels=None if given.labels is None else Path(given.labels))
    root = out / "data"
    if not (root / "dataset.json").is_file():
        made = given.phantom
        make_phantoms(made.kind, root, cases=made.cases, size=made.size, seed=made.seed, progress=progress)
    return open_dataset(root)


def _plan_and_split(out: Path, given: Experiment, data: Dataset, progress: Progress | None) -> tuple[Plan, Split]:
    """Those of the folder, or new ones; and every network and loss tried on them before anything is trained."""
    if (out / "plan.yaml").is_file():
        plan = load_plan(out / "plan.yaml")
    else:
        plan = choose_plan(data, None if given.plan is None else Path(given.plan), progress)
    config = _config(given, data, plan)
    if not (out / "plan.yaml").is_file():
        plan = with_sizes(_with_spacing(plan, given.spacing_mm), config, given.patch_size, given.batch_size)
    cells = given.cells()
    for label in {cell.network for cell in cells}:
        network = given.networks[label]
        build_network(network.network, len(plan.channels), len(plan.labels), plan.patch_size, network.options)
    for loss in given.losses.values():
        create_loss(loss.loss, spatial_dims=plan.spatial_dims, num_classes=len(plan.labels), **loss.options)
    for cell in cells:
        _cell_config(given, cell, data, plan)
    path = out / "split.json"
    labelled = [case.id for case in data.cases if case.label is not None]
    split = load_split(path, labelled) if path.is_file() else choose_split(data, config)
    if not split.test:
        raise InputError(f"{given.split or path}: the split has no test cases to compare by")
    plan.save(out / "plan.yaml")
    split.save(path)
    return plan, split


def _with_spacing(plan: Plan, spacing_mm: list[float] | None) -> Plan:
    if spacing_mm is None:
        return plan
    if len(spacing_mm) != plan.spatial_dims:
        raise InputError(f"spacing_mm {spacing_mm}: {plan.spatial_dims} numbers are needed, one for each axis")
    return plan.model_copy(update={"spacing_mm": spacing_mm})


def _config(given: Experiment, data: Dataset, plan: Plan) -> TrainConfig:
    return resolve_config(
        str(data.root), plan.spatial_dims, split_seed=given.split_seed, split=given.split, device=given.device
    )


def _cell_config(given: Experiment, cell: Cell, data: Dataset, plan: Plan) -> TrainConfig:
    """The cell's configuration as `train_model` will resolve it, so that a wrong setting is found at once."""
    options = given.settings_of(cell)
    settings = {**options["settings"], "loss": options["loss"]}
    return resolve_config(str(data.root), plan.spatial_dims, recipe=options["recipe"], settings=settings)


def _run_cells(
    out: Path,
    given: Experiment,
    data: Dataset,
    jobs: int,
    deadline: float | None,
    retry: bool,
    progress: Progress | None,
    say: Say,
) -> tuple[list[str], list[str]]:
    """Run what is to be run; return the ids of the cells that ended in this call, and of those left for the next."""
    cells = given.cells()
    waiting = []
    for cell in cells:
        record = read_cell(out / "cells" / cell.id)
        if record is not None and record.status == "failed" and retry:
            shutil.rmtree(out / "cells" / cell.id)
            record = None
        if record is None:
            waiting.append(cell)
    done, threads = len(cells) - len(waiting), max(1, _cores() // jobs)
    say(f"{len(cells)} cells, {done} of them there already; {jobs} at a time on {threads} thread(s) each: {out}")
    longest = _guess(given)
    ran: list[str] = []
    begun: dict[str, Cell] = {}
    with pool() as running:
        while waiting or running:
            while waiting and len(running) < jobs:
                if deadline is not None and time.monotonic() + longest > deadline:
                    break
                cell = waiting.pop(0)
                begun[cell.id] = cell
                running.append(_start_cell(out, given, cell, data, threads))
            if not running:
                break
            job = wait_for_one(running)
            spent = time.monotonic() - job.since
            cell = begun.pop(job.name)
            path = out / "cells" / cell.id
            if job.process.returncode == 0 and (record := read_cell(path)) is not None:
                longest = max(longest if ran else 0.0, spent)
                say(f"[{done + len(ran) + 1}/{len(cells)}] {cell.id}: finished in {spent:.0f} s")
            elif job.interrupted:
                say(f"{cell.id}: interrupted; the next call goes on with it")
                continue
            else:
                record = _failure(given, cell, job, threads, spent)
                path.mkdir(parents=True, exist_ok=True)
                write_text(path / CELL, record.model_dump_json(indent=1) + "\n")
                say(f"[{done + len(ran) + 1}/{len(cells)}] {cell.id}: failed: {record.error} (log: {job.log})")
            ran.append(cell.id)
            if progress is not None:
                progress("cells", done + len(ran), len(cells))
    left = [cell.id for cell in cells if read_cell(out / "cells" / cell.id) is None]
    if left:
        say(f"{len(left)} cells are left for the next call: {', '.join(left[:4])}{', ...' if len(left) > 4 else ''}")
    return ran, left


def _guess(given: Experiment) -> float:
    """Seconds that the first cell may take: its budget and the scoring; unknown lengths count as none."""
    return 0.0 if given.max_time is None else parse_duration(given.max_time) + _SCORING_S


def _start_cell(out: Path, given: Experiment, cell: Cell, data: Dataset, threads: int) -> Job:
    request: dict[str, Any] = {
        "work": "train",
        "path": str(out / "cells" / cell.id),
        "dataset": str(data.root),
        "threads": threads,
        "nsd_tolerance_mm": given.nsd_tolerance_mm,
        "cell": _place(given, cell),
        "options": {
            **given.settings_of(cell),
            "labels": given.labels,
            "plan": str(out / "plan.yaml"),
            "split": str(out / "split.json"),
        },
    }
    return start(cell.id, request, out / "logs" / f"{cell.id}.log")


def _place(given: Experiment, cell: Cell) -> dict[str, Any]:
    return {
        "id": cell.id,
        "network": cell.network,
        "loss": cell.loss,
        "recipe": cell.recipe,
        "seed": cell.seed,
        "fingerprint": given.fingerprint(cell),
    }


def _failure(given: Experiment, cell: Cell, job: Job, threads: int, spent: float) -> CellRecord:
    started = datetime.now(timezone.utc).timestamp() - spent
    return CellRecord(
        **_place(given, cell),
        data_hash="",
        status="failed",
        error=job.last_words(),
        started=datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        seconds=round(spent, 1),
        threads=threads,
        versions={"lightm": __version__},
    )


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1
