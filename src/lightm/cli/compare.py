"""The verb that compares methods by training them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lightm.cli.common import Json, app, echo, progress_bar


@app.command()
def compare(
    experiment: Annotated[Path, typer.Argument(help="Experiment YAML, or the folder of a comparison.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default runs/NAME.")] = None,
    dataset: Annotated[Path | None, typer.Option(help="Data set to use instead of the experiment's.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Trainings side by side, on equal shares of the cores.")] = None,
    total_time: Annotated[str | None, typer.Option(help="Begin no training that would end later: 2h.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Train trials that failed once more.")] = False,
    only_report: Annotated[bool, typer.Option("--only-report", help="Train nothing; write tables and page.")] = False,
    as_json: Json = False,
) -> None:
    """Train a grid of networks, losses, recipes and seeds, and say what is better by how much.

    Finished trainings are kept: the same command again goes on.

    Example: lightm compare examples/quick.yaml
    """
    from lightm.api import compare as run
    from lightm.lab.compare import write_results

    with progress_bar() as progress:
        if only_report:
            page = write_results(experiment if out is None else out, progress=progress)
            typer.echo(json.dumps({"page": str(page)}) if as_json else str(page))
            return
        result = run(experiment, out, dataset=dataset, jobs=jobs, total_time=total_time, retry=retry, progress=progress)
    failed = [record.id for record in result.comparison.failed]
    if as_json:
        answer = {
            "folder": str(result.comparison.folder),
            "page": None if result.page is None else str(result.page),
            "finished": [found.record.id for found in result.comparison.finished],
            "failed": failed,
            "left": result.left,
        }
        typer.echo(json.dumps(answer, indent=1))
    elif result.page is not None:
        table = result.comparison.folder / "tables" / "methods.md"
        typer.echo(f"{table.read_text(encoding='utf-8')}\n{result.page}")
    if failed:
        echo(f"{len(failed)} trials failed; `--retry` trains them again")
        raise typer.Exit(1)
