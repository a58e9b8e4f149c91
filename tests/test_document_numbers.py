"""Numbers in the documents are those of the results files that they name, and the tables of comparisons theirs."""

from __future__ import annotations

import csv
import re
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = {path.name: path for path in (ROOT / "benchmarks" / "results").iterdir() if path.is_file()}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMPARISONS = ROOT / "docs" / "results"
_NUMBER = r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?"


def claims(text: str) -> list[tuple[list[str], str]]:
    """Each paragraph that names results files, with the table before or after it that it speaks of."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    blocks, found = text.split("\n\n"), []
    for index, block in enumerate(blocks):
        if not (files := [name for name in RESULTS if name in block]):
            continue
        before, after = blocks[index - 1] if index else "", blocks[index + 1] if index + 1 < len(blocks) else ""
        table = block.lstrip().startswith("|")
        parts = [before] if before.lstrip().startswith("|") and not table else []
        parts += [block, *([after] if block.rstrip().endswith(":") and after.lstrip().startswith("|") else [])]
        found.append((files, "\n".join(parts)))
    return found


def numbers_of(path: Path) -> set[float]:
    """All numbers of a results file, and of a table of networks how many times a value each is of another."""
    found = {float(number) for number in re.findall(_NUMBER, path.read_text(encoding="utf-8"))}
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            peaks = [float(row["peak_mb"]) for row in csv.DictReader(file) if row.get("peak_mb")]
        found |= {a / b for a, b in product(peaks, peaks)}
    return found


def unfounded(text: str, numbers: set[float]) -> list[str]:
    """The decimals of a text that no number rounds to."""
    missing = []
    for shown in re.findall(r"(?<![\w.])\d+\.\d+(?:e[-+]?\d+)?(?![\w.]*\.\d)", text):
        mantissa, _, exponent = shown.partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        if not any(abs(abs(number) - float(shown)) <= 0.500001 * unit for number in numbers):
            missing.append(shown)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_decimals_beside_a_results_file_are_in_it(page: Path) -> None:
    for files, text in claims(page.read_text(encoding="utf-8")):
        numbers = set().union(*(numbers_of(RESULTS[name]) for name in files))
        assert unfounded(text, numbers) == [], f"{page.name}: not in {', '.join(files)}"


def test_a_number_that_no_file_has_is_found() -> None:
    assert unfounded("0.871 seconds, 2.4e-3, 1.0", {0.8712, 0.00242, 3}) == ["1.0"]
    pages = [claims(page.read_text(encoding="utf-8")) for page in PAGES]
    assert sum(len(found) for found in pages) > 8


def shown_p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


@pytest.mark.parametrize("name", sorted(path.parent.parent.name for path in COMPARISONS.glob("*/tables/methods.csv")))
def test_the_tables_of_comparisons_are_those_of_their_files(name: str) -> None:
    page = (COMPARISONS / "README.md").read_text(encoding="utf-8")
    table = page.split(f"<!-- {name} -->", 1)[1].split("<!-- end -->", 1)[0]
    with (COMPARISONS / name / "tables" / "methods.csv").open(encoding="utf-8", newline="") as file:
        methods = {row["method"]: row for row in csv.DictReader(file)}
    lines = [line for line in table.splitlines() if line.startswith("| ") and "| ---" not in line][1:]
    assert len(lines) == len(methods)
    for line in lines:
        method, score, change, p, verdict, spread, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        row = methods[method.removesuffix(" (baseline)")]
        got = re.findall(r"\d\.\d+", score)
        assert got == [f"{float(row[key]):.3f}" for key in ("dsc mean", "dsc low", "dsc high")], method
        assert spread == "–" or spread == f"{float(row['dsc seed_sd']):.3f}", method
        if row["baseline"] == "False":
            known = [f"{float(row[f'dsc difference {key}']):+.3f}" for key in ("mean", "low", "high")]
            assert re.findall(r"[-+]\d\.\d+", change) == known, method
            assert (p, verdict) == (shown_p(float(row["dsc difference p_holm"])), row["dsc difference verdict"]), method
