"""What networks cost as text, Markdown and CSV: one network in full, or many in a table."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

from lightm.errors import InputError
from lightm.lab.complexity.account import Account, account
from lightm.lab.complexity.operations import known_names
from lightm.nets.presets import PRESETS
from lightm.progress import Progress

Line = Sequence[str]

SYMBOLS = (
    "C width of a layer, O width behind it, E = expand C, N states, R = ceil(C / 16), K = 4 (kernel size), I image "
    "channels, H = C / 2, P channels of a Mamba-2 head (16, or E if fewer); "
    "with g parts, primes mark the width C' = C / g of one part and what follows from it."
)
DEFINITIONS = (
    "multiply-add: a product with the addition of its result, in matmuls, convolutions, attention, linear "
    "interpolation and the scan (3 per token, channel and state: the state's update, the output's sum, and the lone "
    "products dt A and dt u B, half each; in Mamba-2, where dt A is computed once per head, 2.5, and half a one per "
    "token and head). Element-wise products, norms and poolings are not counted.",
    "exponential: one per token, channel and state in the scan, in Mamba-2 one per token and head; one per element in "
    "SiLU, softplus, sigmoid, softmax, tanh and GELU.",
)


def aligned(rows: Sequence[Line], *, left: int = 1) -> list[str]:
    """Return rows as lines of equal columns, the first `left` columns flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def markdown(rows: Sequence[Line], *, left: int = 1) -> list[str]:
    """Return rows, the first of them the heading, as a Markdown table; numbers flush right."""
    rule = ["---" if i < left else "---:" for i in range(len(rows[0]))]
    return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]


def csv_text(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV below a heading; None becomes an empty field, numbers keep all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows(rows)
    return text.getvalue()


def giga(number: int) -> str:
    """Return 1e9 as 1.00, with three digits at least; nothing at all as 0."""
    if not number:
        return "0"
    value = number / 1e9
    return f"{value:,.{0 if value >= 1000 else 2 if value >= 1 else 3}f}"


def mebibytes(number: int) -> str:
    """Return bytes as whole MiB, with separators."""
    return f"{number / 2**20:,.0f}"


def source_rows(account: Account) -> list[Line]:
    """Parameters by source: the closed forms of one layer, their sum over the network, and the count."""
    table = account.parameters
    counted, expected, texts = table.by("source"), table.expected_by_source(), table.formulas()
    rows: list[Line] = [("source", "formula of one layer", "formula's sum", "counted")]
    for source, number in counted.items():
        value = expected[source]
        rows.append((source, "; ".join(texts[source]) or "-", "-" if value is None else f"{value:,}", f"{number:,}"))
    known = [value for value in expected.values() if value is not None]
    total = f"{sum(known):,}" if len(known) == len(expected) else "-"
    return [*rows, ("total", "", total, f"{table.total:,}")]


def grouped_rows(account: Account, what: str) -> list[Line]:
    """Parameters summed by `stage` or `kind`, and their share."""
    total, sums = account.parameters.total, account.parameters.by(what)
    return [(what, "parameters", "share"), *((k, f"{n:,}", f"{100 * n / total:.1f} %") for k, n in sums.items())]


def operation_rows(account: Account) -> list[Line]:
    """Multiply-adds and exponentials by kind, in 1e9, and what counters without a rule for the scan give."""
    total = account.operations.total
    rows: list[Line] = [("operations", "1e9")]
    rows += [(f"multiply-adds, {kind}", giga(number)) for kind, number in total.multiply_adds.most_common() if number]
    rows.append(("multiply-adds, all", giga(total.multiply_adds.total())))
    if total.without_scan != total.multiply_adds.total():
        rows.append(("multiply-adds as counters without the scan give them", giga(total.without_scan)))
    rows += [(f"exponentials, {kind}", giga(number)) for kind, number in total.exponentials.most_common() if number]
    return [*rows, ("elements written by all other operators", giga(total.other_elements))]


def layer_rows(account: Account) -> list[Line]:
    """Parameters, multiply-adds and exponentials layer by layer."""
    rows: list[Line] = [("stage", "layer", "parameters", "multiply-adds, 1e9", "scan, 1e9", "exponentials, 1e9")]
    for layer in account.layers:
        count = layer.operations
        numbers = (count.multiply_adds.total(), count.multiply_adds["scan"], count.exponentials.total())
        if layer.parameters or any(numbers):
            rows.append((layer.stage, layer.layer, f"{layer.parameters:,}", *map(giga, numbers)))
    return rows


def describe(account: Account) -> str:
    """Return the whole account as text."""
    size = " x ".join(map(str, account.spatial))
    options = "".join(f", {key} {value}" for key, value in account.options.items())
    memory = [
        ("activations, float32, one image", "MiB"),
        ("inference: peak of live tensors", mebibytes(account.memory.inference_bytes)),
        ("training: kept for the backward pass", mebibytes(account.memory.training_bytes)),
    ]
    lines = [
        f"{account.name}{options}: {size}, {account.in_channels} channel(s), {account.out_channels} classes",
        "",
        *aligned(source_rows(account), left=2),
        *([SYMBOLS] if account.parameters.closed_form else []),
        "",
        *aligned(grouped_rows(account, "stage")),
        "",
        *aligned(grouped_rows(account, "kind")),
        "",
        *aligned(layer_rows(account), left=2),
        "",
        *aligned(operation_rows(account)),
        *DEFINITIONS,
        "",
        *aligned(memory),
        "(plain operators, without weights; the fused CPU path needs less, measured by `lightm bench`)",
    ]
    if (latency := account.latency) is not None:
        lines += [
            "",
            f"latency: {latency.seconds:.3f} s, median of {latency.repeats} passes ({latency.fastest:.3f} to "
            f"{latency.slowest:.3f}) on {latency.threads} CPU thread(s), as this machine runs it",
        ]
    return "\n".join(lines)


# Many networks --------------------------------------------------------------------------------------------------------


_OWN = {  # the first prefix that fits
    "lightm-unet-released": "LightM-UNet, released code (2024)",
    "lightm-unet": "LightM-UNet, arXiv 2403.05246 (2024)",
    "spm": "SPM, after arXiv 2403.20035 (2024)",
    "lightm": "LightM (own)",
}

SOURCES = {
    "unet": "arXiv 1505.04597; residual units: Kerfoot et al., STACOM 2018",
    "dynunet": "Nature Methods 18, 2021; arXiv 1904.08128",
    "segresnet": "BrainLes 2018; arXiv 1810.11654",
    "attention-unet": "MIDL 2018; arXiv 1804.03999",
    "unetr": "WACV 2022; arXiv 2103.10504",
    "swinunetr": "BrainLes 2021; arXiv 2201.01266",
    "umamba-bot": "arXiv 2401.04722",
    "umamba-enc": "arXiv 2401.04722",
    "ultralight-vm-unet": "arXiv 2403.20035",
    "transunet": "arXiv 2102.04306",
    "nnformer": "IEEE TIP 32, 2023; arXiv 2109.03201",
    "deeplabv3plus": "ECCV 2018; arXiv 1802.02611",
}
"""Where each baseline was published."""


@dataclass(frozen=True)
class Dice:
    """A network's mean Dice over the test cases of one run on a data set, with the 95% interval where known."""

    data: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One network of the comparison; operations for one image. `refused` says why it has none."""

    name: str
    source: str
    parameters: int = 0
    multiply_adds: int = 0
    multiply_adds_without_scan: int = 0
    exponentials: int = 0
    inference_bytes: int = 0
    training_bytes: int = 0
    dice: tuple[Dice, ...] = ()
    refused: str = ""


def source_of(name: str) -> str:
    """Return the paper or code that a network comes from, with its year."""
    if name not in PRESETS:
        source = SOURCES.get(name, "")
        number = re.search(r"arXiv (\d\d)\d\d\.", source)
        dated = re.search(r"\b(19|20)\d\d(?![.\d])", source)
        return f"{source} (20{number[1]})" if number and not dated else source
    return next((text for prefix, text in _OWN.items() if name.startswith(prefix)), "LightM (variant)")


def compare(
    names: Sequence[str] | None = None,
    *,
    spatial: Sequence[int] = (128, 128, 128),
    in_channels: int = 1,
    out_channels: int = 3,
    dice: Mapping[str, Sequence[Dice]] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Return a row for every network, fewest parameters first; networks that refuse the size come last, saying why.

    Arguments as in `account`; `names`: by default all that `lightm.nets.create` knows; `dice`: scores of runs by the
    name of the network. Raises InputError for an unknown name.
    """
    known, rows = known_names(), []
    wanted = known if names is None else list(names)
    for done, name in enumerate(wanted):
        if progress is not None:
            progress("networks", done, len(wanted))
        try:
            costs = account(name, spatial=spatial, in_channels=in_channels, out_channels=out_channels)
        except InputError as error:
            if name not in known:
                raise
            rows.append(Row(name, source_of(name), refused=str(error)))
            continue
        total = costs.operations.total
        rows.append(
            Row(
                name=name,
                source=source_of(name),
                parameters=costs.parameters.total,
                multiply_adds=total.multiply_adds.total(),
                multiply_adds_without_scan=total.without_scan,
                exponentials=total.exponentials.total(),
                inference_bytes=costs.memory.inference_bytes,
                training_bytes=costs.memory.training_bytes,
                dice=tuple((dice or {}).get(name, ())),
            )
        )
    if progress is not None:
        progress("networks", len(wanted), len(wanted))
    return sorted(rows, key=lambda row: (bool(row.refused), row.parameters, row.name))


def _cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    scored = list(dict.fromkeys(dice.data for row in rows for dice in row.dice))
    costs = ("parameters, M", "multiply-adds, G", "without scan, G", "exponentials, G")
    heading = ("network", "source", *costs, "inference, MiB", "training, MiB")
    cells: list[tuple[str, ...]] = [(*heading, *(f"Dice, {data}" for data in scored))]
    for row in rows:
        found = {dice.data: dice for dice in row.dice}
        operations = (row.multiply_adds, row.multiply_adds_without_scan, row.exponentials)
        memory = (row.inference_bytes, row.training_bytes)
        if not row.refused:
            numbers = (f"{row.parameters / 1e6:.2f}", *map(giga, operations), *map(mebibytes, memory))
            cells.append((row.name, row.source, *numbers, *(_score(found.get(data)) for data in scored)))
    return cells


def _score(dice: Dice | None) -> str:
    if dice is None:
        return "-"
    interval = "" if dice.low is None or dice.high is None else f" [{dice.low:.3f}, {dice.high:.3f}]"
    return f"{dice.value:.3f}{interval}"


def _refusals(rows: Sequence[Row]) -> list[str]:
    return [f"not for this size: {row.refused}" for row in rows if row.refused]


def as_text(rows: Sequence[Row]) -> str:
    """Return the comparison as aligned text."""
    return "\n".join([*aligned(_cells(rows), left=2), *_refusals(rows)])


def as_markdown(rows: Sequence[Row]) -> str:
    """Return the comparison as a Markdown table."""
    refused = _refusals(rows)
    return "\n".join([*markdown(_cells(rows), left=2), *([""] if refused else []), *(f"- {x}" for x in refused), ""])


def as_csv(rows: Sequence[Row]) -> str:
    """Return the comparison as CSV, numbers in units of one; one line for each network and data set with a score."""
    names = [field.name for field in fields(Row) if field.name != "dice"]
    lines = [
        [*(getattr(row, name) for name in names), *(astuple(dice) if dice else [None] * 4)]
        for row in rows
        for dice in row.dice or (None,)
    ]
    return csv_text([*names, "dice_data", "dice", "dice_low", "dice_high"], lines)
