"""A trained model leaves as a Hugging Face folder that transformers loads whole and unchanged."""

import json

import pytest
import torch
from assets import make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from reflux.trainer.engine.export import export_hf, file_numbers
from reflux.trainer.engine.forward import hidden_states
from reflux.trainer.engine.head import head_logits

pytestmark = pytest.mark.usefixtures("titan_process")


def trained(path, folder, backend="auto"):
    """A trainer after one large step on random tokens, its ids and its logits."""
    trainer = make_trainer(path, folder, backend=backend)
    model = trainer.model_parts[0]
    ids_NL = torch.randint(3, 384, (2, 24), generator=torch.Generator().manual_seed(0))
    positions_NL = torch.arange(24).expand_as(ids_NL)
    logits_NLV = head_logits(model, hidden_states(model, ids_NL, positions_NL))
    torch.nn.functional.cross_entropy(
        logits_NLV[:, :-1].flatten(0, 1), ids_NL[:, 1:].flatten()
    ).backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.05 * weight.grad / weight.grad.norm().full_tensor()
        return trainer, ids_NL, head_logits(model, hidden_states(model, ids_NL, positions_NL))


@pytest.mark.parametrize(
    "name, backend, tolerance",
    [
        ("qwen3", "native", 0.0),
        ("qwen3_tied", "native", 0.0),
        ("llama3", "native", 2e-5),
        ("qwen3_tied", "hf", 0.0),
        ("gemma3", "hf", 0.0),
    ],
)
def test_transformers_loads_the_export_and_computes_the_same(
    assets, tmp_path, name, backend, tolerance
):
    trainer, ids_NL, want_NLV = trained(assets / name, tmp_path / "run", backend)
    out = tmp_path / "out"
    export_hf(trainer, str(out), str(assets / name), dtype="float32", card="# A card\n")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    with torch.no_grad():
        assert (model(ids_NL).logits - want_NLV).abs().max() <= tolerance
        source = AutoModelForCausalLM.from_pretrained(assets / name)
        assert (source(ids_NL).logits - want_NLV).abs().max() > 0.01, (
            "training moved nothing: the test is blind"
        )
    assert (out / "README.md").read_text() == "# A card\n"
    assert (out / "tokenizer.json").read_bytes() == (assets / name / "tokenizer.json").read_bytes()
    assert (
        AutoTokenizer.from_pretrained(out).chat_template
        == AutoTokenizer.from_pretrained(assets / name).chat_template
    )
    assert (out / "generation_config.json").is_file() and json.loads(
        (out / "config.json").read_text()
    )["dtype"] == "float32"
    assert not (out / "shards").exists() and not (tmp_path / "out.partial").exists()
    trainer.close()


def test_bfloat16_rounds_and_an_old_export_stays_until_the_new_one_is_whole(
    assets, tmp_path, monkeypatch
):
    trainer, _, _ = trained(assets / "qwen3", tmp_path / "run")
    out, source = tmp_path / "out", str(assets / "qwen3")
    export_hf(trainer, str(out), source, dtype="bfloat16", card="first")
    weights = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, weight in trainer.model_parts[0].state_dict().items():
        if name in weights:  # embeddings, norms and head keep their names
            assert torch.equal(weights[name], weight.full_tensor().bfloat16())
    monkeypatch.setattr("reflux.trainer.engine.export.copy_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_hf(trainer, str(out), source, dtype="bfloat16", card="second")
    assert (out / "README.md").read_text() == "first" and AutoModelForCausalLM.from_pretrained(out)
    monkeypatch.undo()
    (out / "left_over").touch()
    export_hf(trainer, str(out), source, dtype="bfloat16", card="second")
    assert (out / "README.md").read_text() == "second" and not (out / "left_over").exists()
    trainer.close()


def test_large_models_become_several_files(assets, tmp_path, monkeypatch):
    trainer, ids_NL, want_NLV = trained(assets / "qwen3", tmp_path / "run")
    monkeypatch.setattr(
        "reflux.trainer.engine.export.file_numbers", lambda w: file_numbers(w, limit_bytes=150_000)
    )
    export_hf(trainer, str(tmp_path / "out"), str(assets / "qwen3"), dtype="float32", card="")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and max(f.stat().st_size for f in files) < 160_000
    with torch.no_grad():
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids_NL).logits, want_NLV
        )
    trainer.close()


def test_a_tensor_above_the_limit_gets_a_file_of_its_own():
    weights = {"a": torch.zeros(2), "b": torch.zeros(9), "c": torch.zeros(1), "d": torch.zeros(1)}
    assert file_numbers(weights, limit_bytes=16) == {"a": 1, "b": 2, "c": 3, "d": 3}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(out="source"), "the folder the model came from"),
        (dict(out="notes"), "not a model folder"),
        (dict(dtype="float16"), "want 'float32' or 'bfloat16'"),
    ],
)
def test_what_would_destroy_or_cannot_be_written_is_an_error(assets, tmp_path, options, message):
    (tmp_path / "notes").mkdir()
    source = str(assets / "qwen3")
    out = source if options.get("out") == "source" else str(tmp_path / options.get("out", "out"))
    with pytest.raises(ValueError, match=message):
        export_hf(None, out, source, dtype=options.get("dtype", "float32"), card="")
    assert (tmp_path / "notes").is_dir() and (assets / "qwen3" / "config.json").is_file()
