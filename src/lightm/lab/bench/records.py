"""The rows of a benchmark: CSV with everything that a number depends on, and a table to read.

Columns of the CSV: `date` (UTC), `commit`, versions, `cpu`, `threads`; the case (`level`, `case`, `impl`, `shape`,
`mode`, `parameters`); seconds `p20_s`, `p50_s`, `p80_s` of `runs` measurements; `peak_mb` (10^6 bytes; empty: not
measured); the case's minimum of work (`bytes`, `flops`, `exps`), its roofline on this machine (`roofline_s`) and p50 as
a multiple of it; `baseline` and the median ratio of the times to the baseline's, round by round (below 1 is faster);
the machine's peak throughputs in the same run.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lightm import __version__
from lightm.errors import InputError
from lightm.files import replacing, write_text
from lightm.lab.bench.roofline import Throughput


@dataclass(frozen=True)
class Row:
    """One measured case; numbers that were not measured are None. Columns as in the module's text."""

    date: str
    commit: str
    lightm: str
    torch: str
    numba: str
    monai: str
    python: str
    cpu: str
    threads: int
    level: str
    case: str
    impl: str
    shape: str
    mode: str
    parameters: int
    p20_s: float
    p50_s: float
    p80_s: float
    runs: int
    peak_mb: float | None
    bytes: float
    flops: float
    exps: float
    roofline_s: float
    ratio_to_roofline: float
    baseline: str
    ratio_to_baseline: float | None
    limit_matmul_gflops: float
    limit_register_gflops: float
    limit_copy_gbs: float
    limit_gexps: float
    limit_gupdates: float

    @property
    def edge(self) -> int:
        """Voxels along the last axis: the edge of the cube that a network row was measured on."""
        return int(self.shape.split(",")[0].split("x")[-1])


_COLUMNS = [field.name for field in dataclasses.fields(Row)]
_OLD_COLUMNS = {  # names in files of earlier versions
    "floor_s": "roofline_s",
    "ratio_to_floor": "ratio_to_roofline",
    "limit_product_gflops": "limit_matmul_gflops",
}
_KINDS = {field.name: str(field.type) for field in dataclasses.fields(Row)}


def write_csv(rows: Sequence[Row], path: Path | str) -> None:
    """Write rows as CSV with a header, atomically. Raises LightMError when the file cannot be written."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")  # writes None as an empty field
    writer.writerow(_COLUMNS)
    writer.writerows(dataclasses.astuple(row) for row in rows)
    write_text(path, stream.getvalue())


def read_csv(path: Path | str) -> list[Row]:
    """Read rows that `write_csv` wrote, exactly; InputError names a file that is missing or is something else."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a file that `lightm bench --out` wrote"
        ) from error
    reader = csv.DictReader(io.StringIO(text))
    reader.fieldnames = [_OLD_COLUMNS.get(name, name) for name in reader.fieldnames or []]
    if reader.fieldnames != _COLUMNS:
        missing = [name for name in _COLUMNS if name not in reader.fieldnames]
        what = f"lacks {', '.join(missing)}" if missing else "has other columns"
        raise InputError(f"{path}: {what}; expected a file that this version of `lightm bench --out` wrote")
    rows = []
    for number, values in enumerate(reader, start=2):
        try:
            rows.append(Row(**{name: _value(_KINDS[name], values[name]) for name in _COLUMNS}))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    return rows


def _value(kind: str, text: str) -> str | int | float | None:
    if kind == "str":
        return text
    if kind == "int":
        return int(text)
    return None if "None" in kind and not text else float(text)


def format_json(rows: Sequence[Row]) -> str:
    """The rows as a JSON list of objects with the CSV's columns."""
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=1)


# What a number depends on ---------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of what a number depends on: lightm, torch, numba, monai, python."""
    found = {"lightm": __version__, "torch": "", "numba": "", "monai": "", "python": platform.python_version()}
    for name in ("torch", "numba", "monai"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str:
    """The commit of the checkout that holds this package, "-dirty" added when its files differ; else "v" + version."""
    folder = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(folder), *words], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # a package installed into someone else's repository is not tracked there
    if not git("ls-files", "--error-unmatch", "__init__.py"):
        return f"v{__version__}"
    dirty = git("status", "--porcelain", "--", str(folder))
    return f"{git('rev-parse', '--short=12', 'HEAD') or 'v' + __version__}{'-dirty' if dirty else ''}"


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        if sys.platform == "linux":
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
        elif sys.platform == "darwin":
            done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout.strip()
    return platform.processor() or platform.machine()


# Tables -------------------------------------------------------------------------------------------------------

_MEASURED = ("seconds (p20–p80)", "peak MB", "roofline s", "x roofline", "x baseline")
HEADINGS = ("case", "parameters", "shape", "mode", *_MEASURED)


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table that is printed."""
    peak = "not measured" if row.peak_mb is None else f"{row.peak_mb:.{0 if row.peak_mb >= 10 else 1}f}"
    against = "" if row.ratio_to_baseline is None else _number(row.ratio_to_baseline)
    if against and row.baseline == (row.impl or row.case):
        against = "1 (baseline)"
    return (
        f"{row.case} ({row.impl})" if row.impl else row.case,
        f"{row.parameters:,}" if row.parameters else "",
        row.shape,
        row.mode,
        f"{_number(row.p50_s)} ({_number(row.p20_s)}–{_number(row.p80_s)})",
        peak,
        *((_number(row.roofline_s), _number(row.ratio_to_roofline)) if row.roofline_s else ("", "")),
        against,
    )


def format_markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table below one line that says where and how they were measured."""
    if not rows:
        return "No case was measured."
    first = rows[0]
    rates = (first.limit_matmul_gflops, first.limit_register_gflops, first.limit_copy_gbs)
    peak = Throughput(*(1e9 * rate for rate in (*rates, first.limit_gexps, first.limit_gupdates)))
    lines = [
        f"LightM {first.lightm} ({first.commit}), torch {first.torch}, numba {first.numba}, Python {first.python}; "
        f"{first.cpu}, {first.threads} threads; {first.date}. Peak throughput in this run: {peak.describe()}.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{' --- |' * len(HEADINGS)}",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row))} |" for row in rows)])


def _number(value: float) -> str:
    """Three significant digits without an exponent for the sizes that occur here."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    text = f"{value:.3g}"
    return f"{value:.7f}".rstrip("0") if "e" in text else text


# Plot of scaling ------------------------------------------------------------------------------------------------------


FORMATS = (".svg", ".png", ".pdf")


def check_plot(path: Path | str) -> None:
    """Raise InputError unless the name ends in .svg, .png or .pdf."""
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"{path}: a plot is written as {', '.join(FORMATS)}; give the file one of these endings")


def draw_scaling(rows: Sequence[Row], path: Path | str) -> None:
    """Draw time and peak memory of the `scaling` rows over the number of voxels; the file's ending is its format.

    Both axes are logarithmic. The dashed line through each network's largest size is linear in the voxels: a curve
    above it at the left is fixed cost, a steeper one is worse than linear. Raises InputError without scaling rows of
    two sizes or for an unknown ending, LightMError when the file cannot be written.
    """
    check_plot(path)
    chosen = [row for row in rows if row.level == "scaling"]
    if len({row.edge for row in chosen}) < 2:
        raise InputError("scaling plot: rows of two sizes or more are needed; run `lightm bench scaling`")
    from matplotlib.figure import Figure  # a figure of its own: no window system, no global state

    figure = Figure(figsize=(9, 4), layout="constrained")
    names = list(dict.fromkeys((row.case, row.mode) for row in chosen))
    modes = {mode for _, mode in names}
    for axes, column, label in zip(figure.subplots(1, 2), ("p50_s", "peak_mb"), ("seconds", "peak MB"), strict=True):
        ticks: dict[int, str] = {}
        for index, (name, mode) in enumerate(names):
            found = [(row.edge**3, getattr(row, column)) for row in chosen if (row.case, row.mode) == (name, mode)]
            if not (points := sorted((v, value) for v, value in found if value is not None)):
                continue
            voxels, values = zip(*points, strict=True)
            label_of = name if len(modes) == 1 else f"{name}, {mode}"
            axes.plot(voxels, values, "o-", color=f"C{index}", label=label_of)
            linear = [values[-1] * v / voxels[-1] for v in voxels]
            axes.plot(voxels, linear, "--", color=f"C{index}", alpha=0.5, linewidth=1)
            ticks.update({v: f"{round(v ** (1 / 3))}³" for v in voxels})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sorted(ticks), [ticks[v] for v in sorted(ticks)], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("voxels")
        axes.set_ylabel(f"{label}{'' if len(modes) > 1 else ', ' + next(iter(modes))}")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(title="dashed: linear in the voxels", title_fontsize="small", fontsize="small")
    row = chosen[0]
    figure.suptitle(f"{row.cpu}, {row.threads} threads, LightM {row.lightm}, torch {row.torch}", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lower().lstrip("."), dpi=150)
