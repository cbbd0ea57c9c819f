import json
from pathlib import Path

import numpy as np
import pytest

from mpqc import bench as bench_module
from mpqc.artifact import REPORT, Artifact
from mpqc.bench import ON_GPU, OPPONENTS, bench
from mpqc.data import open_data
from mpqc.demo import files
from mpqc.errors import ArtifactError, ModelError, UsageError
from mpqc.graph import Precision
from mpqc.ort import Session, quantize_static
from mpqc.pipeline import Options, compile_model, import_model
from mpqc.runtime import CompiledModel
from mpqc.target import native

DEMO = files()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    data = open_data(DEMO.calibration, import_model(DEMO.model))
    return compile_model(
        DEMO.model, tmp_path_factory.mktemp("bench") / "out", Options(native(), max_samples=16),
        bits=Precision(2, 2), data=data,
    )  # fmt: skip


def test_times_every_contestant_equally_often(demo: Artifact) -> None:
    result = bench(demo, repeat=7, against=[name for name in OPPONENTS if name not in ON_GPU])
    assert [timing.name for timing in result.timings] == ["mpqc", "ort-fp32", "ort-int8"]
    for timing in result.timings:
        assert timing.runs == 7
        assert 0 < timing.best <= timing.median < 1
    own, other, _ = result.timings
    assert result.speedups["ort-fp32"] == other.best / own.best
    assert result.layers == ()
    assert f"ort-fp32 {other.best * 1e3:.3f} ms" in result.message
    assert result.batch == 1


def test_contestants_take_turns(demo: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ours, theirs = CompiledModel.seconds, Session.seconds

    def mpqc_runs(model: CompiledModel, feeds: object, repeat: int) -> list[float]:
        order.append(f"mpqc {repeat}")
        return ours(model, feeds, repeat)  # type: ignore[arg-type]

    def ort_runs(session: Session, feeds: object, repeat: int) -> list[float]:
        order.append(f"ort {repeat}")
        return theirs(session, feeds, repeat)  # type: ignore[arg-type]

    monkeypatch.setattr(CompiledModel, "seconds", mpqc_runs)
    monkeypatch.setattr(Session, "seconds", ort_runs)
    bench(demo, repeat=2)
    warm = bench_module.WARM_UP
    assert order == [f"mpqc {warm}", f"ort {warm}", "mpqc 1", "ort 1", "mpqc 1", "ort 1"]


def test_layers_carry_their_rates(demo: Artifact) -> None:
    result = bench(demo, repeat=3, against=(), per_layer=True)
    steps = demo.manifest["steps"]
    assert [(row.layer, row.kernel) for row in result.layers] == [
        (step["label"], step["kind"]) for step in steps
    ]
    macs = {row.layer: row.macs for row in result.layers if row.macs}
    assert macs["block.conv1"] == 8 * 8 * 32 * 32 * 9
    assert sum(macs.values()) == sum(layer["macs"] for layer in demo.manifest["layers"])
    for row in result.layers:
        assert 0 <= row.best <= row.median
        if row.macs:
            assert row.macs_per_second == row.macs / row.best


def test_json_says_where_and_with_what(demo: Artifact) -> None:
    plain = bench(demo, repeat=1, per_layer=True).to_json()
    again = json.loads(json.dumps(plain, allow_nan=False))
    machine = again["machine"]
    assert machine["cores"] >= 1
    assert machine["processor"]
    assert machine["compiled_with"].keys() >= {"numpy", "apache-tvm"}
    assert machine["measured_with"]["onnxruntime"]
    assert again["threads"] == 1
    assert {"best", "median", "macs_per_second", "layer", "kernel"} <= again["layers"][0].keys()


def test_threads_go_to_every_contestant(demo: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    made = Session.__init__

    def session(self: Session, model: bytes, threads: int = 1, optimise: bool = False) -> None:
        assert optimise
        given.append(threads)
        made(self, model, threads, optimise)

    monkeypatch.setattr(Session, "__init__", session)
    result = bench(demo, threads=2, repeat=1, against=("ort-fp32", "ort-int8"))
    assert given == [2, 2]
    assert result.threads == 2
    assert result.message.endswith("2 threads")


def test_data_serve_as_inputs(demo: Artifact) -> None:
    data = open_data(DEMO.test, import_model(DEMO.model))
    assert bench(demo, repeat=1, against=("ort-int8",), data=data).timings[1].best > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": ("tflite",)}, "unknown opponent 'tflite'; choose from ort-fp32, ort-int8"),
        ({"repeat": 0}, "start at 1"),
        ({"threads": 0}, "start at 1"),
    ],
)
def test_refuses_what_it_cannot_do(
    demo: Artifact, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        bench(demo, **options)  # type: ignore[arg-type]


def test_a_float_model_that_is_gone_is_named(demo: Artifact, tmp_path: Path) -> None:
    for name in demo.folder.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    report = json.loads((tmp_path / REPORT).read_text(encoding="utf-8"))
    report["model"] = str(tmp_path / "gone.onnx")
    (tmp_path / REPORT).write_text(json.dumps(report), encoding="utf-8")
    moved = Artifact(tmp_path)
    with pytest.raises(ArtifactError, match=r"not at .*gone\.onnx: say where it is with --model"):
        bench(moved, repeat=1)
    assert bench(moved, repeat=1, model=DEMO.model).timings[1].best > 0
    assert bench(moved, repeat=1, against=()).timings[0].best > 0


def test_the_int8_opponent_is_quantized(tmp_path: Path) -> None:
    data = open_data(DEMO.calibration, import_model(DEMO.model)).sample(16, 0)
    feeds = list(data.feeds())
    quantized = quantize_static(DEMO.model, feeds)
    assert b"QuantizeLinear" in quantized
    assert len(quantized) < DEMO.model.stat().st_size
    wanted = [Session(DEMO.model).run(feed)["logits"] for feed in feeds]
    got = [Session(quantized).run(feed)["logits"] for feed in feeds]
    assert np.mean(np.argmax(got, -1) == np.argmax(wanted, -1)) > 0.9
    assert not np.array_equal(got, wanted)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(ModelError, match="ONNX Runtime cannot quantize"):
        quantize_static(broken, feeds)
