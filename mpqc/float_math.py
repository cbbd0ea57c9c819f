"""exp, tanh, erf and sigmoid as polynomials of float32 arithmetic.

TVM lowers these to calls of the C library, one element at a time. Written out they are
vectorised with the loop around them and need no library. Errors are a few units in the last
place (see the tests); NaN passes through, exp overflows to inf and underflows to 0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

MAX_EXPRESSION = 4000  # nodes of one kernel; nested functions repeat their argument

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_EXP_LOW, _EXP_HIGH = -87.33654, 88.72283
_TANH_P = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
    1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_ERF_P = (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
    -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02,
)  # fmt: skip
_ERF_Q = (
    -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
    -1.42647390514189e-02,
)  # fmt: skip


def expand_math(func: Any) -> Any:
    """Replace the float32 calls in a PrimFunc; left alone where it would grow beyond measure."""
    grown = tvm_ffi.structural_map(func, (tvm.ir.Call, _replace))
    return func if _exceeds(grown, MAX_EXPRESSION) else grown


def exp(x: Any) -> Any:
    """2**n * p(r) with x = n ln 2 + r, n by truncation: floor is a library call on old chips."""

    def of_whole(x: Any, clamped: Any, whole: Any) -> Any:
        n = tirx.Cast("float32", whole)
        # two factors, since 2**128 is no float
        first = tirx.shift_right(whole, tirx.const(1, "int32"))
        low = clamped - n * _f(0.693359375) - n * _f(-2.12194440e-4)
        y = _let(low, lambda r: _horner(_EXP, r) * (r * r) + r + _f(1.0))
        y = y * _power(first) * _power(whole - first)
        y = tirx.Select(x < _f(_EXP_LOW), _f(0.0), y)
        return tirx.Select(x > _f(_EXP_HIGH), tirx.const(float("inf"), "float32"), y)

    def of_clamped(x: Any, clamped: Any) -> Any:
        half = tirx.Select(clamped < _f(0.0), _f(-0.5), _f(0.5))
        whole = tirx.Cast("int32", clamped * _f(1.44269504088896341) + half)
        return _let(whole, lambda w: of_whole(x, clamped, w), "int32")

    return _let(
        x, lambda v: _let(_clamp(v, _EXP_LOW, _EXP_HIGH), lambda clamped: of_clamped(v, clamped))
    )


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return _f(1.0) / (_f(1.0) + exp(_f(0.0) - x))


def tanh(x: Any) -> Any:
    """A rational function on [-9, 9]; x itself where it is tiny."""

    def of(v: Any) -> Any:
        return tirx.Select(
            tirx.abs(v) < _f(4e-4), v, _rational(_clamp(v, -9.0, 9.0), _TANH_P, _TANH_Q)
        )

    return _let(x, of)


def erf(x: Any) -> Any:
    """A rational function on [-4, 4]."""
    return _let(x, lambda v: _rational(_clamp(v, -4.0, 4.0), _ERF_P, _ERF_Q))


_FUNCTIONS: Mapping[str, Callable[[Any], Any]] = {
    "tirx.exp": exp,
    "tirx.sigmoid": sigmoid,
    "tirx.tanh": tanh,
    "tirx.erf": erf,
}


def _replace(call: Any) -> Any:
    name = getattr(call.op, "name", "")
    if name in _FUNCTIONS and str(call.args[0].ty) == "float32":
        return _FUNCTIONS[name](call.args[0])
    return call


def _clamp(x: Any, low: float, high: float) -> Any:
    """Selections rather than min and max, which may lose a NaN."""
    below = tirx.Select(x > _f(high), _f(high), x)
    return tirx.Select(x < _f(low), _f(low), below)


def _rational(x: Any, p: Sequence[float], q: Sequence[float]) -> Any:
    """The odd function x * p(x**2) / q(x**2)."""
    return _let(
        x, lambda v: _let(v * v, lambda square: v * _horner(p, square) / _horner(q, square))
    )


def _let(value: Any, body: Callable[[Any], Any], dtype: str = "float32") -> Any:
    """The body with a name for the value, which a tree of expressions would repeat."""
    name = tirx.Var("x", dtype)
    return tirx.Let(name, value, body(name))


def _horner(coefficients: Sequence[float], x: Any) -> Any:
    result = _f(coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + _f(coefficient)
    return result


def _power(n: Any) -> Any:
    """2**n for an int32 n in [-126, 127]."""
    bits = tirx.shift_left(n + tirx.const(127, "int32"), tirx.const(23, "int32"))
    return tirx.reinterpret("float32", bits)


def _f(value: float) -> Any:
    return tirx.const(value, "float32")


def _exceeds(func: Any, limit: int) -> bool:
    """Whether the function has more expression nodes, shared ones counted at each place."""
    count = 0

    def visit(_: Any) -> Any:
        nonlocal count
        count += 1
        return tvm_ffi.VisitInterrupt(None) if count > limit else None

    return tvm_ffi.structural_walk(func, (tvm.ir.Expr, visit)) is not None
