"""The page of a comparison: one HTML file that needs nothing else to be read."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from lightm import __version__
from lightm.evaluation.report import duration, embed, render
from lightm.files import write_text
from lightm.lab.compare.draw import write_figures
from lightm.lab.compare.results import Comparison
from lightm.lab.compare.style import looks
from lightm.lab.compare.summary import Summary
from lightm.lab.compare.tables import class_texts, legend, method_texts
from lightm.lab.compare.words import answer, detail_words, unshown
from lightm.progress import Progress


def write_page(comparison: Comparison, summary: Summary, *, progress: Progress | None = None) -> Path:
    """Write `comparison.html`, `figures/` and the tables of fine detail, and return the page's path.

    The page answers first, then shows tables, differences, training curves, fine detail, single cases and cost, and
    tells how to repeat the comparison. Pictures are embedded; no script, no outside address; all names are escaped.
    What is missing (trainings, histories, the data set) is named as missing. Raises LightMError when the disk refuses.
    Takes some ten seconds for small cases, with the memory of one case and all its predictions.
    """
    drawn = write_figures(comparison, summary, progress=progress)
    html = render(
        "compare.html.j2",
        package=__package__,
        summary=summary,
        answer=answer(summary),
        unshown=unshown(summary),
        intro=_intro(comparison),
        cards=_cards(comparison, summary),
        method_table=method_texts(summary),
        class_table=class_texts(summary),
        legend=legend(summary),
        colours={
            name: look.colour for name, look in looks([m.name for m in summary.methods], summary.baseline).items()
        },
        pictures={name: embed(picture) for name, picture in drawn.pictures.items()},
        drawn=drawn,
        embed=embed,
        size_words=detail_words(drawn.detail.size) if drawn.detail else [],
        radius_words=detail_words(drawn.detail.radius) if drawn.detail else [],
        facts=_facts(comparison),
        documents=[
            (name, (comparison.folder / name).read_text(encoding="utf-8"))
            for name in ("experiment.yaml", "plan.yaml", "split.json")
            if (comparison.folder / name).is_file()
        ],
        command=f"lightm compare experiment.yaml -o {comparison.folder.resolve().name}",
        version=__version__,
    )
    target = comparison.folder / "comparison.html"
    write_text(target, html)
    return target


def _intro(comparison: Comparison) -> dict[str, str]:
    """What was compared, on which data and how trained, as parts of sentences."""
    experiment, plan, split = comparison.experiment, comparison.plan, comparison.split
    methods = experiment.methods()
    ends = []
    if experiment.epochs is not None:
        ends.append(f"{experiment.epochs} epochs")
    if experiment.max_time is not None:
        given = experiment.max_time
        ends.append(given if isinstance(given, str) else duration(given))
    return {
        "methods": f"{len(methods)} method{'s' if len(methods) > 1 else ''}",
        "networks": ", ".join(experiment.networks),
        "losses": ", ".join(experiment.losses),
        "recipes": ", ".join(experiment.recipes),
        "seeds": f"{len(experiment.seeds)} seed{'s' if len(experiment.seeds) > 1 else ''}",
        "data": plan.dataset,
        "classes": ", ".join(name for name, value in plan.labels.items() if value),
        "dims": f"{plan.spatial_dims}D",
        "channels": ", ".join(plan.channels),
        "split": f"{len(split.train)} cases to learn from, {len(split.val)} to choose the weights by, "
        f"{len(split.test)} to test",
        "budget": " or ".join(ends) + (", whichever came first" if len(ends) > 1 else ""),
        "patch": " x ".join(map(str, plan.patch_size)),
        "batch": str(plan.batch_size),
    }


def _cards(comparison: Comparison, summary: Summary) -> list[dict[str, str]]:
    finished = sum(len(method.seeds) for method in summary.methods)
    verdicts: list[str] = [
        m.overall.dsc.difference.verdict for m in summary.methods if m.overall.dsc.difference is not None
    ]
    cards = [
        {
            "title": "Trainings finished",
            "value": f"{finished} of {summary.planned}",
            "note": f"{len(summary.failed)} failed, {len(summary.missing)} not run",
        },
        {
            "title": "Test cases",
            "value": str(len(summary.test_cases)),
            "note": "the same for every method",
        },
    ]
    for verdict, title in (("better", "Better than the baseline"), ("worse", "Worse than the baseline")):
        cards.append(
            {
                "title": title,
                "value": f"{verdicts.count(verdict)} of {len(verdicts)}",
                "note": "in mean DSC, corrected p",
            }
        )
    seconds = [cell.record.seconds for cell in comparison.finished]
    cards.append(
        {"title": "Time of all trainings", "value": duration(sum(seconds)), "note": "with the scoring of test cases"}
    )
    return cards


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    experiment, records = comparison.experiment, [cell.record for cell in comparison.finished]
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        for package, version in record.versions.items():
            versions.setdefault(package, {})[version] = None
    facts = [
        ("Data set", comparison.plan.dataset),
        ("Data hash (SHA-256)", _unique([record.data_hash for record in records])),
        ("Split", f"{comparison.split.kind}, seed {comparison.split.seed}"),
        ("Seeds", ", ".join(map(str, experiment.seeds))),
        ("Patch, batch", f"{' x '.join(map(str, comparison.plan.patch_size))}, {comparison.plan.batch_size}"),
        ("Device", experiment.device),
        ("Threads of a training", _unique([str(record.threads) for record in records])),
        ("Versions of the trainings", "; ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())),
        ("Trained between", " and ".join(sorted(record.started for record in records)[:: max(1, len(records) - 1)])),
        ("Page written by", f"LightM {__version__}, Python {platform.python_version()}"),
    ]
    return [(name, value) for name, value in facts if value]


def _unique(values: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(values))
