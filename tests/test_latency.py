"""Latency tables: the CSV, lookups, the model for what was not measured, promises."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqc.compute import Window
from mpqc.errors import DataError, OutputError, UsageError
from mpqc.graph import Precision
from mpqc.kernels import Layer as KernelLayer
from mpqc.latency import (
    HEADER,
    KINDS,
    Conditions,
    Entry,
    Geometry,
    LatencyCost,
    LatencyTable,
    LayerPoint,
    Network,
    cached_table,
    table_path,
    versions,
)
from mpqc.latency_model import LatencyModel, exists, features
from mpqc.passes.find_layers import Layer
from mpqc.program import LayerRecord, Program, Step
from mpqc.select_kernel import table_geometry
from mpqc.target import TARGETS, native

CONDITIONS = Conditions("native", "a processor, with a comma", 1, "mpqc 1; kernels ab; tvm 0")
CONV = Geometry("conv", 1, 8, 8, 16, 32, 3, 3, pad_top=1, pad_left=1, pad_bottom=1, pad_right=1)
DENSE = Geometry("matmul", 1, 1, 1, 64, 10)
SHA = "ab" * 32
TWO, FOUR, EIGHT = Precision(2, 2), Precision(4, 4), Precision(8, 8)


def row(
    geometry: Geometry | None = CONV,
    precision: Precision = FOUR,
    kernel: str = "int8",
    seconds: float = 1e-5,
    epilogue: str = "Requantize to uint8",
    model: str = "",
) -> Entry:
    widths = precision.weight, precision.activation
    return Entry(
        geometry, epilogue, *widths, kernel, "v", "7x2x16", seconds, seconds * 1.1, model=model
    )


def table(*entries: Entry) -> LatencyTable:
    return LatencyTable(CONDITIONS, entries)


def network_rows(
    rest: float = 1e-6, whole: float = 9e-6, promise: float = 1e-5, precision: Precision = FOUR
) -> list[Entry]:
    values = {"rest": rest, "whole": whole, "promise": promise}
    return [row(None, precision, k, s, "", SHA[:16]) for k, s in values.items()]


# The file ------------------------------------------------------------------------------------


def test_a_table_comes_back_from_its_csv(tmp_path: Path) -> None:
    made = table(row(), row(DENSE, TWO, "bitplane", 3.21e-7), *network_rows())
    made.save(tmp_path / "t.csv")
    again = LatencyTable.load(tmp_path / "t.csv")
    assert again.conditions == CONDITIONS
    assert [e.key for e in again.entries] == [e.key for e in made.entries]
    for old, new in zip(made.entries, again.entries, strict=True):
        assert new.seconds_min == pytest.approx(old.seconds_min)
        assert new.seconds_median == pytest.approx(old.seconds_median)
        blank = {"seconds_min": 0.0, "seconds_median": 0.0}
        assert replace(new, **blank) == replace(old, **blank)  # type: ignore[arg-type]
    assert (tmp_path / "t.csv").read_text("utf-8").partition("\n")[0] == ",".join(HEADER)


def test_rows_are_appended_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.csv"
    first = table().appended(path, [row(seconds=1e-5)])
    second = first.appended(path, [row(seconds=2e-5), row(kernel="bitplane")])
    assert len(second.entries) == 2
    assert LatencyTable.load(path).seconds(CONV, FOUR)[0] == pytest.approx(1e-5)
    assert len(path.read_text("utf-8").splitlines()) == 4


def test_a_line_without_its_end_is_dropped_and_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table().appended(path, [row()])
    whole = path.read_bytes()
    path.write_bytes(whole + b"conv,1,8,8,16,32,3,3,1,1")
    known = LatencyTable.load(path)
    assert len(known.entries) == 1
    known.appended(path, [row(kernel="bitplane")])
    assert path.read_bytes().startswith(whole)
    assert {e.kernel for e in LatencyTable.load(path).entries} == {"int8", "bitplane"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.replace(",1e-05,", ",soon,"), "line 2"),
        (lambda s: s.replace(",1e-05,", ",nan,"), "line 2.*no number of seconds"),
        (lambda s: s.replace(",1e-05,", ",-1,"), "line 2.*no number of seconds"),
        (lambda s: s.replace("conv,1,8", "conv,1,x"), "line 2"),
        (lambda s: s.replace("conv,", "lstm,"), "line 2.*unknown op"),
        (lambda s: s.replace(",yes,", ",perhaps,"), "line 2.*perhaps"),
        (lambda s: s.replace("op,n", "what,n"), "not a latency table"),
        (lambda s: s + "1,2,3\n", "line 3.*3 columns"),
        (lambda s: "", "not a latency table"),
        (lambda s: s.splitlines()[0] + "\n", "empty"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "t.csv"
    table(row()).save(path)
    text = path.read_text("utf-8")
    changed = damage(text)  # type: ignore[operator]
    assert changed != text
    path.write_text(changed, "utf-8")
    with pytest.raises(DataError, match=message) as caught:
        LatencyTable.load(path)
    assert str(path) in str(caught.value)


def test_a_table_of_two_machines_is_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "1.csv", tmp_path / "2.csv"
    table(row()).save(one)
    LatencyTable(replace(CONDITIONS, cpu="another"), (row(),)).save(other)
    one.write_text(one.read_text("utf-8") + other.read_text("utf-8").splitlines()[1] + "\n")
    with pytest.raises(DataError, match=r"mixes machines.*line 3"):
        LatencyTable.load(one)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv"):
        LatencyTable.load(tmp_path / "nowhere.csv")
    (tmp_path / "blocked").write_text("")
    with pytest.raises(OutputError, match="blocked"):
        table(row()).save(tmp_path / "blocked" / "t.csv")


def test_the_cache_has_a_file_for_each_target_and_thread_count(tmp_path: Path) -> None:
    files = {
        table_path(target, threads, tmp_path)
        for target in (native(), TARGETS["x86-64-v2"], TARGETS["rpi4"])
        for threads in (1, 2)
    }
    assert len(files) == 6
    assert cached_table(native(), 1, tmp_path) is None
    table(row()).save(table_path(native(), 1, tmp_path))
    assert cached_table(native(), 1, tmp_path) is not None
    assert cached_table(native(), 2, tmp_path) is None


def test_versions_name_what_makes_kernels() -> None:
    assert "kernels " in versions()
    assert "apache-tvm " in versions()


# Lookups -------------------------------------------------------------------------------------


def test_the_fastest_measured_kernel_wins() -> None:
    made = table(
        row(kernel="int8", seconds=3e-6),
        row(kernel="bitplane", seconds=2e-6),
        row(kernel="bitplane-lut", seconds=4e-6),
        row(precision=EIGHT, kernel="int8", seconds=3e-6),
        row(precision=EIGHT, kernel="bitplane", seconds=9e-6),
    )
    assert made.seconds(CONV, FOUR, "Requantize to uint8") == (2e-6, True)
    assert made.best_kernel(CONV, FOUR) == ("bitplane", True)
    assert made.best_kernel(CONV, EIGHT) == ("int8", True)


def test_epilogues_are_told_apart_and_averaged_where_none_is_named() -> None:
    made = table(
        row(seconds=2e-6), row(seconds=4e-6, epilogue="Affine+Add to float32"),
        row(kernel="bitplane", seconds=2.5e-6),
    )  # fmt: skip
    assert made.seconds(CONV, FOUR, "Affine+Add to float32") == (4e-6, True)
    assert made.seconds(CONV, FOUR, "Requantize to uint8") == (2e-6, True)
    # only one epilogue was measured with both kernels
    assert made.seconds(CONV, FOUR) == (2e-6, True)


def test_what_was_not_measured_is_marked() -> None:
    made = table(row(), row(precision=EIGHT, seconds=2e-5))
    seconds, measured = made.seconds(CONV, Precision(6, 6))
    assert not measured
    assert 1e-5 <= seconds <= 2e-5
    assert made.best_kernel(CONV, Precision(6, 6)) == ("int8", False)
    # measured behind another epilogue only: not this point
    assert made.seconds(CONV, FOUR, "Affine to float32")[1] is False
    # a shape that nobody measured
    assert made.seconds(replace(CONV, out_channels=64), FOUR)[1] is False
    assert made.decides(CONV, "int8")
    assert not made.decides(DENSE, "int8")


def test_rows_of_a_model_are_no_measurements() -> None:
    made = table(replace(row(seconds=1e-9), measured="model"), row(precision=EIGHT))
    assert made.seconds(CONV, FOUR)[1] is False


def test_a_table_without_layers_says_so() -> None:
    with pytest.raises(UsageError, match="mpqc profile"):
        table(*network_rows()).seconds(CONV, FOUR)


def test_lookup_kernels_are_not_predicted_where_there_are_none() -> None:
    assert exists("bitplane-lut", CONV, Precision(4, 6))
    assert not exists("bitplane-lut", CONV, Precision(4, 7))
    assert not exists("bitplane-lut", replace(CONV, groups=4), FOUR)
    fast = table(*(row(kernel=k, seconds=1e-9 if "lut" in k else 1e-5) for k in KINDS))
    assert fast.best_kernel(CONV, Precision(3, 3)) == ("bitplane-lut", False)
    assert fast.best_kernel(CONV, EIGHT)[0] != "bitplane-lut"


# The model -----------------------------------------------------------------------------------

SHAPES = [
    Geometry("conv", 1, n, n, c, o, k, k) for n, c, o, k in
    [(16, 16, 16, 3), (8, 32, 64, 3), (16, 8, 32, 1), (4, 64, 128, 3), (12, 24, 24, 3)]
]  # fmt: skip
LAW = {
    "bitplane": [2e-7, 1e-10, 2e-10, 0.0, 1e-12],
    "bitplane-lut": [3e-7, 2e-10, 1e-10, 1e-12, 5e-12],
    "int8": [1e-7, 5e-11, 2e-10, 0.0, 2e-11],
}


def lawful() -> list[Entry]:
    """Measurements that follow the model exactly."""
    return [
        row(shape, precision, kind, float(features(kind, shape, precision) @ LAW[kind]))
        for shape in SHAPES
        for precision in (Precision(w, a) for w, a in product((1, 2, 4), repeat=2))
        for kind in KINDS
    ]


def test_the_model_finds_the_law_behind_measurements() -> None:
    model = LatencyModel.fit(lawful())
    unseen = Geometry("conv", 1, 10, 10, 48, 96, 3, 3)
    for kind, precision in product(KINDS, (Precision(3, 5), Precision(2, 6))):
        expected = float(features(kind, unseen, precision) @ LAW[kind])
        assert model.seconds(unseen, precision, kind) == pytest.approx(expected, rel=1e-3)
    assert max(model.errors()) < 1e-3


@given(
    st.sampled_from(KINDS),
    st.tuples(*[st.integers(1, 7)] * 2),
    st.sampled_from(SHAPES),
)
def test_more_bits_never_cost_less_in_the_model(
    kind: str, bits: tuple[int, int], shape: Geometry
) -> None:
    noisy = [
        replace(e, seconds_min=e.seconds_min * (1 + 0.2 * math.sin(i)))
        for i, e in enumerate(lawful())
    ]
    model = replace(LatencyModel.fit(noisy), anchors={})
    narrow = model.seconds(shape, Precision(*bits), kind)
    assert model.seconds(shape, Precision(bits[0] + 1, bits[1]), kind) >= narrow
    assert model.seconds(shape, Precision(bits[0], bits[1] + 1), kind) >= narrow


def test_measurements_of_the_same_shape_correct_the_model() -> None:
    slow = Geometry("conv", 1, 9, 9, 20, 20, 3, 3)  # twice as slow as the law says

    def law(precision: Precision) -> float:
        return float(features("int8", slow, precision) @ LAW["int8"])

    entries = [*lawful(), row(slow, TWO, "int8", 2 * law(TWO))]
    predicted = LatencyModel.fit(entries).seconds(slow, Precision(3, 2), "int8")
    assert predicted == pytest.approx(2 * law(Precision(3, 2)), rel=0.05)


def test_grouped_convolutions_have_coefficients_of_their_own() -> None:
    grouped = [
        row(replace(shape, groups=shape.c, out_channels=shape.c), p, "int8", 7e-5)
        for shape in SHAPES for p in (TWO, FOUR)
    ]  # fmt: skip
    model = LatencyModel.fit([*lawful(), *grouped])
    unseen = Geometry("conv", 1, 14, 14, 40, 40, 3, 3, groups=40)
    assert model.seconds(unseen, FOUR, "int8") > 3e-5
    plain = replace(unseen, groups=1)
    expected = float(features("int8", plain, FOUR) @ LAW["int8"])
    assert model.seconds(plain, FOUR, "int8") == pytest.approx(expected, rel=1e-3)


# Networks ------------------------------------------------------------------------------------


def layer(name: str, macs: int = 100) -> Layer:
    return Layer(name, "Conv", "x", "w", "y", macs, 1, 0, 1, 1)


def cost(network: Network) -> LatencyCost:
    points = {"a": LayerPoint(CONV, "Requantize to uint8"), "b": LayerPoint(DENSE, "e")}
    entries = (row(seconds=3e-6), row(DENSE, FOUR, seconds=2e-6, epilogue="e"))
    return LatencyCost(table(*entries), points, network, CONV.macs + DENSE.macs)


def test_costs_of_layers_add_up_to_the_promise_for_the_network() -> None:
    made = cost(Network(rest=1e-6, factor=0.9))
    total = made(layer("a"), FOUR) + made(layer("b"), FOUR)
    assert total == pytest.approx(0.9 * 6e-6)
    assert made.promise({"a": FOUR, "b": FOUR}) == pytest.approx(total)


def test_float_layers_cost_their_share_of_the_float_network() -> None:
    made = cost(Network(0.0, 1.0, float_seconds=1e-4))
    assert made(layer("a"), None) == pytest.approx(1e-4 * CONV.macs / made.macs)
    assert made.promise({"b": FOUR}) == pytest.approx(made(layer("a"), None) + 2e-6)
    with pytest.raises(UsageError, match="'a' stays in float"):
        cost(Network(0.0, 1.0))(layer("a"), None)
    with pytest.raises(UsageError, match="'c'"):
        made(layer("c"), FOUR)


def test_the_check_of_whole_networks_corrects_promises() -> None:
    made = table(
        row(), *network_rows(1e-6, 9e-6, 1e-5, FOUR), *network_rows(3e-6, 8e-6, 1e-5, TWO),
        *network_rows(2e-6, 1.2e-5, 1e-5, EIGHT),
    )  # fmt: skip
    network = made.network(SHA)
    assert network is not None
    assert network.factor == pytest.approx(0.9)  # the median of 0.8, 0.9, 1.2
    assert network.rest == pytest.approx(2e-6)
    assert network.checks["w8a8"] == (1e-5, 1.2e-5)
    assert made.network("cd" * 32) is None
    # checks whose promise rests on the model count only where there are no others
    unsure = [replace(e, measured="model") for e in made.entries if e.weight_bits != 2]
    again = made.with_entries(unsure).network(SHA)
    assert again is not None
    assert again.factor == pytest.approx(0.8)


# Geometry and attribution --------------------------------------------------------------------


def test_geometry_counts_what_the_kernel_computes() -> None:
    strided = replace(CONV, stride_h=2, stride_w=2)
    window = Window(1, 4, 4, 3, 3, 2, 2, 1, 1)
    kernel = KernelLayer(window, (1, 10, 10, 16), 32, 1, 4, 4, False, False)
    assert table_geometry("IntConv", kernel, (1, 1, 1, 1), (1, 8, 8, 16)) == strided
    assert strided.out_pixels == 16
    assert strided.macs == 16 * 32 * 9 * 16
    depthwise = replace(CONV, groups=16, out_channels=16)
    assert depthwise.macs == 64 * 16 * 9
    assert DENSE.macs == 640


def test_steps_that_prepare_inputs_belong_to_the_layers_that_read_them() -> None:
    from mpqc.profile_layers import Times, attribute

    program = Program()
    program.layers = [LayerRecord(n, "w2a2", "w2a2", "bitplane") for n in ("a", "b", "c")]
    program.steps = [
        Step("k0", ("x",), ("q",), "q", "elementwise"),
        Step("k1", ("q",), ("q.planes",), "q", "pack"),
        Step("k2", ("q.planes",), ("q.pad",), "q", "pad"),
        Step("k3", ("q.pad", "wa"), ("ya",), "a", "bitplane"),
        Step("k4", ("q.pad", "wb"), ("yb",), "b", "bitplane-lut"),
        Step("k5", ("ya",), ("ya.sums",), "c", "window_sum"),
        Step("k6", ("ya", "ya.sums"), ("yc",), "c", "int8"),
        Step("k7", ("yc",), ("z",), "pool", "float"),
    ]
    seconds = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
    layers, rest = attribute(program, Times(tuple((s, 2 * s) for s in seconds), (0.0, 0.0)))
    assert layers == {"a": (11.0, 22.0), "b": (19.0, 38.0), "c": (96.0, 192.0)}
    assert rest == (129.0, 258.0)
