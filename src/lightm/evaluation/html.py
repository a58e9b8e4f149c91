"""What the HTML pages share: rendering of templates, embedded pictures, numbers as readers see them."""

from __future__ import annotations

import base64
from functools import partial
from importlib import resources
from typing import Any

from matplotlib.figure import Figure

from lightm.evaluation.evaluation import Statistic
from lightm.evaluation.figures import to_png

_PACKAGE = "lightm.evaluation"


def render(template: str, *, package: str = _PACKAGE, **values: Any) -> str:
    """Render a template of `package`, or else of this one, all values escaped; an unknown name in it is an error."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(partial(_source, package)),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, seconds=duration, statistic=statistic)
    return environment.get_template(template).render(**values)


def embed(figure: Figure | bytes) -> str:
    """Return a figure, or the bytes of a PNG, as an address that holds the picture itself."""
    picture = figure if isinstance(figure, bytes) else to_png(figure)
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


def number(value: float | None, digits: int = 3) -> str:
    """Return the number with so many digits after the point; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def statistic(statistic: Statistic, digits: int = 3) -> dict[str, str]:
    """Return mean, interval (empty where there is none), median, deviation and count as text."""
    interval = ""
    if statistic.low is not None and statistic.high is not None:
        interval = f"{statistic.low:.{digits}f} – {statistic.high:.{digits}f}"
    return {
        "mean": number(statistic.mean, digits),
        "interval": interval,
        "median": number(statistic.median, digits),
        "sd": number(statistic.sd, digits),
        "n": str(statistic.n),
    }


def duration(seconds: float) -> str:
    """Return seconds in the unit a reader expects: 93.0 s, 12 min, 2.4 h."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


def _source(package: str, name: str) -> str | None:
    for place in (package, _PACKAGE):
        source = resources.files(place).joinpath(name)
        if source.is_file():
            return source.read_text(encoding="utf-8")
    return None
