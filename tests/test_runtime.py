"""The C interface of a built library, used as it should not be, and its Python door."""

import ctypes
import mmap
import threading
from collections.abc import Iterator
from ctypes import POINTER, c_int, c_size_t, c_void_p
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpqc import reference
from mpqc.errors import ArtifactError, DataError
from mpqc.graph import Array, TensorType
from mpqc.model_source import LOOPS, input_alignments
from mpqc.runtime import CompiledModel, load
from tests.graph_runner import built, feeds, lower, parse
from tests.test_lowering import RESIDUAL

OK, INVALID, NO_MEMORY, BUSY, FAILED, WRONG_SIZE, WRONG_MACHINE = range(7)
GRAPH = parse(RESIDUAL.replace("5,5]", "20,20]"))
FEEDS = feeds(GRAPH)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    with built(lower(GRAPH), folder) as model:
        return model.path


@pytest.fixture
def c(library: Path) -> Any:
    """The library as a C program sees it."""
    opened = ctypes.CDLL(str(library))
    opened.mpqc_message.restype = ctypes.c_char_p
    opened.mpqc_scratch_bytes.restype = c_size_t
    opened.mpqc_create.argtypes = (c_int, POINTER(c_void_p))
    opened.mpqc_create_in.argtypes = (c_int, c_void_p, c_size_t, POINTER(c_void_p))
    opened.mpqc_destroy.argtypes = (c_void_p,)
    opened.mpqc_run.argtypes = (c_void_p,) * 5
    opened.mpqc_bind.argtypes = (c_void_p,) * 3
    opened.mpqc_step.argtypes = (c_void_p, c_int)
    opened.mpqc_read.argtypes = (c_void_p, c_size_t, c_void_p, c_size_t)
    return opened


@pytest.fixture
def instance(c: Any) -> Iterator[c_void_p]:
    handle = c_void_p()
    assert c.mpqc_create(1, ctypes.byref(handle)) == OK
    yield handle
    c.mpqc_destroy(handle)


def expected() -> dict[str, Array]:
    return reference.run(GRAPH, FEEDS)


class Buffers:
    """Arguments of mpqc_run."""

    def __init__(self) -> None:
        self.arrays = [np.ascontiguousarray(FEEDS["x"])]
        self.results = [np.empty(a.shape, a.dtype) for a in expected().values()]
        self.inputs = (c_void_p * 1)(self.arrays[0].ctypes.data)
        self.outputs = (c_void_p * 2)(*[a.ctypes.data for a in self.results])
        self.input_sizes = (c_size_t * 1)(self.arrays[0].nbytes)
        self.output_sizes = (c_size_t * 2)(*[a.nbytes for a in self.results])


def test_runs_from_c(c: Any, instance: c_void_p) -> None:
    b = Buffers()
    for _ in range(2):
        status = c.mpqc_run(instance, b.inputs, b.input_sizes, b.outputs, b.output_sizes)
        assert status == OK
        for got, wanted in zip(b.results, expected().values(), strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_wrong_sizes_are_refused_before_anything_runs(c: Any, instance: c_void_p) -> None:
    b = Buffers()
    b.results[0][...] = 123
    b.input_sizes[0] -= 4
    assert c.mpqc_run(instance, b.inputs, b.input_sizes, b.outputs, None) == WRONG_SIZE
    b.output_sizes[1] += 1
    assert c.mpqc_run(instance, b.inputs, None, b.outputs, b.output_sizes) == WRONG_SIZE
    assert (b.results[0] == 123).all()


def test_null_pointers_are_refused(c: Any, instance: c_void_p) -> None:
    b = Buffers()
    nothing = (c_void_p * 2)()
    assert c.mpqc_run(None, b.inputs, None, b.outputs, None) == INVALID
    assert c.mpqc_run(instance, None, None, b.outputs, None) == INVALID
    assert c.mpqc_run(instance, b.inputs, None, None, None) == INVALID
    assert c.mpqc_run(instance, nothing, None, b.outputs, None) == INVALID
    assert c.mpqc_run(instance, b.inputs, None, nothing, None) == INVALID
    assert c.mpqc_create(1, None) == INVALID
    assert c.mpqc_describe_input(0, None) == INVALID
    c.mpqc_destroy(None)
    assert c.mpqc_run(instance, b.inputs, None, b.outputs, None) == OK  # none of it left it busy


@pytest.mark.parametrize("threads", [0, -1, 65])
def test_thread_counts_have_bounds(c: Any, threads: int) -> None:
    handle = c_void_p()
    assert c.mpqc_scratch_bytes(threads) == 0
    assert c.mpqc_create(threads, ctypes.byref(handle)) == INVALID
    assert handle.value is None


@pytest.mark.parametrize("index", [-1, 1, 2**31 - 1])
def test_indices_have_bounds(c: Any, instance: c_void_p, index: int) -> None:
    space = ctypes.create_string_buffer(64)
    assert c.mpqc_describe_input(index, space) == INVALID
    assert c.mpqc_describe_output(index + 1 if index > 0 else index, space) == INVALID
    far = index if index < 0 else c.mpqc_step_count() + index
    assert c.mpqc_step(instance, min(far, 2**31 - 1)) == INVALID


def test_steps_want_bound_buffers_first(c: Any, instance: c_void_p) -> None:
    assert c.mpqc_step(instance, 0) == INVALID
    b = Buffers()
    assert c.mpqc_bind(instance, b.inputs, b.outputs) == OK
    for index in range(c.mpqc_step_count()):
        assert c.mpqc_step(instance, index) == OK
    np.testing.assert_array_equal(b.results[0], expected()["c3"])


def test_reading_stays_in_the_arena(c: Any, instance: c_void_p) -> None:
    space = ctypes.create_string_buffer(8)
    arena = 2**40
    assert c.mpqc_read(instance, 0, space, 8) == OK
    assert c.mpqc_read(instance, arena, space, 8) == INVALID
    assert c.mpqc_read(instance, 0, space, arena) == INVALID
    assert c.mpqc_read(instance, 2**64 - 4, space, 8) == INVALID
    assert c.mpqc_read(instance, 0, None, 8) == INVALID


def test_memory_of_the_callers(c: Any) -> None:
    size = c.mpqc_scratch_bytes(2)
    memory = np.full(size + 128, 0xEE, np.uint8)
    start = memory.ctypes.data + (-memory.ctypes.data % 64)
    handle = c_void_p()
    assert c.mpqc_create_in(2, start + 1, size, ctypes.byref(handle)) == INVALID
    assert c.mpqc_create_in(2, None, size, ctypes.byref(handle)) == INVALID
    assert c.mpqc_create_in(2, start, size - 1, ctypes.byref(handle)) == WRONG_SIZE
    assert c.mpqc_create_in(2, start, size, ctypes.byref(handle)) == OK
    b = Buffers()
    assert c.mpqc_run(handle, b.inputs, None, b.outputs, None) == OK
    np.testing.assert_array_equal(b.results[0], expected()["c3"])
    c.mpqc_destroy(handle)
    end = start - memory.ctypes.data + size
    assert (memory[end:] == 0xEE).all()  # nothing was written behind it


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shift", [0, 1, 2, 4, 12, 20])
def test_inputs_lie_anywhere(c: Any, threads: int, shift: int) -> None:
    """Aligned like their type they are read where they are, else copied: never a byte behind."""
    (given,) = FEEDS.values()
    pages = -(-(given.nbytes + shift) // mmap.PAGESIZE) * mmap.PAGESIZE
    anonymous = (mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    libc = ctypes.CDLL(None)
    libc.mmap.restype, libc.mmap.argtypes = c_void_p, (c_void_p, c_size_t, *[c_int] * 3, c_size_t)
    libc.mprotect.argtypes, libc.munmap.argtypes = (c_void_p, c_size_t, c_int), (c_void_p, c_size_t)
    memory = libc.mmap(None, pages + mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, *anonymous)
    assert libc.mprotect(memory + pages, mmap.PAGESIZE, 0) == 0  # PROT_NONE
    place = memory + pages - given.nbytes - shift
    ctypes.memmove(place, given.ctypes.data, given.nbytes)
    handle, b = c_void_p(), Buffers()
    b.inputs[0] = place
    assert c.mpqc_create(threads, ctypes.byref(handle)) == OK
    for _ in range(2):
        assert c.mpqc_run(handle, b.inputs, None, b.outputs, None) == OK
        np.testing.assert_array_equal(b.results[0], expected()["c3"])
    c.mpqc_destroy(handle)
    assert libc.munmap(memory, pages + mmap.PAGESIZE) == 0


def test_inputs_that_dot_kernels_read_are_copied() -> None:
    """They may read a little behind; plain loops do not."""
    direct = """
    %x = Input() : u8[1,16,6,6]
    %w = Constant() : i16[16,16,3,3]
    %y = IntConv(%x, %w) {activation_bits=2, weight_bits=2, weight_levels="signed", zero_point=0} : i32[1,16,4,4]
    return %y
    """  # noqa: E501
    nhwc = lower(parse(direct), kernel="int8")
    first = next(step for step in nhwc.steps if "x" in step.inputs)
    assert first.kind in LOOPS
    assert "{1}" in input_alignments(nhwc)
    nhwc.steps[nhwc.steps.index(first)] = replace(first, kind="int8")
    assert "{0}" in input_alignments(nhwc)
    assert "{4}" in input_alignments(lower(GRAPH))  # what the test above reads in place


def test_every_status_has_words(c: Any) -> None:
    words = {c.mpqc_message(status) for status in range(7)}
    assert len(words) == 7
    assert c.mpqc_message(99) == b"unknown status"


def test_an_instance_serves_one_caller_at_a_time(c: Any, instance: c_void_p) -> None:
    """Two threads on one instance: every call either computes or says busy."""
    start = threading.Barrier(2)
    outcomes: list[list[int]] = [[], []]
    buffers = [Buffers(), Buffers()]

    def call(index: int) -> None:
        b = buffers[index]
        start.wait()
        for _ in range(300):
            outcomes[index].append(c.mpqc_run(instance, b.inputs, None, b.outputs, None))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes[0]) | set(outcomes[1]) <= {OK, BUSY}
    for index, b in enumerate(buffers):
        if OK in outcomes[index]:
            np.testing.assert_array_equal(b.results[0], expected()["c3"])
    assert c.mpqc_run(instance, buffers[0].inputs, None, buffers[0].outputs, None) == OK


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads_do_not_change_results(library: Path, threads: int) -> None:
    with CompiledModel(library, threads) as model:
        for _ in range(20):
            got = model.run(FEEDS)
            for name, wanted in expected().items():
                np.testing.assert_array_equal(got[name], wanted)


def test_instances_run_side_by_side(library: Path) -> None:
    wrong: list[str] = []

    def work() -> None:
        with CompiledModel(library, 2) as model:
            for _ in range(20):
                got = model.run(FEEDS)
                if not np.array_equal(got["c3"], expected()["c3"]):
                    wrong.append("c3")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_many_lives_leave_no_memory_behind(library: Path) -> None:
    def resident() -> int:
        fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
        return int(fields[1]) * 4096

    def live() -> None:
        with CompiledModel(library, 2) as model:
            model.run(FEEDS)

    for _ in range(50):
        live()
    before = resident()
    for _ in range(150):
        live()
    with CompiledModel(library) as model:
        one = model.scratch_bytes
    assert resident() - before < 20 * one  # 150 leaked instances would be far more


# Python --------------------------------------------------------------------------------------


def test_describes_its_tensors(library: Path) -> None:
    with load(library) as model:
        assert model.inputs == {"x": TensorType("float32", (1, 16, 20, 20))}
        assert model.outputs == {
            "c3": TensorType("int32", (1, 8, 20, 20)),
            "r": TensorType("float32", (1, 16, 20, 20)),
        }
        assert model.manifest == {"steps": []}
        assert model.scratch_bytes > 0


def test_steps_give_the_same_as_a_run(library: Path) -> None:
    with load(library) as model:
        stepper = model.steps(FEEDS)
        assert all(stepper.step(index) >= 0 for index in range(len(stepper)))
        np.testing.assert_array_equal(stepper.results[0], model.run(FEEDS)["c3"])
        assert all(time > 0 for time in model.seconds(FEEDS, 3))


@pytest.mark.parametrize(
    ("fed", "message"),
    [
        ({}, r"takes \['x'\], got \[\]"),
        ({"y": FEEDS["x"]}, r"takes \['x'\], got \['y'\]"),
        ({"x": FEEDS["x"][:, :8]}, r"input 'x' is f32\[1,8,20,20\], the model takes f32\[1,16"),
        ({"x": FEEDS["x"].astype(np.float64)}, r"input 'x' is f64"),
    ],
)
def test_names_inputs_that_do_not_fit(library: Path, fed: dict[str, Array], message: str) -> None:
    with load(library) as model, pytest.raises(DataError, match=message):
        model.run(fed)


def test_strided_inputs_are_taken(library: Path) -> None:
    turned = np.ascontiguousarray(FEEDS["x"].transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    assert not turned.flags.c_contiguous
    with load(library) as model:
        np.testing.assert_array_equal(model.run({"x": turned})["c3"], expected()["c3"])


def test_a_closed_model_says_so(library: Path) -> None:
    model = load(library)
    model.close()
    model.close()
    with pytest.raises(ArtifactError, match="invalid argument"):
        model.run(FEEDS)


def test_names_what_is_no_library(tmp_path: Path, library: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist: compile the model first"):
        load(tmp_path / "model.so")
    damaged = tmp_path / "damaged.so"
    content = library.read_bytes()
    for end in (1, 63, 64, 1000, len(content) // 2, len(content) - 1):
        damaged.write_bytes(content[:end])
        with pytest.raises(ArtifactError, match=r"is truncated|no shared library at all"):
            load(damaged)
    damaged.write_bytes(b"text, and long enough to hold the header of a library" * 2)
    with pytest.raises(ArtifactError, match="no shared library at all"):
        load(damaged)
    damaged.write_bytes(content[:18] + b"\xb7\x00" + content[20:])  # of another processor
    with pytest.raises(ArtifactError, match="no compiled model of this machine"):
        load(damaged)
    with pytest.raises(ArtifactError, match="no compiled model of this machine"):
        load("/proc/self/exe")
    with pytest.raises(ArtifactError, match="thread count out of range"):
        load(library, threads=0)
