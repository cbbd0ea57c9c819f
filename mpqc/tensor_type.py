"""Element types and shapes: what the IR and the runtime share; numpy is all that it needs."""

import re
from dataclasses import dataclass
from math import prod
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from mpqc.errors import GraphError

Array: TypeAlias = npt.NDArray[Any]

SHORT_NAMES = {
    "float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16",
    "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64", "bool": "bool",
    "string": "str",
    "int4": "i4", "uint4": "u4", "int2": "i2", "uint2": "u2",
}  # fmt: skip
_LONG_NAMES = {short: long for long, short in SHORT_NAMES.items()}


@dataclass(frozen=True)
class TensorType:
    """Element type (numpy's name) and static shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: Array) -> Self:
        return cls(str(array.dtype), tuple(array.shape))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"f32[1,3,224,224]"``."""
        match = re.fullmatch(r"(\w+)\[([\d,\s]*)\]", text.strip())
        if not match or match[1] not in _LONG_NAMES:
            raise GraphError(f"not a tensor type: {text!r}")
        return cls(_LONG_NAMES[match[1]], tuple(int(d) for d in match[2].split(",") if d.strip()))

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{SHORT_NAMES.get(self.dtype, self.dtype)}[{','.join(map(str, self.shape))}]"
