"""A copied tokenizer renders what the run rendered: one template counts for every reader."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from reflux.trainer.data.chat import Chat
from reflux.trainer.data.tokenizer_files import (
    MORE_TEMPLATES,
    TEMPLATE,
    copy_tokenizer,
    has_template,
    write_template,
)

OWN = "{% for m in messages %}Q: {{ m['content'] }}\n{% endfor %}A: "
ASK = [{"role": "user", "content": "Why?"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def rendered(folder, **more):
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        ASK, add_generation_prompt=True, tokenize=False, **more
    )


def set_template(folder, value):
    """As older versions of transformers store it."""
    file = folder / "tokenizer_config.json"
    table = json.loads(file.read_text())
    table.pop("chat_template", None)
    file.write_text(json.dumps(table | ({} if value is None else {"chat_template": value})))


@pytest.fixture
def source(assets, tmp_path):
    return shutil.copytree(assets / "qwen3", tmp_path / "source")


LISTED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]


@pytest.mark.parametrize("stored", [None, "S{{ messages[0].content }}", LISTED])
@pytest.mark.parametrize(
    "beside", [(), (TEMPLATE,), (TEMPLATE, f"{MORE_TEMPLATES}/tool_use.jinja")]
)
def test_the_written_template_is_the_only_one(source, tmp_path, stored, beside):
    set_template(source, stored)
    (source / "chat_template.json").write_text('{"chat_template": "J"}')
    for name in beside:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("B{{ messages[0].content }}")
    out = tmp_path / "out"
    out.mkdir()
    copy_tokenizer(out, str(source), OWN)
    assert rendered(out) == rendered(out, tools=TOOLS) == "Q: Why?\nA: "
    chat = Chat(str(out))
    assert chat.tokenizer.decode(chat.prompt_ids(ASK)) == "Q: Why?\nA: " and has_template(str(out))
    # readers that know no chat_template.jinja
    table = json.loads((out / "tokenizer_config.json").read_text())
    assert table.get("chat_template", OWN) == OWN
    assert json.loads((out / "chat_template.json").read_text()) == {"chat_template": OWN}
    write_template(out, "")
    assert not AutoTokenizer.from_pretrained(out).chat_template and not has_template(str(out))


def test_without_another_template_every_one_of_the_source_goes_along(source, tmp_path):
    (source / TEMPLATE).write_text("B{{ messages[0].content }}")
    (source / MORE_TEMPLATES).mkdir()
    (source / MORE_TEMPLATES / "tool_use.jinja").write_text("T{{ messages[0].content }}")
    out = tmp_path / "out"
    out.mkdir()
    copy_tokenizer(out, str(source))
    assert rendered(out) == "BWhy?" and rendered(out, tools=TOOLS) == "TWhy?"
    name = "tokenizer_config.json"
    assert (out / name).read_bytes() == (source / name).read_bytes()


def test_an_adapter_with_a_tokenizer_has_no_template_of_its_base(source, tmp_path):
    """Prompts are rendered with the adapter's own, and so is what is made of it."""
    (source / TEMPLATE).write_text("B{{ messages[0].content }}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    table = {"base_model_name_or_path": str(source), "lora_alpha": 1, "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(table))
    (adapter / "adapter_model.safetensors").touch()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, adapter / name)
    set_template(adapter, None)
    out = tmp_path / "out"
    out.mkdir()
    copy_tokenizer(out, str(adapter))
    assert not has_template(str(adapter)) and not Chat(str(adapter)).tokenizer.chat_template
    assert not AutoTokenizer.from_pretrained(out).chat_template
    assert (out / "generation_config.json").exists(), "the base's, where the adapter has none"


def test_the_file_that_is_used_instead_decides(source, tmp_path):
    for text, found in (("", False), (OWN, True)):
        (tmp_path / "own.jinja").write_text(text)
        assert has_template(str(source), str(tmp_path / "own.jinja")) is found
