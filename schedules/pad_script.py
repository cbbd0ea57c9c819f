"""The padding kernel, spelled out: three plain loops a row."""

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from mpqc.graph import TensorType
from mpqc.schedules.simple_cpu import SMALL


def pad(
    images: int,
    size: tuple[int, int, int],
    pads: tuple[int, int, int, int],
    fill: tuple[int, ...],
    dtypes: tuple[str, str],
    last_mask: int,
    offset: int = 0,
) -> tuple[Any, tuple[TensorType, TensorType]]:
    """Rows of a bordered image: three plain loops each, which LLVM turns into memset and memcpy.

    ``offset`` is taken from every inner value; ``fill`` is stored as it is.
    """
    height, width, channels = size
    top, left, bottom, right = pads
    rows, row = top + height + bottom, (left + width + right) * channels
    inner, before, after = width * channels, left * channels, right * channels
    source, result = dtypes
    images_a_fill = images // len(fill)

    def border(image: Any, column: Any) -> Any:
        value = tirx.const(fill[0], result)
        for index, other in enumerate(fill[1:], start=1):
            value = tirx.Select(image >= index * images_a_fill, tirx.const(other, result), value)
        if last_mask != 255:
            last = tirx.const(last_mask, result)
            value = tirx.Select(column % channels == channels - 1, value & last, value)
        return value

    def stored(value: Any) -> Any:
        if offset:  # modulo 256: the difference fits the result's type
            value = value - tirx.const(offset, source)
        return T.Cast(result, value)

    loop = T.parallel if images * rows * row >= SMALL else T.serial

    @T.prim_func(s_tir=True)
    def bordered(
        src: T.Buffer((images * height * inner,), source),
        dst: T.Buffer((images * rows * row,), result),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for line in loop(images * rows):
            with T.sblock("line"):
                T.reads()
                T.writes()
                if T.And(line % rows >= top, line % rows < top + height):
                    for r in T.serial(before):
                        dst[line * row + r] = border(line // rows, r)
                    for r in T.serial(inner):
                        dst[line * row + before + r] = stored(
                            src[(line // rows * height + line % rows - top) * inner + r]
                        )
                    for r in T.serial(after):
                        dst[line * row + before + inner + r] = border(line // rows, r)
                else:
                    for r in T.serial(row):
                        dst[line * row + r] = border(line // rows, r)

    kinds = (
        TensorType(source, (images * height * inner,)),
        TensorType(result, (images * rows * row,)),
    )
    return bordered, kinds
