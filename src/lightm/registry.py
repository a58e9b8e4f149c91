"""Things by name: those that come with LightM, those that a program registers, those of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from lightm.errors import InputError, did_you_mean

Item = TypeVar("Item")


@cache
def _installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group; all installed packages are searched for them, once."""
    return {entry.name: entry for entry in entry_points(group=group)}


class Registry(Generic[Item]):
    """Names and what they stand for.

    Arguments: `what` the things are called in messages ("network"); `group` of the entry points by which installed
    packages add theirs, imported when first asked for; `wrap`: makes an item of what a program or an entry point gives,
    and raises InputError for what it cannot use; `hint`: what else a name may be, for the message about unknown ones.
    Built-in names cannot be replaced: files that name them would mean something else elsewhere.

    >>> colours = Registry("colour", "example.colours", wrap=str)
    >>> colours.register("red", "#f00")
    >>> colours["red"]
    '#f00'
    >>> colours["rde"]
    Traceback (most recent call last):
    lightm.errors.InputError: unknown colour 'rde'; did you mean 'red'? Known: red.
    """

    def __init__(self, what: str, group: str, wrap: Callable[[Any], Item], hint: str = "") -> None:
        self.what, self.group, self.wrap, self.hint = what, group, wrap, hint
        self._items: dict[str, Item] = {}
        self._built_in: set[str] = set()

    def add_built_in(self, name: str, item: Item) -> None:
        """Add what comes with LightM."""
        self._items[name] = item
        self._built_in.add(name)

    def register(self, name: str, given: Any, *, overwrite: bool = False) -> None:
        """Give a name to something; raises InputError for a name that is no word, or that is taken."""
        if not isinstance(name, str) or not name or name != name.strip().lower() or any(c in name for c in "+ /\\"):
            raise InputError(
                f"{self.what} name {name!r}: expected one lower-case word without spaces, '+' or slashes, such as "
                f"'my-{self.what}'"
            )
        if name in self._built_in:
            raise InputError(f"{self.what} '{name}' comes with LightM and cannot be replaced; register another name")
        if name in self._items and not overwrite:
            raise InputError(f"{self.what} '{name}' is registered already; give another name, or overwrite=True")
        self._items[name] = self.wrap(given)

    def is_built_in(self, name: str) -> bool:
        """Whether a name comes with LightM."""
        return name in self._built_in

    def names(self) -> list[str]:
        """Return all names: LightM's own first, then those registered, then those of installed packages."""
        return list(dict.fromkeys([*self._items, *self._entry_points()]))

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self._entry_points()

    def __getitem__(self, name: str) -> Item:
        if not isinstance(name, str):
            raise InputError(f"{self.what} {name!r}: expected a name")
        if name not in self._items:
            entry = self._entry_points().get(name)
            if entry is None:
                near, known = did_you_mean(name, self.names()) or ".", ", ".join(sorted(self.names()))
                raise InputError(f"unknown {self.what} '{name}'{near} Known: {known}. {self.hint}".rstrip())
            try:
                self._items[name] = self.wrap(entry.load())
            except Exception as error:  # what an installed package raises when it is imported can be anything
                raise InputError(
                    f"{self.what} '{name}' is an entry point, {entry.value}, which cannot be used "
                    f"({type(error).__name__}: {error}); update or remove the package that declares it"
                ) from error
        return self._items[name]

    def _entry_points(self) -> dict[str, EntryPoint]:
        return _installed(self.group)
