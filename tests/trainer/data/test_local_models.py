"""Models that grade: devices and dtypes that are not there, and a hash of what a folder holds."""

import json
import shutil

import pytest

from reflux.trainer.data.local_models import check_place, content_hash


@pytest.mark.parametrize(
    "device, dtype, says",
    [
        ("gpu", "float32", "judge: device = 'gpu' is not there; want cpu, cuda or cuda:N"),
        ("cuda:99", "float32", "judge: device = 'cuda:99' is not there"),
        ("", "float32", "judge: device = '' is not there"),
        ("meta", "float32", "judge: device = 'meta' holds no numbers"),
        ("cpu", "fp32", "judge: dtype = 'fp32'; want float32, bfloat16 or float16"),
        ("cpu", "int8", "judge: dtype = 'int8'; want"),
        ("cpu", "nn", "judge: dtype = 'nn'; want"),
    ],
)
def test_a_place_that_is_not_there_is_named(device, dtype, says):
    with pytest.raises(ValueError) as error:
        check_place("judge", device, dtype)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)
    check_place("judge", "cpu", "bfloat16")


def test_a_folder_is_what_it_holds(tmp_path, monkeypatch):
    """Not where it lies, nor when it was written; an adapter is its base, too."""
    model, copy, adapter = (tmp_path / name for name in ("model", "copy", "adapter"))
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    shutil.copytree(model, copy)
    (copy / "log.csv").write_text("no part of the model")
    monkeypatch.chdir(tmp_path)
    first = content_hash(str(model))
    assert first == content_hash("model") == content_hash("copy") == content_hash("./copy/")
    adapter.mkdir()
    table = {"peft_type": "LORA", "lora_alpha": 1, "base_model_name_or_path": str(copy)}
    (adapter / "adapter_config.json").write_text(json.dumps(table))
    (adapter / "adapter_model.safetensors").write_bytes(b"A and B")
    adapted = content_hash("adapter")
    seen = {first, adapted}
    for file in ("model.safetensors", "config.json", "chat_template.jinja", "tokenizer.model"):
        (copy / file).write_bytes(b"other")
        seen |= {content_hash("copy"), content_hash("adapter")}
    assert len(seen) == 10, "each file counts, and in a base too"


def test_names_of_the_hub_are_told_apart():
    assert content_hash("a/model") != content_hash("b/model")
