"""What the verbs share: the application, options that follow from a verb's model, progress and printing."""

from __future__ import annotations

import functools
import inspect
import json
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperCommand, TyperGroup

from lightm.config_io import parse_yaml

if TYPE_CHECKING:
    from lightm.evaluation.evaluation import Evaluation
    from lightm.pipeline import RunResult

# in the order of the help; the last two are earlier names
VERBS = (
    *("demo", "phantoms", "check", "plan", "train", "resume", "predict", "evaluate", "report", "compare", "bench"),
    *("import-released", "info", "export", "convert", "phantom", "pack"),
)


class _Verbs(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=VERBS.index)


app = typer.Typer(
    name="lightm",
    cls=_Verbs,
    help="Medical image segmentation with Mamba U-Nets of about a million parameters. For research, not for clinical "
    "decisions.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def echo(text: str) -> None:
    """Print a message for people, on standard error."""
    typer.echo(text, err=True)


def print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=1))


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A Rich bar on standard error for `progress(what, done, total)`; nothing when that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, Any] = {}
    live: list[Progress] = []

    def show(what: str, done: int, total: int) -> None:
        if not live:
            live.append(Progress(*columns, console=Console(stderr=True)))
            live[0].start()
        if what not in bars:
            bars[what] = live[0].add_task(what, total=total)
        live[0].update(bars[what], completed=done, total=total)
        if done >= total:  # let go of the terminal, which the training's own bar needs
            live[0].stop()
            live.clear()
            bars.clear()

    try:
        yield show
    finally:
        for progress in live:
            progress.stop()


def print_run(result: RunResult, *, as_json: bool) -> None:
    if result.report is None:
        typer.echo(json.dumps({"run": str(result.run_dir)}) if as_json else f"model: {result.model}")
        return
    if result.evaluation is not None:
        print_evaluation(result.evaluation, as_json)
    echo(f"report: {result.report}")


def print_evaluation(evaluation: Evaluation, as_json: bool) -> None:
    if as_json:
        typer.echo(evaluation.model_dump_json(indent=2))
        return
    from rich.console import Console

    from lightm.evaluation.evaluation import format_lesions, format_table

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(format_table(evaluation))
    if evaluation.lesions is not None:
        console.print(format_lesions(evaluation))


def command(model: str, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a verb that has an option for each field of a model ("module:name"), beside its own parameters.

    Name, type, default and help text of an option are the field's; one with `{"cli": False}` gets none. The verb is
    called with `given`: what the user typed, by the names of the fields, so that the model's own defaults and checks
    are the only ones. The model is loaded when the verb is used.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "given"]

        def registered(parameters: list[inspect.Parameter], fields: dict[str, FieldInfo]) -> Callable[..., None]:
            @functools.wraps(function)
            def run(**values: Any) -> None:
                given = {key: _parsed(key, field, values.pop(key)) for key, field in fields.items()}
                function(**values, given={key: value for key, value in given.items() if value is not None})

            run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
            run.__annotations__ = {p.name: p.annotation for p in parameters}
            del run.__wrapped__
            return run

        class Command(TyperCommand):
            _complete = False

            def get_params(self, ctx: Any) -> list[Any]:
                if not self._complete:
                    every = pkgutil.resolve_name(model).model_fields
                    fields = {key: field for key, field in every.items() if _extra(field).get("cli", True)}
                    made = [_parameter(key, field) for key, field in fields.items()]
                    ordered = sorted([*own, *made], key=lambda p: p.default is not inspect.Parameter.empty)
                    whole = typer.Typer(add_completion=False)
                    whole.command(self.name)(registered(ordered, fields))
                    command = typer.main.get_command(whole)
                    self.params, self.callback, self._complete = command.params, command.callback, True
                return super().get_params(ctx)

        app.command(name, cls=Command)(registered(own, {}))
        return function

    return decorate


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    kind = _kind(field)
    if kind is bool:
        flag += "/--no-" + name.replace("_", "-")
    text = field.description or ""
    if field.default is True:
        text = f"{text} [default: yes]"
    elif field.default_factory is None and field.default is not None and not isinstance(field.default, bool):
        text = f"{text} [default: {field.default}]"
    option = typer.Option(flag, *_extra(field).get("flags", []), help=text, show_default=False)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


def _kind(field: FieldInfo) -> type:
    """The type of the option: a number or switch where the field is just that, else text, which the model reads."""
    parts = [part for part in _members(field.annotation) if part is not type(None)]
    plain = len(parts) == 1 and parts[0] in (bool, int, float) and not _extra(field).get("text")
    return parts[0] if plain else str


def _members(annotation: Any) -> list[Any]:
    """The types that a union joins, without what annotates them."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return _members(get_args(annotation)[0]) if get_origin(annotation) is Annotated else [annotation]


def _parsed(name: str, field: FieldInfo, value: Any) -> Any:
    """What the text of a mapping stands for in YAML; everything else the model reads itself."""
    if not isinstance(value, str) or _extra(field).get("text"):
        return value
    kinds = [get_origin(part) or part for part in _members(field.annotation)]
    mapping = any(isinstance(kind, type) and issubclass(kind, dict | BaseModel) for kind in kinds)
    return parse_yaml(value, f"--{name.replace('_', '-')}") if mapping else value
