import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqc.graph import Array
from mpqc.packing import (
    bitplane_weights,
    bits_to_bytes,
    bytes_to_codes,
    dot_weights,
    grouped_weights,
)


def drawn(shape: tuple[int, ...], top: int, seed: int) -> Array:
    codes: Array = np.random.default_rng(seed).integers(0, top, shape).astype(np.uint8)
    return codes


@given(
    shape=st.lists(st.integers(1, 5), max_size=3),
    channels=st.integers(1, 140),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**16),
)
def test_planes_come_back_as_codes(shape: list[int], channels: int, bits: int, seed: int) -> None:
    codes = drawn((*shape, channels), 2**bits, seed)
    planes = bits_to_bytes(codes, bits)
    assert planes.shape == (bits, *shape, -(-channels // 8))
    np.testing.assert_array_equal(bytes_to_codes(planes, channels), codes)


def test_channel_8k_plus_b_is_bit_b_of_byte_k() -> None:
    codes = np.zeros(17, np.uint8)
    codes[[0, 9, 16]] = 1, 2, 3
    np.testing.assert_array_equal(bits_to_bytes(codes, 2), [[0b1, 0b0, 0b1], [0b0, 0b10, 0b1]])


def test_missing_channels_are_zero_bits() -> None:
    planes = bits_to_bytes(np.full((2, 3), 255, np.uint8), 8)
    np.testing.assert_array_equal(planes, np.full((8, 2, 1), 0b111))


@given(
    groups=st.integers(1, 3),
    outside=st.integers(1, 20),
    inside=st.integers(1, 19),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bits=st.integers(1, 8),
    block=st.sampled_from([1, 8, 16]),
    joined=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_bitplane_weights_hold_every_bit_once(
    groups: int, outside: int, inside: int, kernel: tuple[int, int], bits: int, block: int,
    joined: bool, seed: int,
) -> None:  # fmt: skip
    kh, kw = kernel
    codes = drawn((groups * outside, inside, kh, kw), 2**bits, seed)
    taps = 1 if joined else kw
    packed = bitplane_weights(codes, bits, groups, taps, block)
    blocks, group_bytes = -(-outside // block), -(-inside // 8)
    assert packed.shape == (groups * blocks, bits, kh, taps, kw // taps * group_bytes, block)
    # undo: [G, blocks, J, KH, KW, bytes, B] -> planes of [O, KH, KW, C/G]
    split = packed.reshape(groups, blocks, bits, kh, kw, group_bytes, block)
    rows = split.transpose(2, 0, 1, 6, 3, 4, 5).reshape(
        bits, groups, blocks * block, kh, kw, group_bytes
    )
    assert not rows[:, :, outside:].any()
    planes = rows[:, :, :outside].reshape(bits, groups * outside, kh, kw, group_bytes)
    np.testing.assert_array_equal(
        bytes_to_codes(np.ascontiguousarray(planes), inside).transpose(0, 3, 1, 2), codes
    )


@given(
    outside=st.integers(1, 20),
    inside=st.integers(1, 9),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    block=st.sampled_from([4, 8, 16]),
    group=st.sampled_from([2, 4]),
    joined=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_dot_weights_pad_runs_with_zeros(
    outside: int, inside: int, kernel: tuple[int, int], block: int, group: int, joined: bool,
    seed: int,
) -> None:  # fmt: skip
    kh, kw = kernel
    weight = drawn((outside, inside, kh, kw), 255, seed).astype(np.int16) - 127
    taps = 1 if joined else kw
    packed = dot_weights(weight, taps, block, group, "int8")
    run = kw // taps * inside
    assert packed.dtype == np.int8
    assert packed.shape == (-(-outside // block), kh, taps, -(-run // group), block, group)
    rows = packed.transpose(0, 4, 1, 2, 3, 5).reshape(-1, kh, taps, -(-run // group) * group)
    assert not rows[outside:].any()
    assert not rows[..., run:].any()
    back = rows[:outside, ..., :run].reshape(outside, kh, kw, inside).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(back, weight)


@pytest.mark.parametrize(("outside", "inside", "block"), [(12, 1, 4), (6, 5, 6), (8, 3, 1)])
def test_grouped_weights_put_output_channels_last(outside: int, inside: int, block: int) -> None:
    weight = drawn((outside, inside, 3, 2), 255, 0).astype(np.int16) - 127
    packed = grouped_weights(weight, block)
    assert packed.shape == (3, 2, inside, outside // block, block)
    for o in range(outside):
        np.testing.assert_array_equal(
            packed[:, :, :, o // block, o % block], weight[o].transpose(1, 2, 0)
        )
