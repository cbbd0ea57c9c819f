"""PyTorch as an opponent, on the CPU: the same numbers, nothing timed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpqc.demo
from mpqc import ort
from mpqc.errors import EnvironmentLacks, ModelError
from mpqc.graph import Array

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.train.opponent import Int8Product, TorchOpponent


def inputs(batch: int = 1) -> dict[str, Array]:
    return {"input": np.load(mpqc.demo.files().test)["input"][:batch]}


def test_fp16_says_what_the_model_says() -> None:
    model = mpqc.demo.files().model
    feeds = inputs(4)
    found = TorchOpponent(model, "fp16", batch=4, device="cpu")
    expected = ort.Session(model).run(feeds)
    for _ in range(2):
        for name, array in found.run(feeds).items():
            assert array.dtype == np.float32
            np.testing.assert_allclose(array, expected[name], rtol=0.05, atol=0.05)
    assert len(found.seconds(feeds, 3)) == 3


def test_int8_multiplies_bytes_where_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mpqc.demo.files().model
    feeds, calls = inputs(32), []
    plain = torch._int_mm

    def counted(a: Any, b: Any) -> Any:
        calls.append((a.shape, b.shape))
        assert a.dtype == b.dtype == torch.int8
        return plain(a, b)

    monkeypatch.setattr(torch, "_int_mm", counted)
    try:
        found = TorchOpponent(model, "int8", batch=32, device="cpu")
    except ModelError:
        pytest.skip("the demo has no such layer")
    expected = ort.Session(model).run(feeds)
    for name, array in found.run(feeds).items():
        error = np.abs(array - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 0.1
    assert calls


@pytest.mark.parametrize("image", [False, True])
def test_a_product_of_bytes_is_near_the_product(image: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape, extent = ((2, 24, 5, 4), (40, 24, 1, 1)) if image else ((32, 24), (40, 24))
    x, weight = (torch.randn(s, generator=generator) for s in (shape, extent))
    bias = torch.randn(40, generator=generator)

    def product(a: Any, b: Any, c: Any | None) -> Any:
        functional = torch.nn.functional
        return functional.conv2d(a, b, c) if image else functional.linear(a, b, c)

    hook, expected = Int8Product(), product(x, weight, bias)
    for _ in range(2):
        got = hook(product, x, weight, bias)
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) < 0.05 * float(expected.abs().max())
    few = x[:1, :, :1, :1] if image else x[:1]
    torch.testing.assert_close(hook(product, few, weight, bias), product(few, weight, bias))


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EnvironmentLacks, match="sees no GPU: install a build with CUDA"):
        TorchOpponent(mpqc.demo.files().model, "fp16")
    assert tmp_path.exists()
