"""Compiled kernels across processes: uses of every kernel, run in any order, and what their files hold.

    python tests/ops/kernel_cache.py run NAME ...          run uses in this order; prints errors against float64 as JSON
    python tests/ops/kernel_cache.py orders --count 200    random orders, each in a new process, caches shared by five
    python tests/ops/kernel_cache.py pairs --times 10      two uses in processes of their own, in both orders
    python tests/ops/kernel_cache.py symbols ...           names that stand for two codes in caches and runs' records

The reference of every use is the same computation in float64, for which there are no kernels.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-2
"""Largest relative error against float64; kernels that were mixed up are wrong by far more."""

Use = Callable[[], float]
USES: dict[str, Use] = {}


def use(name: str) -> Callable[[Use], Use]:
    """Register a use under a name."""

    def register(function: Use) -> Use:
        USES[name] = function
        return function

    return register


def error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor; infinite where either is not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    scale = expected.double().norm().item()
    return (got.double() - expected.double()).norm().item() / (scale or 1.0)


def _operator(call: Callable[..., Any], shapes: dict[str, tuple[int, ...]], gradients: bool = True) -> float:
    """The largest error of an operator's results and gradients."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def run(dtype: torch.dtype) -> list[Tensor]:
        given = {name: x.detach().to(dtype, copy=True).requires_grad_(gradients) for name, x in inputs.items()}
        out = call(**given)
        outs = list(out) if isinstance(out, tuple) else [out]
        if gradients:
            weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in outs]
            sum((x * w.to(dtype)).sum() for x, w in zip(outs, weights, strict=True)).backward()
            outs += [x.grad for x in given.values()]
        return [x.detach() for x in outs]

    return max(error(a, b) for a, b in zip(run(torch.float32), run(torch.float64), strict=True))


def _module(module: nn.Module, shape: tuple[int, ...], training: bool) -> float:
    """The largest error of a module's result, and of all gradients with `training`."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = torch.randn(shape)

    def run(dtype: torch.dtype) -> list[Tensor]:
        twin = copy.deepcopy(module).to(dtype)
        if not training:
            with torch.no_grad():
                return [twin.eval()(x.to(dtype))]
        out = twin.train()(x.to(dtype))
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)).sum().backward()
        return [out.detach(), torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])]

    return max(error(a, b) for a, b in zip(run(torch.float32), run(torch.float64), strict=True))


def _register() -> None:
    """The uses: every operator, layer, network and scan order, with and without gradients."""
    from lightm import ops
    from lightm.nets import PRESETS, create
    from lightm.nets.blocks import RVM, SPM

    use("linear")(lambda: _operator(lambda x, w: ops.linear(x, w), {"x": (4096, 48), "w": (96, 48)}))
    use("linear, odd")(
        lambda: _operator(lambda x, w, b: ops.linear(x, w, b), {"x": (300, 19), "w": (37, 19), "b": (37,)})
    )
    use("conv1d")(
        lambda: _operator(
            lambda x, w, b: ops.causal_conv1d(x, w, b, activation="silu"), {"x": (2, 700, 37), "w": (37, 4), "b": (37,)}
        )
    )
    for axes in (2, 3):
        size = (6, 8, 10)[-axes:]
        use(f"depthwise {axes}D")(
            lambda size=size, axes=axes: _operator(
                ops.depthwise_conv, {"x": (2, *size, 21), "weight": (*(3,) * axes, 21)}
            )
        )
        for name in ("max_pool2", "avg_pool2", "upsample_linear2"):
            use(f"{name} {axes}D")(lambda name=name, size=size: _operator(getattr(ops, name), {"x": (2, *size, 21)}))
    use("group norm")(
        lambda: _operator(lambda x, w, b: ops.group_norm_relu(x, 4, w, b), {"x": (2, 7, 9, 20), "w": (20,), "b": (20,)})
    )
    for width in (16, 8, 24):
        use(f"gated norm, {width} wide")(
            lambda width=width: _operator(
                lambda y, z, w, b, width=width: ops.gated_norm(y, z, w, b, 48 // width),
                {"y": (2, 300, 48), "z": (2, 300, 48), "w": (48,), "b": (48,)},
            )
        )
    for states in (4, 8, 16):
        for groups, channels in ((1, 32), (4, 32)):
            shapes = {
                "u": (1, 200, channels), "delta": (1, 200, channels), "A": (channels, states),
                "B": (1, 200, groups, states), "C": (1, 200, groups, states), "d_skip": (channels,),
                "z": (1, 200, channels), "bias": (channels,),
            }  # fmt: skip
            use(f"scan, {states} states, {groups} groups")(lambda shapes=shapes: _operator(_scan, shapes))
        heads = {
            "u": (1, 200, 2, 16), "delta": (1, 200, 2), "A": (2,), "B": (1, 200, 1, states), "C": (1, 200, 1, states),
        }  # fmt: skip
        use(f"ssd, {states} states")(lambda heads=heads: _operator(_ssd, heads))
    use("scan, many threads")(_cut_scan)
    for kind, layer, settings in (("rvm", RVM, {}), ("spm", SPM, {}), ("rvm, 8 states", RVM, {"state_size": 8})):
        for scan in ("raster", "bidirectional", "axes"):
            for training in (False, True):
                name = f"layer {kind}, {scan}, {'training' if training else 'inference'}"
                use(name)(
                    lambda layer=layer, settings=settings, scan=scan, training=training: _module(
                        _seeded(lambda: layer(16, 32, scan=scan, **settings)), (1, 4, 4, 6, 16), training
                    )
                )
    for preset in sorted(PRESETS):
        for axes in (2, 3):
            for training in (False, True):
                name = f"{preset} {axes}D, {'training' if training else 'inference'}"
                use(name)(
                    lambda preset=preset, axes=axes, training=training: _module(
                        _seeded(lambda: create(preset, axes, 1, 3)), (1, 1, *(16, 8, 8)[:axes]), training
                    )
                )


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, d_skip: Tensor | None, z: Tensor | None,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    from lightm.ops import selective_scan

    return selective_scan(u, delta, -A.exp(), B, C, d_skip, z, bias, True)


def _cut_scan() -> float:
    """A scan whose tokens are cut into parts for more threads than tiles."""
    from lightm.ops.scan import cpu

    threads, shortest = torch.get_num_threads(), cpu.SHORTEST
    torch.set_num_threads(4)
    cpu.SHORTEST = 64
    try:
        shapes = {"u": (1, 500, 16), "delta": (1, 500, 16), "A": (16, 8), "B": (1, 500, 1, 8), "C": (1, 500, 1, 8)}
        return _operator(lambda u, delta, A, B, C: _scan(u, delta, A, B, C, None, None, None), shapes, False)
    finally:
        torch.set_num_threads(threads)
        cpu.SHORTEST = shortest


def _ssd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from lightm.ops import ssd_scan

    return ssd_scan(u, delta, -A.exp(), B, C, delta_softplus=True)


# Processes ----------------------------------------------------------------------------------------------------------


def run_process(
    names: list[str], cache: Path, environment: dict[str, str] | None = None, timeout: float = 1800
) -> dict[str, Any]:
    """Run uses in a new process; its errors by name, "exit" and the end of "stderr"."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **(environment or {})}
    done = subprocess.run(
        [sys.executable, __file__, "run", *names], env=env, capture_output=True, text=True, timeout=timeout
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = {"errors": {name: value for line in lines for name, value in line.items()}}
    code = done.returncode
    return found | {"exit": signal.Signals(-code).name if code < 0 else code, "stderr": done.stderr[-2000:]}


def bad(found: dict[str, Any], names: list[str]) -> list[str]:
    """What is wrong with a process's results: crashes, and uses that are missing or off."""
    wrong = [f"{name}: {value}" for name, value in found["errors"].items() if not value <= TOLERANCE]
    missing = [f"{name}: no result" for name in names if name not in found["errors"]]
    return wrong + ([*missing, f"exit {found['exit']}: {found['stderr']}"] if missing or found["exit"] else [])


def orders(count: int, of_cache: int, size: int, jobs: int, seed: int, out: Path | None, seconds: float) -> int:
    """Run random orders of `size` uses, each in a new process, `of_cache` of them one after the other on one cache."""
    started = time.monotonic()
    rows: list[dict[str, Any]] = []

    def series(index: int) -> None:
        choice = random.Random(f"{seed}-{index}")
        cache = Path(tempfile.mkdtemp(prefix="kernels-"))
        try:
            for turn in range(min(of_cache, count - index * of_cache)):
                if time.monotonic() - started > seconds:
                    return
                names = choice.sample(sorted(USES), size)
                threads = choice.choice(["1", "2", "4"])
                found = run_process(names, cache, {"OMP_NUM_THREADS": threads})
                worst = max(found["errors"].values(), default=float("nan"))
                row = {"cache": index, "turn": turn, "threads": threads, "order": names, "worst error": worst}
                rows.append(row | {"bad": bad(found, names)})
                done = sum(bool(row["bad"]) for row in rows)
                print(f"{len(rows)} of {count} orders, {done} bad, worst error {worst:.1e}", flush=True)
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(series, range(-(-count // of_cache))))
    faulty = [row for row in rows if row["bad"]]
    summary = {
        "command": " ".join(sys.argv[1:]), "orders": len(rows), "uses an order": size, "uses in all": len(USES),
        "orders on one cache": of_cache, "bad orders": len(faulty),
        "worst error": max((row["worst error"] for row in rows), default=None), "tolerance": TOLERANCE,
        "minutes": round((time.monotonic() - started) / 60, 1), "bad": faulty,
    }  # fmt: skip
    if out is not None:
        out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in summary.items() if key != "bad"}))
    return 1 if faulty else 0


def pairs(times: int, names: tuple[str, str], jobs: int) -> int:
    """Run two uses in processes of their own, in both orders, `times` times each, on a new cache each time."""

    def once(index: int) -> list[str]:
        with tempfile.TemporaryDirectory() as cache:
            order = names[:: (1, -1)[index % 2]]
            return [line for name in (*order, *order) for line in bad(run_process([name], Path(cache)), [name])]

    with ThreadPoolExecutor(jobs) as pool:
        wrong = [found for found in pool.map(once, range(2 * times)) if found]
    print(f"{names[0]} and {names[1]}, {times} times in each order: {len(wrong)} bad", *wrong, sep="\n")
    return 1 if wrong else 0


# Names and codes ----------------------------------------------------------------------------------------------------


def record(codes: dict[str, set[str]]) -> None:
    """From now on, note the code of every function that Numba compiles, before LLVM's optimiser, under its name.

    After the optimiser equal functions differ, since it knows more of the callers in one kernel than in another.
    """
    import llvmlite.binding
    from numba.core.codegen import CPUCodeLibrary

    add = CPUCodeLibrary.add_ir_module

    def noting(self: Any, module: Any) -> None:
        for function in llvmlite.binding.parse_assembly(str(module)).functions:
            if not function.is_declaration:
                codes.setdefault(plain(function.name), set()).add(_code(str(function)))
        add(self, module)

    CPUCodeLibrary.add_ir_module = noting


def plain(text: str) -> str:
    """Names without the counter of the process that compiled them: the tag B<length>v<number>."""
    return re.sub(r"B\d+v\d+(?=[B\d])", "", text)


def _code(text: str) -> str:
    """A checksum of a function's code without what only numbers things: the counter, metadata, addresses."""
    text = re.sub(r"(, )?![\w.]+( !\d+)?|#\d+", "", plain(text))
    text = re.sub(r"@numba\.dynamic\.globals\.\w+", "@dynamic", text)  # Numba caches no library that keeps one
    text = re.sub(r"@\.const\.[^,)\s]*|@\"\.const\.[^\"]*\"", "@const", text)
    return hashlib.sha256(text.encode()).hexdigest()


def names_on_disk(cache: Path) -> set[str]:
    """Names of all functions in the compiled kernels of a cache folder."""
    import llvmlite.binding

    import lightm.ops.jit  # noqa: F401  (types that the files refer to)

    found = set()
    for path in [*cache.rglob("*.kernel"), *cache.rglob("*.nbc")]:
        data = path.read_bytes()
        payload = pickle.loads(data[48:] if path.suffix == ".kernel" else data)
        module = llvmlite.binding.parse_bitcode(payload[0][2][1])
        found |= {plain(function.name) for function in module.functions if not function.is_declaration}
    return found


def conflicts(recorded: list[Path], caches: list[Path]) -> tuple[int, list[str]]:
    """How many functions the caches hold, and which names stand for two codes or for one that was never seen."""
    codes: dict[str, set[str]] = {}
    for path in recorded:
        for name, found in json.loads(path.read_text(encoding="utf-8")).items():
            codes.setdefault(name, set()).update(found)
    names = set().union(*map(names_on_disk, caches))
    wrong = [f"{name}: {len(found)} codes" for name, found in sorted(codes.items()) if len(found) > 1]
    return len(names), wrong + [f"{name}: not seen" for name in sorted(names - codes.keys())]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("names", nargs="*")
    run.add_argument("--record", type=Path)
    symbols = verbs.add_parser("symbols")
    symbols.add_argument("--caches", nargs="+", type=Path, required=True)
    symbols.add_argument("--recorded", nargs="+", type=Path, required=True)
    many = verbs.add_parser("orders")
    for option, default in (("count", 200), ("of-cache", 5), ("size", 12), ("jobs", 2), ("seed", 0)):
        many.add_argument(f"--{option}", type=int, default=default)
    many.add_argument("--seconds", type=float, default=86400)
    many.add_argument("--out", type=Path)
    pair = verbs.add_parser("pairs")
    pair.add_argument("--times", type=int, default=10)
    pair.add_argument("--names", nargs=2, default=("linear", "lightm-small 3D, inference"))
    pair.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    if given.verb == "symbols":
        count, found = conflicts(given.recorded, given.caches)
        print(f"{count} names of functions on disk, {len(found)} that do not stand for one code", *found, sep="\n")
        return 1 if found else 0
    _register()
    if given.verb == "pairs":
        return pairs(given.times, tuple(given.names), given.jobs)
    if given.verb == "orders":
        return orders(given.count, given.of_cache, given.size, given.jobs, given.seed, given.out, given.seconds)
    codes: dict[str, set[str]] = {}
    if given.record is not None:
        record(codes)
    for name in given.names or list(USES):
        print(json.dumps({name: USES[name]()}), flush=True)
    if given.record is not None:
        given.record.write_text(json.dumps({name: sorted(found) for name, found in codes.items()}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
