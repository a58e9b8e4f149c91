"""Tables of a comparison: right numbers in the right columns, names escaped, bold only where something is best."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from lightm.lab.compare import read_comparison
from lightm.lab.compare.results import Summary
from lightm.lab.compare.statistics import summarize_comparison
from lightm.lab.compare.tables import (
    TextCell,
    as_latex,
    as_markdown,
    escape_latex,
    escape_markdown,
    write_tables,
)
from lightm.lab.complexity.report import csv_text
from tests.lab.compare.made import make_comparison

NASTY = r"50% a&b_c #1 {x} $y$ ~^ \z <w> | *q* [r]"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Summary, Path]:
    folder = make_comparison(tmp_path_factory.mktemp("c") / "c", cases=10, leave_out=[("unet_plain", 1)])
    summary = summarize_comparison(read_comparison(folder))
    paths = write_tables(summary, folder)
    assert sorted(path.name for path in paths) == sorted(
        [f"{name}.{kind}" for name in ("methods", "classes") for kind in ("csv", "md", "tex")]
        + ["cases.csv", "trials.csv"]
    )
    assert all(path.parent == folder / "tables" and path.stat().st_size for path in paths)
    return summary, folder / "tables"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown_rows(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    trials = [[trial.strip() for trial in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in trials}) == 1
    return [dict(zip(trials[0], row, strict=True)) for row in trials[2:]]


def test_methods_in_numbers(made: tuple[Summary, Path]):
    summary, tables = made
    rows = read(tables / "methods.csv")
    assert [row["method"] for row in rows] == ["lightm-small", "segresnet", "unet_plain"]
    for row, method in zip(rows, summary.methods, strict=True):
        assert float(row["dsc mean"]) == method.overall.dsc.mean
        assert float(row["hd95_mm high"]) == method.overall.hd95_mm.high
        assert float(row["train_seconds"]) == method.training.mean_seconds
        assert int(row["missed"]) == sum(counts["missed"] for counts in method.counts.values())
    assert rows[0]["dsc difference mean"] == ""
    assert float(rows[1]["dsc difference p_holm"]) == summary.methods[1].overall.dsc.difference.p_holm
    assert rows[2]["peak_memory_bytes"] == ""
    assert rows[2]["epochs_to_level"] == ""


def test_methods_for_readers(made: tuple[Summary, Path]):
    summary, tables = made
    rows = markdown_rows(tables / "methods.md")
    score = summary.methods[0].overall.dsc
    assert rows[0]["method"] == "lightm-small (baseline)"
    assert rows[0]["DSC"] == rf"**{score.mean:.3f} \[{score.low:.3f}, {score.high:.3f}\]**"
    assert not rows[1]["DSC"].startswith("**")
    assert (rows[0]["difference in DSC"], rows[0]["p (Holm)"], rows[0]["verdict"]) == ("–", "–", "–")
    difference = summary.methods[1].overall.dsc.difference
    assert difference.mean < 0
    assert rows[1]["difference in DSC"].startswith(f"−{-difference.mean:.3f} ")
    assert (rows[1]["p (Holm)"], rows[1]["verdict"]) == (f"{difference.p_holm:.3f}", "worse")
    assert (rows[0]["HD95 (mm)"][:2], rows[2]["HD95 (mm)"][:2] == "**") == ("**", False)
    assert (rows[0]["parameters (M)"], rows[1]["parameters (M)"]) == ("**0.266**", "1.063")
    assert (rows[0]["latency (ms)"], rows[1]["multiply-adds (G)"]) == ("**50.0**", "3.00")
    assert (rows[0]["peak memory (MiB)"], rows[2]["peak memory (MiB)"]) == ("**286**", "–")
    assert (rows[0]["training (s)"], rows[2]["seeds"], rows[2]["SD over seeds"]) == ("60", "1", "–")
    text = (tables / "methods.md").read_text(encoding="utf-8")
    assert "- 1 of 6 trainings have not run" in text
    assert "differences are to lightm-small" in text


def test_classes(made: tuple[Summary, Path]):
    summary, tables = made
    rows = read(tables / "classes.csv")
    assert [(row["class"], row["method"]) for row in rows] == [
        (name, method.name) for name in ("liver", "tumour") for method in summary.methods
    ]
    assert float(rows[4]["nsd mean"]) == summary.methods[1].classes["tumour"].nsd.mean
    assert (rows[5]["missed"], rows[3]["absent"]) == ("2", "4")
    assert rows[5]["hd95_mm difference left_out"] == "2"
    texts = markdown_rows(tables / "classes.md")
    assert [row["DSC"].startswith("**") for row in texts] == [True, False, False] * 2
    assert texts[5]["missed"] == "2"


def test_cases_and_trials(made: tuple[Summary, Path]):
    summary, tables = made
    cases = read(tables / "cases.csv")
    assert len(cases) == 5 * 10 * 2  # trainings, cases, classes
    row = next(r for r in cases if r["status"] == "missed")
    assert (row["method"], row["class"], row["dsc"], row["hd95_mm"]) == ("unet_plain", "tumour", "0.0", "")
    mean = sum(float(r["dsc"]) for r in cases if r["method"] == "segresnet" and r["class"] == "liver") / 20
    assert mean == pytest.approx(summary.methods[1].classes["liver"].dsc.mean)
    trials = read(tables / "trials.csv")
    assert [trial["status"] for trial in trials] == ["finished"] * 5 + ["not run"]
    assert trials[-1]["id"] == summary.missing[0]
    assert (trials[0]["steps"], trials[0]["threads"], trials[0]["version torch"]) == ("120", "2", "2.5.0")


def test_pixels_are_no_millimetres(tmp_path: Path):
    folder = make_comparison(tmp_path / "c", spatial_dims=2, cases=6, seeds=[0])
    write_tables(summarize_comparison(read_comparison(folder)), folder)
    assert "hd95_px mean" in read(folder / "tables" / "methods.csv")[0]
    assert "hd95_px" in read(folder / "tables" / "cases.csv")[0]
    text = (folder / "tables" / "methods.tex").read_text(encoding="utf-8")
    assert "HD95 (px)" in text
    assert not re.search(r"\bmm\b", text)


def test_one_method_has_no_best(tmp_path: Path):
    folder = make_comparison(tmp_path / "c", methods={"lightm-small": 0.8}, cases=6)
    write_tables(summarize_comparison(read_comparison(folder)), folder)
    assert "**" not in (folder / "tables" / "methods.md").read_text(encoding="utf-8")
    assert "textbf" not in (folder / "tables" / "methods.tex").read_text(encoding="utf-8")


def test_equal_methods_have_no_best(tmp_path: Path):
    folder = make_comparison(tmp_path / "c", methods={"a": 0.8, "b": 0.8}, cases=6)
    write_tables(summarize_comparison(read_comparison(folder)), folder)
    rows = markdown_rows(folder / "tables" / "methods.md")
    assert not any(rows[i][heading].startswith("**") for i in (0, 1) for heading in ("DSC", "mIoU", "NSD"))


def check_latex(text: str) -> None:
    """Braces and environments balanced, as many trials in a row as columns, no bare special character."""
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    body = "\n".join(lines)
    bare = re.sub(r"\\[&%$#_{}\\]", "", body)
    depth = 0
    for letter in bare:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        assert depth >= 0
    assert depth == 0
    assert not re.search(r"[%#_^~<>|\"]", bare)
    assert bare.replace("$-$", "").count("$") == 0
    assert re.findall(r"\\(begin|end)\{(\w+)\}", body) == [("begin", "tabular"), ("end", "tabular")]
    assert [body.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", body).group(1))
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) >= 2
    assert all(len(re.findall(r"(?<!\\)&", row)) == columns - 1 for row in rows)
    assert not any(row.startswith(("[", "*")) for row in rows)


def test_latex_is_balanced(made: tuple[Summary, Path]):
    for name in ("methods", "classes"):
        text = (made[1] / f"{name}.tex").read_text(encoding="utf-8")
        check_latex(text)
        assert text.isascii()
        assert r"unet\_plain" in text
        assert r"\textbf{" in text


def test_names_are_escaped(tmp_path: Path):
    folder = make_comparison(tmp_path / "c", classes=[NASTY, "[first] line\nbreak"], cases=6)
    write_tables(summarize_comparison(read_comparison(folder)), folder)
    text = (folder / "tables" / "classes.tex").read_text(encoding="utf-8")
    check_latex(text)
    assert "\n{}[first] line break & " in text
    rows = markdown_rows(folder / "tables" / "classes.md")
    assert rows[0]["class"] == escape_markdown(NASTY)
    assert read(folder / "tables" / "classes.csv")[0]["class"] == NASTY


def test_escaping_by_hand():
    assert escape_latex(r"a_b & 5% #\^~{}$") == (
        r"a\_b \& 5\% \#\textbackslash{}\textasciicircum{}\textasciitilde{}\{\}\$"
    )
    assert escape_latex("–\n−1 <2>") == r"-- $-$1 \textless{}2\textgreater{}"
    assert escape_markdown("a_b|c*d <e> & [f]") == r"a\_b\|c\*d &lt;e> &amp; \[f\]"
    rows = [[TextCell("x_1"), TextCell("2", best=True)]]
    assert as_markdown(["a", "b"], rows, left=1, below=["one"]) == (
        "| a | b |\n| --- | ---: |\n| x\\_1 | **2** |\n\n- one\n"
    )
    assert r"x\_1 & \textbf{2} \\" in as_latex(["a", "b"], rows, left=1, below=[])
    assert csv_text(["a", "b"], [["x,y", None]]) == 'a,b\n"x,y",\n'
