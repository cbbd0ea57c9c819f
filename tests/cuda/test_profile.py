"""Latencies of a GPU: measured on the emulated one, and what the compiler does with them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import mpqc.demo
from mpqc import lowering, profile_layers
from mpqc.cli import app
from mpqc.cuda import measure, toolkit
from mpqc.cuda.select import CudaChoice, candidates
from mpqc.errors import ArtifactError, EnvironmentLacks, UsageError
from mpqc.graph import Graph, Node, Precision
from mpqc.importer import sha256
from mpqc.latency import Conditions, Entry, LatencyTable, cached_path, table_path
from mpqc.passes.base import run
from mpqc.passes.channels_last import ChannelsLast
from mpqc.pipeline import Options, compile_model, import_model
from mpqc.plan import Plan
from mpqc.profile_layers import Profile, latency_cost, node_geometry, profile
from mpqc.select_kernel import Selector
from mpqc.target import TARGETS
from mpqc.target import gpu as gpu_here
from mpqc.tune import tune
from tests.cuda.emulation import Emulator
from tests.cuda.test_kernels import convolution
from tests.graph_runner import built, feeds, lower

MODEL = mpqc.demo.files().model
SM86 = TARGETS["cuda:sm_86"]


def quicken(patch: pytest.MonkeyPatch) -> None:
    """One run of everything."""
    patch.setattr(profile_layers, "LEAST_SECONDS", 0.0)
    patch.setattr(measure, "TOGETHER", 2)


def measured(cache: Path, batch: int = 1) -> Profile:
    checks = [Precision(2, 2)]
    return profile(MODEL, SM86, widths=[2], repeat=1, batch=batch, checks=checks, cache=cache)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def found(emulator: Emulator, cache: Path) -> Profile:
    """A profile of the demo on the emulated GPU."""
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        emulator.install(patch)
        made = measured(cache)
    gpu_here.cache_clear()
    return made


def test_every_layer_is_measured_with_its_fastest_forms(
    found: Profile, cache: Path, gpu: Emulator
) -> None:
    assert gpu.driver.exists()
    assert found.table.conditions.cpu == "Emulated GPU"
    assert found.path is not None
    assert found.path.is_relative_to(cache)
    assert found.path.name.startswith("sm_86-")
    rows = [row for row in found.table.entries if row.geometry is not None]
    assert {row.kernel for row in rows} == {"bitplane", "int8"}
    assert all(row.seconds_min > 0 for row in rows)
    assert {row.variant for row in rows} <= {
        "mma-b1", "and-popcount", "dp4a", "mma-s8", "multiply-add",
    }  # fmt: skip
    assert found.network is not None
    assert found.network.rest > 0
    again = measured(cache)
    assert (again.measured, again.cached) == (0, found.measured)


def test_the_compiler_takes_what_was_fastest(found: Profile, gpu: Emulator, tmp_path: Path) -> None:
    assert gpu.driver.exists()
    rows = [
        replace(row, seconds_min=1e-3, variant="dp4a", tile="32x32x8")
        if row.kernel == "int8" else replace(row, seconds_min=9e-3)
        for row in found.table.entries
        if row.geometry is not None
    ]  # fmt: skip
    LatencyTable(found.table.conditions, tuple(rows)).save(tmp_path / "table.csv")
    artifact = compile_model(
        MODEL, tmp_path / "out", Options(SM86, latencies=tmp_path / "table.csv"), ends=None,
        bits=Precision(2, 2), data=lambda graph: profile_layers._random_data(graph),
    )  # fmt: skip
    layers = artifact.manifest["layers"]
    assert {layer["chosen"] for layer in layers} == {"measured"}
    assert {layer["kernel"] for layer in layers} == {"int8"}
    variants = {layer["variant"] for layer in layers}
    assert "dp4a" in variants
    assert "mma-s8" not in variants


def _convolution() -> tuple[Graph, Node]:
    graph = run(convolution((1, 64, 12, 11), 64), ChannelsLast())
    return graph, next(node for node in graph if node.op == "IntConv")


def row_of(
    selector: Selector, kernel: str, variant: str, tile: str, others: tuple[str, ...] = ()
) -> tuple[LatencyTable, Any]:
    """What a layer gets when one form of a kernel was measured, and slower ones of others."""
    graph, node = _convolution()
    row = Entry(node_geometry(graph, node), "x", 2, 2, kernel, variant, tile, 1e-6, 1e-6)
    slower = [replace(row, kernel=other, variant="slow", seconds_min=9e-6) for other in others]
    table = LatencyTable(Conditions(SM86.name, "g", 1, "v"), (row, *slower))
    return table, replace(selector, table=table).choose(graph, node)


@pytest.mark.parametrize(
    ("kernel", "variant", "tile"),
    [
        ("bitplane", "and-popcount", "16x32x16"), ("bitplane", "mma-b1", "32x32x16"),
        ("int8", "dp4a", "64x32x32"), ("int8", "mma-s8", "16x32x32"),
    ],
)  # fmt: skip
def test_instruction_and_tile_are_those_that_were_fastest(
    kernel: str, variant: str, tile: str
) -> None:
    other = "int8" if kernel == "bitplane" else "bitplane"
    _, choice = row_of(Selector(SM86), kernel, variant, tile, (other,))
    assert isinstance(choice, CudaChoice)
    assert choice.blocks is not None
    assert (choice.kind, choice.variant, choice.blocks.name) == (kernel, variant, tile)
    assert choice.chosen == "measured"
    assert choice.blocks.mma == variant.startswith("mma")
    # what no layer can have is not taken from a table
    _, choice = row_of(Selector(SM86), kernel, "wgmma", "7x7x7", (other,))
    assert choice.variant != "wgmma"
    assert choice.blocks is not None


def test_a_table_without_the_kernel_that_is_expected_does_not_decide() -> None:
    """As a tuning leaves it that was stopped: the other kernel was not shown to be faster."""
    model = Selector(SM86).choose(*_convolution())
    assert model.kind == "bitplane"
    _, choice = row_of(Selector(SM86), "int8", "dp4a", "64x32x32")
    assert (choice.kind, choice.chosen) == ("bitplane", "model")


@pytest.mark.slow
def test_tuning_measures_every_tile(gpu: Emulator, tmp_path: Path) -> None:
    assert gpu.driver.exists()
    plan = Plan.uniform(import_model(MODEL), Precision(2, 2), model_sha256=sha256(MODEL))
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        result = tune(MODEL, SM86, plan, tmp_path / "tuned.csv", repeat=1)
    assert result.complete
    assert result.trials == sum(
        len(candidates(SM86, kind, tiles=True)) for kind in ("bitplane", "int8")
    )
    assert {row.measured for row in result.table.entries} == {"tuned"}
    assert all(layer.seconds for layer in result.layers)


def test_a_kernel_that_was_asked_for_still_runs_its_fastest_form() -> None:
    _, choice = row_of(Selector(SM86, "bitplane"), "bitplane", "and-popcount", "32x32x16")
    assert (choice.chosen, choice.variant) == ("asked", "and-popcount")


@pytest.mark.parametrize("kind", ["bitplane", "int8"])
def test_every_candidate_computes_the_same(kind: str, gpu: Emulator, tmp_path: Path) -> None:
    graph = convolution((1, 32, 9, 8), 40)
    found = candidates(SM86, kind, tiles=True)
    assert len(found) == 6
    last = run(graph, ChannelsLast())
    node = next(node for node in last if node.op == "IntConv")
    forms, results = set(), []
    for selector in found:
        choice = selector.choose(last, node)
        assert choice.kind == kind
        assert choice.blocks is not None
        if (choice.variant, choice.blocks.name) in forms:
            continue
        forms.add((choice.variant, choice.blocks.name))
        with built(lowering.lower(last, SM86, selector), tmp_path, SM86) as model:
            results.append(model.run(feeds(graph)))
    assert len(forms) > 2
    for other in results[1:]:
        assert all((other[name] == array).all() for name, array in results[0].items())
    assert len(candidates(TARGETS["cuda:sm_75"], kind, tiles=False)) == 1  # no tensor cores


@pytest.mark.slow
def test_batches_are_rows_and_networks_of_their_own(
    found: Profile, cache: Path, gpu: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.driver.exists()
    quicken(monkeypatch)
    two = measured(cache, batch=2)
    assert two.measured > 0
    assert {row.geometry.n for row in two.table.entries if row.geometry} == {1, 2}
    assert two.network is not None
    assert found.network is not None
    assert two.network.checks != found.network.checks
    own = latency_cost(MODEL, SM86, two.table, batch=2)
    widths = dict.fromkeys(two.points, Precision(2, 2))
    assert own.promise(widths) == pytest.approx(two.cost.promise(widths))


def test_budgets_of_a_batch_that_was_not_measured(found: Profile) -> None:
    with pytest.raises(UsageError, match=r"at batch 3: run mpqc profile .* --batch 3 first"):
        latency_cost(MODEL, SM86, found.table, batch=3)


def test_the_time_of_a_step_is_that_of_one_run(gpu: Emulator, tmp_path: Path) -> None:
    graph = convolution((1, 64, 12, 11), 64)
    with built(lower(graph, SM86, "int8"), tmp_path, SM86) as model:
        longest = max(range(len(model.steps(feeds(graph)))), key=lambda i: model.time_step(i, 1))
        once = min(model.time_step(longest, 1) for _ in range(5))
        often = min(model.time_step(longest, 5) for _ in range(3))
        assert 0.3 * once < often < 3 * once
        assert model.on_gpu
        expected = model.run(feeds(graph))  # a run after it is right again
    with built(lower(graph, SM86, "int8"), tmp_path, SM86) as model:
        for name, array in model.run(feeds(graph)).items():
            assert (array == expected[name]).all()


def test_a_gpu_lost_while_steps_are_timed(
    gpu: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = convolution((1, 32, 4, 4), 32)
    with built(lower(graph, SM86, "int8"), tmp_path, SM86) as model:
        monkeypatch.setenv("MPQC_EMULATED_FAIL", "cuStreamSynchronize:719")
        with pytest.raises(ArtifactError, match="the GPU failed"):
            model.time_step(0, 3)


@pytest.mark.usefixtures("no_gpu")
def test_searches_for_a_gpu_need_its_table_alone(found: Profile, tmp_path: Path) -> None:
    table, plan = tmp_path / "table.csv", tmp_path / "plan.json"
    found.own_table().save(table)
    words = ("search", MODEL, "--method", "uniform", "--budget", "latency=1.5*w2a2")
    more = ("--target", SM86.name, "--latency-table", table, "--widths", "2", "-o", plan)
    said = call(*words, "--data", mpqc.demo.files().calibration, *more, "--first-last", "search")
    assert json.loads(plan.read_text("utf-8"))["layers"]
    assert "latency" in json.dumps(said)


def call(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


# ---- without a GPU


@pytest.fixture
def no_gpu(gpu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.driver.exists()
    monkeypatch.setenv("MPQC_CUDA_DRIVER", "/nowhere/libcuda.so.1")
    gpu_here.cache_clear()


@pytest.mark.usefixtures("no_gpu")
def test_measuring_verbs_say_that_there_is_no_gpu(tmp_path: Path) -> None:
    files = mpqc.demo.files()
    target = ("--target", SM86.name)
    measuring: list[tuple[object, ...]] = [
        ("profile", files.model, *target),
        ("compare", files.model, "--data", files.test, "-o", tmp_path / "report", *target),
    ]
    for words in measuring:
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 3, result.output
        assert "needs a GPU, and no CUDA driver" in " ".join(result.stderr.split())
        assert "Traceback" not in result.output
    assert not (tmp_path / "report").exists()
    out = tmp_path / "out"
    call("compile", files.model, "--bits", "w2a2", "--data", files.calibration, *target, "-o", out)
    result_file = tmp_path / "y.npz"
    running: list[tuple[object, ...]] = [
        ("bench", out, "--against", "none"),
        ("verify", out),
        ("run", out, "--input", files.test, "-o", result_file),
    ]
    for words in running:
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 3, result.output
        assert "no CUDA driver" in " ".join(result.stderr.split())
        assert "Traceback" not in result.output
    assert not result_file.exists()


def test_an_older_gpu_is_not_measured(
    gpu: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.driver.exists()
    monkeypatch.setenv("MPQC_EMULATED_CAPABILITY", "75")
    with pytest.raises(EnvironmentLacks, match=r"this machine's Emulated GPU, which is sm_75"):
        measured(tmp_path)


def test_without_a_compiler_nothing_is_measured(
    gpu: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.driver.exists()
    monkeypatch.setenv(toolkit.VARIABLE, "/nowhere/nvcc")
    with pytest.raises(EnvironmentLacks, match="names /nowhere/nvcc"):
        measured(tmp_path)


def test_tables_of_gpus_and_their_hosts_lie_apart(gpu: Emulator, tmp_path: Path) -> None:
    assert gpu.driver.exists()
    assert table_path(SM86, cache=tmp_path).name.startswith("sm_86-")
    assert table_path(SM86) != table_path(TARGETS["cuda:sm_80"])
    assert table_path(SM86, cpu="another GPU") != table_path(SM86)
    assert cached_path(SM86, cache=tmp_path) is None
