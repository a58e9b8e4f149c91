"""The options of a verb: one pydantic model each, from which its CLI options, YAML keys and Python arguments follow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

from lightm.config_io import read_yaml, validated
from lightm.errors import InputError

Self = TypeVar("Self", bound="Options")


class Options(BaseModel):
    """Base of a verb's options. A field's name, type, default and description are also those of its CLI option.

    `json_schema_extra={"flags": [...]}` of a field names further flags, `{"cli": False}` leaves it out there.
    """

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def of(cls: type[Self], given: Any, more: Mapping[str, Any], where: str) -> Self:
        """Return the options `given` (an object, a mapping, a YAML file, or None), overridden by those in `more`.

        In `more` None stands for an option that was not given. Raises InputError naming `where` (or the file), the
        key and, for an unknown one, the nearest known.
        """
        values: dict[str, Any] = {}
        if isinstance(given, cls):
            values = {name: getattr(given, name) for name in given.model_fields_set}
        elif isinstance(given, Mapping):
            values = dict(given)
        elif isinstance(given, str | Path):
            values = read_yaml(given)
            validated(cls, values, str(given))
        elif given is not None:
            raise InputError(f"{where}: got {type(given).__name__}; expected {cls.__name__}, a mapping or a YAML file")
        return validated(cls, {**values, **{k: v for k, v in more.items() if v is not None}}, where)


def _numbers(kind: type[int] | type[float], how: str) -> BeforeValidator:
    """What reads text as numbers of a kind; other values are left to the model."""

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return list(value) if isinstance(value, tuple) else value
        try:
            return [kind(part) for part in re.split(r"\s*[,x]\s*|\s+", value.strip())]  # an empty part is an error
        except ValueError:
            raise ValueError(f"'{value}': write {how}") from None

    return BeforeValidator(read)


def _as_names(value: Any) -> Any:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, Iterable) else value


PathText = Annotated[str, BeforeValidator(lambda given: str(given) if isinstance(given, Path) else given)]
"""A path, kept as text so that it can be written to a file."""
Sizes = Annotated[list[int], _numbers(int, "whole numbers as 40,56,40")]
"""Whole numbers for each axis, (z, y, x) or (y, x); text such as "40,56,40" is read too."""
Numbers = Annotated[list[float], _numbers(float, "numbers as 1,0.8,0.8")]
"""Numbers for each axis; text such as "1,0.8,0.8" is read too."""
Names = Annotated[list[str], BeforeValidator(_as_names)]
"""Names; text such as "one,two" is read too."""
