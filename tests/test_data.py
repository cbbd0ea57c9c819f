import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpqc.data import open_data
from mpqc.errors import DataError
from mpqc.graph import Array, Graph
from mpqc.npz import PackedRows, open_npz
from mpqc.preprocess import Preprocess

ONE = Graph.parse("%x = Input() : f32[2,3,4,4]\n%y = Relu(%x) : f32[2,3,4,4]\nreturn %y")
TWO = Graph.parse(
    "%a = Input() : f32[2,3]\n%b = Input() : i32[2]\n%y = Relu(%a) : f32[2,3]\nreturn %y"
)
VECTOR = Graph.parse("%v = Input() : f32[5]\n%y = Relu(%v) : f32[5]\nreturn %y")


def images(count: int = 5) -> Array:
    return np.random.default_rng(0).standard_normal((count, 3, 4, 4)).astype(np.float32)


def pixels(count: int = 5, size: int = 4) -> Array:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture(params=["savez", "savez_compressed"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    def write(**arrays: Array) -> Path:
        getattr(np, request.param)(tmp_path / "data.npz", **arrays)
        return tmp_path / "data.npz"

    return write


def test_streams_batches_and_fills_the_last(save: Callable[..., Path]) -> None:
    x = images(5)
    data = open_data(save(x=x, labels=np.arange(5)), ONE)

    feeds = list(data.feeds())

    assert (len(data), data.batch, len(feeds)) == (5, 2, 3)
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in feeds])[:5], x)
    np.testing.assert_array_equal(feeds[-1]["x"][1], x[4])
    np.testing.assert_array_equal(data.labels, np.arange(5))
    np.testing.assert_array_equal(next(iter(data.feeds()))["x"], x[:2])  # again from the start


def test_the_rest_is_what_a_sample_leaves_out() -> None:
    data = open_data({"x": images(10), "labels": np.arange(10)}, ONE)
    part, rest = data.sample(6, 3), data.rest(6, 3)
    assert rest is not None
    assert part.labels is not None
    assert rest.labels is not None
    assert sorted([*part.labels, *rest.labels]) == list(range(10))
    assert len(list(rest.feeds())) == 2  # of two samples each
    assert data.rest(10) is None


def test_a_sample_is_drawn_by_seed_and_keeps_its_labels(save: Callable[..., Path]) -> None:
    x = images(40)
    source = save(anything=x, y=np.arange(40, dtype=np.uint8))
    data = open_data(source, ONE, max_samples=6, seed=3)

    got = np.concatenate([feed["x"] for feed in data.feeds()])

    assert data.labels is not None
    np.testing.assert_array_equal(got, x[data.labels])
    other = open_data(source, ONE, max_samples=6, seed=4)
    assert other.labels is not None
    assert not np.array_equal(data.labels, other.labels)
    assert len(data.sample(2, 0)) == 2


def test_uncompressed_arrays_are_mapped_and_compressed_ones_stream(tmp_path: Path) -> None:
    x = images(9)
    np.savez(tmp_path / "plain.npz", x=x)
    np.savez_compressed(tmp_path / "packed.npz", x=x)
    assert isinstance(open_npz(tmp_path / "plain.npz")["x"], np.memmap)
    packed = open_npz(tmp_path / "packed.npz")["x"]
    assert isinstance(packed, PackedRows)
    for rows in (slice(2, 5), slice(7, 9), slice(0, 3), slice(8, 20)):
        np.testing.assert_array_equal(packed[rows], x[rows])


def test_columns_in_fortran_order_read_the_same(save: Callable[..., Path]) -> None:
    x = images(4)
    data = open_data(save(x=np.asfortranarray(x)), ONE)
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in data.feeds()]), x)


def test_inputs_are_found_by_name(save: Callable[..., Path]) -> None:
    a, b = np.ones((4, 3), np.float32), np.arange(4, dtype=np.int16)
    feed = next(iter(open_data(save(b=b, a=a), TWO).feeds()))
    assert feed["b"].dtype == np.int32  # a cast that loses nothing
    np.testing.assert_array_equal(feed["b"], [0, 1])


def test_an_input_without_a_batch_axis_takes_one_row_a_feed() -> None:
    data = open_data({"v": np.ones((3, 5), np.float32)}, VECTOR)
    assert [feed["v"].shape for feed in data.feeds()] == [(5,)] * 3


def test_text_beside_the_data_is_ignored(save: Callable[..., Path]) -> None:
    names = np.array(["cat", "dog"])
    data = open_data(save(x=images(2), y=np.array([1, 0]), labels=names, name=names), ONE)
    np.testing.assert_array_equal(data.labels, [1, 0])


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"x": images(2).astype(np.float64)}, r"float64.*astype\(np\.float32\)"),
        ({"x": images(2)[:, :2]}, r"\[2, 2, 4, 4\], expected \[samples, 3, 4, 4\]"),
        ({"x": images(2)[:0]}, "empty"),
        ({"x": np.float32(3)}, "single number"),
        ({"p": images(2), "q": images(2)}, "model's input x; it holds p, q"),
        ({"x": pixels(2)}, "--preprocess"),
        ({"x": images(2), "labels": np.arange(3)}, "3 labels for 2 samples"),
        ({"labels": np.arange(3)}, "input x"),
    ],
)
def test_names_what_does_not_fit(
    save: Callable[..., Path], arrays: dict[str, Array], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        open_data(save(**arrays), ONE)


def test_inputs_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="different numbers of samples"):
        open_data({"a": np.ones((4, 3), np.float32), "b": np.ones(2, np.int32)}, TWO)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_found(save: Callable[..., Path], bad: float) -> None:
    x = images(5)
    x[3, 1, 2, 2] = bad
    data = open_data(save(x=x), ONE)
    with pytest.raises(DataError, match=r"'x' holds NaN or infinity in the feed .* sample 2"):
        list(data.feeds())


def test_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="Python objects"):
        open_data(tmp_path / "evil.npz", ONE)


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"data\.npz"):
        open_data(tmp_path / "data.npz", ONE)
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        open_data(tmp_path / "nowhere.npz", ONE)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "data.npz", x=images(2000))
    raw = bytearray((tmp_path / "data.npz").read_bytes())
    raw[5000:9000] = bytes(4000)
    (tmp_path / "data.npz").write_bytes(raw)
    # flipped bits may still unpack, then to nonsense
    with pytest.raises(DataError, match=r"damaged|NaN or infinity"):
        list(open_data(tmp_path / "data.npz", ONE).feeds())


# Pictures ------------------------------------------------------------------------------------


def test_pictures_are_normalised_in_the_order_of_the_model() -> None:
    p = pixels(2)
    steps = Preprocess(channels="BGR", scale=0.5, mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 8.0))
    got = next(iter(open_data({"x": p}, ONE, steps).feeds()))["x"]
    blue = p[..., 2].astype(np.float32)
    np.testing.assert_array_equal(got[:, 0], (blue * np.float32(0.5) - 1) / 2)


def test_pictures_are_cropped_and_inverted() -> None:
    p = pixels(2, size=7)
    got = next(iter(open_data({"x": p}, ONE, Preprocess(crop=(4, 4), invert=True)).feeds()))["x"]
    np.testing.assert_array_equal(got[:, 1], 255 - p[:, 1:5, 1:5, 1].astype(np.float32))


def test_grey_pictures_need_no_channel_axis() -> None:
    graph = Graph.parse("%x = Input() : f32[1,1,3,3]\n%y = Relu(%x) : f32[1,1,3,3]\nreturn %y")
    p = pixels(2, size=3)[..., 0]
    got = next(iter(open_data({"x": p}, graph, Preprocess(layout="NHW")).feeds()))["x"]
    np.testing.assert_array_equal(got[0, 0], p[0])


def test_pictures_may_be_flattened_or_stay_nhwc() -> None:
    flat = Graph.parse("%x = Input() : f32[1,27]\n%y = Relu(%x) : f32[1,27]\nreturn %y")
    p = pixels(1, size=3)
    got = next(iter(open_data({"x": p}, flat, Preprocess(output_layout="NC")).feeds()))["x"]
    np.testing.assert_array_equal(got[0], p[0].transpose(2, 0, 1).reshape(-1))
    nhwc = Graph.parse("%x = Input() : f32[1,3,3,3]\n%y = Relu(%x) : f32[1,3,3,3]\nreturn %y")
    got = next(iter(open_data({"x": p}, nhwc, Preprocess(output_layout="NHWC")).feeds()))["x"]
    np.testing.assert_array_equal(got, p)


def test_a_resize_keeps_a_flat_picture_flat() -> None:
    pytest.importorskip("PIL", reason="resizing needs Pillow")
    p = np.full((1, 9, 6, 3), 77, np.uint8)
    steps = Preprocess(resize=4, crop=(4, 4))  # shorter side 6 -> 4: 6 x 4
    got = next(iter(open_data({"x": p}, ONE, steps).feeds()))["x"]
    np.testing.assert_array_equal(got, np.full((2, 3, 4, 4), 77))


def test_a_wrong_size_after_preprocessing_is_named() -> None:
    with pytest.raises(DataError, match=r"gives pictures of \[3, 5, 5\].*\[3, 4, 4\]"):
        open_data({"x": pixels(1, size=5)}, ONE, Preprocess())


def test_float_data_refuse_a_preprocessing() -> None:
    with pytest.raises(DataError, match="leave it out"):
        open_data({"x": images(1)}, ONE, Preprocess())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("std = 0.0", "std is not 0"),
        ("colour = 1", "colour"),
        ("scale = ", "cannot read"),
        ('layout = "HWC"', "layout"),
    ],
)
def test_a_bad_preprocessing_file_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(DataError, match=complaint):
        open_data({"x": pixels(1)}, ONE, tmp_path / "p.toml")


def test_a_preprocessing_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("scale = 0.5\nmean = [1, 2, 3]\ncrop = [4, 4]\n")
    assert Preprocess.load(tmp_path / "p.toml") == Preprocess(
        scale=0.5, mean=(1.0, 2.0, 3.0), crop=(4, 4)
    )


def jpeg_archive(tmp_path: Path, pictures: Array) -> Path:
    image = pytest.importorskip("PIL.Image", reason="JPEG needs Pillow")
    streams = []
    for picture in pictures:
        buffer = io.BytesIO()
        image.fromarray(picture).save(buffer, "JPEG", quality=95)
        streams.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offsets = np.cumsum([0, *(stream.size for stream in streams)])
    np.savez(
        tmp_path / "jpg.npz", jpg=np.concatenate(streams), off=offsets, y=np.arange(len(pictures))
    )
    return tmp_path / "jpg.npz"


def test_jpeg_archives_are_unpacked(tmp_path: Path) -> None:
    grey = np.array([10, 60, 110, 160, 210], np.uint8)
    pictures = np.broadcast_to(grey[:, None, None, None], (5, 4, 4, 3)).copy()
    data = open_data(jpeg_archive(tmp_path, pictures), ONE, Preprocess())
    got = np.concatenate([feed["x"] for feed in data.feeds()])[:5]
    np.testing.assert_allclose(got.mean(axis=(1, 2, 3)), grey, atol=2)
    assert data.labels is not None
    assert len(data) == 5


def test_a_damaged_jpeg_archive_is_named() -> None:
    jpg = np.zeros(10, np.uint8)
    with pytest.raises(DataError, match="'off' does not rise"):
        open_data({"jpg": jpg, "off": np.array([0, 20])}, ONE, Preprocess())
    pytest.importorskip("PIL", reason="JPEG needs Pillow")
    with pytest.raises(DataError, match="not a readable picture"):
        open_data({"jpg": jpg, "off": np.array([0, 10])}, ONE, Preprocess())


# Functions -----------------------------------------------------------------------------------

FUNCTIONS = """
import numpy as np

def feed(i):
    return {"a": np.full((2, 3), i, np.float32), "b": np.zeros(2, np.int32)}

def generator():
    for i in range(3):
        yield feed(i)

class Reader:
    def __init__(self):
        self.left = 3
    def get_next(self):
        self.left -= 1
        return feed(2 - self.left) if self.left >= 0 else None

def reader():
    return Reader()

def wrong_name():
    return [{"c": 1}]

def wrong_type():
    return [{**feed(0), "a": np.zeros((2, 3))}]

def nothing():
    return []

def number():
    return 3

def raises():
    raise RuntimeError("no disk")
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    (tmp_path / "feeds.py").write_text(FUNCTIONS)
    return str(tmp_path / "feeds.py")


@pytest.mark.parametrize("name", ["generator", "reader"])
def test_functions_are_called_for_each_pass(module: str, name: str) -> None:
    data = open_data(f"{module}:{name}", TWO)
    for _ in range(2):
        assert [feed["a"][0, 0] for feed in data.feeds()] == [0, 1, 2]
    assert data.samples is None
    assert len(list(data.sample(3).feeds())) == 2  # batches of two


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("wrong_name", "expected a dict of a, b, got c"),
        ("wrong_type", r"'a' is f64\[2,3\], the model takes f32\[2,3\]"),
        ("nothing", "no feeds"),
        ("number", "returned int"),
        ("raises", "RuntimeError: no disk"),
        ("absent", "absent"),
    ],
)
def test_functions_that_misbehave_are_named(module: str, name: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        list(open_data(f"{module}:{name}", TWO).feeds())


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot find .*gone\.py"):
        list(open_data(f"{tmp_path}/gone.py:feeds", TWO).feeds())


@pytest.mark.parametrize("count", [0, -1])
def test_at_least_one_sample(count: int) -> None:
    with pytest.raises(DataError, match="at least one sample"):
        open_data({"x": images(2)}, ONE, max_samples=count)
