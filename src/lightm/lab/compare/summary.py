"""What the statistics of a comparison say, as models: the content of results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from lightm.config_io import load_json
from lightm.evaluation.evaluation import CaseRow
from lightm.evaluation.metrics import Status
from lightm.files import write_text
from lightm.lab.compare.results import CellRecord, NetworkRecord

Verdict = Literal["better", "worse", "no difference shown", "not tested"]


class Difference(BaseModel):
    """A method against the baseline in one metric: method minus baseline, over the cases that both have.

    `n` pairs of cases; `left_out`: those in which the metric is undefined for one of the two (or for both, though the
    class was there), over all classes in an overall value. `low` and `high` bound the 95% bootstrap interval. `p` is
    that of one signed-rank test, `p_holm` corrected for the number of methods tested; both None with the reason in
    `note` where there was no test.
    """

    model_config = ConfigDict(extra="forbid")

    n: int
    left_out: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    verdict: Verdict
    note: str | None = None


class Score(BaseModel):
    """One metric of one method: its mean over `n` cases (each the mean over seeds) with the 95% interval over cases.

    `seed_means` has a value for every seed of the method, None where undefined in all cases; `seed_sd` is their
    standard deviation (n - 1 in the denominator), None for fewer than two. `difference` is None for the baseline, and
    where the baseline has no result.
    """

    model_config = ConfigDict(extra="forbid")

    n: int
    mean: float | None
    low: float | None
    high: float | None
    seed_means: list[float | None]
    seed_sd: float | None
    difference: Difference | None = None


class Scores(BaseModel):
    """The four metrics; overlaps and NSD between 0 and 1, HD95 in the summary's `distance_unit`."""

    model_config = ConfigDict(extra="forbid")

    dsc: Score
    iou: Score
    hd95_mm: Score
    nsd: Score


class Training(BaseModel):
    """Length of the trainings, one entry a seed in the order of `seeds`, and the means of those known."""

    model_config = ConfigDict(extra="forbid")

    epochs: list[int | None]
    steps: list[int | None]
    seconds: list[float | None]
    threads: list[int]
    mean_epochs: float | None
    mean_steps: float | None
    mean_seconds: float | None


class Convergence(BaseModel):
    """When the pseudo Dice first reached the summary's `convergence_level`, one entry a seed.

    `epochs` counts finished epochs (1: at the end of the first), `seconds` is their summed time in history.csv; None:
    not reached. The medians count "not reached" as later than all, so they are None unless half of the seeds did.
    """

    model_config = ConfigDict(extra="forbid")

    epochs: list[int | None]
    seconds: list[float | None]
    median_epochs: float | None
    median_seconds: float | None


class MethodSummary(BaseModel):
    """Everything about one method. `counts` are cases times seeds, by class and status."""

    model_config = ConfigDict(extra="forbid")

    name: str
    network: str
    loss: str
    recipe: str
    is_baseline: bool
    seeds: list[int]
    cases: int
    counts: dict[str, dict[Status, int]]
    overall: Scores
    classes: dict[str, Scores]
    training: Training
    convergence: Convergence
    cost: NetworkRecord | None


class CaseResult(CaseRow):
    """The metrics of one class in one case by the training of one method and seed."""

    method: str
    seed: int


class FailedCell(BaseModel):
    """A training that ended with an error."""

    model_config = ConfigDict(extra="forbid")

    id: str
    error: str | None


class Summary(BaseModel):
    """Statistics of a whole comparison; `methods` has the baseline first.

    `missing` names the cells that have not run, `notes` says in sentences what a reader must know of an incomplete or
    uneven comparison. `convergence_level` is 95% of the baseline's best pseudo Dice (median over its seeds).
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    name: str
    baseline: str
    spatial_dims: Literal[2, 3]
    distance_unit: Literal["mm", "px"]
    labels: dict[str, int]
    nsd_tolerance_mm: dict[str, float]
    seeds: list[int]
    test_cases: list[str]
    bootstrap: int
    bootstrap_seed: int
    alpha: float
    planned: int
    missing: list[str]
    failed: list[FailedCell]
    notes: list[str]
    convergence_level: float | None
    methods: list[MethodSummary]
    cells: list[CellRecord]
    cases: list[CaseResult]

    def to_json(self, path: Path) -> None:
        """Write everything as JSON, whole or not at all."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def load_summary(path: Path | str) -> Summary:
    """Read a results.json; InputError naming the file when it is missing or is something else."""
    return load_json(path, Summary, "a summary of a comparison", "write it again with `lightm compare`")
