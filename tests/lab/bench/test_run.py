"""The benchmark as a user runs it: rows, files, plots, wrong calls."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lightm.cli import app
from lightm.errors import InputError
from lightm.lab.bench import cases, draw_scaling, format_markdown, measure, read_csv, roofline, run, suite, write_csv
from lightm.lab.bench.measure import OutOfMemoryError, peak_in_child
from lightm.lab.bench.records import Row
from lightm.memory import resident

LIMITS = {"limit_matmul_gflops": 1.0, "limit_register_gflops": 1.0, "limit_copy_gbs": 1.0}
ROW = Row(
    date="2026-01-02T03:04:05+00:00", commit="abc", lightm="0.1", torch="2", numba="0.6", monai="1.5", python="3.11",
    cpu='a "CPU", fast', threads=2, level="scaling", case="lightm-unet", impl="", shape="1x1x32x32x32",
    mode="inference", parameters=5, p20_s=0.1, p50_s=1 / 3, p80_s=0.5, runs=5, peak_mb=None, bytes=1e9, flops=2.0,
    exps=0.0, roofline_s=0.1, ratio_to_roofline=10 / 3, baseline="", ratio_to_baseline=None, limit_gexps=1.0,
    limit_gupdates=1.0, **LIMITS,
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Throughputs from small data, and calls repeated less often."""
    monkeypatch.setattr(measure, "SHORTEST", 0.001)
    monkeypatch.setattr(roofline, "measure_throughput", functools.partial(roofline.measure_throughput, 1, small=True))


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be measured."""

    def measured(*args: Any, **options: Any) -> None:
        raise AssertionError("measured before the input was checked")

    monkeypatch.setattr(roofline, "measure_throughput", measured)


def test_csv_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = [ROW, dataclasses.replace(ROW, peak_mb=12.5, ratio_to_baseline=0.1 + 0.2, baseline="dynunet")]
    write_csv(rows, tmp_path / "rows.csv")
    assert read_csv(tmp_path / "rows.csv") == rows


@pytest.mark.parametrize("name", ["network-128.csv", "scaling.csv"])
def test_csv_of_earlier_versions_is_read(name: str) -> None:
    path = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / name
    row = read_csv(path)[0]
    assert "floor_s" in path.read_text(encoding="utf-8").splitlines()[0]
    assert row.ratio_to_roofline == pytest.approx(row.p50_s / row.roofline_s)
    assert row.limit_matmul_gflops > 100


def test_csv_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with pytest.raises(InputError, match="cannot be read"):
        read_csv(path)
    path.write_text("date,commit\n1,2\n", encoding="utf-8")
    with pytest.raises(InputError, match="lacks lightm"):
        read_csv(path)
    write_csv([dataclasses.replace(ROW, threads="two")], path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="line 2: invalid literal"):
        read_csv(path)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_every_operator_and_layer_runs_in_every_variant() -> None:
    ticks: list[tuple[int, int]] = []
    rows = run("op", size=4, repeats=2, memory=False, progress=lambda what, done, total: ticks.append((done, total)))
    forward = {(row.case, row.impl) for row in rows if row.mode == cases.FORWARD}
    assert forward == {(name, impl) for name, variants in cases.OPERATORS.items() for impl in variants}
    both = {(row.case, row.impl) for row in rows if row.mode == cases.BOTH}
    assert both == forward - {("selective_scan_long", "bare")}
    assert ticks == [(i + 1, 2 * len(rows)) for i in range(2 * len(rows))]
    for row in rows:
        assert 0 < row.p20_s <= row.p50_s <= row.p80_s
        assert row.runs == 2
        assert row.peak_mb is None
        assert row.ratio_to_roofline == pytest.approx(row.p50_s / row.roofline_s)
        if row.impl == row.baseline:
            assert row.ratio_to_baseline == 1
    layers = run("layer", size=4, repeats=1, memory=False)
    assert [(row.case, row.mode) for row in layers] == [
        (f"{kind}-{width}", mode)
        for mode in (cases.FORWARD, cases.BOTH)
        for width in (32, 64)
        for kind in ("rvm", "spm")
    ]


@pytest.mark.usefixtures("quick")
def test_the_verb_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.csv"
    words = ["bench", "max_pool2", "--size", "32", "--repeats", "2", "--no-memory", "--out", str(out)]
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "measuring the peak throughput" in done.stderr
    printed, rows = json.loads(done.stdout), read_csv(out)
    assert printed == [dataclasses.asdict(row) for row in rows]
    assert [(row.impl, row.mode) for row in rows] == [
        (impl, mode) for mode in (cases.FORWARD, cases.BOTH) for impl in ("cpu", "reference")
    ]
    table = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert table.count("| max_pool2 (cpu) |") == 2


@pytest.mark.slow
def test_a_case_is_measured_in_a_process_of_its_own() -> None:
    case = cases.Case("op", "upsample_linear2", 48, cases.FORWARD, "cpu")
    peak = peak_in_child({"case": dataclasses.asdict(case), "threads": 1})
    if resident() is not None:
        assert peak == pytest.approx(8 * 48**3 * 32 * 4, rel=0.1)  # the result


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("train", [False, True])
def test_networks_are_compared_with_the_baseline(train: bool) -> None:
    names = ["lightm-unet-small", "spm-lightm-unet-small"]
    rows = run("network", size=16, repeats=2, networks=names, baseline=names[1], train=train, memory=False)
    assert [row.case for row in rows] == names
    assert {row.mode for row in rows} == {cases.TRAINING if train else cases.INFERENCE}
    assert {row.baseline for row in rows} == {names[1]}
    assert rows[1].ratio_to_baseline == 1
    assert rows[0].ratio_to_baseline not in (None, 1)
    assert rows[0].parameters == 662_990
    table = format_markdown(rows)
    assert "662,990" in table
    assert "1 (baseline)" in table
    assert "not measured" in table


@pytest.mark.usefixtures("quick")
def test_a_training_step_needs_what_three_forward_passes_compute() -> None:
    names = ["lightm-unet-small"]
    infer, train = (run("network", size=16, repeats=1, networks=names, train=t, memory=False)[0] for t in (False, True))
    assert train.flops == 3 * infer.flops
    assert train.exps == 2 * infer.exps


@pytest.mark.usefixtures("quick")
def test_a_case_that_memory_does_not_suffice_for_is_left_out_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ended(request: dict[str, Any]) -> int:
        if request["case"]["impl"] == "reference":
            raise OutOfMemoryError("max_pool2: ended by the system")
        return 1_000_000

    monkeypatch.setattr(suite, "peak_in_child", ended)
    with caplog.at_level("INFO", logger="lightm"):
        rows = run("max_pool2", size=4, repeats=1)
    assert {row.impl for row in rows} == {"cpu"}
    assert {(row.peak_mb, row.ratio_to_baseline) for row in rows} == {(1.0, None)}
    assert "left out" in caplog.text


@pytest.mark.usefixtures("quick")
def test_scaling_is_drawn(tmp_path: Path) -> None:
    rows = run(
        "scaling",
        networks=["lightm-unet-small"],
        sizes=[16, 8],
        repeats=1,
        memory=False,
        plot=tmp_path / "scaling.svg",
    )
    assert [row.edge for row in rows] == [8, 16]
    text = (tmp_path / "scaling.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml")
    draw_scaling([dataclasses.replace(row, peak_mb=row.edge * 2.0) for row in rows], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="two sizes"):
        draw_scaling(rows[:1], tmp_path / "one.svg")
    with pytest.raises(InputError, match=r"\.svg, \.png, \.pdf"):
        draw_scaling(rows, tmp_path / "scaling.jpg")


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"what": "netwrk"}, "did you mean 'network'"),
        ({"what": "selectiv_scan"}, "did you mean 'selective_scan'"),
        ({"networks": ["lightm-unett"]}, "did you mean 'lightm-unet'"),
        ({"networks": []}, "no network given"),
        ({"networks": ["lightm-unet", "lightm-unet"]}, "given twice"),
        (
            {"networks": ["lightm-unet"], "size": 90},
            "size 90: network 'lightm-unet' takes multiples of 8. Use 64 or 96",
        ),
        (
            {"networks": ["lightm-unet", "dynunet-6"], "size": 48},
            "'dynunet-6' takes multiples of 32 from 64 on. Use 64 or 96",
        ),
        ({"networks": ["lightm-unet"], "baseline": "dynunet"}, "baseline 'dynunet' is not among the networks"),
        ({"repeats": 0, "networks": ["lightm-unet"]}, "at least one round"),
        ({"what": "op", "size": 9}, "even edge; use 8 or 10"),
        ({"what": "op", "size": 2}, "edge of 4 voxels or more"),
        ({"what": "scaling", "sizes": []}, "no sizes"),
        ({"what": "scaling", "sizes": [32, 33]}, "size 33: network 'lightm-unet' takes multiples of 8. Use 32 or 64"),
        ({"what": "op", "plot": "a.svg"}, "two sizes or more"),
        ({"what": "scaling", "sizes": [8, 16], "plot": "a.gif"}, r"a\.gif: a plot is written as"),
    ],
)
def test_wrong_calls_are_told_before_anything_is_measured(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(**options)


@pytest.mark.usefixtures("never")
def test_a_file_that_cannot_be_written_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="is a folder"):
        run("op", out=tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        run("op", out=tmp_path / "file" / "rows.csv")


@pytest.mark.usefixtures("never")
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"'unetr' needs einops.*pip install einops"):
        run("network", networks=["lightm-unet", "unetr"], size=32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "opp"], "did you mean 'op'"),
        (["bench", "scaling", "--sizes", "8,x"], "write whole numbers"),
        (["bench", "--threads", "0"], "threads: Input should be greater"),
    ],
)
def test_wrong_words_on_the_command_line(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, words, catch_exceptions=False)
