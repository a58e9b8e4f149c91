"""dataset.json, as nnU-Net and the Medical Segmentation Decathlon write it."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightm.config_io import read_json
from lightm.datasets.cases import Dataset
from lightm.errors import InputError
from lightm.images.io import SUFFIXES, file_suffix
from lightm.labels import IGNORE_INDEX, Values, check_regions, targets_of

MAX_CLASSES = IGNORE_INDEX  # class indices are stored in bytes
_MAX_CHANNELS = 10_000  # files are numbered with four digits
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """The labels of dataset.json. values: name to value, background first; ignore: the value that does not count.

    regions, order: nnU-Net's region-based labels, name to values, and the value that stands for each in label maps;
    the values are called label_1, label_2, ... then.
    """

    values: dict[str, int]
    ignore: int | None = None
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    order: tuple[int, ...] = ()


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
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    regions_class_order: tuple[int, ...] = ()

    @property
    def targets(self) -> dict[str, Values]:
        """What is to be found, name to value: regions, or classes without the background."""
        return targets_of(self.labels, self.regions)


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
        labels = read_labels(content)
        channels = _channels(content.get("channel_names", content.get("modality")))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    training, test, promised = (content.get(key) for key in ("training", "test", "numTraining"))
    listed = (training, test if isinstance(test, list) else []) if isinstance(training, list) else None
    promised = promised if isinstance(promised, int) else None
    return Description(
        file, channels, labels.values, labels.ignore, ending, promised, listed, labels.regions, labels.order
    )


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


def label_entries(of: Description | Dataset) -> dict[str, Any]:
    """Return "labels" and, with regions, "regions_class_order" as a dataset.json holds them."""
    ignore = {} if of.ignore_label is None else {"ignore": of.ignore_label}
    if not of.regions:
        return {"labels": {**of.labels, **ignore}}
    regions = {name: list(values) for name, values in of.regions.items()}
    order = list(of.regions_class_order)
    return {"labels": {"background": 0, **regions, **ignore}, "regions_class_order": order}


def read_labels(content: Mapping[str, Any]) -> Labels:
    """Read "labels" and "regions_class_order" of a dataset.json; InputError for what cannot be."""
    given = content.get("labels")
    if not isinstance(given, dict) or not given:
        raise InputError('"labels" is missing or empty; write for example "labels": {"background": 0, "liver": 1}')
    if all(re.fullmatch(r"-?\d{1,9}", key) for key in given) and all(isinstance(name, str) for name in given.values()):
        given = {name: int(key) for key, name in given.items()}  # MSD writes {"1": "liver"}
    if len(given) > MAX_CLASSES + 1:
        raise InputError(f"{len(given)} labels; at most {MAX_CLASSES} are possible")
    named: dict[str, tuple[int, ...]] = {}
    for name, value in given.items():
        several = isinstance(value, (list, tuple))
        if several and not value:
            raise InputError(f"label {_short(name)} has no value; give it one")
        named[str(name)] = tuple(_label_value(name, one) for one in (value if several else [value]))
    ignore = named.pop("ignore", None)
    if ignore is not None and len(ignore) > 1:
        raise InputError(f"the ignore label has the values {_short(list(ignore))}; give it one value")
    ignored = None if ignore is None else ignore[0]
    order = content.get("regions_class_order")
    if any(len(values) > 1 for values in named.values()):
        return _regions(named, ignored, order)
    if order is not None:
        _log.warning("regions_class_order is not used: no label has several values")
    values = {name: held[0] for name, held in named.items()}
    doubled = sorted(v for v, count in Counter([*values.values(), *(ignore or ())]).items() if count > 1)
    if doubled:
        raise InputError(f"labels share the value {doubled[0]}; give each label a value of its own")
    if 0 not in values.values():
        raise InputError('no label has the value 0; write "background": 0')
    if len(values) < 2:
        raise InputError('only the background is named in "labels"; add what is to be segmented')
    if len(values) > MAX_CLASSES:
        raise InputError(f"{len(values)} labels; at most {MAX_CLASSES} are possible")
    return Labels(dict(sorted(values.items(), key=lambda item: item[1])), ignored)


def _regions(named: dict[str, tuple[int, ...]], ignored: int | None, given: Any) -> Labels:
    regions = {name: values for name, values in named.items() if values != (0,)}
    if len(regions) == len(named):
        raise InputError('no label has the value 0; write "background": 0')
    if given is not None and not isinstance(given, (list, tuple)):
        raise InputError(f"regions_class_order is {_short(given)}; expected a list with one value for each region")
    order = tuple(_label_value("of regions_class_order", value) for value in given or ())
    for name, values in regions.items():
        if ignored in values:
            raise InputError(f"region {_short(name)} holds {ignored}, the ignore label; take it out of the region")
    check_regions(regions, order)
    found = sorted({value for values in regions.values() for value in values})
    if len(found) >= MAX_CLASSES:
        raise InputError(f"{len(found)} label values; at most {MAX_CLASSES - 1} are possible")
    return Labels({"background": 0, **{f"label_{value}": value for value in found}}, ignored, regions, order)


def _label_value(name: str, value: Any) -> int:
    if isinstance(value, str) and value.isdecimal() and len(value) < 9:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"label {_short(name)} has the value {_short(value)}; expected a whole number")
    if not 0 <= value <= 32767:
        raise InputError(
            f"label {_short(name)} has the value {_short(value)}; values from 0 to 32767 can be stored, renumber it"
        )
    return value
