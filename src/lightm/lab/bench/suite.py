"""Run benchmarks: which cases, in which order, and what becomes of the measurements."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightm.errors import InputError, did_you_mean
from lightm.lab.bench import cases, records, roofline
from lightm.lab.bench.cases import BOTH, FORWARD, INFERENCE, LAYERS, OPERATORS, TRAINING, Case, Prepared
from lightm.lab.bench.measure import OutOfMemoryError, alternate, median_ratio, peak_in_child
from lightm.lab.bench.records import Row, check_plot, draw_scaling, write_csv
from lightm.progress import Progress

LEVELS = ("op", "layer", "network", "scaling")
SCALING_SIZES = (32, 64, 96, 128, 160)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """Cases that alternate in one process; `baseline` is the name or variant that the others are compared with."""

    cases: tuple[Case, ...]
    baseline: str = ""


@dataclass
class _Result:
    case: Case
    prepared: Prepared
    steps: list[roofline.Work]
    times: list[float]
    baseline_times: list[float] | None
    baseline: str
    peak: int | None


def run(
    what: str = "network",
    *,
    size: int | None = None,
    repeats: int = 5,
    networks: Sequence[str] | None = None,
    baseline: str | None = None,
    train: bool = False,
    sizes: Sequence[int] = SCALING_SIZES,
    memory: bool = True,
    out: Path | str | None = None,
    plot: Path | str | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Measure time and peak memory of operators, layers and networks beside this machine's roofline.

    Cases that are compared alternate in one process (A, B, A, B, ...), each called once before; times are of whole
    calls on float32 CPU tensors, a call shorter than 20 ms repeated and averaged. Peak memory is that of one call in
    a fresh process. Peak throughputs are measured before and after, the faster counts; `lightm.lab.bench.roofline`
    defines the roofline.

    Args:
        what: "op", "layer", "network", "scaling" (networks over `sizes`), "all", or one operator or layer by name.
        size: edge of the cube in voxels; 64 for operators and layers, 96 for networks when None.
        repeats: rounds, each with one measurement of every case.
        networks: names of presets and baselines; `lightm.lab.bench.cases.DEFAULT` when None, and `lightm-unet`
            alone for scaling.
        baseline: the network that the others are compared with; dynunet when it is among them, else the first.
        train: networks in training steps (forward, cross-entropy, backward, SGD) instead of inference.
        sizes: edges for "scaling".
        memory: measure peak memory too; a fresh process per case takes seconds to start.
        out: CSV file for the rows, replaced if it is there.
        plot: .svg, .png or .pdf of the scaling rows.

    Returns one row per case, in order; a case that the system ended for lack of memory is left out and logged.
    Raises InputError, before anything is measured, for an unknown name, a size that a network cannot take, a missing
    module, and a file that cannot be written; LightMError for a case that failed. "all" takes minutes on two cores.
    """
    groups = plan(what, size=size, networks=networks, baseline=baseline, train=train, sizes=sizes)
    if repeats < 1:
        raise InputError(f"repeats {repeats}: at least one round is needed; 5 or more give percentiles a meaning")
    if out is not None:
        _check_writable(Path(out))
    if plot is not None:
        check_plot(plot)
        if len({case.size for group in groups for case in group.cases if case.level == "scaling"}) < 2:
            raise InputError("a plot needs scaling cases of two sizes or more: `lightm bench scaling --plot FILE`")
        _check_writable(Path(plot))
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    _log.info("measuring the peak throughput of this machine")
    peak = roofline.measure_throughput()
    _log.info(peak.describe())
    # a tick for every measurement, and one for every peak
    total = sum(len(group.cases) * (repeats + memory) for group in groups)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("bench", done, total)

    results: list[_Result] = []
    for group in groups:
        _log.info(f"{', '.join(case.label for case in group.cases)}")
        results += _measure(group, repeats, memory, tick)
    peak = peak.best(roofline.measure_throughput())
    rows = _rows(results, peak, started)
    if out is not None:
        write_csv(rows, out)
    if plot is not None:
        draw_scaling(rows, plot)
    return rows


def plan(
    what: str,
    *,
    size: int | None = None,
    networks: Sequence[str] | None = None,
    baseline: str | None = None,
    train: bool = False,
    sizes: Sequence[int] = SCALING_SIZES,
) -> list[Group]:
    """The groups of cases that `run` measures; arguments and errors as there."""
    known = ("all", *LEVELS, *OPERATORS, *LAYERS)
    if what not in known:
        raise InputError(f"unknown benchmark '{what}'{did_you_mean(what, known)} Known: {', '.join(known)}.")
    for edge in [*([] if size is None else [size]), *sizes]:
        if edge < 4:
            raise InputError(f"size {edge}: an edge of 4 voxels or more is needed")
    names = tuple(networks) if networks is not None else cases.DEFAULT
    if baseline is not None and baseline not in names:
        raise InputError(f"baseline '{baseline}' is not among the networks {', '.join(names)}; add it with --networks")
    small, large = size or 64, size or 96
    if small % 2 and what != "network" and what != "scaling":
        even = f"{small - 1} or {small + 1}"
        raise InputError(f"size {small}: operators and layers are measured on an even edge; use {even}")
    groups: list[Group] = []
    for name in OPERATORS:
        if what in ("op", "all", name):
            groups += [_operator_group(name, small, mode) for mode in (FORWARD, BOTH)]
    for mode in (FORWARD, BOTH):
        for width in cases.LAYER_WIDTHS:
            pair = [name for name in LAYERS if name.endswith(f"-{width}") and what in ("layer", "all", name)]
            if pair:
                groups.append(Group(tuple(Case("layer", name, small, mode) for name in pair), pair[0]))
    mode = TRAINING if train else INFERENCE
    if what in ("network", "all"):
        cases.check_networks(names, [large])
        chosen = baseline or ("dynunet" if "dynunet" in names else names[0])
        groups.append(Group(tuple(Case("network", name, large, mode) for name in names), chosen))
    if what in ("scaling", "all"):
        over = names if networks is not None else ("lightm-unet",)
        if not sizes:
            raise InputError("no sizes for scaling; give some, e.g. 32,64,96")
        cases.check_networks(over, sizes)
        groups += [Group(tuple(Case("scaling", name, edge, mode) for name in over)) for edge in sorted(set(sizes))]
    return groups


def _operator_group(name: str, size: int, mode: str) -> Group:
    baseline = {"selective_scan_long": "bare", "selective_scan": "chunked"}.get(name, "reference")
    # the bare loop has no backward pass
    variants = [impl for impl in OPERATORS[name] if impl != "bare" or mode == FORWARD]
    chosen = tuple(Case("op", name, size, mode, impl) for impl in variants)
    return Group(chosen, baseline if len(chosen) > 1 else "")


def _measure(group: Group, repeats: int, with_memory: bool, tick: Callable[[], None]) -> list[_Result]:
    import torch

    peaks: dict[Case, int | None] = {}
    for case in group.cases:
        peaks[case] = None
        if with_memory:
            try:
                peaks[case] = peak_in_child({"case": dataclasses.asdict(case), "threads": torch.get_num_threads()})
            except OutOfMemoryError as error:
                _log.info(f"{case.label}: left out: {error}")
                del peaks[case]
            tick()
    ready = {case: cases.prepare(case) for case in peaks}
    steps = {case: prepared.count() for case, prepared in ready.items()}
    times = alternate({case.label: prepared.call for case, prepared in ready.items()}, repeats, tick)
    against = None
    if group.baseline:
        against = next((times[case.label] for case in ready if group.baseline in (case.impl, case.name)), None)
    name = group.baseline if against is not None else ""
    return [
        _Result(case, prepared, steps[case], times[case.label], against, name, peaks[case])
        for case, prepared in ready.items()
    ]


def _rows(results: Sequence[_Result], peak: roofline.Throughput, started: str) -> list[Row]:
    import torch

    version, commit, cpu = records.versions(), records.commit(), records.cpu_model()
    rows = []
    for result in results:
        low, middle, high = np.percentile(result.times, (20, 50, 80)).tolist()
        shortest = roofline.roofline_seconds(result.steps, peak)
        rows.append(
            Row(
                date=started,
                commit=commit,
                **version,
                cpu=cpu,
                threads=torch.get_num_threads(),
                level=result.case.level,
                case=result.case.name,
                impl=result.case.impl,
                shape=result.prepared.shape,
                mode=result.case.mode,
                parameters=result.prepared.parameters,
                p20_s=low,
                p50_s=middle,
                p80_s=high,
                runs=len(result.times),
                peak_mb=None if result.peak is None else result.peak / 1e6,
                bytes=sum(step.bytes for step in result.steps),
                flops=sum(step.flops for step in result.steps),
                exps=sum(step.exps for step in result.steps),
                roofline_s=shortest,
                ratio_to_roofline=middle / shortest if shortest else 0.0,
                baseline=result.baseline,
                ratio_to_baseline=median_ratio(result.times, result.baseline_times) if result.baseline_times else None,
                limit_matmul_gflops=peak.matmul / 1e9,
                limit_register_gflops=peak.registers / 1e9,
                limit_copy_gbs=peak.bytes / 1e9,
                limit_gexps=peak.exps / 1e9,
                limit_gupdates=peak.updates / 1e9,
            )
        )
    return rows


def _check_writable(path: Path) -> None:
    """Raise InputError unless a file can be put there, before minutes of measuring."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{path}: cannot be written, {folder} is no folder or is not writable; give another file")
