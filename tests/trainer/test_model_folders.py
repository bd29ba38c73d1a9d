"""Every way to name a model that is none or is damaged: exit code 2, one message, no traceback,
for the trained model and for a frozen one.
"""

import re
import shutil

import pytest
import torch
from engine_cases import edit_config
from runs import config
from safetensors.torch import load_file, save_file

from reflux.trainer import main
from reflux.trainer.config.loader import to_toml

pytestmark = pytest.mark.usefixtures("titan_process")
WEIGHTS = "model.safetensors"


def cut(name: str, size: int):
    def damage(folder) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return damage


def rename(name: str, other: str):
    def damage(folder) -> None:
        (folder / name).rename(folder / other)

    return damage


def configured(**changes):
    def damage(folder) -> None:
        edit_config(folder, **changes)

    return damage


def stored(**changes):
    """Tensors by name, dots as two underscores; None takes one away."""

    def damage(folder) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors |= {name.replace("__", "."): value for name, value in changes.items()}
        whole = {name: value for name, value in tensors.items() if value is not None}
        save_file(whole, folder / WEIGHTS, {"format": "pt"})

    return damage


def written(name: str, text: str):
    def damage(folder) -> None:
        (folder / name).write_text(text)

    return damage


def without_tokenizer(folder) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


DAMAGE = {
    "no weights": (rename(WEIGHTS, "old"), "no model.safetensors and no model.safetensors.index"),
    "pickled weights": (rename(WEIGHTS, "pytorch_model.bin"), "only pytorch_model.bin"),
    "half the weights": (cut(WEIGHTS, 99_999), "model.safetensors: truncated"),
    "no byte of weights": (cut(WEIGHTS, 0), "model.safetensors: truncated"),
    "another shape": (stored(model__norm__weight=torch.ones(3)), r"'model.norm.weight' is \(3,\)"),
    "a missing tensor": (stored(model__norm__weight=None), "no tensor 'model.norm.weight'"),
    "an extra tensor": (stored(extra=torch.ones(3)), "1 tensors that the model does not have"),
    "integers": (stored(model__norm__weight=torch.ones(64).int()), "'model.norm.weight' is I32"),
    "half a tokenizer": (cut("tokenizer.json", 999), "tokenizer.json: no JSON"),
    "no tokenizer": (without_tokenizer, "no tokenizer there"),
    "another tokenizer": (configured(vocab_size=256), "tokenizer.json: the token .* has id"),
    "half a config": (cut("config.json", 99), "config.json: no JSON"),
    "an empty config": (written("config.json", "{}"), "config.json: transformers cannot read it"),
    "no config": (rename("config.json", "old"), "no config.json there"),
    "another family": (configured(model_type="bert"), "BertLMHeadModel is not supported"),
    "no family": (configured(model_type="none"), "config.json: transformers cannot read it"),
    "more layers": (
        configured(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "describes 3 layers, the file holds 2",
    ),
    "fewer layers": (
        configured(num_hidden_layers=1, layer_types=["full_attention"]),
        "describes 1 layers, the file holds 2",
    ),
    "an unknown activation": (
        configured(hidden_act="none"),
        "no model can be built from it|'silu'",
    ),
    "code of its own": (
        configured(model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "config.json: transformers cannot read it .*code",
    ),
    "quantised": (configured(quantization_config={"quant_method": "fp8"}), "quantised"),
    "stops that are none": (
        written("generation_config.json", '{"eos_token_id": "end"}'),
        "generation_config.json: eos_token_id",
    ),
    "a tokenizer of no class": (
        written("tokenizer_config.json", '{"tokenizer_class": 7}'),
        "cannot read its tokenizer",
    ),
}


def message_of(cfg, tmp_path, capsys) -> str:
    file = tmp_path / "run.toml"
    file.write_text(to_toml(cfg))
    with pytest.raises(SystemExit) as ended:
        main.main(["--config", str(file)])
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("role", ["model", "teacher"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_said_in_words(talkers, tmp_path, capsys, damage, role):
    folder = shutil.copytree(talkers / "policy", tmp_path / "folder")
    change, words = DAMAGE[damage]
    change(folder)
    cfg = config(talkers, tmp_path / "run", "distill", **{role: {"path": str(folder)}})
    message = message_of(cfg, tmp_path, capsys)
    assert re.search(words, message), message
    assert str(folder) in message and "Traceback" not in message


def test_a_mistyped_folder_is_answered_with_the_one_beside_it(
    talkers, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(talkers / "policy", tmp_path / "runs/debug/qwen3")
    for path, there in (("runs/debug/qwen", "runs/debug/qwen3"), ("debug/qwen", "debug/qwen3")):
        cfg = config(talkers, tmp_path / "run", "distill", model={"path": path})
        message = message_of(cfg, tmp_path, capsys)
        assert f"did you mean {there}?" in message and "debug_models" not in message, message
        monkeypatch.chdir(tmp_path / "runs")  # the second looks like an id of the hub


@pytest.mark.parametrize("path", ["Qwen/Qwen3-8B", "no such folder", "/dev/null"])
def test_a_name_that_is_no_folder_is_said_with_its_option(talkers, tmp_path, capsys, path):
    cfg = config(talkers, tmp_path / "run", "distill", teacher={"path": path})
    message = message_of(cfg, tmp_path, capsys)
    reason = "no folder here, and the hub gave no model" if "/Q" in path else "no config.json there"
    assert f"teacher.path = '{path}': {reason}" in message
    assert ("hf download" in message) == (path == "Qwen/Qwen3-8B")
