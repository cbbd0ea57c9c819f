"""The lowered program: a straight list of kernel calls over named buffers; no TVM in here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpqc.graph import Array, TensorType


@dataclass(frozen=True)
class Step:
    """One kernel call.

    Attributes:
        kernel: symbol of the kernel.
        inputs, outputs: buffers in the kernel's argument order, inputs first.
        label: the graph node, or what the step does, for people and profiles.
        kind: of a layer its kernel's ("bitplane", "bitplane-lut", "int8"); of others what they do,
            such as "pad", "pack", "winograd", "elementwise", "float".
    """

    kernel: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    label: str
    kind: str


@dataclass(frozen=True)
class Tap:
    """Where the value of a graph tensor can be read after a step ran; serves ``verify --layers``.

    Attributes:
        buffer: buffer that holds it.
        form: "plain" (the array itself), "codes" or "planes" (see compute).
        shape: of the tensor in the graph, channels first.
        perm: axes of the stored array in terms of the graph's; () when they agree.
        bits: planes a code has.
        step: index of the step that defines it.
    """

    buffer: str
    form: str
    shape: tuple[int, ...]
    perm: tuple[int, ...] = ()
    bits: int = 0
    step: int = -1


@dataclass(frozen=True)
class LayerRecord:
    """What a layer of the model became; goes into the manifest.

    Attributes:
        name: node of the model.
        asked: precision in the plan, as text ("w0-4a3": channels of several widths); None where
            the plan left the layer in float.
        run: precision that the kernel executes; "w2+4a3": one kernel for the channels of each.
        kernel: "bitplane", "bitplane-lut", "int8" or "float".
        variant: instruction or form inside the kind.
        accumulator: dtype.
        bound: proven bound of |accumulator|.
        reason: why not what was asked; empty when it is.
        chosen: what the choice of the kernel rests on: "asked", "measured" or "model"; empty in
            float.
        channels: width in the plan -> output channels, where they have several.
    """

    name: str
    asked: str | None
    run: str | None
    kernel: str
    variant: str = ""
    accumulator: str = ""
    bound: int = 0
    macs: int = 0
    reason: str = ""
    chosen: str = ""
    channels: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def joined(cls, name: str, parts: Sequence["LayerRecord"]) -> "LayerRecord":
        """A layer whose channels run in parts."""
        if len(parts) == 1:
            return replace(parts[0], name=name)

        def each(texts: Iterable[str]) -> str:
            return "+".join(dict.fromkeys(filter(None, texts)))

        _, _, inputs = str(parts[0].run).partition("a")
        runs = [str(part.run).partition("a")[0].removeprefix("w") for part in parts]
        return LayerRecord(
            name, parts[0].asked, f"w{'+'.join(runs)}a{inputs}",
            each(part.kernel for part in parts), each(part.variant for part in parts),
            parts[0].accumulator, max(part.bound for part in parts),
            sum(part.macs for part in parts), each(part.reason for part in parts),
            each(part.chosen for part in parts),
        )  # fmt: skip


@dataclass
class Program:
    """Everything that ``build`` needs.

    Attributes:
        inputs, outputs: name -> type as the model states them (channels first).
        results: output name -> buffer that holds it; each its own.
        buffers: name -> type of every buffer: inputs, outputs, temporaries.
        aliases: name -> buffer whose bytes it shares.
        constants: name -> array; prepacked weights, scales.
        kernels: symbol -> scheduled PrimFunc.
        steps: in execution order.
        floats: float32 value that a quantized layer writes -> why it does not stay in the kernel.
    """

    inputs: dict[str, TensorType] = field(default_factory=dict)
    outputs: dict[str, TensorType] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, TensorType] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    taps: dict[str, Tap] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    floats: dict[str, str] = field(default_factory=dict)

    def root(self, name: str) -> str:
        """The buffer that really holds a name's bytes."""
        while name in self.aliases:
            name = self.aliases[name]
        return name


@dataclass(frozen=True)
class MemoryPlan:
    """Offsets in one arena [bytes].

    Attributes:
        offsets: buffer -> offset of the temporaries, multiples of 64.
        size: of the arena.
        lower_bound: largest total of buffers that live at the same time.
        ends: the same as ``offsets`` for the buffers of inputs and outputs: an input lives until
            its last reader, an output from its writer on.
    """

    offsets: Mapping[str, int]
    size: int
    lower_bound: int
    ends: Mapping[str, int] = field(default_factory=dict)


ALIGNMENT = 64
# Dot kernels take whole groups: they read (never use) up to a group less an element past the end
# of a buffer. That is another buffer, or this much memory at the end of the arena.
SLACK = 64


def plan_memory(program: Program) -> MemoryPlan:
    """Place all buffers: largest first, each at the lowest offset free during its life."""
    first, last = _lives(program)
    end = len(program.steps)
    ends = {*program.inputs, *(program.root(name) for name in program.results.values())}
    names = [n for n in first if n not in program.constants]
    need = {n: _round_up(program.buffers[n].nbytes) for n in names}
    live = [
        sum(need[n] for n in names if first[n] <= step <= last[n]) for step in range(-1, end + 1)
    ]
    offsets: dict[str, int] = {}
    for name in sorted(names, key=lambda n: (-need[n], first[n], n)):
        busy = sorted(
            (offsets[other], offsets[other] + need[other])
            for other in offsets
            if first[other] <= last[name] and first[name] <= last[other]
        )
        place = 0
        for start, stop in busy:
            if place + need[name] <= start:
                break
            place = max(place, stop)
        offsets[name] = place
    return MemoryPlan(
        {n: place for n, place in offsets.items() if n not in ends},
        max((offsets[n] + need[n] for n in names), default=0) + SLACK,
        max(live, default=0),
        {n: place for n, place in offsets.items() if n in ends},
    )


def free_place(program: Program, memory: MemoryPlan, step: int, size: int) -> int:
    """Lowest offset of ``size`` bytes that no buffer needs while a step runs."""
    first, last = _lives(program)
    place = 0
    for name, offset in sorted({**memory.offsets, **memory.ends}.items(), key=lambda item: item[1]):
        if not first[name] <= step <= last[name]:
            continue
        if place + size <= offset:
            break
        place = max(place, offset + _round_up(program.buffers[name].nbytes))
    return place


def _lives(program: Program) -> tuple[dict[str, int], dict[str, int]]:
    """First and last step of every buffer; -1 is before all steps, their number behind."""
    first: dict[str, int] = {name: -1 for name in program.inputs}
    last: dict[str, int] = {name: -1 for name in program.inputs}
    for index, step in enumerate(program.steps):
        for name in (*step.inputs, *step.outputs):
            root = program.root(name)
            first.setdefault(root, index)
            last[root] = index
    end = len(program.steps)
    for name in program.results.values():
        last[program.root(name)] = end
        first.setdefault(program.root(name), end)
    return first, last


def _round_up(size: int) -> int:
    return max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
