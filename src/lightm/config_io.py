"""Pydantic models as YAML files that people read and edit, and JSON that others wrote, read with limits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lightm.errors import InputError, did_you_mean
from lightm.files import write_text

# Ours are some kilobytes; PyYAML takes about ten seconds per megabyte.
MAX_YAML_BYTES = 256 << 10
MAX_JSON_BYTES = 16 << 20
_MAX_RECORD_BYTES = 512 << 20  # results of many thousand cases
# What PyYAML lets through for values that their tag does not fit, such as `!!int x`.
_MAX_DEPTH = 50
_SHOWN = 20  # errors in one message
_FAULTS = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError)

Model = TypeVar("Model", bound=BaseModel)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the content of a JSON file in UTF-8.

    Raises InputError, naming the file, for one that cannot be opened, is longer than `max_bytes`, or is no JSON: also
    where it is nested deeper, or its numbers are longer, than Python reads. Memory: some ten times the file.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: cannot be read (no such file); check the path")
        with path.open("rb") as stream:
            content = stream.read(min(max_bytes, path.stat().st_size) + 1)  # Python reserves what is asked for
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    return parse_json(content, str(path), max_bytes)


def parse_json(content: bytes, where: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return JSON that others wrote, with the limits of `read_json`; raises InputError that begins with `where`."""
    if len(content) > max_bytes:
        raise InputError(f"{where}: longer than {max_bytes >> 20} MB, which no such file is; is it another one?")
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise InputError(f"{where}: not readable as JSON (nested too deeply); mend or write it again") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are some, numbers of 5000 digits too
        raise InputError(f"{where}: not readable as JSON ({str(error)[:200]}); mend or write it again") from None


def load_json(path: Path | str, model: type[Model], what: str, remedy: str) -> Model:
    """Read JSON into a model; InputError names the file, `what` it should be, each wrong key and the `remedy`."""
    try:
        content = read_json(Path(path), _MAX_RECORD_BYTES)
    except InputError as error:
        raise InputError(f"{str(error).rpartition('; ')[0]}; {remedy}") from None
    try:
        return validated(model, content, f"{path}: not {what}")
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from None


def load_yaml(path: Path | str, model: type[Model]) -> Model:
    """Read a YAML file into a model; raises InputError with the file, the key and, for an unknown one, the nearest."""
    return validated(model, read_yaml(path), str(path))


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Return the keys and values of a YAML file; raises InputError, naming it, for anything else."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(MAX_YAML_BYTES + 1)
        if len(start) > MAX_YAML_BYTES:
            raise InputError(f"{path}: longer than {MAX_YAML_BYTES >> 10} kB, as no settings are; is it another file?")
        content = yaml.load(start.decode("utf-8"), Loader=_Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror or error}); check the path") from None
    except RecursionError:
        raise InputError(f"{path}: not valid YAML (nested too deeply); write it again") from None
    except (yaml.YAMLError, *_FAULTS) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{path}: not valid YAML ({reason}); mend the line") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, got {type(content).__name__}; write it again")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """Return the value that a short text holds in YAML, such as `{a: 1e-3}`; InputError, naming `where`, for none."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, *_FAULTS) as error:
        raise InputError(f"{where} '{text}': not valid YAML ({' '.join(str(error).split())[:200]})") from None


def save_yaml(path: Path | str, model: BaseModel, heading: str) -> None:
    """Write a model, its keys in the order of the fields, below `heading` as comment lines; atomic."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in heading.splitlines())
    content = model.model_dump(mode="json", exclude_none=True)
    style: dict[str, Any] = {"sort_keys": False, "default_flow_style": None, "width": 100, "allow_unicode": True}
    write_text(path, comment + yaml.dump(content, Dumper=_Dumper, **style))


def validated(model: type[Model], content: Any, where: str) -> Model:
    """Return the model of the content; raises InputError that names `where`, each wrong key and the remedy."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        faults = [_fault(fault, model) for fault in error.errors()[:_SHOWN]]
        if error.error_count() > _SHOWN:
            faults.append(f"and {error.error_count() - _SHOWN} more")
        raise InputError(f"{where}: " + "; ".join(faults)) from None


def _fault(fault: Any, model: type[BaseModel]) -> str:
    keys = ".".join(str(key) for key in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = list(_owner(model, fault["loc"][:-1]).model_fields)
        near = did_you_mean(str(fault["loc"][-1]), known)
        return f"unknown key '{keys}'{near or '; known are ' + ', '.join(known)}"
    if fault["type"] == "missing":
        return f"the key '{keys}' is missing; add it"
    message = str(fault["msg"]).removeprefix("Value error, ")
    given = repr(fault["input"])
    got = f" (got {given if len(given) < 200 else given[:197] + '...'})" if not isinstance(fault["input"], dict) else ""
    return f"{keys}: {message}{got}" if keys else message


def _owner(model: type[BaseModel], keys: tuple[Any, ...]) -> type[BaseModel]:
    """Follow keys through nested models, lists and unions to the model that refused one."""
    for key in keys:
        field = model.model_fields.get(key) if isinstance(key, str) else None
        pending = [field.annotation] if field is not None else []
        while pending:
            kind = pending.pop()
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
            pending += get_args(kind)
    return model


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, which YAML 1.1 takes for text, and refuses a key that is given twice.

    Aliases are refused too: a few lines of them stand for more values than any memory holds; and deep nesting.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias '*{event.anchor}' is not allowed; write the value itself", event.start_mark
            )
        self._depth += 1
        if self._depth > _MAX_DEPTH:  # PyYAML takes time by the square of the depth, and Python's stack
            raise yaml.composer.ComposerError(None, None, "nested too deeply", self.peek_event().start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                twice = f"the key '{key.value}' is given twice"
                raise yaml.constructor.ConstructorError(None, None, twice, node.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Writes no anchors: the file is to be edited by hand."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
