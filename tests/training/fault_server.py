"""A program that does work in processes of its own which a test may kill: one order a line in, one answer a line out.

The libraries are imported once and every order runs in a fork, so that a kill costs no import. Orders are JSON:
{"do": "train" | "preprocess" | "predict", ...} is answered by a process id; {"wait": pid} by its exit status, negative
for a signal. With "limit": bytes, no file of that process can grow beyond them, as on a disk that is full.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightm.pipeline  # noqa: F401 (all of it, before the forks)
from lightm.errors import LightMError


def train(data: str, run: str, **options: Any) -> None:
    from lightm.training import resume_training, train_model

    if (Path(run) / "config.yaml").is_file():
        resume_training(run)
    else:
        train_model(data, run, **options)


def preprocess(data: str, cache: str) -> None:
    from lightm import open_dataset
    from lightm.preparation.plan import make_plan
    from lightm.preparation.preprocess import preprocess_dataset

    dataset = open_dataset(Path(data))
    plan = make_plan(dataset).model_copy(update={"spacing_mm": [1.0, 0.7, 0.7]})  # so that there is resampling to do
    preprocess_dataset(dataset, plan, Path(cache))


def predict(model: str, images: str, out: str) -> None:
    from lightm.inference import predict_folder

    predict_folder(model, images, out, overwrite=True)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            limit = order.pop("limit", None)
            if limit is not None:
                import resource

                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work = {"train": train, "preprocess": preprocess, "predict": predict}[order.pop("do")]
            try:
                warnings.simplefilter("ignore")
                work(**order)
                os._exit(0)
            except LightMError as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(error.exit_code)
            except BaseException:
                traceback.print_exc()
                os._exit(99)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
