"""How fast is LightM on this machine, against what else there is: operators, layers, networks, growth with size.

`run` measures and returns rows for `write_csv`, `read_csv`, `format_markdown` and `draw_scaling`. Columns:
`lightm.lab.bench.records`; rooflines: `lightm.lab.bench.roofline`.
"""

from __future__ import annotations

from lightm.lab.bench.records import Row, draw_scaling, format_markdown, read_csv, write_csv
from lightm.lab.bench.suite import run

__all__ = ["Row", "draw_scaling", "format_markdown", "read_csv", "run", "write_csv"]
