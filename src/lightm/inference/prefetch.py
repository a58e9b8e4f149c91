"""Reading the next case while the present one is computed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Reading(Generic[Result]):
    """One item being read, in a thread of its own or when it is asked for."""

    def __init__(self, read: Callable[[], Result], *, threaded: bool) -> None:
        self._read = read
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if threaded:
            # A daemon, so that an interrupted program need not wait for the end of a long read.
            self._thread = threading.Thread(target=self._run, name="lightm-read", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._read())
        except BaseException as error:  # handed to whom the item belongs
            self._error = error

    def wait(self) -> None:
        """Wait for the thread, if there is one; in steps, since Windows delivers no Ctrl-C within a wait."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.2)

    def take(self) -> Result:
        """Return what was read, once, and let go of it; raises what reading raised."""
        if self._thread is None:
            return self._read()
        self.wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._result.pop()


def each_read(
    items: Sequence[Item], read: Callable[[Item], Result], *, ahead: bool
) -> Iterator[tuple[Item, Reading[Result]]]:
    """Yield every item with its reading, whose `take()` returns `read(item)` or raises what that raised.

    ahead: read the next item in a thread as soon as the present one has been read, so while the caller works on it; one
    item at most is read ahead, and held beside the present one. Else an item is read when it is taken. An error belongs
    to its item; the others go on.
    """
    following: Reading[Result] | None = None
    for index, item in enumerate(items):
        present = following or Reading(lambda item=item: read(item), threaded=ahead)  # type: ignore[misc]
        following = None
        if ahead:
            present.wait()
            if index + 1 < len(items):
                following = Reading(lambda item=items[index + 1]: read(item), threaded=True)  # type: ignore[misc]
        yield item, present
