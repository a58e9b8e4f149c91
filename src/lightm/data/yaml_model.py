"""pydantic models as YAML files that people read and edit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lightm.errors import InputError, did_you_mean
from lightm.files import atomic_file

Model = TypeVar("Model", bound=BaseModel)


def load_yaml(path: Path | str, model: type[Model]) -> Model:
    """Read a YAML file into a model; raises InputError with the file, the key and, for an unknown one, the nearest."""
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror or error}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())}); mend the line") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, got {type(content).__name__}; write it again")
    return validated(model, content, str(path))


def save_yaml(path: Path | str, model: BaseModel, heading: str) -> None:
    """Write a model, its keys in the order of the fields, below `heading` as comment lines; atomic."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in heading.splitlines())
    body = yaml.dump(
        model.model_dump(mode="json", exclude_none=True),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        width=100,
        allow_unicode=True,
    )
    with atomic_file(path) as stream:
        stream.write((comment + body).encode("utf-8"))


def validated(model: type[Model], content: dict[str, Any], where: str) -> Model:
    """Return the model of the content; raises InputError that names `where`, each wrong key and the cure."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        faults = [_fault(fault, model) for fault in error.errors()]
        raise InputError(f"{where}: " + "; ".join(faults)) from None


def _fault(fault: Any, model: type[BaseModel]) -> str:
    keys = ".".join(str(key) for key in fault["loc"])
    if fault["type"] == "extra_forbidden":
        owner = _owner(model, fault["loc"][:-1])
        known = list(owner.model_fields)
        near = did_you_mean(str(fault["loc"][-1]), known)
        return f"unknown key '{keys}'{near or '; known are ' + ', '.join(known)}"
    if fault["type"] == "missing":
        return f"the key '{keys}' is missing; add it"
    message = str(fault["msg"]).removeprefix("Value error, ")
    got = f" (got {fault['input']!r})" if not isinstance(fault["input"], dict) else ""
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
    """Reads 1e-3 as a number, which YAML 1.1 takes for text, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Writes no anchors: the file is to be edited by hand."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
