"""dataset.json, as nnU-Net and the Medical Segmentation Decathlon write it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightm.config_io import read_json
from lightm.errors import InputError
from lightm.images.io import SUFFIXES, file_suffix
from lightm.labels import IGNORE_INDEX

MAX_CLASSES = IGNORE_INDEX  # class indices are stored in bytes
_MAX_CHANNELS = 10_000  # files are numbered with four digits


@dataclass(frozen=True)
class Description:
    """The parts of dataset.json that matter here; `listed` holds MSD's lists of files, None without them."""

    file: Path
    channels: tuple[str, ...]
    labels: dict[str, int]
    ignore_label: int | None
    file_ending: str | None
    cases_promised: int | None
    listed: tuple[list[Any], list[Any]] | None


def read_description(file: Path) -> Description:
    """Read and check dataset.json; keys that are not used here are allowed. Raises InputError naming the file."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected an object with the keys channel_names, labels and file_ending")
    try:
        ending = content.get("file_ending")
        if ending is not None and not (isinstance(ending, str) and file_suffix(f"x{ending}") == ending):
            raise InputError(
                f"file_ending {_short(ending)} is not a format that can be read; use one of {', '.join(SUFFIXES)}"
            )
        labels, ignore = _labels(content.get("labels"))
        channels = _channels(content.get("channel_names", content.get("modality")))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    training, test, promised = (content.get(key) for key in ("training", "test", "numTraining"))
    listed = (training, test if isinstance(test, list) else []) if isinstance(training, list) else None
    promised = promised if isinstance(promised, int) else None
    return Description(file, channels, labels, ignore, ending, promised, listed)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _channels(given: Any) -> tuple[str, ...]:
    if isinstance(given, list):
        given = {str(index): name for index, name in enumerate(given)}
    if not isinstance(given, dict) or not given:
        raise InputError('"channel_names" is missing or empty; write for example "channel_names": {"0": "CT"}')
    if len(given) > _MAX_CHANNELS:
        raise InputError(f'"channel_names" names {len(given)} channels; at most {_MAX_CHANNELS} are possible')
    if sorted(given) != sorted(str(index) for index in range(len(given))):
        raise InputError(f'"channel_names" has the keys {_short(sorted(given))}; number them "0", "1", ...')
    return tuple(str(given[str(index)]) for index in range(len(given)))


def _labels(given: Any) -> tuple[dict[str, int], int | None]:
    if not isinstance(given, dict) or not given:
        raise InputError('"labels" is missing or empty; write for example "labels": {"background": 0, "liver": 1}')
    if all(re.fullmatch(r"-?\d{1,9}", key) for key in given) and all(isinstance(name, str) for name in given.values()):
        given = {name: int(key) for key, name in given.items()}  # MSD writes {"1": "liver"}
    if len(given) > MAX_CLASSES + 1:
        raise InputError(f"{len(given)} labels; at most {MAX_CLASSES} are possible")
    values: dict[str, int] = {}
    for name, value in given.items():
        if isinstance(value, (list, tuple)):
            raise InputError(
                f"label {_short(name)} is a region {_short(value)} of several values; regions are not supported, "
                "give each label one value"
            )
        if isinstance(value, str) and value.isdecimal() and len(value) < 9:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"label {_short(name)} has the value {_short(value)}; expected a whole number")
        if not 0 <= value <= 32767:
            raise InputError(
                f"label {_short(name)} has the value {_short(value)}; values from 0 to 32767 can be stored, renumber it"
            )
        values[str(name)] = value
    doubled = sorted(value for value, count in Counter(values.values()).items() if count > 1)
    ignore = values.pop("ignore", None)
    if doubled:
        raise InputError(f"labels share the value {doubled[0]}; give each label a value of its own")
    if 0 not in values.values():
        raise InputError('no label has the value 0; write "background": 0')
    if len(values) < 2:
        raise InputError('only the background is named in "labels"; add what is to be segmented')
    if len(values) > MAX_CLASSES:
        raise InputError(f"{len(values)} labels; at most {MAX_CLASSES} are possible")
    return dict(sorted(values.items(), key=lambda item: item[1])), ignore
