"""Prepack weights for the kernels, and read packed activations back; numpy, pure."""

import numpy as np

from mpqc.graph import Array


def bits_to_bytes(codes: Array, bits: int) -> Array:
    """Split codes into planes and pack the last axis, channel 8*k + b to bit b of byte k.

    Args:
        codes: uint8 [..., C].
        bits: planes.

    Returns:
        uint8 [bits, ..., ceil(C/8)].
    """
    planes = (codes[None] >> np.arange(bits, dtype=np.uint8).reshape(-1, *[1] * codes.ndim)) & 1
    packed: Array = np.packbits(planes, axis=-1, bitorder="little")
    return packed


def bytes_to_codes(planes: Array, channels: int) -> Array:
    """Inverse of ``bits_to_bytes``.

    Args:
        planes: uint8 [bits, ..., ceil(C/8)].
        channels: C.

    Returns:
        uint8 [..., C].
    """
    unpacked = np.unpackbits(planes, axis=-1, bitorder="little", count=channels)
    codes: Array = np.bitwise_or.reduce(
        [plane << np.uint8(i) for i, plane in enumerate(unpacked)], axis=0, dtype=np.uint8
    )
    return codes


def _blocks(channels_last: Array, block: int) -> Array:
    """[O, ...] -> [ceil(O/B), ..., B], missing channels zero."""
    count = channels_last.shape[0]
    pad = -count % block
    padded = np.pad(channels_last, [(0, pad), *[(0, 0)] * (channels_last.ndim - 1)])
    return np.moveaxis(padded.reshape(-1, block, *channels_last.shape[1:]), 1, -1)


def bitplane_weights(codes: Array, bits: int, groups: int, taps: int, block: int) -> Array:
    """Weights of the bitplane kernel.

    Args:
        codes: uint8 [O, C/G, KH, KW].
        bits: J.
        groups: G.
        taps: separate runs of a window row: 1 or KW.
        block: B, output channels of a tile.

    Returns:
        uint8 [G * ceil(O/G/B), J, KH, taps, run, B], run = KW/taps * ceil(C/G/8) bytes.
    """
    out, _, kh, _ = codes.shape
    planes = bits_to_bytes(codes.transpose(0, 2, 3, 1), bits)  # [J, O, KH, KW, bytes]
    planes = planes.reshape(bits, out, kh, taps, -1).transpose(1, 0, 2, 3, 4)
    groups_of = planes.reshape(groups, out // groups, *planes.shape[1:])
    return np.ascontiguousarray(np.concatenate([_blocks(group, block) for group in groups_of]))


def popcount_weights(codes: Array, bits: int, groups: int, taps: int, block: int) -> Array:
    """Weights of the pairwise popcount kernel: those of the bitplane kernel, two bytes a lane.

    Args:
        codes: uint8 [O, C/G, KH, KW].
        bits: J.
        groups: G.
        taps: separate runs of a window row: 1 or KW.
        block: B.

    Returns:
        uint8 [G * ceil(O/G/B), J, KH, taps, ceil(run/2), B, 2]; a missing byte is zero.
    """
    single = bitplane_weights(codes, bits, groups, taps, block)
    padding = [(0, 0)] * 4 + [(0, single.shape[4] % 2), (0, 0)]
    pairs = np.pad(single, padding).reshape(*single.shape[:4], -1, 2, block)
    return np.ascontiguousarray(np.swapaxes(pairs, -1, -2))


def lut_weights(
    codes: Array, bits: int, taps: int, block: int, vector: int = 0, slices: int = 1
) -> Array:
    """Weights of the lookup kernel: bits of four channels of a plane as one nibble.

    Args:
        codes: uint8 [O, C, KH, KW].
        bits: J.
        taps: separate runs of a window row: 1 or KW.
        block: B.
        vector: bytes of which the even ones are the first half of their channels; 0: in order.
        slices: S, of the channels, one after the other.

    Returns:
        uint8 [ceil(O/B), J, S, KH, taps, run, B], run = KW/taps * ceil(C/4) / S; bit t of a nibble
        is channel 4*k + t of a slice.
    """
    out, channels, kh, kw = codes.shape
    last = np.pad(codes.transpose(0, 2, 3, 1), [(0, 0)] * 3 + [(0, -channels % 4)])
    planes = (last[None] >> np.arange(bits, dtype=np.uint8).reshape(-1, 1, 1, 1, 1)) & 1
    nibbles = planes.reshape(bits, out, kh, kw, slices, -1, 4) @ np.array([1, 2, 4, 8], np.uint8)
    runs = nibbles.transpose(1, 0, 4, 2, 3, 5).reshape(out, bits, slices, kh, taps, -1)
    packed = _blocks(runs.astype(np.uint8), block)
    if vector:
        halves = packed.reshape(*packed.shape[:-1], -1, 2, vector // 2)
        packed = halves.swapaxes(-1, -2).reshape(packed.shape)
    return np.ascontiguousarray(packed)


def dot_weights(weight: Array, taps: int, block: int, group: int, dtype: str) -> Array:
    """Weights of the dot kernels, runs padded with zeros to whole instructions.

    Args:
        weight: integers [O, C, KH, KW].
        taps: separate runs of a window row: 1 or KW.
        block: B.
        group: t, products that one instruction adds.
        dtype: int8 or int16.

    Returns:
        [ceil(O/B), KH, taps, ceil(run/t), B, t], run = KW/taps * C.
    """
    out, _, kh, _ = weight.shape
    runs = weight.transpose(0, 2, 3, 1).reshape(out, kh, taps, -1)
    runs = np.pad(runs, [(0, 0), (0, 0), (0, 0), (0, -runs.shape[-1] % group)])
    blocked = _blocks(runs.reshape(out, kh, taps, -1, group), block)  # [O/B, KH, taps, R, t, B]
    return np.ascontiguousarray(np.swapaxes(blocked, -1, -2)).astype(dtype)


def grouped_weights(weight: Array, block: int) -> Array:
    """Weights of the grouped kernel: [O, C/G, KH, KW] -> int16 [KH, KW, C/G, O/B, B]."""
    out = weight.shape[0]
    moved = weight.transpose(2, 3, 1, 0)
    return np.ascontiguousarray(moved.reshape(*moved.shape[:3], out // block, block)).astype(
        np.int16
    )


def unpack_elements(packed: Array, bits: int, *, signed: bool = False) -> Array:
    """Integers narrower than a byte out of the bytes that hold them, the lowest bits first.

    So ONNX packs INT4 and its kin, and ONNX Runtime the blocks of MatMulNBits.

    Args:
        packed: uint8 [..., n].
        bits: of each integer: 1, 2, 4 or 8.
        signed: they are in two's complement.

    Returns:
        int8 or uint8 [..., n * 8 / bits].
    """
    each = 8 // bits
    shifts = (np.arange(each) * bits).astype(np.uint8)
    spread = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    codes: Array = spread.reshape(*packed.shape[:-1], packed.shape[-1] * each)
    if not signed:
        return codes
    top = 2 ** (bits - 1)
    values: Array = ((codes ^ np.uint8(top)).astype(np.int16) - top).astype(np.int8)
    return values


PATTERN_BITS = 8  # of four codes: the tables of all patterns are 4 KiB, which stay in L1


def pattern_tables(bits: int) -> Array:
    """The tables of all patterns of four codes, what ``compute.rows_of_patterns`` looks up.

    Args:
        bits: of a code, 1 or 2. With one bit, the upper four bits of a pattern are those of the
            pixel beside it, which counts 16 times: see ``compute.lut_pair_conv``.

    Returns:
        uint8 [256 * 16]: entry ``b`` of pattern ``p`` is ``sum_t bit_t(b) * code_t(p)``.
    """
    patterns = np.arange(2**PATTERN_BITS)[:, None]
    chosen = np.arange(16)[:, None] >> np.arange(4) & 1  # [entry, code]
    low = (patterns >> bits * np.arange(4) & 2**bits - 1) @ chosen.T
    high = (patterns >> 4 + np.arange(4) & 1) @ chosen.T if bits == 1 else 0
    return np.asarray(low + 16 * high, np.uint8).reshape(-1)
