import os

import pytest
from assets import free_port, make_trainer
from runs import config

from reflux.trainer.engine.engine import Engine


@pytest.fixture(scope="module")
def host(assets, titan_process, tmp_path_factory):
    """torchtitan's Trainer on the model qwen3, loaded."""
    trainer = make_trainer(assets / "qwen3", tmp_path_factory.mktemp("host"))
    yield trainer
    trainer.close()


@pytest.fixture
def engine(talkers, titan_process, tmp_path):
    """The engine of a run of nine steps that saves each of them."""
    os.environ["MASTER_PORT"] = str(free_port())
    checkpoint = {"interval": 1, "keep_latest_k": 9}
    engine = Engine(config(talkers, tmp_path / "run", "distill", steps=9, checkpoint=checkpoint))
    yield engine
    engine.close()
