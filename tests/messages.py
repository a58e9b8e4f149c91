"""What the package logs, as it is logged."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def on_message(act: Callable[[str], object], room: str = "training") -> Iterator[None]:
    """Call act(text) for every message of a room, in its thread."""

    class Acting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            act(record.getMessage())

    logger, handler = logging.getLogger(f"lightm.{room}"), Acting(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
