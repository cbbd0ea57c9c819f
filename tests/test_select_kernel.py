"""Which kernel runs a layer, and how its geometry is read from the graph."""

import pytest

from mpqc.errors import UsageError
from mpqc.graph import Graph
from mpqc.passes.channels_last import ChannelsLast
from mpqc.pipeline import expected_cycles
from mpqc.select_kernel import Choice, Selector, count_weights, geometry
from mpqc.target import TARGETS, Target
from tests.graph_runner import parse

V3, VNNI, V2 = (TARGETS[name] for name in ("x86-64-v3", "x86-64-v4-vnni", "x86-64-v2"))


DILATED = "pads=[2, 2, 2, 2], dilations=[2, 2]"  # nothing for Winograd


def layer(
    channels: int = 64, out: int = 64, size: int = 14, weight: int = 2, activation: int = 2,
    attrs: str = "pads=[1, 1, 1, 1]", group: int = 1, levels: str = "",
) -> Graph:  # fmt: skip
    levels = levels or ("odd" if weight == 1 else "signed")
    text = f"""
    %x = Input() : u8[1,{channels},{size},{size}]
    %w = Constant() : i16[{out},{channels // group},3,3]
    %y = IntConv(%x, %w) {{activation_bits={activation}, group={group}, {attrs}, weight_bits={weight}, weight_levels="{levels}", zero_point=0}} : i32[1,{out},{size},{size}] @conv
    return %y
    """  # noqa: E501
    return ChannelsLast()(parse(text))


def choose(graph: Graph, target: Target, kernel: str = "auto", **by_layer: str) -> Choice:
    return Selector(target, kernel, by_layer).choose(graph, graph["conv"])


@pytest.mark.parametrize("kernel", ["bitplane", "bitplane-lut", "int8"])
def test_a_kernel_that_is_asked_for_runs(kernel: str) -> None:
    choice = choose(layer(), V3, kernel)
    assert (choice.kind, choice.reason) == (kernel, "")
    assert choose(layer(), V3, "bitplane", conv=kernel).kind == kernel  # the plan knows better
    assert choose(layer(), V3, kernel, conv="auto").kind == kernel
    assert choose(layer(), V3, kernel, other="int8").kind == kernel


def test_the_choice_is_the_highest_rate() -> None:
    for target in (V2, V3, VNNI, TARGETS["rpi4"]):
        for weight, activation in ((1, 1), (2, 2), (4, 4), (8, 8)):
            choice = choose(layer(weight=weight, activation=activation), target)
            assert choice.kind == max(choice.rates, key=choice.rates.__getitem__)
            assert choice.reason == ""


@pytest.mark.parametrize("target", [V2, V3, VNNI, TARGETS["rpi4"]], ids=lambda t: t.name)
def test_single_bits_run_as_bitplanes_and_bytes_as_bytes(target: Target) -> None:
    wide = layer(channels=256, out=256, weight=1, activation=1)
    assert choose(wide, target).kind.startswith("bitplane")
    assert choose(layer(channels=256, out=256, weight=8, activation=8), target).kind == "int8"


def test_weights_of_small_networks_come_from_l2() -> None:
    """Kinds are compared with what reading weights costs there: int8, which has most, gains."""
    text = """
    %x = Input() : u8[1,64,4,4]
    %w = Constant() : i16[64,64,3,3]
    %y = IntConv(%x, %w) {activation_bits=2, group=1, pads=[2, 2, 2, 2], dilations=[2, 2], weight_bits=2, weight_levels="signed", zero_point=0} : i32[1,64,4,4] @conv
    """  # noqa: E501
    beside = text.replace("%x = Input() : u8[1,64,4,4]", "").replace("64,64,3", "512,64,3")
    beside = beside.replace("%w", "%v").replace("%y", "%z").replace("i32[1,64", "i32[1,512")
    alone = ChannelsLast()(parse(f"{text} return %y"))
    among = ChannelsLast()(parse(f"{text} {beside.replace('@conv', '@other')} return %y, %z"))
    assert (count_weights(alone), count_weights(among)) == (64 * 64 * 9, (64 + 512) * 64 * 9)
    small, large = choose(alone, VNNI), choose(among, VNNI)
    part = Selector(VNNI, weights=count_weights(among)).choose(alone, alone["conv"])
    assert part.rates == large.rates
    cycles = expected_cycles(Selector(VNNI), among)  # splits of channels are single layers, too
    macs = 4 * 4 * 64 * 64 * 9
    assert cycles(alone, alone["conv"]) == pytest.approx(macs / large.rates[large.kind])
    assert small.rates["int8"] > 1.2 * large.rates["int8"]
    assert small.rates["bitplane-lut"] > large.rates["bitplane-lut"]
    assert small.rates["bitplane"] == large.rates["bitplane"]


def test_two_bits_of_the_demo_run_as_lookups() -> None:
    """Its strided layer ran as popcounts, a third slower, charged for weights that stay in L2."""
    text = """
    %x = Input() : u8[1,32,8,8]
    %w = Constant() : i16[64,32,3,3]
    %y = IntConv(%x, %w) {activation_bits=2, group=1, pads=[1, 1, 1, 1], strides=[2, 2], weight_bits=2, weight_levels="signed", zero_point=0} : i32[1,64,4,4] @conv
    return %y
    """  # noqa: E501
    down = ChannelsLast()(parse(text))
    assert choose(down, VNNI).kind == "bitplane-lut"


def test_a_fallback_says_why() -> None:
    for graph, target, why in (
        (layer(activation=8), V3, "8-bit codes overflow a byte"),
        (layer(group=8), V3, "grouped"),
        (layer(), TARGETS["armv7"], "armv7 has no lookup kernel"),
    ):
        choice = choose(graph, target, "bitplane-lut")
        assert choice.kind == "bitplane"
        assert why in choice.reason


@pytest.mark.parametrize(
    ("graph", "target", "variant"),
    [
        (layer(attrs=DILATED), VNNI, "vpdpbusd512"),
        (layer(attrs=DILATED), V3, "vpmaddubsw256"),
        (
            layer(weight=8, activation=8, attrs=DILATED),
            V2,
            "vpmaddubsw128",
        ),  # its weights are small
        (layer(), VNNI, "winograd-vpdpbusd512"),
        (layer(), V3, "winograd-vpmaddubsw256"),
        (layer(activation=8, size=28), V3, "winograd-vpmaddwd256"),
        (layer(channels=6), V3, "vpmaddubsw256"),  # instructions take four channels
        (layer(group=8), VNNI, "multiply-add"),
        (layer(), TARGETS["rpi4"], "smlal32-small"),
        (layer(weight=4, activation=8), TARGETS["rpi4"], "smlal32-offset"),
        (layer(channels=3), TARGETS["rpi4"], "smlal16"),
        (layer(), TARGETS["rpi5"], "sdot"),
        (layer(activation=8), TARGETS["rpi5"], "sdot-offset"),
        (layer(), TARGETS["armv7"], "vmlal16"),
        (layer(activation=8), TARGETS["armv7"], "vmlal16-offset"),
        (layer(group=8), TARGETS["rpi5"], "multiply-add"),
    ],
)
def test_the_instruction_of_int8_follows_the_target(
    graph: Graph, target: Target, variant: str
) -> None:
    assert choose(graph, target, "int8").variant == variant


@pytest.mark.parametrize(
    ("name", "weight", "activation", "kind"),
    [
        ("rpi3", 1, 1, "bitplane"),
        ("rpi3", 2, 2, "bitplane-lut"),
        ("rpi4", 1, 1, "bitplane"),
        ("rpi4", 2, 2, "bitplane"),
        ("rpi4", 6, 6, "int8"),
        ("rpi5", 1, 1, "bitplane"),
        ("rpi5", 3, 3, "int8"),
        ("jetson-orin-cpu", 4, 4, "int8"),
        ("armv7", 2, 2, "bitplane"),
    ],
)
def test_arm_cores_differ(name: str, weight: int, activation: int, kind: str) -> None:
    graph = layer(channels=128, out=128, weight=weight, activation=activation)
    assert choose(graph, TARGETS[name]).kind == kind


def test_the_smallest_weight_of_all_is_multiplied_alone() -> None:
    graph = layer(weight=8, activation=8)
    weight = graph.constants["w"].copy()
    weight[0, 0, 0, 0] = -128
    full = graph.with_(constants={"w": weight})
    assert choose(full, TARGETS["rpi4"], "int8").variant == "smull32-offset"
    assert choose(full, TARGETS["rpi5"], "int8").variant == "sdot-offset"


@pytest.mark.parametrize("value", [128, 255, -255])
def test_weights_beyond_a_byte_need_words(value: int) -> None:
    graph = layer(weight=8, activation=8, levels="odd", attrs=DILATED)
    weight = graph.constants["w"].copy()
    weight[0, 0, 0, 0] = value
    graph = graph.with_(constants={"w": weight})
    assert choose(graph, VNNI, "int8").variant == "vpmaddwd512"
    assert choose(graph, V3, "int8").variant == "vpmaddwd256"


def test_large_products_keep_out_of_int16_sums() -> None:
    graph = layer(weight=8, activation=8, attrs=DILATED)
    weight = graph.constants["w"].copy()
    weight[0, 0, 0, 0] = -128
    assert choose(graph.with_(constants={"w": weight}), V3, "int8").variant == "vpmaddwd256"
    assert choose(graph.with_(constants={"w": weight}), VNNI, "int8").variant == "vpdpbusd512"


def test_unknown_kernels_are_named() -> None:
    with pytest.raises(UsageError, match="unknown kernel 'fast'; choose one of auto, bitplane"):
        Selector(V3, "fast")
    with pytest.raises(UsageError, match="unknown kernel 'fast'"):
        Selector(V3, by_layer={"conv": "fast"})


@pytest.mark.parametrize(
    ("attrs", "pads"),
    [
        ("pads=[1, 2, 3, 4]", (1, 2, 3, 4)),
        ('auto_pad="VALID"', (0, 0, 0, 0)),
        ('auto_pad="SAME_UPPER"', (1, 1, 1, 1)),
        ('auto_pad="SAME_UPPER", dilations=[2, 1]', (2, 1, 2, 1)),
        ('auto_pad="SAME_LOWER"', (1, 1, 1, 1)),
    ],
)
def test_padding_is_read_as_onnx_writes_it(attrs: str, pads: tuple[int, ...]) -> None:
    graph = layer(attrs=attrs)
    assert geometry(graph, graph["conv"])[1] == pads


@pytest.mark.parametrize(("auto", "pads"), [("SAME_UPPER", (0, 0, 1, 1)),
                                            ("SAME_LOWER", (1, 1, 0, 0))])  # fmt: skip
def test_an_odd_padding_goes_to_the_named_side(auto: str, pads: tuple[int, ...]) -> None:
    text = f"""
    %x = Input() : u8[1,4,8,8]
    %w = Constant() : i16[4,4,3,3]
    %y = IntConv(%x, %w) {{activation_bits=2, auto_pad="{auto}", strides=[2, 2], weight_bits=2, weight_levels="signed", zero_point=0}} : i32[1,4,4,4] @conv
    return %y
    """  # noqa: E501
    graph = ChannelsLast()(parse(text))
    found, found_pads, _ = geometry(graph, graph["conv"])
    assert found_pads == pads
    assert found.image == (1, 9, 9, 4)
