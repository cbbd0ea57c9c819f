"""Estimates of the ARM kernels' inner loops: what fewer bits must buy."""

import pytest

from benchmarks.arm import CORES, analyser, best, estimate, kernels_of, layer_of
from mpqc.errors import EnvironmentLacks


@pytest.fixture(scope="module", autouse=True)
def _llvm_mca() -> None:
    try:
        analyser()
    except EnvironmentLacks as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("core", ["cortex-a53", "cortex-a72"])
def test_fewer_bits_cost_fewer_cycles(core: str) -> None:
    """At most half of the int8 kernel's cycles per product at w2a2, a quarter at w1a1."""
    rows = [
        estimate(core, kernel, layer_of(bits, bits))
        for bits in (1, 2, 8)
        for kernel in kernels_of(core, bits, bits)
        if kernel != "multiply-add"
    ]
    int8 = best(rows, core, 8, 8)
    assert int8.kernel not in ("bitplane", "bitplane-lut")
    assert best(rows, core, 2, 2).cycles_per_mac <= 0.5 * int8.cycles_per_mac
    assert best(rows, core, 1, 1).cycles_per_mac <= 0.25 * int8.cycles_per_mac


@pytest.mark.parametrize("core", [*CORES])
def test_an_estimate_counts_the_inner_loop(core: str) -> None:
    row = estimate(core, "bitplane", layer_of(1, 1))
    counted = "vcnt.8" if core == "cortex-a9" else "cnt"
    assert row.counts[counted] * 128 == row.products
    assert row.vector < row.instructions < 400
    assert row.cycles >= row.instructions / 4  # nothing issues more
