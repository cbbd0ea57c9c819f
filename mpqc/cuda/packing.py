"""Prepack weights for the product kernels; numpy, pure."""

import numpy as np

from mpqc.cuda.kernels import QUAD, WORD, ProductLayer
from mpqc.graph import Array
from mpqc.schedules.cuda_product import ProductTile


def plane_words(codes: Array, bits: int) -> Array:
    """Codes uint8 [..., C] -> uint32 [bits, ..., ceil(C/32)], channel 32*k + b in bit b."""
    filled = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % WORD)])
    planes = (filled[None] >> np.arange(bits, dtype=np.uint8).reshape(-1, *[1] * codes.ndim)) & 1
    packed = np.packbits(planes, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4")


def quad_words(values: Array) -> Array:
    """Bytes int8 [..., C] -> uint32 [..., ceil(C/4)], missing ones zero."""
    filled = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % QUAD)])
    return np.ascontiguousarray(filled.astype(np.int8)).view("<u4")


def product_weights(weight: Array, shape: ProductLayer, tile: ProductTile) -> Array:
    """Weights of the product kernel, in the order in which its blocks read them.

    Args:
        weight: [O, C/G, KH, KW]: codes uint8 where the words are planes, else integers.
        shape: the layer.
        tile: of the kernel.

    Returns:
        uint32 [G * columns, chunks, J, N, K].
    """
    layer = shape.layer
    last = weight.transpose(0, 2, 3, 1)  # [O, KH, KW, C/G]
    if shape.planes:
        words = plane_words(last, layer.weight_bits)
    else:
        parts = [last & 1, last >> 1] if shape.wide else [last]
        words = np.stack([quad_words(part) for part in parts])
    planes = words.shape[0]
    kind = shape.weight_type(tile)
    blocks, chunks, _, columns, depth = kind.shape
    grouped = words.reshape(planes, layer.groups, layer.group_out, shape.depth)
    across = blocks // layer.groups
    padding = (
        (0, 0), (0, 0), (0, across * columns - layer.group_out), (0, chunks * depth - shape.depth),
    )  # fmt: skip
    filled = np.pad(grouped, padding)
    tiled = filled.reshape(planes, layer.groups, across, columns, chunks, depth)
    return np.ascontiguousarray(tiled.transpose(1, 2, 4, 0, 3, 5)).reshape(kind.shape)


def direct_weights(weight: Array, dtype: str) -> Array:
    """[O, C/G, KH, KW] -> [KH, KW, C/G, O]."""
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0)).astype(dtype)
