"""Checks of the memory that CPU kernels touch, for tests and for debugging: set LIGHTM_CHECK_KERNELS=1.

Kernels take plain addresses, so neither Numba nor PyTorch can tell when one reads or writes beyond a buffer. Each
kernel therefore declares, as a function of its arguments, which bytes it touches behind each address. With the checks
on, `address` returns integers that know their tensor's memory, and every call of a kernel holds the declared bytes
against it first: a call that would leave its buffer, misses its alignment or passes an address of unknown origin raises
`KernelBoundsError` and touches nothing. With the checks off, none of this costs anything.

That the declarations are true is tested with the hardware: tests/ops/test_bounds.py runs every kernel on buffers of
just the declared bytes between pages that cannot be accessed.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

CHECKS = os.environ.get("LIGHTM_CHECK_KERNELS", "") not in ("", "0")
"""Whether kernels are checked; read once, when this module is imported."""

Extent = tuple[int, int]
Extents = Callable[..., dict[str, Extent]]
"""From some of a kernel's arguments, by name, to the bytes it touches: (first, last + 1) relative to each address."""

NOTHING: Extent = (0, 0)


class KernelBoundsError(Exception):
    """A kernel was about to touch memory outside of a buffer."""


class Address(int):
    """An address and the memory it may be used for; sums with integers keep that memory."""

    low: int
    high: int

    @classmethod
    def within(cls, at: int, low: int, high: int) -> Address:
        """The address `at`, good for the bytes low..high-1."""
        made = cls(at)
        made.low, made.high = low, high
        return made

    def __add__(self, offset: int) -> Address:
        return Address.within(int(self) + int(offset), self.low, self.high)

    __radd__ = __add__

    def __sub__(self, offset: int) -> Address:
        return self + -int(offset)


def _checked_address(x: Tensor) -> int:
    start = x.data_ptr()
    if not x.numel():
        return Address.within(start, start, start)
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return Address.within(start, start, start + x.element_size() * (last + 1))


address: Callable[[Tensor], int] = _checked_address if CHECKS else Tensor.data_ptr
"""The address of a tensor's first element, for a kernel."""


def entry_address(x: Tensor, entry: int) -> int:
    """The address of an entry of the first axis of float32 numbers."""
    return address(x) + 4 * entry * x.stride(0)


def token_rows(x: Tensor) -> Tensor:
    """x as float32 with channels next to each other."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def strided_address(x: Tensor | None) -> tuple[int, int, int]:
    """(address, bytes between batch entries, bytes between tokens) of float32 numbers; zeros for None."""
    return (0, 0, 0) if x is None else (address(x), 4 * x.stride(0), 4 * x.stride(1))


def rows(first: int, last: int, step: int, width: int) -> Extent:
    """The extent of rows first..last-1, `step` bytes apart and `width` bytes long."""
    return (first * step, (last - 1) * step + width) if last > first else NOTHING


def row_extents(first: int, last: int, width: int, **steps: int) -> dict[str, Extent]:
    """The extents of rows of `width` bytes behind several addresses, by the bytes between their rows."""
    return {name: rows(first, last, step, width) for name, step in steps.items()}


def each(extent: Extent, *names: str) -> dict[str, Extent]:
    """The same extent behind several addresses."""
    return dict.fromkeys(names, extent)


def checked(kernel: Callable[..., Any], extents: Extents) -> Callable[..., Any]:
    """The kernel with its arguments checked before every call."""
    names = list(inspect.signature(getattr(kernel, "py_func", kernel)).parameters)
    asked = list(inspect.signature(extents).parameters)
    title = kernel.__name__

    def call(*args: Any) -> None:
        given = dict(zip(names, args, strict=True))
        found = extents(*(given[name] for name in asked))
        for name, value in given.items():
            if isinstance(value, Address) and name not in found:
                raise KernelBoundsError(f"{title}: the extent of '{name}' is not declared")
        for name, extent in found.items():
            check(title, name, given[name], extent)
        execute(kernel, given, found)

    return call


def check(title: str, name: str, at: int, extent: Extent) -> None:
    """Raise unless the bytes of `extent` at an address lie in its memory and are aligned to floats."""
    low, high = extent
    if low >= high:
        return
    if not isinstance(at, Address):
        raise KernelBoundsError(f"{title}: '{name}' = {at:#x} is the address of no known buffer")
    if at + low < at.low or at + high > at.high:
        raise KernelBoundsError(
            f"{title}: '{name}' touches bytes {at + low - at.low} to {at + high - at.low} of a buffer of "
            f"{at.high - at.low} bytes"
        )
    if (at + low) % 4:
        raise KernelBoundsError(f"{title}: '{name}' is not aligned to 4 bytes")


def execute(kernel: Callable[..., Any], given: dict[str, Any], extents: dict[str, Extent]) -> None:
    """Run a checked kernel; a test puts its own function here to run it on memory of its own."""
    kernel(*(int(value) if isinstance(value, Address) else value for value in given.values()))
