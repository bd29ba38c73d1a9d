"""A role's folder before anything is loaded."""

import json
import shutil

import pytest
from assets import save_tokenizer, sentences, train_tokenizer
from engine_cases import edit_config
from hypothesis import given
from hypothesis import strategies as st
from runs import config

from reflux.trainer.engine.model_builder import build_spec
from reflux.trainer.engine.model_folder import (
    JSON_FILES,
    check_files,
    check_folders,
    check_model,
)


@pytest.fixture
def folder(assets, tmp_path):
    """A copy of a checkpoint of 512 entries."""
    return shutil.copytree(assets / "qwen3", tmp_path / "model")


def edit_tokenizer(folder, edit) -> None:
    file = folder / "tokenizer.json"
    table = json.loads(file.read_text())
    edit(table)
    file.write_text(json.dumps(table))


def test_a_whole_folder_passes(assets):
    for name in ("qwen3", "gemma3", "qwen2"):
        check_files(str(assets / name))


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("text", ["", "{", '{"a": 1} x', "[1]", "null", "[" * 10**5, "\xff"])
def test_a_torn_json_file_is_named(folder, name, text):
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"/model/{name}: "):
        check_files(str(folder))


@given(cut=st.integers(0, 10**5))
def test_a_tokenizer_cut_anywhere_is_named(assets, tmp_path_factory, cut):
    raw = (assets / "qwen3" / "tokenizer.json").read_bytes()
    folder = tmp_path_factory.mktemp("cut")
    (folder / "tokenizer.json").write_bytes(raw[: cut % len(raw)])
    with pytest.raises(ValueError, match="tokenizer.json: no JSON"):
        check_files(str(folder))
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.pop("model"),
        lambda t: t.update(model=3),
        lambda t: t["model"].update(vocab=7),
        lambda t: t["model"].update(vocab={"a": "b"}),
        lambda t: t.update(added_tokens=[1]),
        lambda t: t.update(added_tokens=[{"id": 1}]),
    ],
)
def test_json_that_is_no_tokenizer_is_named(folder, edit):
    edit_tokenizer(folder, edit)
    with pytest.raises(ValueError, match="tokenizer.json: no tokenizer"):
        check_files(str(folder))


def test_ids_beyond_the_head_are_an_error_and_control_tokens_are_not(folder):
    def add(i, special):
        token = {"id": i, "content": f"<extra {i}>", "special": special}
        edit_tokenizer(folder, lambda t: t["added_tokens"].append(token))

    add(512, special=True)
    check_files(str(folder))
    add(513, special=False)
    with pytest.raises(ValueError, match="'<extra 513>' has id 513, .*vocab_size = 512"):
        check_files(str(folder))


def test_a_larger_tokenizer_is_an_error(folder):
    save_tokenizer(train_tokenizer(sentences(600), 600), folder)
    with pytest.raises(ValueError, match="tokenizer.json: the token .* has id 599"):
        check_files(str(folder))


def test_ids_of_a_unigram_model_are_its_order(folder):
    pieces = {"vocab": [["a", 0.0]] * 511 + [["b", 0.0]], "type": "Unigram"}
    edit_tokenizer(folder, lambda t: t.update(model=pieces))
    check_files(str(folder))
    pieces["vocab"].append(["last", 0.0])
    edit_tokenizer(folder, lambda t: t.update(model=pieces))
    with pytest.raises(ValueError, match="the token 'last' has id 512"):
        check_files(str(folder))


def test_a_config_that_transformers_cannot_read_is_named(folder):
    edit_config(folder, model_type="no_such_model")
    with pytest.raises(ValueError, match="model/config.json: transformers cannot read it"):
        check_files(str(folder))
    edit_config(folder, model_type="qwen3", hidden_size="wide")
    with pytest.raises(ValueError, match="model/config.json: transformers cannot read it"):
        check_files(str(folder))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "foo"}, "no model can be built from it .KeyError: 'foo'"),
        ({"num_attention_heads": 0}, "no model can be built from it .(Zero|Assert)"),
        ({"model_type": "t5"}, "transformers has no causal language model 't5'"),
        ({"num_attention_heads": 5}, r"q_proj.weight' is \(128, 64\); .* wants \(160, 64\)"),
        ({"vocab_size": 600}, r"embed_tokens.weight' is \(512, 64\); .* wants \(600, 64\)"),
    ],
)
def test_a_model_that_cannot_be_built_or_is_another_is_said_so(folder, changes, message):
    edit_config(folder, **changes)
    for backend in ("auto", "hf"):
        with pytest.raises(ValueError, match=message):
            check_model(build_spec(str(folder), backend=backend), str(folder))


def test_a_folder_without_a_tokenizer_is_an_error(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="model: no tokenizer there; want one of tokenizer.json"):
        check_files(str(folder))


def test_every_role_is_checked_before_any_is_loaded(talkers, tmp_path):
    sampled = {"objective": "nll", "on_policy": 0.0}
    served = {"distill": sampled, "defence": {"proxy": "no/such"}}
    cfg = config(talkers, tmp_path / "run", "distill", **served)
    with pytest.raises(ValueError, match="defence.proxy = 'no/such'"):
        check_folders(cfg)
    torn = shutil.copytree(talkers / "teacher", tmp_path / "torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:9999])
    for phase, section in (("distill", "teacher"), ("calibrate", "proxy"), ("evaluate", "model")):
        over = {section: {"path": str(torn)}}
        over |= {"calibration": {"mode": "distillable"}} if phase == "calibrate" else {}
        over |= {"eval": {"source": "x.jsonl"}} if phase == "evaluate" else {}
        with pytest.raises(ValueError, match="torn/model.safetensors: truncated"):
            check_folders(config(talkers, tmp_path / "run", phase, **over))


def test_random_weights_need_no_files(talkers, tmp_path):
    path = shutil.copytree(talkers / "policy", tmp_path / "model")
    (path / "model.safetensors").unlink()
    over = {"path": str(path), "from_scratch": True}
    check_folders(config(talkers, tmp_path / "run", "distill", model=over))
    with pytest.raises(ValueError, match="no model.safetensors"):
        check_folders(config(talkers, tmp_path / "run", "distill", model={"path": str(path)}))
