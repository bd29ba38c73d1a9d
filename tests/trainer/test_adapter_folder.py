"""Which folders are adapters, and where their base lies."""

import json

import pytest

from reflux.trainer.adapter_folder import (
    WEIGHTS,
    base_of,
    file_of,
    model_folder,
    read_adapter,
    tokenizer_of,
)

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "base"}


def adapter(tmp_path, **changes):
    """A folder beside its base."""
    base, folder = tmp_path / "adapter" / "base", tmp_path / "adapter"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (folder / WEIGHTS).write_bytes(b"")
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | changes))
    return folder


def test_a_folder_without_adapter_is_its_own_base(tmp_path):
    assert read_adapter(str(tmp_path)) is None
    assert base_of(str(tmp_path)) == tokenizer_of(str(tmp_path)) == str(tmp_path)


def test_the_base_is_found_and_its_tokenizer_unless_the_adapter_has_one(tmp_path):
    folder = adapter(tmp_path)
    found = read_adapter(str(folder))
    assert found.base == base_of(str(folder)) == tokenizer_of(str(folder)) == str(folder / "base")
    assert found.scale(4) == 2.0 and read_adapter(str(folder)).rslora is False
    (folder / "tokenizer.json").write_text("{}")
    assert tokenizer_of(str(folder)) == str(folder)
    assert file_of(str(folder), "tokenizer.json") == str(folder / "tokenizer.json")
    assert file_of(str(folder), "config.json") == str(folder / "base" / "config.json")


def test_rslora_divides_by_the_root_of_the_rank(tmp_path):
    assert read_adapter(str(adapter(tmp_path, use_rslora=True))).scale(16) == 2.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported; want a plain LoRA"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"lora_alpha": None}, "lora_alpha = None; want a number"),
        ({"base_model_name_or_path": "org/model"}, "'org/model': no config.json there"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_adapter(str(adapter(tmp_path, **changes)))


def test_torn_files_and_adapters_of_adapters_are_said(tmp_path):
    folder = adapter(tmp_path)
    (folder / "base" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter, too; merge that one first"):
        read_adapter(str(folder))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json: no JSON"):
        read_adapter(str(folder))
    (folder / WEIGHTS).unlink()
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN))
    with pytest.raises(ValueError, match=f"no {WEIGHTS} there"):
        read_adapter(str(folder))


def test_a_folder_that_is_none_is_named_by_its_option(tmp_path, monkeypatch):
    for path in (str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(
            ValueError, match=f"teacher.path = '{path}': no config.json there; want"
        ):
            model_folder(path, "teacher.path")
    with pytest.raises(ValueError, match=rf"There is no {tmp_path}/none$"):
        model_folder(f"{tmp_path}/none", "teacher.path")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="There is no .*; python -m .*debug_models writes it"):
        model_folder("runs/debug/qwen3_tied", "model.path")
    with pytest.raises(ValueError, match="hf download Qwen/Qwen3-8B --local-dir"):
        model_folder("Qwen/Qwen3-8B", "model.path")


def test_the_export_of_a_run_is_named(tmp_path):
    (tmp_path / "run/export").mkdir(parents=True)
    with pytest.raises(ValueError, match="did you mean .*/run/export\\?"):
        model_folder(f"{tmp_path}/run", "teacher.path")
