"""exp2, softplus and sigmoid of float32 vectors, and the moments of rows and of lanes.

exp2(x) = 2^r * p(x - r), r = round(x), p of degree 5 with p(0) = 1 fitted to the least relative error on [-1/2, 1/2]:
README.md has the errors. With AVX-512 the scaling by 2^r is one instruction and exact also for subnormal, zero and
infinite results. Elsewhere x is clamped to [-126, 127], r is found by adding 1.5 * 2^23 and added to the exponent as an
integer; then the smallest result is 2^-126 instead of 0 and the largest 2^127 instead of infinity.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from lightm.ops.jit import AVX512, LANES, device_function
from lightm.ops.vector import INT, call, emit_fma, emit_select, fma, full, get, keep, maximum, root, splat, spread

_EXP2 = (0.69314698, 0.24022242, 0.05550734, 0.00967151, 0.00132647)
_ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves a float32 rounded to an integer in its low bits
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


def emit_exp2(builder: Any, x: Any) -> Any:
    """2^x lane by lane."""
    kind = x.type
    lanes = kind.count
    scaled = AVX512 and lanes == 16
    if scaled:
        whole = call(builder, f"llvm.rint.v{lanes}f32", kind, x)
    else:
        x = emit_select(builder, "<", x, splat(-126.0, kind))
        x = emit_select(builder, ">", x, splat(127.0, kind))
        shifted = builder.fadd(x, splat(_ROUND, kind))
        whole = builder.fsub(shifted, splat(_ROUND, kind))
    part = builder.fsub(x, whole)
    value = splat(_EXP2[4], kind)
    for coefficient in (*_EXP2[3::-1], 1.0):
        value = emit_fma(builder, value, part, splat(coefficient, kind))
    if scaled:
        mask, rounding = ir.IntType(16)(-1), INT(4)
        return call(builder, "llvm.x86.avx512.mask.scalef.ps.512", kind, value, whole, splat(0.0, kind), mask, rounding)
    bits = ir.VectorType(INT, lanes)
    exponent = builder.shl(builder.bitcast(shifted, bits), ir.Constant(bits, [23] * lanes))
    return builder.bitcast(builder.add(builder.bitcast(value, bits), exponent), kind)


@intrinsic
def exp2(typing: Any, x: Any) -> Any:
    """exp2(vector): 2^x lane by lane."""
    return x(x), lambda context, builder, sig, args: emit_exp2(builder, args[0])


@intrinsic
def divide(typing: Any, a: Any, b: Any) -> Any:
    """divide(a, b): a / b for b in [1, infinity]; within 1.5 units in the last place, 0 where b is above 2^126."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = args
        kind = b.type
        if not (AVX512 and kind.count == 16):
            return builder.fdiv(a, b)
        # the division instruction takes as long as ten others: an estimate of 14 bits and one step of Newton's method
        name, zero = "llvm.x86.avx512.rcp14.ps.512", splat(0.0, kind)
        start = call(builder, name, kind, b, zero, ir.IntType(16)(-1))
        rest = emit_fma(builder, builder.fneg(b), start, splat(1.0, kind))
        inverse = emit_fma(builder, rest, start, start)
        value = builder.fmul(a, inverse)
        return builder.select(builder.fcmp_ordered(">", b, splat(2.0**126, kind)), zero, value)

    return b(a, b), generate


@device_function
def sigmoid(x, lanes):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x)); exactly 0 and 1 far out, never NaN for finite x."""
    one = full(1.0, lanes)
    return divide(one, one + exp2(x * full(-LOG2E, lanes)))


@device_function
def softplus(x, lanes):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)) = max(x, 0) + 2 atanh(q / (2 + q)), q = exp(-|x|); relative error below 3e-7 + 6e-8 |x|."""
    zero = full(0.0, lanes)
    q = exp2(maximum(x, zero - x) * full(-LOG2E, lanes))
    s = divide(q, full(2.0, lanes) + q)
    w = s * s
    p = fma(full(0.14005999, lanes), w, full(0.14000902, lanes))
    p = fma(p, w, full(0.20010764, lanes))
    p = fma(p, w, full(0.33333208, lanes))
    p = fma(p, w, full(1.0, lanes))
    return maximum(x, zero) + (s + s) * p


@device_function
def moments(y, width, eps):  # type: ignore[no-untyped-def]
    """(mean, 1 / deviation) of `width` channels at y, in every lane."""
    scale = full(1.0 / width, LANES)
    total = full(0.0, LANES)
    for c in range(0, width, LANES):
        total = total + get(y + 4 * c, width - c)
    mean = spread(total, LANES) * scale
    total = full(0.0, LANES)
    for c in range(0, width, LANES):
        far = keep(get(y + 4 * c, width - c) - mean, width - c)
        total = fma(far, far, total)
    return mean, full(1.0, LANES) / root(fma(spread(total, LANES), scale, full(eps, LANES)))


@device_function
def lane_moments(values, eps, width):  # type: ignore[no-untyped-def]
    """(values - mean, 1 / deviation) of every `width` neighbouring lanes."""
    scale = full(1.0 / width, LANES)
    far = values - spread(values, width) * scale
    return far, full(1.0, LANES) / root(fma(spread(far * far, width), scale, full(eps, LANES)))
