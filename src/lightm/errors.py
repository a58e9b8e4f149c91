"""The two kinds of error that LightM raises for what a user can cause.

The command line turns each into one message and an exit code: 1 for work that failed, 2 for a wrong
call or wrong input. Both say what was wrong, what came, what was expected and how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LightMError(Exception):
    """Work that could not be finished; the command line exits with 1.

    >>> issubclass(lightm.InputError, lightm.LightMError)
    True
    """

    exit_code = 1


class InputError(LightMError, ValueError):
    """A wrong call or wrong input (file, folder, option, configuration); the command line exits with 2.

    >>> try:
    ...     lightm.phantoms("livr", "data")
    ... except ValueError as error:
    ...     print(type(error).__name__)
    InputError
    """

    exit_code = 2


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest of the known names, or an empty string."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
