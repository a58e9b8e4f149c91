"""Documents say what is so: measured numbers stand in their files, commands, options, paths, links and names exist."""

from __future__ import annotations

import csv
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import lightm
from lightm.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "src").rglob("*.md")),
]
# what happened once stays as it was written: old paths and names are no mistakes there
HISTORY = [path for path in PAGES if path.name == "CHANGELOG.md" or path.parent.name == "decisions"]
CURRENT = [path for path in PAGES if path not in HISTORY]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def rows_below(heading: str) -> list[list[str]]:
    """The cells of all table rows of README between a heading and the next."""
    text = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)
    ]
    return [row for row in rows if not set(row[0]) <= set("-: ")]


def number_and_interval(text: str) -> list[str]:
    return re.findall(r"-?\d+\.\d+", text)


def rounded(value: Any, like: str) -> str:
    return f"{float(value):.{len(like.partition('.')[2])}f}"


# Numbers ------------------------------------------------------------------------------------------------------------

RUNS = {
    "MSD Hippocampus": "hippocampus-15m",
    "Shenzhen chest X-ray 256 x 256": "shenzhen-xray-15m",
    "liver phantoms": "demo",
}
MEASURED = rows_below("What was measured")


def test_the_scores_of_the_readme_are_those_of_the_runs() -> None:
    found = 0
    for data, training, scores in (row for row in MEASURED if len(row) == 3 and row[0] != "data"):
        name = next(name for name in RUNS if data.startswith(name))
        run = json.loads((ROOT / "benchmarks" / "results" / f"{RUNS[name]}.json").read_text(encoding="utf-8"))
        assert f"--max-time {training.removesuffix(' minutes')}m" in run["command"] or "demo" in run["command"]
        assert re.search(r"(\d+) test cases", data)[1] == str(run["split"]["test"])  # type: ignore[index]
        for organ, score in re.findall(r"(\w+) (\d\.\d+ \[[^\]]*\])", scores):
            names = {entry["class_name"].lower(): entry for entry in run["classes"]}
            dsc = names[organ if organ in names else {"lung": "lung"}[organ]]["dsc"]
            expected = [dsc["mean"], *dsc.get("interval", [dsc.get("low"), dsc.get("high")])]
            got = number_and_interval(score)
            assert got == [rounded(value, text) for value, text in zip(expected, got, strict=True)], f"{data}, {organ}"
            found += 1
    assert found == 5


def test_the_comparison_of_the_readme_is_that_of_its_tables() -> None:
    results = ROOT / "docs/results/baselines-time-hippocampus"
    with (results / "tables/methods.csv").open(encoding="utf-8", newline="") as file:
        methods = {row["method"].split(" (")[0]: row for row in csv.DictReader(file)}
    networks = json.loads((results / "networks.json").read_text(encoding="utf-8"))
    counts = json.dumps(networks)
    found = 0
    for network, parameters, score, deviation in (row for row in MEASURED if len(row) == 4 and "[" in row[2]):
        row = methods[network.split(" (")[0]]
        got = number_and_interval(score)
        expected = [row["dsc mean"], row["dsc low"], row["dsc high"]]
        assert got == [rounded(value, text) for value, text in zip(expected, got, strict=True)], network
        assert deviation == rounded(row["dsc seed_sd"], deviation), network
        assert any(rounded(int(n) / 1e6, parameters) == parameters for n in re.findall(r"\b\d{6,}\b", counts)), network
        found += 1
    assert found == 4


def test_the_times_of_the_readme_are_those_of_the_bench() -> None:
    with (ROOT / "benchmarks/results/network-128.csv").open(encoding="utf-8", newline="") as file:
        bench = {row["case"]: row for row in csv.DictReader(file)}
    found = 0
    for network, seconds, memory, ratio in (row for row in MEASURED if len(row) == 4 and re.fullmatch(r"\d+", row[2])):
        case = {"nnU-Net's network (DynUNet)": "dynunet", "UNETR": "unetr"}.get(network, network)
        assert seconds == rounded(bench[case]["p50_s"], seconds), network
        assert memory == rounded(bench[case]["peak_mb"], memory), network
        # the ratio is the median of the rounds' ratios
        assert ratio == rounded(bench[case]["ratio_to_baseline"] or 1, ratio), network
        found += 1
    assert found == 5


def test_the_prose_of_the_readme_repeats_its_tables() -> None:
    demo = next(row for row in MEASURED if row[0].startswith("liver phantoms"))[2]
    for organ in ("liver", "tumour"):
        said = re.search(rf"{organ} Dice about (\d\.\d+)", README)
        exact = re.search(rf"{organ} (\d\.\d+)", demo)
        assert said
        assert exact
        assert said[1] == rounded(exact[1], said[1])


# Commands -----------------------------------------------------------------------------------------------------------

COMMANDS = dict(typer.main.get_command(app).commands.items())  # type: ignore[attr-defined]
SHOWN = {name for name, command in COMMANDS.items() if not command.hidden}


def options(command: str) -> set[str]:
    """The options of a command, which are made when they are first asked for."""
    found = COMMANDS[command].get_params(COMMANDS[command].make_context(command, [], resilient_parsing=True))
    return {option for parameter in found for option in (*parameter.opts, *parameter.secondary_opts)}


def test_the_commands_of_make_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in CURRENT:
        text = page.read_text(encoding="utf-8")
        used = set(re.findall(r"(?:^|`)(?:PYTHON=\S+ )?make ([a-z][\w-]*)", text, re.M))
        assert used <= targets, f"{name_of(page)}: make {', '.join(sorted(used - targets))}"
    assert {"demo", "docs"} <= set(re.findall(r"make ([\w-]+)", README))
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert set(re.findall(r"^make ([\w-]+)", script, re.M)) == {"docs", "test"}


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_commands_and_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    fenced = "\n".join(re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.M | re.S))
    lines = re.findall(r"^(?:\$ )?(lightm .*)", fenced, re.M) + re.findall(r"`(lightm [^`\n]+)`", text)
    for line in lines:
        words = line.split("#")[0].split()[1:]
        if not words or words[0].startswith("-"):
            words = [word for word in words if word in COMMANDS] or words
        if words[0] == "VERB" or words[0].startswith("-"):
            continue
        assert words[0] in COMMANDS, f"`{line}`"
        known = options(words[0])
        for word in words:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in known | {"--help"}, f"`{line}`: {word}"


def test_the_table_of_verbs_is_whole() -> None:
    text = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`lightm ([\w-]+)", text)) >= SHOWN


# Paths, links, names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target = link.split("#")[0]
        if target and not re.match(r"[a-z]+:", target) and not target.startswith("reference/"):  # those are generated
            assert (page.parent / target).exists(), f"{name_of(page)}: {link}"


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(
        r"\b((?:src|docs|tests|examples|benchmarks)/[\w./-]*\w\.(?:py|md|csv|yaml|json|svg))\b", text
    ):
        places = (ROOT, page.parent, ROOT / "benchmarks")
        assert any((place / path).exists() for place in places) or "/NAME" in path, f"{name_of(page)}: {path}"


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_python_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for dotted in sorted(set(re.findall(r"(?<![\w/.-])lightm((?:\.[A-Za-z_]\w*)+)", text))):
        found: Any = lightm
        parts = dotted[1:].split(".")
        if parts[-1] in ("networks", "losses", "formats", "md", "svg") and len(parts) == 1:
            continue  # a group of entry points, a file
        if len(parts) == 1 and not parts[0].startswith("_"):
            importable = parts[0] in lightm.__all__ or (ROOT / "src/lightm" / parts[0]).exists()
            importable = importable or (ROOT / "src/lightm" / f"{parts[0]}.py").exists()
            assert importable, f"{name_of(page)}: lightm{dotted}"
            continue
        for depth, part in enumerate(parts):
            if not hasattr(found, part):
                importlib.import_module(".".join(["lightm", *parts[: depth + 1]]))
            found = getattr(found, part)


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_package() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    source = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    source = re.sub(r'"\s*f?"', "", source)  # pieces of one message
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.M) + re.findall(r"^- `([^`]+)`:", page, re.M)
    assert len(quoted) > 12
    assert [message for message in quoted if message not in source] == []


def test_the_citation_is_of_this_version() -> None:
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == lightm.__version__
    assert citation["authors"] == [{"name": "The LightM developers"}]


def test_the_readme_says_what_this_is_not_for() -> None:
    assert "**For research. Not for clinical decisions.**" in README[:600]
    assert COMMANDS
