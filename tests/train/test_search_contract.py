"""Every method that trains keeps the contract that is asked of others."""

import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.search import base, load
from tests.train.contract import TrainedContract


class TestEbs(TrainedContract):
    method = "ebs"
    options = {"samples": "1"}  # noqa: RUF012


class TestEbsStochastic(TrainedContract):
    method = "ebs"
    options = {  # noqa: RUF012
        "strengths": "stochastic",
        "choice": "likeliest",
        "level": "two",
        "quantizer": "dorefa",
        "samples": "0",
        "warmup": "0",
    }


class TestDnas(TrainedContract):
    method = "dnas"
    options = {"samples": "0"}  # noqa: RUF012


@pytest.mark.slow
class TestDnasSampled(TrainedContract):
    method = "dnas"
    options = {  # noqa: RUF012
        "samples": "2",
        "short": "0.2",
        "share_weights": "true",
        "hard_sample": "true",
        "cost": "product",
    }


@pytest.mark.slow
class TestAlps(TrainedContract):
    method = "alps"
    options = {"epochs": "0.2", "start": "0.2", "groups": "layers", "samples": "0"}  # noqa: RUF012


class TestAlpsOfTensors(TrainedContract):
    method = "alps"
    options = {"epochs": "0.2", "start": "0.2", "samples": "2"}  # noqa: RUF012


class TestFracBits(TrainedContract):
    method = "fracbits"
    options = {"warmup": "0", "samples": "0"}  # noqa: RUF012


TRAINING = [name for name in base.BUILT_IN if "trainer" in load(name).needs]


@pytest.mark.parametrize("name", TRAINING)
def test_every_method_that_trains_is_tested(name: str) -> None:
    tested = {case.method for case in TrainedContract.__subclasses__()}
    assert name in tested
