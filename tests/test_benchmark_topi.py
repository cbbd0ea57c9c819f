import numpy as np
import pytest

from benchmarks import topi
from benchmarks.layers import Convolution
from mpqc.errors import MpqcError
from mpqc.graph import Precision
from mpqc.target import find_target, native

LAYER = Convolution(64, 4, 32, 3)

pytestmark = pytest.mark.skipif(native().arch != "x86_64", reason="runs code for x86")


def test_weights_are_packed_as_topi_packs_data() -> None:
    codes = np.zeros((1, 8, 1, 1), np.int64)
    codes[0, 0], codes[0, 1], codes[0, 7] = 1, 2, 3
    packed = topi.pack_weights(codes, 2, 8)
    assert packed.shape == (1, 1, 1, 2, 1)
    assert packed.ravel().tolist() == [0b10000001, 0b01000001]


@pytest.mark.parametrize("bits", ["w1a1", "w1a2", "w2a2", "w4a4", "w8a8"])
def test_the_best_form_is_exact_and_timed(bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topi, "PIXELS", (2,))
    monkeypatch.setattr(topi, "CHANNELS", (16,))
    found = topi.best_form(LAYER, Precision.parse(bits), find_target("x86-64-v2"))
    assert found.form.word in topi.WORDS
    times = found.seconds(3)
    assert len(times) == 3
    assert min(times) > 0


def test_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topi, "WORDS", (8,))
    right = topi.expected
    monkeypatch.setattr(topi, "expected", lambda *all_: right(*all_) + 1)
    with pytest.raises(MpqcError, match="uint8, 2x16 is not exact"):
        topi.best_form(LAYER, Precision(1, 1), find_target("x86-64-v2"))
