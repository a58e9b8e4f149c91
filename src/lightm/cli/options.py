"""The options of a verb's model as those of its command: name, type, default and help text are the fields'."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from lightm.cli.common import app
from lightm.config_io import parse_yaml

Models = Callable[[], "type[BaseModel]"]


def command(
    load: Models, name: str | None = None, *, leave_out: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a verb that has an option for each field of the model which `load` returns, beside its own parameters.

    It is called with `given`: what the user typed, by the names of the fields, so that the model's own defaults and
    checks are the only ones. The model is loaded when the verb is used. Fields with `{"cli": False}` and those in
    `leave_out` get no option.
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
                    fields = {
                        key: field
                        for key, field in load().model_fields.items()
                        if key not in leave_out and _extra(field).get("cli", True)
                    }
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
    if (
        isinstance(value, str)
        and not _extra(field).get("text")
        and any(
            get_origin(part) is dict or (isinstance(part, type) and issubclass(part, BaseModel))
            for part in _members(field.annotation)
        )
    ):
        return parse_yaml(value, f"--{name.replace('_', '-')}")
    return value
