"""Running a comparison: data, plan and split once, trial by trial in processes, then what the networks cost."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
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
from lightm.lab.compare import results
from lightm.lab.compare.experiment import Experiment, Trial, file_name, load_experiment
from lightm.lab.compare.jobs import Job, pool, start, wait_for_one
from lightm.lab.compare.results import TRIAL, Comparison, TrialRecord, read_comparison, read_trial
from lightm.lab.complexity import build_network, count_operations
from lightm.losses import create_loss
from lightm.nets import count_parameters
from lightm.preparation.cache import default_cache_dir
from lightm.preparation.plan import Plan, load_plan
from lightm.preparation.preprocess import preprocess_dataset
from lightm.progress import Progress
from lightm.training.config import parse_duration, resolve_config
from lightm.training.run import loss_sizes
from lightm.training.settle import choose_plan, choose_split, keep_rare, with_sizes

_log = logging.getLogger(__name__)

_COMMON = ("dataset", "labels", "phantom", "plan", "split", "split_seed", "patch_size", "batch_size", "spacing_mm")
_BEFORE = ("data", "plan.yaml", "split.json")  # what a call writes before experiment.yaml
_SCORING_S = 30.0  # a guess at what a trial takes beyond its training, before one has been seen


@dataclass(frozen=True)
class CompareResult:
    """What a call of `compare_experiment` did: the comparison as it stands, trials run and left, and its page."""

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
) -> CompareResult:
    """Train and score every trial of an experiment that has not been yet, and write tables, figures and one page.

    Arguments:
        experiment: its YAML file, or the model itself.
        out: folder of the comparison, by default `runs/NAME`. One that an earlier call left is completed: finished
            trials stay, an interrupted trial is resumed from its last checkpoint. Trials may be added to the
            experiment; the settings of those that are there must not change.
        dataset: folder to use instead of the experiment's data.
        jobs, total_time: replace the experiment's. No trial is begun that, judging by those before it, would end after
            `total_time` (of this call); running ones are not cut short.
        retry: train failed trials again, from the start.

    Each trial runs in a process with an equal share of the cores. A failed trial is recorded, and the others run on.
    Raises InputError for an invalid experiment before anything is written, for a folder in use or of another
    experiment; KeyboardInterrupt passes through once running trials have written their checkpoints.
    """
    given = experiment if isinstance(experiment, Experiment) else load_experiment(experiment)
    if dataset is not None:
        given = given.model_copy(update={"dataset": str(Path(dataset).resolve()), "phantom": None})
    jobs = given.jobs if jobs is None else jobs
    if jobs < 1:
        raise InputError(f"jobs {jobs}: at least one trial must run at a time")
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
        )  # once, not by every trial
        ran, left = _run_trials(out, given, data, jobs, deadline, retry, progress)
        comparison = read_comparison(out)
        if not comparison.finished:
            return CompareResult(comparison, ran, left, None)
        measure_networks(comparison, out, threads=_cores())
        return CompareResult(read_comparison(out), ran, left, write_results(out, progress=progress))


def write_results(out: Path | str, *, progress: Progress | None = None) -> Path:
    """Write results.json, tables/, figures/ and comparison.html of a comparison, and return the page's path.

    Raises InputError for a folder without a comparison or without a finished trial.
    """
    from lightm.lab.compare import report, statistics, tables

    comparison = read_comparison(out)
    if not comparison.finished:
        raise InputError(f"{out}: no trial has finished yet; run `lightm compare` again")
    summary = statistics.summarize_comparison(comparison)
    summary.to_json(comparison.folder / "results.json")
    tables.write_tables(summary, comparison.folder)
    return report.write_page(comparison, summary, progress=progress)


def _check_folder(out: Path, given: Experiment) -> None:
    """Raise InputError where `out` holds something else, or trials made with other settings."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder for the comparison with -o")
    path = out / "experiment.yaml"
    if not path.is_file():
        if out.is_dir() and any(p.name not in _BEFORE and not p.name.startswith(".") for p in out.iterdir()):
            raise InputError(f"{out}: is not empty and holds no comparison; give another folder with -o")
        return
    results.refuse_earlier_layout(out)
    earlier = load_yaml(path, Experiment)
    for key in (*_COMMON, "nsd_tolerance_mm"):
        if getattr(earlier, key) != getattr(given, key):
            raise InputError(
                f"{path}: this comparison was begun with {key} = {getattr(earlier, key)!r}, now it is "
                f"{getattr(given, key)!r}; its trials would not be comparable. Give another folder with -o"
            )
    before = {trial.id: earlier.settings_of(trial) for trial in earlier.trials()}
    for trial in given.trials():
        now, then = given.settings_of(trial), before.get(trial.id)
        if then is None or then == now or not (out / "trials" / trial.id).exists():
            continue
        key = next(key for key in now if now[key] != then[key])
        raise InputError(
            f"{out / 'trials' / trial.id}: was trained with {key} = {then[key]!r}, now it is {now[key]!r}; give "
            "another folder with -o, or another label in the experiment"
        )


def _data(out: Path, given: Experiment, progress: Progress | None) -> Dataset:
    if given.phantom is None:
        labels = None if given.labels is None else Path(given.labels)
        return open_dataset(Path(given.dataset or ""), labels=labels)
    if not (out / "data" / "dataset.json").is_file():
        make_phantoms(out=out / "data", **given.phantom.model_dump(), progress=progress)
    return open_dataset(out / "data")


def _plan_and_split(out: Path, given: Experiment, data: Dataset, progress: Progress | None) -> tuple[Plan, Split]:
    """Those of the folder, or new ones; and every network and loss tried on them before anything is trained."""
    earlier = (out / "plan.yaml").is_file()
    plan = load_plan(out / "plan.yaml") if earlier else choose_plan(data, given.plan, progress)
    dims = plan.spatial_dims
    config = resolve_config(str(data.root), dims, split_seed=given.split_seed, split=given.split, device=given.device)
    if not earlier:
        if given.spacing_mm is not None:
            if len(given.spacing_mm) != dims:
                raise InputError(f"spacing_mm {given.spacing_mm}: {dims} numbers are needed, one for each axis")
            plan = plan.model_copy(update={"spacing_mm": given.spacing_mm})
        plan = with_sizes(plan, config, given.patch_size, given.batch_size)
    for network in given.networks.values():  # refused, not rounded: all trials are to see the same patches
        build_network(network.network, len(plan.channels), len(plan.outputs), plan.patch_size, network.options)
    for loss in given.losses.values():
        create_loss(loss.loss, **loss_sizes(plan), **loss.options)
    for trial in given.trials():  # as `train_model` will resolve it, so that a wrong setting is found at once
        options = given.settings_of(trial)
        settings = {**options["settings"], "loss": options["loss"]}
        resolve_config(str(data.root), dims, recipe=options["recipe"], settings=settings)
    path = out / "split.json"
    labelled = [case.id for case in data.cases if case.label is not None]
    if path.is_file():
        split = load_split(path, labelled)
    else:
        split = choose_split(data, config)
        split = split if given.split is not None else keep_rare(data, plan, split)
    if not split.test:
        raise InputError(f"{given.split or path}: the split has no test cases to compare by")
    plan.save(out / "plan.yaml")
    split.save(path)
    return plan, split


def _run_trials(
    out: Path,
    given: Experiment,
    data: Dataset,
    jobs: int,
    deadline: float | None,
    retry: bool,
    progress: Progress | None,
) -> tuple[list[str], list[str]]:
    """Run what is to be run; return the ids of the trials that ended in this call, and of those left for the next."""
    trials = given.trials()
    paths = {trial.id: out / "trials" / trial.id for trial in trials}
    for path in paths.values() if retry else ():
        if (record := read_trial(path)) is not None and record.status == "failed":
            shutil.rmtree(path)
    waiting = [trial for trial in trials if read_trial(paths[trial.id]) is None]
    done, threads = len(trials) - len(waiting), max(1, _cores() // jobs)
    _log.info(f"{len(trials)} trials, {done} of them done; {jobs} at a time on {threads} thread(s) each: {out}")
    # seconds that a trial may take: at first its budget and the scoring; unknown lengths count as none
    longest = 0.0 if given.max_time is None else parse_duration(given.max_time) + _SCORING_S
    ran: list[str] = []
    begun: dict[str, Trial] = {}
    with pool() as running:
        while waiting or running:
            while waiting and len(running) < jobs:
                if deadline is not None and time.monotonic() + longest > deadline:
                    break
                trial = waiting.pop(0)
                begun[trial.id] = trial
                running.append(_start_trial(out, given, trial, data, threads))
            if not running:
                break
            job = wait_for_one(running)
            spent = time.monotonic() - job.since
            trial = begun.pop(job.name)
            path = paths[trial.id]
            if job.process.returncode == 0 and (record := read_trial(path)) is not None:
                longest = max(longest if ran else 0.0, spent)
                _log.info(f"[{done + len(ran) + 1}/{len(trials)}] {trial.id}: finished in {spent:.0f} s")
            elif job.interrupted:
                _log.info(f"{trial.id}: interrupted; the next call resumes it")
                continue
            else:
                record = _failure(given, trial, job, threads, spent)
                path.mkdir(parents=True, exist_ok=True)
                write_text(path / TRIAL, record.model_dump_json(indent=1) + "\n")
                _log.info(f"[{done + len(ran) + 1}/{len(trials)}] {trial.id}: failed: {record.error} (log: {job.log})")
            ran.append(trial.id)
            if progress is not None:
                progress("trials", done + len(ran), len(trials))
    left = [name for name, path in paths.items() if read_trial(path) is None]
    if left:
        shown = [*left[:4], "..."] if len(left) > 4 else left
        _log.info(f"{len(left)} trials are left for the next call: {', '.join(shown)}")
    return ran, left


def _start_trial(out: Path, given: Experiment, trial: Trial, data: Dataset, threads: int) -> Job:
    request: dict[str, Any] = {
        "work": "train",
        "path": str(out / "trials" / trial.id),
        "dataset": str(data.root),
        "threads": threads,
        "nsd_tolerance_mm": given.nsd_tolerance_mm,
        "trial": _place(given, trial),
        "options": {
            **given.settings_of(trial),
            "labels": given.labels,
            "plan": str(out / "plan.yaml"),
            "split": str(out / "split.json"),
        },
    }
    return start(trial.id, request, out / "logs" / f"{trial.id}.log")


def _place(given: Experiment, trial: Trial) -> dict[str, Any]:
    return {"id": trial.id, **asdict(trial), "fingerprint": given.fingerprint(trial)}


def _failure(given: Experiment, trial: Trial, job: Job, threads: int, spent: float) -> TrialRecord:
    started = datetime.now(timezone.utc) - timedelta(seconds=spent)
    return TrialRecord(
        **_place(given, trial),
        data_hash="",
        status="failed",
        error=job.last_words(),
        started=started.isoformat(timespec="seconds"),
        seconds=round(spent, 1),
        threads=threads,
        versions={"lightm": __version__},
    )


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


# What the networks cost -----------------------------------------------------------------------------------------------


def measure_networks(comparison: Comparison, out: Path, *, threads: int) -> None:
    """Count and measure every network of finished trials that has no entry yet, and write `networks.json`.

    Parameters are summed over tensors and multiply-adds include the scan. Latency is the median of five forward
    passes of one patch on `threads` threads, peak memory that of one pass, each network in a fresh process on the CPU,
    whatever the training's device. A network whose process ends early has None for both.
    """
    plan = comparison.plan
    records = dict(comparison.networks)
    for label in dict.fromkeys(found.trial.network for found in comparison.finished):
        if label in records:
            continue
        choice = comparison.experiment.networks[label]
        patch, channels = plan.patch_size, len(plan.channels)
        network: dict[str, Any] = {
            "name": choice.network,
            "in_channels": channels,
            "out_channels": len(plan.outputs),
            "spatial": patch,
            "options": choice.options,
        }
        _log.info(f"measuring {label} on one patch of {' x '.join(map(str, patch))}")
        request = {"work": "measure", "network": network, "threads": threads}
        measured = _measured(label, request, out / "logs" / f"network-{file_name(label)}.log")
        meta = build_network(**network)
        records[label] = results.NetworkRecord(
            label=label,
            network=choice.network,
            parameters=count_parameters(meta),
            multiply_adds=count_operations(meta, channels, patch).total.multiply_adds.total(),
            patch_size=plan.patch_size,
            latency_s=measured.get("latency_s"),
            latency_threads=threads if measured else None,
            peak_memory_bytes=measured.get("peak_memory_bytes"),
        )
        entries = [record.model_dump(mode="json") for record in records.values()]
        write_text(out / results.NETWORKS, json.dumps(entries, indent=1) + "\n")


def _measured(label: str, request: dict[str, Any], log: Path) -> dict[str, Any]:
    with pool() as jobs:
        jobs.append(start(label, request, log))
        job = wait_for_one(jobs)
    if job.process.returncode != 0:
        return {}
    found: dict[str, Any] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return found
