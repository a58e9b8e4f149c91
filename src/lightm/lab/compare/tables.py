"""The tables of a comparison (configurations, classes, cases, trials) as Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightm.evaluation.evaluation import METRICS
from lightm.evaluation.metrics import STATUSES, ClassMetrics, Status
from lightm.files import write_text
from lightm.lab.compare.results import Difference, MethodSummary, Score, Scores, Summary
from lightm.lab.complexity.report import csv_text, giga, markdown, mebibytes

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "–": "--",
    "−": "$-$",
    **{letter: "\\" + letter for letter in "&%$#_{}"},
}


@dataclass(frozen=True)
class TextCell:
    """One cell as plain text, in bold where it is the best of its column."""

    text: str
    best: bool = False


def as_markdown(headings: Sequence[str], rows: Sequence[Sequence[TextCell]], *, left: int, below: Sequence[str]) -> str:
    """A Markdown table, its first `left` columns flush left, with the sentences of `below` as a list under it."""
    form = {True: "**{}**", False: "{}"}
    body = [[form[cell.best].format(escape_markdown(cell.text)) for cell in row] for row in rows]
    lines = markdown([list(map(escape_markdown, headings)), *body], left=left)
    return "\n".join([*lines, "", *(f"- {escape_markdown(sentence)}" for sentence in below), ""])


def as_latex(headings: Sequence[str], rows: Sequence[Sequence[TextCell]], *, left: int, below: Sequence[str]) -> str:
    """A `tabular` for \\input, its first `left` columns flush left; needs booktabs.

    The sentences of `below` become comments at its top.
    """
    columns = "l" * left + "r" * (len(headings) - left)
    lines = [f"% {' '.join(sentence.split())}" for sentence in (r"Needs \usepackage{booktabs}.", *below)]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [_latex_row([escape_latex(heading) for heading in headings]), r"\midrule"]
    form = {True: r"\textbf{{{}}}", False: "{}"}
    lines += [_latex_row([form[cell.best].format(escape_latex(cell.text)) for cell in row]) for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def escape_latex(text: str) -> str:
    """Text on one line with every character escaped that LaTeX would act on."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def escape_markdown(text: str) -> str:
    """Text on one line that no Markdown reader takes for markup."""
    escaped = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + letter if letter in "\\`*_|[]~$" else letter for letter in escaped)


def _latex_row(cells: Sequence[str]) -> str:
    # A row that begins with a bracket would be read as the optional argument of the \\ before it.
    first = "{}" + cells[0] if cells[0].startswith(("[", "*")) else cells[0]
    return " & ".join([first, *cells[1:]]) + r" \\"


# Tables ---------------------------------------------------------------------------------------------------------------


NONE = "–"


def write_tables(summary: Summary, folder: Path) -> list[Path]:
    """Write methods and classes (.csv, .md, .tex), cases.csv and trials.csv to `folder`/tables; return their paths.

    methods: a row per method, scores over classes; classes: a row per method and class; cases: a row per method, seed,
    case and class; trials: a row per planned training. CSV has plain numbers, an empty field where there is none, and
    units in its headings; Markdown and LaTeX round for readers and set the best of several methods in bold. Raises
    LightMError, naming the file, when the disk refuses.
    """
    tables = folder / "tables"
    texts = {
        "methods.csv": csv_text(*_method_numbers(summary)),
        "classes.csv": csv_text(*_class_numbers(summary)),
        "cases.csv": csv_text(*_case_numbers(summary)),
        "trials.csv": csv_text(*_trial_facts(summary)),
    }
    below = legend(summary)
    for name, left, (headings, rows) in (("methods", 1, method_texts(summary)), ("classes", 2, class_texts(summary))):
        texts[f"{name}.md"] = as_markdown(headings, rows, left=left, below=below)
        texts[f"{name}.tex"] = as_latex(headings, rows, left=left, below=below)
    paths = [tables / name for name in sorted(texts)]
    for path in paths:
        write_text(path, texts[path.name])
    return paths


def legend(summary: Summary) -> list[str]:
    """How the tables are to be read, and the notes on this comparison, in sentences."""
    interval = "95% bootstrap interval over cases" if summary.bootstrap else "no interval"
    tolerances = sorted(set(summary.nsd_tolerance_mm.values()))
    tolerance = f"{tolerances[0]:g} {summary.distance_unit}" if len(tolerances) == 1 else "each class's own tolerance"
    sentences = [
        f"{len(summary.test_cases)} test cases; mean over cases and seeds [{interval}]; differences are to "
        f"{summary.baseline}.",
        "p: two-sided Wilcoxon signed-rank test over cases, corrected by Holm for all methods within one metric and "
        f"class; better or worse at {summary.alpha:g}. Tests hold for the networks as trained, not for other seeds.",
        f"HD95 is taken where label and prediction both have the class: read it with the missed and spurious counts "
        f"(cases times seeds). NSD at {tolerance}.",
    ]
    if summary.convergence_level is not None:
        sentences.append(
            f"To level: until the pseudo Dice first reached {summary.convergence_level:.3f}, 95% of the "
            "baseline's best (median over seeds)."
        )
    return [*sentences, *summary.notes]


def method_texts(summary: Summary) -> tuple[list[str], list[list[TextCell]]]:
    unit, methods = summary.distance_unit, summary.methods
    overall = [method.overall for method in methods]
    columns = [
        ("method", _plain([m.name + (" (baseline)" if m.is_baseline else "") for m in methods])),
        ("DSC", _scores([scores.dsc for scores in overall], 3)),
        ("difference in DSC", _plain([_signed(scores.dsc.difference) for scores in overall])),
        ("p (Holm)", _plain([_p(scores.dsc.difference) for scores in overall])),
        ("verdict", _plain([_verdict(m, m.overall.dsc) for m in methods])),
        ("SD over seeds", _plain([_number(scores.dsc.seed_sd, "{:.3f}") for scores in overall])),
        ("mIoU", _scores([scores.iou for scores in overall], 3)),
        (f"HD95 ({unit})", _scores([scores.hd95_mm for scores in overall], 2, smallest=True)),
        ("NSD", _scores([scores.nsd for scores in overall], 3)),
        ("missed", _plain([str(_count(m, "missed")) for m in methods])),
        ("spurious", _plain([str(_count(m, "spurious")) for m in methods])),
        ("parameters (M)", _lowest(methods, "parameters", lambda v: f"{v / 1e6:.3f}")),
        ("multiply-adds (G)", _lowest(methods, "multiply_adds", lambda v: giga(int(v)))),
        ("latency (ms)", _lowest(methods, "latency_s", lambda v: f"{1000 * v:.1f}")),
        ("peak memory (MiB)", _lowest(methods, "peak_memory_bytes", lambda v: mebibytes(int(v)))),
        ("training (s)", _plain([_number(m.training.mean_seconds, "{:,.0f}") for m in methods])),
        ("epochs", _plain([_number(m.training.mean_epochs, "{:.4g}") for m in methods])),
        ("to level (epochs)", _plain([_number(m.convergence.median_epochs, "{:g}") for m in methods])),
        ("to level (s)", _plain([_number(m.convergence.median_seconds, "{:,.0f}") for m in methods])),
        ("seeds", _plain([str(len(m.seeds)) for m in methods])),
    ]
    headings, cells = zip(*columns, strict=True)
    return list(headings), [list(row) for row in zip(*cells, strict=True)]


def class_texts(summary: Summary) -> tuple[list[str], list[list[TextCell]]]:
    headings = ["class", "method", "DSC", "difference in DSC", "p (Holm)", "verdict", "IoU"]
    headings += [f"HD95 ({summary.distance_unit})", "difference in HD95", "NSD", *STATUSES]
    rows = []
    for name in summary.labels:
        scores = [method.classes[name] for method in summary.methods]
        columns = [
            _plain([name] * len(scores)),
            _plain([method.name + (" (baseline)" if method.is_baseline else "") for method in summary.methods]),
            _scores([s.dsc for s in scores], 3),
            _plain([_signed(s.dsc.difference) for s in scores]),
            _plain([_p(s.dsc.difference) for s in scores]),
            _plain([_verdict(m, s.dsc) for m, s in zip(summary.methods, scores, strict=True)]),
            _scores([s.iou for s in scores], 3),
            _scores([s.hd95_mm for s in scores], 2, smallest=True),
            _plain([_signed(s.hd95_mm.difference, 2) for s in scores]),
            _scores([s.nsd for s in scores], 3),
            *(_plain([str(method.counts[name][status]) for method in summary.methods]) for status in STATUSES),
        ]
        rows += [list(row) for row in zip(*columns, strict=True)]
    return headings, rows


def _method_numbers(summary: Summary) -> tuple[list[str], list[list[object]]]:
    headings = ["method", "network", "loss", "recipe", "baseline", "seeds", "cases"]
    headings += [*_score_headings(summary), *STATUSES]
    costs = ["parameters", "multiply_adds", "latency_s", "latency_threads", "peak_memory_bytes"]
    headings += costs
    headings += ["train_seconds", "epochs", "steps", "level", "epochs_to_level", "seconds_to_level"]
    rows: list[list[object]] = []
    for m in summary.methods:
        training, convergence = m.training, m.convergence
        rows.append(
            [
                *(m.name, m.network, m.loss, m.recipe, m.is_baseline, " ".join(map(str, m.seeds)), m.cases),
                *_score_numbers(m.overall),
                *(_count(m, status) for status in STATUSES),
                *(getattr(m.cost, name, None) for name in costs),
                *(training.mean_seconds, training.mean_epochs, training.mean_steps, summary.convergence_level),
                *(convergence.median_epochs, convergence.median_seconds),
            ]
        )
    return headings, rows


def _class_numbers(summary: Summary) -> tuple[list[str], list[list[object]]]:
    rows: list[list[object]] = [
        [name, m.name, *_score_numbers(m.classes[name]), *(m.counts[name][status] for status in STATUSES)]
        for name in summary.labels
        for m in summary.methods
    ]
    return ["class", "method", *_score_headings(summary), *STATUSES], rows


def _case_numbers(summary: Summary) -> tuple[list[str], list[list[object]]]:
    fields = list(ClassMetrics.model_fields)
    headings = ["method", "seed", "case", "class", *(_with_unit(field, summary) for field in fields)]
    rows: list[list[object]] = [
        [row.method, row.seed, row.case, row.class_name, *(getattr(row, field) for field in fields)]
        for row in summary.cases
    ]
    return headings, rows


def _trial_facts(summary: Summary) -> tuple[list[str], list[list[object]]]:
    fields = ["id", "network", "loss", "recipe", "seed", "status", "error", "started", "seconds", "train_seconds"]
    fields += ["epochs", "steps", "stopped_because", "threads", "data_hash", "fingerprint"]
    packages = sorted({name for record in summary.trials for name in record.versions})
    rows: list[list[object]] = [
        [*(getattr(record, field) for field in fields), *(record.versions.get(name) for name in packages)]
        for record in summary.trials
    ]
    for name in summary.missing:
        known = {"id": name, "status": "not run"}
        rows.append([known.get(field) for field in [*fields, *packages]])
    return [*fields, *(f"version {name}" for name in packages)], rows


_SCORE = ("n", "mean", "low", "high", "seed_sd")
_DIFFERENCE = ("n", "left_out", "mean", "low", "high", "p", "p_holm", "verdict")


def _score_headings(summary: Summary) -> list[str]:
    fields = [*_SCORE, *(f"difference {field}" for field in _DIFFERENCE)]
    return [f"{_with_unit(metric, summary)} {field}" for metric in METRICS for field in fields]


def _score_numbers(scores: Scores) -> list[object]:
    numbers: list[object] = []
    for metric in METRICS:
        score: Score = getattr(scores, metric)
        numbers += [getattr(score, field) for field in _SCORE]
        numbers += [getattr(score.difference, field, None) for field in _DIFFERENCE]
    return numbers


def _with_unit(field: str, summary: Summary) -> str:
    return f"hd95_{summary.distance_unit}" if field == "hd95_mm" else field


def _plain(texts: Sequence[str]) -> list[TextCell]:
    return [TextCell(text) for text in texts]


def _scores(scores: Sequence[Score], digits: int, *, smallest: bool = False) -> list[TextCell]:
    best = _best([score.mean for score in scores], digits, smallest)
    return [TextCell(interval(s.mean, s.low, s.high, f".{digits}f"), i in best) for i, s in enumerate(scores)]


def _lowest(methods: Sequence[MethodSummary], cost: str, show: Callable[[float], str]) -> list[TextCell]:
    values: list[float | None] = [getattr(method.cost, cost, None) for method in methods]
    best = _best(values, None, True)
    return [TextCell(NONE if value is None else show(value), i in best) for i, value in enumerate(values)]


def _best(values: Sequence[float | None], digits: int | None, smallest: bool) -> set[int]:
    """Where the best value stands, as far as `digits` show; nowhere if all that are known are equal, or one only."""
    known = {i: v if digits is None else round(v, digits) for i, v in enumerate(values) if v is not None}
    if len(set(known.values())) < 2:
        return set()
    best = (min if smallest else max)(known.values())
    return {i for i, value in known.items() if value == best}


def interval(mean: float | None, low: float | None, high: float | None, form: str) -> str:
    if mean is None:
        return NONE
    return f"{mean:{form}}" + ("" if low is None or high is None else f" [{low:{form}}, {high:{form}}]")


def _signed(difference: Difference | None, digits: int = 3) -> str:
    if difference is None:
        return NONE
    text = interval(difference.mean, difference.low, difference.high, f"+.{digits}f")
    return text.replace("-", "−")  # a minus, as long as the plus above it


def _p(difference: Difference | None) -> str:
    p = None if difference is None else difference.p_holm
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _verdict(method: MethodSummary, score: Score) -> str:
    return NONE if method.is_baseline or score.difference is None else score.difference.verdict


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def _count(method: MethodSummary, status: Status) -> int:
    return sum(counts[status] for counts in method.counts.values())
