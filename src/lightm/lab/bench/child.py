"""The process that measures one case's peak memory: a request as JSON on standard input, {"peak": bytes} on output."""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Build the case, warm its kernels up on a small one, and measure one call."""
    request = json.load(sys.stdin)
    import torch

    from lightm.lab.bench.cases import Case, prepare, warm_up
    from lightm.memory import peak_of

    torch.set_num_threads(int(request["threads"]))
    case = Case(**request["case"])
    warm_up(case)
    prepared = prepare(case)
    print(json.dumps({"peak": peak_of(prepared.call)}))


if __name__ == "__main__":
    main()
