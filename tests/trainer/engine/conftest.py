import pytest
from assets import make_trainer


@pytest.fixture(scope="module")
def host(assets, titan_process, tmp_path_factory):
    """torchtitan's Trainer on the model qwen3, loaded."""
    trainer = make_trainer(assets / "qwen3", tmp_path_factory.mktemp("host"))
    yield trainer
    trainer.close()
