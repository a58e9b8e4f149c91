"""The comparison of networks: source, parameters, operations, and Dice where runs exist."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from lightm.errors import InputError
from lightm.lab.complexity.account import account
from lightm.lab.complexity.shapes import known_names
from lightm.lab.complexity.text import aligned, giga, markdown
from lightm.nets.presets import PRESETS

_OWN = {  # the first prefix that fits
    "lightm-unet-released": "LightM-UNet, released code (2024)",
    "lightm-unet": "LightM-UNet, arXiv 2403.05246 (2024)",
    "spm": "SPM, after arXiv 2403.20035 (2024)",
    "lightm": "LightM (own)",
}


@dataclass(frozen=True)
class Dice:
    """A network's mean Dice over the test cases of one run, with the data set and the 95% interval where known."""

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
        from lightm.lab.complexity.references import FACTS

        source = FACTS[name].source if name in FACTS else ""
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
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Row]:
    """Return a row for every network, fewest parameters first; networks that refuse the size come last, saying why.

    Arguments: `names`, by default all that `lightm.nets.create` knows; `spatial`, `in_channels`, `out_channels` as in
    `account`; `dice`: scores of runs by the name of the network. Raises InputError for an unknown name.
    """
    known = known_names()
    rows = []
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
    heading: tuple[str, ...] = ("network", "source", "parameters, M", "multiply-adds, G", "without scan, G")
    heading += ("exponentials, G", "inference, MiB", "training, MiB")
    cells: list[tuple[str, ...]] = [(*heading, *(f"Dice, {data}" for data in scored))]
    for row in rows:
        if row.refused:
            continue
        found = {dice.data: dice for dice in row.dice}
        cells.append(
            (
                row.name,
                row.source,
                f"{row.parameters / 1e6:.2f}",
                giga(row.multiply_adds),
                giga(row.multiply_adds_without_scan),
                giga(row.exponentials),
                f"{row.inference_bytes / 2**20:,.0f}",
                f"{row.training_bytes / 2**20:,.0f}",
                *(_score(found.get(data)) for data in scored),
            )
        )
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
    text = io.StringIO()
    names = [key for key in asdict(Row("", "")) if key != "dice"]
    writer = csv.DictWriter(text, [*names, "dice_data", "dice", "dice_low", "dice_high"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = {key: value for key, value in asdict(row).items() if key != "dice"}
        for dice in row.dice or (None,):
            score = {} if dice is None else {"dice_data": dice.data, "dice": dice.value}
            if dice is not None and dice.low is not None:
                score |= {"dice_low": dice.low, "dice_high": dice.high}
            writer.writerow({**plain, **score})
    return text.getvalue()
