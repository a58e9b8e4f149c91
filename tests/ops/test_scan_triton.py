"""The Triton scan: run by Triton's interpreter against the oracle, and compiled for real GPUs without one.

Triton decides at its import whether kernels are compiled or interpreted, so that what is interpreted runs in worker
processes that are started with TRITON_INTERPRET=1: `interpreted` hands a function of this module to one of them. The
interpreter takes about a millisecond a line, hence the small sizes.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import Inputs, assert_close, check_against_oracle, relative, run
from scan_inputs import make_inputs, scan
from torch import Tensor

from lightm.ops import causal_conv1d, selective_scan
from lightm.ops.checks import choose
from lightm.ops.scan import gpu
from lightm.ops.scan.gpu import Plan, triton_limits
from lightm.ops.scan.inputs import ScanInputs

needs_triton = pytest.mark.skipif(gpu._MISSING is not None, reason=str(gpu._MISSING))


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Call a function of this module in a process whose Triton interprets."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # for the workers; this process may have imported Triton already
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield lambda function, *args: pool.submit(function, *args).result()
    finally:
        pool.shutdown()
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def small(*sizes: int, optional: str = "dzbi") -> Inputs:
    """float32 inputs of `make_inputs`."""
    return {name: x.float() for name, x in make_inputs(*sizes, optional=optional).items()}


CASES = [
    # batch, length, channels, states, groups, optional, softplus; chunks are 32 tokens, tiles at most 32 channels
    (1, 1, 16, 16, 0, "dzbi", True),
    (2, 2, 4, 4, 0, "", False),
    (1, 33, 40, 4, 0, "zi", False),
    (1, 63, 24, 8, 0, "dz", True),
    (2, 34, 12, 5, 2, "db", True),
    (1, 65, 8, 16, 2, "i", True),
    (1, 3, 8, 70, 0, "dzbi", True),
]


def _against_oracle(*case: Any) -> None:
    *sizes, optional, softplus = case
    dtypes = (torch.float32, torch.bfloat16) if sizes[1] < 30 else (torch.float32,)
    inputs = make_inputs(*sizes, optional)
    check_against_oracle(scan("triton", softplus), scan("reference", softplus), inputs, dtypes)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_against_oracle(interpreted: Callable[..., Any], case: tuple[Any, ...]) -> None:
    interpreted(_against_oracle, *case)


def _long_forward() -> float:
    inputs = small(1, 130, 8, 4)
    y, _ = scan("triton", True)(**inputs)
    expected, _ = scan("reference", True)(**{name: x.double() for name, x in inputs.items()})
    return relative(y, expected)


@needs_triton
@pytest.mark.slow
def test_many_chunks(interpreted: Callable[..., Any]) -> None:
    assert interpreted(_long_forward) <= 1e-5


def _bits() -> tuple[Inputs, Inputs]:
    inputs = small(1, 34, 12, 4, 2)
    return run(scan("triton", True), inputs, torch.float32), run(scan("triton", True), inputs, torch.float32)


@needs_triton
@pytest.mark.slow
def test_two_runs_are_bit_equal(interpreted: Callable[..., Any]) -> None:
    first, second = interpreted(_bits)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def _split() -> tuple[Inputs, Inputs]:
    inputs = small(1, 41, 8, 4)
    whole = run(scan("triton", True), inputs, torch.float32)

    def parts(**given: Tensor) -> tuple[Tensor, ...]:
        state, rows = given.pop("initial_state"), []
        fixed = {name: given.pop(name) for name in ("A", "d_skip", "delta_bias")}
        for cut in (slice(0, 7), slice(7, None)):
            here = {name: x[:, cut] for name, x in given.items()}
            y, state = scan("triton", True)(**here, **fixed, initial_state=state)
            rows.append(y)
        return torch.cat(rows, dim=1), state

    return run(parts, inputs, torch.float32), whole


@needs_triton
@pytest.mark.slow
def test_cut_with_the_state_carried_equals_whole(interpreted: Callable[..., Any]) -> None:
    assert_close(*interpreted(_split), 1e-5)


def _strided() -> tuple[Inputs, Inputs]:
    inputs = small(2, 5, 8, 4)
    wide = torch.cat((inputs["B"], inputs["C"], inputs["B"]), dim=-1)
    strided = dict(inputs)
    strided["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["delta"] = inputs["delta"].flip(0).flip(0).repeat_interleave(2, dim=1)[:, ::2]
    strided["B"], strided["C"] = wide[..., :4], wide[..., 4:8]
    strided["z"] = torch.cat((inputs["z"], inputs["z"]), dim=-1)[..., 8:]
    strided["A"] = inputs["A"].t().contiguous().t()
    strided["d_skip"] = inputs["d_skip"].repeat_interleave(3)[::3]
    strided["delta_bias"] = inputs["delta_bias"].repeat_interleave(3)[::3]
    strided["initial_state"] = inputs["initial_state"].transpose(0, 2).contiguous().transpose(0, 2)
    assert not any(x.is_contiguous() for x in strided.values())

    def grads(given: Inputs) -> Inputs:
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        y, state = scan("triton", True)(**leaves)
        y.sum().backward()  # the gradient of a sum has strides of zero
        found = {f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}
        return {"y": y.detach(), "state": state.detach(), **found}

    return grads(strided), grads(inputs)


@needs_triton
@pytest.mark.slow
def test_any_strides(interpreted: Callable[..., Any]) -> None:
    got, expected = interpreted(_strided)
    assert got.keys() == expected.keys()
    assert len(got) == 11
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def _extreme(value: float, softplus: bool) -> tuple[Inputs, Inputs]:
    inputs = small(1, 33, 4, 4, optional="zi")
    inputs["delta"] = torch.full_like(inputs["delta"], value)
    inputs["z"] = inputs["z"] * 100
    exact = {name: x.double() for name, x in inputs.items()}
    return (
        run(scan("triton", softplus), inputs, torch.float32),
        run(scan("reference", softplus), exact, torch.float64),
    )


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "softplus"), [(0.0, False), (1e-8, False), (1e3, False), (-1e3, True), (-20.0, True), (1e3, True)]
)
def test_extreme_steps(interpreted: Callable[..., Any], value: float, softplus: bool) -> None:
    got, expected = interpreted(_extreme, value, softplus)
    for name, x in got.items():
        assert x.isfinite().all(), name
    assert relative(got["out0"], expected["out0"]) <= 1e-5
    # a step of softplus(-20) = 2e-9 keeps its digits
    assert relative(got["du"], expected["du"]) <= 1e-5


def _kinds() -> dict[str, Any]:
    inputs = small(1, 3, 8, 4)
    half = {name: x.half() for name, x in inputs.items()}
    mixed = {name: x.bfloat16() if name in ("u", "B", "C") else x for name, x in inputs.items()}
    leaves = {name: x.detach().requires_grad_() for name, x in mixed.items()}
    scan("triton", True)(**leaves)[0].float().sum().backward()
    nan = {name: x.clone() for name, x in inputs.items()}
    nan["delta"][0, 1, 2] = float("nan")
    empty = torch.zeros(1, 0, 4)
    none = torch.zeros(1, 0, 2)
    args = [inputs[name].unsqueeze(2) if name in "BC" else inputs[name] for name in ("u", "delta", "A", "B", "C")]
    args = [x.detach().requires_grad_() for x in args]
    torch.library.opcheck(
        torch.ops.lightm.selective_scan_triton.default,
        (*args, None, None, None, True, None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    return {
        "half": scan("triton", True)(**half),
        "single": scan("triton", True)(**{name: x.float() for name, x in half.items()}),
        "grads": {name: x.grad.dtype for name, x in leaves.items() if x.grad is not None},
        "nan": scan("triton", True)(**nan)[0],
        "empty": scan("triton", True)(u=empty, delta=empty, A=torch.zeros(4, 2), B=none, C=none),
        "limit": triton_limits(torch.zeros(1)),
    }


@needs_triton
@pytest.mark.slow
def test_types_empty_axes_and_registration(interpreted: Callable[..., Any]) -> None:
    found = interpreted(_kinds)
    y, state = found["half"]
    assert (y.dtype, state.dtype) == (torch.float16, torch.float32)
    assert torch.equal(y, found["single"][0].half())  # float32 inside: only the result is rounded
    assert found["grads"]["u"] == found["grads"]["B"] == torch.bfloat16
    assert found["grads"]["delta"] == found["grads"]["A"] == torch.float32
    assert found["nan"][0, 1:, 2].isnan().all()
    assert found["nan"].isnan().sum() == 2
    assert found["empty"][0].shape == (1, 0, 4)
    assert not found["empty"][1].any()
    assert found["limit"] is None


def _argument(name: str, half: bool) -> tuple[str, Any]:
    """The compiled type of a kernel's argument and, for a constant, its value."""
    constants = {"SOFTPLUS": True, "BLOCK_E": 32, "BLOCK_N": 16, "REVERSE": True, "BLOCK": 32}
    if name in constants:
        return "constexpr", constants[name]
    if name in ("u", "delta", "b", "c", "skip", "z", "bias", "y", "dy", "du", "ddelta", "dz"):
        return ("*bf16" if half else "*fp32"), None
    if name in ("a", "begin", "ends", "sums", "starts", "last", "arriving", "scratch", "da", "db", "dc", "dskip",
                "dbias", "dbegin"):  # fmt: skip
        return "*fp32", None
    return ("i64" if half else "i32"), None


ONES = ("length", "count", "chunks", "channels", "blocks", "group_blocks", "groups", "of_group", "states", "items",
        "size", "programs")  # fmt: skip
KERNELS = {
    "end_kernel": gpu._UNROLL,
    "carry_kernel": gpu._CARRY_UNROLL,
    "forward_kernel": gpu._UNROLL,
    "grad_end_kernel": gpu._UNROLL,
    "backward_kernel": gpu._UNROLL_BACKWARD,
}


def _compile(
    kernel: str, backend: str, chip: Any, lanes: int, half: bool, absent: bool, folder: str
) -> tuple[str, int]:
    """Compile a kernel to the machine's code; return its intermediate form and the bytes of shared memory it takes."""
    os.environ["TRITON_CACHE_DIR"] = folder
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    from triton.backends.compiler import GPUTarget

    from lightm.ops.scan import triton_kernels

    function = getattr(triton_kernels, kernel)
    types, values, hints = {}, {}, {}
    for place, name in enumerate(function.arg_names):
        types[name], value = ("constexpr", KERNELS[kernel]) if name == "UNROLL" else _argument(name, half)
        if absent and name in ("skip", "z", "bias", "begin"):
            types[name] = "constexpr"
        if not half and name in ("u_e", "d_e", "dy_e", "z_e", "a_e", "b_n", "c_n"):
            types[name], value = "constexpr", 1  # what a launch makes of contiguous tensors
        if absent and name in ONES:
            types[name], value = "constexpr", 1  # and of any number that is 1
        if types[name] == "constexpr":
            values[name] = value
        elif not half:
            hints[(place,)] = [["tt.divisibility", 16]]  # and of aligned ones
    source = triton.compiler.ASTSource(function, types, values, hints)
    built = triton.compile(source, target=GPUTarget(backend, chip, lanes), options={"num_warps": 1})
    assert len(built.asm["cubin" if backend == "cuda" else "hsaco"]) > 0
    return str(built.asm["ttgir"]), built.metadata.shared


TARGETS = [("cuda", 90, 32, False, False), ("cuda", 80, 32, True, True), ("hip", "gfx942", 64, False, False)]


@pytest.fixture(scope="module")
def compiling() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton compiles, whatever this one's environment says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(os.getpid).result()  # started while the variable is away
            yield pool


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[1]}")
def test_compiles_for_gpus(
    compiling: ProcessPoolExecutor, tmp_path: Path, kernel: str, target: tuple[Any, ...]
) -> None:
    # no GPU is needed: Triton's own compiler and assembler run to the end, for NVIDIA's and AMD's machine code
    form, shared = compiling.submit(_compile, kernel, *target, str(tmp_path)).result()
    if target[:2] == ("cuda", 90) and kernel in ("end_kernel", "forward_kernel", "grad_end_kernel"):
        assert shared == 0
        assert "threadsPerWarp = [1, 32]" in form  # a channel a lane
    if target[:2] == ("cuda", 90) and kernel == "backward_kernel":
        assert "threadsPerWarp = [4, 8, 1]" in form


def test_plan() -> None:
    plan = Plan(batch=1, length=262144, channels=64, groups=1, states=16)
    assert (plan.block_e, plan.block_n, plan.chunk, plan.items) == (32, 16, 256, 2048)
    short = Plan(batch=2, length=70, channels=200, groups=5, states=40)
    assert (short.block_e, short.block_n, short.group_blocks, short.chunk, short.chunks) == (8, 64, 5, 32, 3)
    assert short.items == 2 * 3 * 25


def test_more_programs_than_can_be_numbered() -> None:
    u = torch.empty(2**21, 1, device="meta").expand(2**21, 2**20).unsqueeze(-1)
    with pytest.raises(ValueError, match="programs for u of shape"):
        gpu.plan_for(ScanInputs(u, u, u[0, :1], u.unsqueeze(-1), u.unsqueeze(-1)))


def test_explicit_choice_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones(1, 2, 3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gpu, "_MISSING", None)
    with pytest.raises(ValueError, match=r"impl='triton' is not possible: the tensors are on the CPU; move them"):
        selective_scan(ones, ones, ones[0].t(), ones[..., :2], ones[..., :2], impl="triton")
    double = ones.double()
    with pytest.raises(ValueError, match=r"the tensors are torch\.float64; use float32"):
        selective_scan(double, double, double[0].t(), double[..., :2], double[..., :2], impl="triton")
    with pytest.raises(ValueError, match="the tensors are on meta; move them to a GPU"):
        choose("scan", "triton", torch.empty(1, device="meta"), triton_limits=triton_limits)
    monkeypatch.setattr(gpu, "_MISSING", "Triton is not installed; get it")
    with pytest.raises(ValueError, match=r"impl='triton' is not possible: Triton is not installed"):
        selective_scan(ones, ones, ones[0].t(), ones[..., :2], ones[..., :2], impl="triton")


def test_operators_without_a_triton_form_refuse_it() -> None:
    with pytest.raises(ValueError, match=r"impl is 'triton', expected one of 'auto', 'reference', 'cpu'$"):
        causal_conv1d(torch.ones(1, 4, 2), torch.ones(2, 3), impl="triton")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.util, "find_spec", lambda name: None)
    assert "Triton is not installed; on Linux" in str(gpu._what_is_missing())
    monkeypatch.setattr(gpu.util, "find_spec", lambda name: object())
    for version, said in (("3.2.0", "Triton 3.2.0 is too old, 3.3 is needed"), ("3.3.1", "None"), ("3.10.0", "None")):
        monkeypatch.setattr(gpu.metadata, "version", lambda name, version=version: version)
        assert said in str(gpu._what_is_missing())


class _OnGpu:
    """As much of a tensor on a GPU as the choice looks at."""

    device = torch.device("cuda", 0)
    dtype = torch.float32


def test_auto_takes_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("lightm.ops.checks._used", set())
    caplog.set_level(logging.INFO, logger="lightm.ops")
    lead: Any = _OnGpu()
    monkeypatch.setattr(gpu, "_MISSING", None)
    assert choose("scan", "auto", lead, triton_limits=triton_limits) == "triton"
    assert choose("other", "auto", lead) == "reference"
    monkeypatch.setattr(gpu, "_MISSING", "Triton is not installed; get it")
    assert choose("scan", "auto", lead, triton_limits=triton_limits) == "reference"
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "scan: using the triton implementation"
    assert "Triton is not installed" in messages[-1]
    assert choose("scan", "auto", torch.ones(1), triton_limits=triton_limits) == "cpu"
