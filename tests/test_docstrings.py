"""Every public function has a runnable example and few parameters."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import lightm

PUBLIC = [name for name in lightm.__all__ if name != "__version__"]
MOST_PARAMETERS = 8
OPERATORS = {"selective_scan"}  # tensors, as its equations have them


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_public_name_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    thing = getattr(lightm, name)
    names = {**vars(importlib.import_module(thing.__module__)), "lightm": lightm, "folder": tmp_path}
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    example = parser.get_doctest(inspect.getdoc(thing) or "", names, name, None, None)
    assert example.examples, f"lightm.{name} has no example"
    said: list[str] = []
    runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - OPERATORS))
def test_a_public_function_has_at_most_eight_parameters(name: str) -> None:
    thing = getattr(lightm, name)
    if inspect.isfunction(thing):
        parameters = inspect.signature(thing).parameters.values()
        named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        assert len(named) <= MOST_PARAMETERS, f"lightm.{name} has {len(named)} parameters"
