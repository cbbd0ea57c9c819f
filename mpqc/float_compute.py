"""Tensor expressions of the float operators whose layout or summation order is ours to choose.

Everything here takes and returns ``tvm.te`` tensors. Spatial ranks 1 and 2 (and 3 for pools);
``layout`` is ``"NC"`` (channels first, ONNX) or ``"NHWC"`` (channels last).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, prod
from typing import Any

import numpy as np
from tvm import te, tirx

from mpqc.graph import Array

BLOCK = 16  # output channels that are packed side by side: 1 zmm, 2 ymm or 4 neon registers
LANES = 16  # partial sums of a row; the same on every machine, so that results are
TREE_LEAVES = 16  # a sum of at most this many terms is one expression


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution or a pool over the spatial axes.

    Attributes:
        kernel, strides, dilations: per spatial axis.
        before, after: padding per spatial axis, in elements.
        output: spatial shape of the result.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    output: tuple[int, ...]

    def position(self, axis: int, out: Any, tap: Any) -> Any:
        """Input index along one axis, before clipping to the input."""
        return out * self.strides[axis] + tap * self.dilations[axis] - self.before[axis]


def register_rows(extent: int, limit: int) -> int:
    """Rows of a register tile: few tiles of nearly full height, little overhang.

    The cost of a tile of t rows is taken as t + 1.5: t multiply-adds per weight vector loaded.
    """
    limit = max(1, limit)
    return min(range(1, min(limit, extent) + 1), key=lambda t: (ceil(extent / t) * (t + 1.5), -t))


def pack_weights(weight: Array, groups: int) -> Array:
    """[O, I/g, *kernel] -> [O/b, *kernel, I/g, b], O padded with zeros to a multiple of b."""
    outs = weight.shape[0]
    b = block_of(outs, groups)
    padded = np.zeros((ceil(outs / b) * b, *weight.shape[1:]), weight.dtype)
    padded[:outs] = weight
    blocked = padded.reshape(-1, b, *weight.shape[1:])  # ob, b, i, *k
    rank = weight.ndim - 2
    return np.ascontiguousarray(blocked.transpose(0, *range(3, 3 + rank), 2, 1))


def block_of(outs: int, groups: int) -> int:
    """Channels in one packed block; with groups a block must not cross a group."""
    if groups == 1:
        return BLOCK
    per_group = outs // groups
    return max(b for b in range(1, BLOCK + 1) if per_group % b == 0)


def pad(data: Any, before: Sequence[int], shape: Sequence[int], value: float) -> Any:
    """Place ``data`` at ``before`` in a tensor of ``shape`` filled with ``value``."""
    fill = tirx.const(value, data.dtype)

    def at(*index: Any) -> Any:
        source = [i - b for i, b in zip(index, before, strict=True)]
        inside = [
            condition
            for i, s, b, size, extent in zip(index, source, before, data.shape, shape, strict=True)
            for condition in _within(i, s, b, int(size), extent)
        ]
        return te.if_then_else(te.all(*inside), data(*source), fill) if inside else data(*source)

    return te.compute(tuple(shape), at, name="pad")


def _within(index: Any, source: Any, before: int, size: int, extent: int) -> list[Any]:
    conditions = []
    if before > 0:
        conditions.append(index >= before)
    if extent > before + size:
        conditions.append(source < size)
    return conditions


def convolution(
    data: Any,
    weight: Any,
    bias: Any | None,
    window: Window,
    outs: int,
    groups: int,
    layout: str,
    rows: int,
) -> Any:
    """Convolution of data that is padded already, with weights from ``pack_weights``.

    Args:
        data: float [N, C, *S] or [N, *S, C], large enough for an output row of a multiple of
            ``rows``.
        weight: [O/b, *kernel, I/g, b].
        bias: [O] or None.
        window: its padding has been applied already.
        outs: O.
        groups: the channels of a group lie side by side.
        layout: of data and result.
        rows: the register tile along the last spatial axis.
    """
    rank = len(window.kernel)
    b, depth = int(weight.shape[-1]), int(weight.shape[-2])
    per_group = outs // groups
    spatial = (*window.output[:-1], ceil(window.output[-1] / rows) * rows)
    taps = [te.reduce_axis((0, k), f"r{axis}") for axis, k in enumerate(window.kernel)]
    channel = te.reduce_axis((0, depth), "rc")

    def tile(n: Any, ob: Any, *rest: Any) -> Any:
        place, oi = rest[:-1], rest[-1]
        at = [
            p * s + t * d
            for p, s, t, d in zip(place, window.strides, taps, window.dilations, strict=True)
        ]
        first = 0 if groups == 1 else (ob * b) // per_group * depth
        return te.sum(
            _read(data, layout, n, at, first + channel) * weight(ob, *taps, channel, oi),
            axis=[*taps, channel],
        )

    blocks = int(weight.shape[0])
    acc = te.compute(
        (data.shape[0], blocks, *spatial, b), tile, name="conv", attrs={"mpqc.rows": rows}
    )

    def out(n: Any, place: Sequence[Any], o: Any) -> Any:
        value = acc(n, o // b, *place, o % b)
        return value if bias is None else value + bias[o]

    return _compute(int(data.shape[0]), outs, window.output, layout, out, "conv_out", rank)


def depthwise(data: Any, weight: Any, bias: Any | None, window: Window, layout: str) -> Any:
    """Depthwise convolution; data not padded, weight [*kernel, C].

    The taps are one expression in row-major order, so there is no accumulator in memory.
    """
    rank = len(window.kernel)
    channels = int(weight.shape[-1])

    def out(n: Any, place: Sequence[Any], c: Any) -> Any:
        terms = [
            value * weight(*tap, c)
            for tap, value in _window_values(data, layout, window, n, place, c, 0.0)
        ]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total if bias is None else total + bias[c]

    return _compute(int(data.shape[0]), channels, window.output, layout, out, "depthwise", rank)


def max_pool(data: Any, window: Window, layout: str) -> Any:
    """Maximum over the window; padding never wins."""

    def out(n: Any, place: Sequence[Any], c: Any) -> Any:
        lowest = float(tirx.min_value(str(data.dtype)).value)
        values = [v for _, v in _window_values(data, layout, window, n, place, c, lowest)]
        best = values[0]
        for value in values[1:]:
            best = te.max(best, value)
        return best

    return _compute(
        int(data.shape[0]), _channels(data, layout), window.output, layout, out, "max_pool",
        len(window.kernel),
    )  # fmt: skip


def average_pool(data: Any, window: Window, layout: str, include_pad: bool) -> Any:
    """Mean over the window: a pairwise tree over the taps in row-major order, then * (1/count).

    A tap in the padding counts as a zero in its place of the tree.
    """
    sizes = _spatial(data, layout)
    padded = any(window.before) or any(
        window.position(a, window.output[a] - 1, window.kernel[a] - 1) >= sizes[a]
        for a in range(len(sizes))
    )
    ceiled = any(
        window.position(a, window.output[a] - 1, window.kernel[a] - 1) >= sizes[a] + window.after[a]
        for a in range(len(sizes))
    )

    def factor(place: Sequence[Any]) -> Any:
        if not padded or (include_pad and not ceiled):
            return tirx.const(float(np.float32(1 / prod(window.kernel))), data.dtype)
        count = tirx.const(1, "int64")
        for axis, p in enumerate(place):
            low = -window.before[axis] if include_pad else 0
            high = sizes[axis] + (window.after[axis] if include_pad else 0)
            inside = tirx.const(0, "int64")
            for tap in range(window.kernel[axis]):
                at = window.position(axis, p, tap)
                inside = inside + te.all(at >= low, at < high).astype("int64")
            count = count * inside
        return tirx.const(1.0, data.dtype) / count.astype(data.dtype)

    def out(n: Any, place: Sequence[Any], c: Any) -> Any:
        values = [v for _, v in _window_values(data, layout, window, n, place, c, 0.0)]
        return tree_sum(values) * factor(place)

    return _compute(
        int(data.shape[0]), _channels(data, layout), window.output, layout, out, "average_pool",
        len(window.kernel),
    )  # fmt: skip


def tree_sum(values: Sequence[Any]) -> Any:
    """Pairwise sum by halves: while n > 1: h = ceil(n/2); x[i] += x[i+h] for i < n-h; n = h."""
    values = list(values)
    while len(values) > 1:
        half = ceil(len(values) / 2)
        values = [
            values[i] + values[i + half] if i < len(values) - half else values[i]
            for i in range(half)
        ]
    return values[0]


def tree_halve(data: Any, axis: int) -> Any:
    """One level of ``tree_sum`` along an axis of n elements: the result has ceil(n/2)."""
    shape = [int(d) for d in data.shape]
    n = shape[axis]
    half = ceil(n / 2)
    shape[axis] = half

    def at(*index: Any) -> Any:
        other = list(index)
        other[axis] = index[axis] + half
        if n == 2 * half:
            return data(*index) + data(*other)
        return te.if_then_else(index[axis] < n - half, data(*index) + data(*other), data(*index))

    return te.compute(tuple(shape), at, name="tree_halve")


def tree_finish(data: Any, axis: int, count: int) -> Any:
    """The last levels of the tree in one expression, times float32(1/count); drops the axis."""
    n = int(data.shape[axis])
    shape = [int(d) for i, d in enumerate(data.shape) if i != axis]
    factor = tirx.const(float(np.float32(1 / count)), data.dtype)

    def at(*index: Any) -> Any:
        values = [data(*index[:axis], tirx.const(i, "int64"), *index[axis:]) for i in range(n)]
        return tree_sum(values) * factor

    return te.compute(tuple(shape), at, name="tree_mean")


def row_sum(value: Callable[..., Any], lead: Sequence[int], n: int, name: str) -> Any:
    """Sum ``value(*lead, k)`` over k < n in an order that vectors can follow.

    Lane l of 16 adds the elements l, l + 16, ... in turn; a pairwise tree then joins the lanes
    and the n % 16 last elements.
    """
    return _row_reduce(value, lead, n, name, te.sum, tree_sum)


def row_max(value: Callable[..., Any], lead: Sequence[int], n: int, name: str) -> Any:
    """Maximum of ``value(*lead, k)`` over k < n."""

    def largest(values: Sequence[Any]) -> Any:
        best = values[0]
        for other in values[1:]:
            best = te.max(best, other)
        return best

    return _row_reduce(value, lead, n, name, te.max, largest)


def _row_reduce(
    value: Callable[..., Any],
    lead: Sequence[int],
    n: int,
    name: str,
    combine: Callable[..., Any],
    join: Callable[[Sequence[Any]], Any],
) -> Any:
    turns, rest = divmod(n, LANES)
    leaves: Callable[..., list[Any]]
    if turns > 1:
        k = te.reduce_axis((0, turns), "k")
        part = te.compute(
            (*lead, LANES), lambda *i: combine(value(*i[:-1], k * LANES + i[-1]), axis=k),
            name=f"{name}_lanes",
        )  # fmt: skip
        leaves = lambda *i: [part(*i, tirx.const(lane, "int64")) for lane in range(LANES)]  # noqa: E731
        first = turns * LANES
    else:
        leaves = lambda *_: []  # noqa: E731
        first, rest = 0, n
    return te.compute(
        tuple(lead),
        lambda *i: join([*leaves(*i), *(value(*i, first + j) for j in range(rest))]),
        name=name,
        attrs={"mpqc.keep": 1},
    )


def softmax_terms(data: Any) -> list[Any]:
    """exp(x - max) and its sum along the last axis."""
    *lead, n = (int(d) for d in data.shape)
    peak = row_max(lambda *i: data(*i), lead, n, "peak")
    terms = te.compute(
        data.shape, lambda *i: te.exp(data(*i) - peak(*i[:-1])), name="terms",
        attrs={"mpqc.keep": 1},
    )  # fmt: skip
    return [terms, row_sum(lambda *i: terms(*i), lead, n, "total")]


def divide_rows(terms: Any, total: Any) -> Any:
    """The last step of a softmax."""
    return te.compute(terms.shape, lambda *i: terms(*i) / total(*i[:-1]), name="softmax")


def softmax(data: Any) -> Any:
    """Along the last axis."""
    return divide_rows(*softmax_terms(data))


def layer_norm(data: Any, scale: Any, bias: Any | None, epsilon: float) -> Any:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias along the last axis."""
    *lead, n = (int(d) for d in data.shape)
    count, small = tirx.const(float(n), data.dtype), tirx.const(epsilon, data.dtype)
    total = row_sum(lambda *i: data(*i), lead, n, "total")

    def centred(*i: Any) -> Any:
        return data(*i) - total(*i[:-1]) / count

    squares = row_sum(lambda *i: centred(*i) * centred(*i), lead, n, "squares")
    factor = te.compute(
        tuple(lead), lambda *i: tirx.const(1.0, data.dtype) / te.sqrt(squares(*i) / count + small),
        name="factor", attrs={"mpqc.keep": 1},
    )  # fmt: skip

    def out(*i: Any) -> Any:
        value = centred(*i) * factor(*i[:-1]) * scale(i[-1])
        return value if bias is None else value + bias(i[-1])

    return te.compute(data.shape, out, name="layer_norm")


def row_total(data: Any, mean: bool) -> Any:
    """Sum or mean along the last axis, which is dropped."""
    *lead, n = (int(d) for d in data.shape)
    total = row_sum(lambda *i: data(*i), lead, n, "total")
    if not mean:
        return total
    count = tirx.const(float(n), data.dtype)
    return te.compute(tuple(lead), lambda *i: total(*i) / count, name="mean")


def strided(data: Any, first: Sequence[int], stride: Sequence[int], shape: Sequence[int]) -> Any:
    """Element i of the result is element ``first + i * stride`` of the data, along every axis."""

    def at(*index: Any) -> Any:
        return data(*(f + i * s for i, f, s in zip(index, first, stride, strict=True)))

    return te.compute(tuple(shape), at, name="slice")


def cumulative_sum(data: Any, axis: int, exclusive: bool, reverse: bool) -> Any:
    """Each element sums its predecessors from the first on: quadratic, but short in practice."""
    size = int(data.shape[axis])
    k = te.reduce_axis((0, size), "k")
    zero = tirx.const(0, data.dtype)

    def at(*index: Any) -> Any:
        here = index[axis]
        source: list[Any] = list(index)
        source[axis] = (size - 1 - k) if reverse else k
        place = (size - 1 - here) if reverse else here
        taken = (k < place) if exclusive else (k <= place)
        return te.sum(tirx.Select(taken, data(*source), zero), axis=k)

    return te.compute(data.shape, at, name="cumsum")


def one_hot(data: Any, axis: int, depth: int, off: Any, on: Any, dtype: str) -> Any:
    """Indices, negative ones from the end, to ``on`` along a new axis of ``depth``."""
    shape = [int(d) for d in data.shape]
    shape.insert(axis, depth)
    wrap = tirx.const(depth, data.dtype)

    def at(*index: Any) -> Any:
        source = data(*index[:axis], *index[axis + 1 :])
        wrapped = tirx.Select(source < tirx.const(0, data.dtype), source + wrap, source)
        hit = tirx.EQ(wrapped.astype(str(index[axis].ty)), index[axis])
        return tirx.Select(hit, tirx.const(on, dtype), tirx.const(off, dtype))

    return te.compute(tuple(shape), at, name="one_hot")


def rank(data: Any, axis: int, largest: bool) -> Any:
    """Place of each element along the axis in sorted order, equal ones by their index: int32.

    Counts who comes before: quadratic in the extent, but static, parallel and free of branches.
    """
    shape = [int(d) for d in data.shape]
    other = te.reduce_axis((0, shape[axis]), "other")

    def at(*index: Any) -> Any:
        mine = data(*index)
        theirs = data(*index[:axis], other, *index[axis + 1 :])
        ahead = theirs > mine if largest else theirs < mine
        tied = tirx.all(tirx.EQ(theirs, mine), other < index[axis])
        return te.sum(tirx.any(ahead, tied).astype("int32"), axis=[other])

    return te.compute(tuple(shape), at, name="rank")


def take_ranks(data: Any | None, ranks: Any, axis: int, count: int, dtype: str) -> Any:
    """Elements (or, without data, indices) whose rank is 0 .. count - 1, in that order."""
    shape = [int(d) for d in ranks.shape]
    source = te.reduce_axis((0, shape[axis]), "source")
    shape[axis] = count

    def at(*index: Any) -> Any:
        where = (*index[:axis], source, *index[axis + 1 :])
        value = source.astype(dtype) if data is None else data(*where)
        hit = tirx.EQ(ranks(*where), index[axis].astype("int32"))
        return te.sum(tirx.Select(hit, value, tirx.const(0, dtype)), axis=[source])

    return te.compute(tuple(shape), at, name="take_ranks")


def matmul(data: Any, weight: Any, bias: Any | None, outs: int, height: int, rows: int) -> Any:
    """Product of data [..., M', K] and packed weight [N/b, K, b], + bias [N]: [..., M, N].

    M' is ``height`` = M rounded up to a multiple of ``rows``, the register tile.
    """
    b, depth = int(weight.shape[-1]), int(weight.shape[-2])
    blocks = int(weight.shape[0])
    lead = [int(d) for d in data.shape[:-1]]
    k = te.reduce_axis((0, depth), "rc")

    def tile(*index: Any) -> Any:
        ob, place, oi = index[0], index[1:-1], index[-1]
        return te.sum(data(*place, k) * weight(ob, k, oi), axis=[k])

    acc = te.compute((blocks, *lead, b), tile, name="matmul", attrs={"mpqc.rows": rows})

    def out(*index: Any) -> Any:
        place, o = index[:-1], index[-1]
        value = acc(o // b, *place, o % b)
        return value if bias is None else value + bias[o]

    return te.compute((*lead[:-1], height, outs), out, name="matmul_out")


def _window_values(
    data: Any, layout: str, window: Window, n: Any, place: Sequence[Any], c: Any, fill: float
) -> list[tuple[tuple[int, ...], Any]]:
    """(tap, value) in row-major order, ``fill`` where the tap lies in the padding."""
    sizes = _spatial(data, layout)
    constant = tirx.const(fill, data.dtype)
    values = []
    for tap in product(*(range(k) for k in window.kernel)):
        at, inside = [], []
        for axis, (p, t, size) in enumerate(zip(place, tap, sizes, strict=True)):
            index = window.position(axis, p, t)
            at.append(index)
            if window.position(axis, 0, t) < 0:
                inside.append(index >= 0)
            if window.position(axis, window.output[axis] - 1, t) >= size:
                inside.append(index < size)
        value = _read(data, layout, n, at, c)
        values.append((tap, te.if_then_else(te.all(*inside), value, constant) if inside else value))
    return values


def _read(data: Any, layout: str, n: Any, place: Sequence[Any], c: Any) -> Any:
    return data(n, *place, c) if layout == "NHWC" else data(n, c, *place)


def _spatial(data: Any, layout: str) -> list[int]:
    shape = [int(d) for d in data.shape]
    return shape[1:-1] if layout == "NHWC" else shape[2:]


def _channels(data: Any, layout: str) -> int:
    return int(data.shape[-1] if layout == "NHWC" else data.shape[1])


def _compute(
    batch: int,
    channels: int,
    spatial: Sequence[int],
    layout: str,
    value: Callable[[Any, Sequence[Any], Any], Any],
    name: str,
    rank: int,
) -> Any:
    """A tensor in the layout whose element is ``value(n, place, channel)``."""
    if layout == "NHWC":
        shape = (batch, *spatial, channels)
        return te.compute(shape, lambda n, *i: value(n, i[:rank], i[rank]), name=name)
    shape = (batch, channels, *spatial)
    return te.compute(shape, lambda n, c, *i: value(n, i, c), name=name)
