"""A trained adapter leaves as a folder that the real peft loads, and as a whole model; both compute
what was trained. A folder that peft wrote is read wherever a model folder is.
"""

import json

import pytest
import torch
from engine_cases import load_frozen, random_ids
from lora_cases import ROUTING, check_float32, close, logits, save_family, start, train
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bench.model_families import FAMILIES
from reflux.trainer.adapter_folder import BASE_FILES
from reflux.trainer.config.sections import LoraSection
from reflux.trainer.data.chat import Chat
from reflux.trainer.engine.lora_export import peft_config, short_targets
from reflux.trainer.merge import main as merge_command
from reflux.trainer.merge import merge

pytestmark = pytest.mark.usefixtures("titan_process")
IDS_NL = random_ids(2, 17).remainder(300)
MODELS = [("qwen3_tied", "native"), ("llama3", "native"), ("gemma3", "hf")]


def peft_logits(base, folder):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(folder)).eval()(IDS_NL).logits


@pytest.mark.parametrize("name, backend", MODELS)
def test_peft_and_transformers_compute_what_was_trained(assets, tmp_path, name, backend):
    lora = {"rank": 4, "alpha": 6.5, "rslora": True, "targets": ["q_proj", "layers.1.*", "v_proj"]}
    over = dict(model={"backend": backend}, lora=lora, export={"dtype": "float32"})
    engine = start(assets / name, tmp_path / "run", **over)
    start_NLV = logits(engine, IDS_NL)
    train(engine)
    want_NLV = logits(engine, IDS_NL)
    engine._export(str(tmp_path / "adapter"), "# A card")
    tolerance = 3e-5 * float(want_NLV.abs().max())
    assert (want_NLV - start_NLV).abs().max() > 100 * tolerance, "training moved nothing"
    got_NLV = peft_logits(assets / name, tmp_path / "adapter")
    assert (got_NLV - want_NLV).abs().max() < tolerance
    table = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert table["r"] == 4 and table["use_rslora"] and table["lora_alpha"] == 6.5
    hashes = json.loads((tmp_path / "adapter" / BASE_FILES).read_text())
    assert len(hashes["model.safetensors"]) == 64
    # base + adapter as a frozen role, in its dtype
    frozen = load_frozen(engine._trainer, tmp_path / "adapter", backend)
    positions_NL = torch.arange(17).expand_as(IDS_NL)
    with frozen.open_head() as head_VD:
        got_NLV = frozen.hidden(IDS_NL, positions_NL) @ head_VD.T
    assert (got_NLV - want_NLV).abs().max() < tolerance
    close(engine)


@pytest.mark.parametrize("name, backend", MODELS[1:])
def test_the_merged_model_computes_what_was_trained(assets, tmp_path, name, backend):
    over = dict(model={"backend": backend}, export={"dtype": "float32", "merge": True})
    engine = start(assets / name, tmp_path / "run", **over)
    train(engine)
    want_NLV = logits(engine, IDS_NL)
    engine._export(str(tmp_path / "merged"), "# A card")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert (model(IDS_NL).logits - want_NLV).abs().max() < 3e-5 * want_NLV.abs().max()
    # what a sampler elsewhere is sent is the merged model
    sent, stored = dict(engine.named_weights()), load_file(tmp_path / "merged/model.safetensors")
    assert sent.keys() == stored.keys()
    assert all((sent[n] - w).abs().max() < 1e-6 * w.abs().max() for n, w in stored.items())
    close(engine)


@pytest.mark.parametrize("family, dense", [("deepseek_v3", 0), ("qwen2_moe", 1)])
def test_layers_of_one_name_and_two_sizes_leave_whole(assets, tmp_path, family, dense, monkeypatch):
    """Dense layers beside experts: mlp.gate_proj and mlp.shared_experts.gate_proj."""
    monkeypatch.setitem(FAMILIES, "qwen2_moe", {"mlp_only_layers": [1]})
    base = save_family(family, tmp_path / family, assets)
    # lr: experts are chosen by scores, and a tie apart by rounding would choose others
    over = dict(optim={"lr": 0.001}, export={"dtype": "float32"})
    engine = start(base, tmp_path / "run", **over)
    start_NLV = logits(engine, IDS_NL)
    train(engine)
    want_NLV = logits(engine, IDS_NL)
    engine._export(str(tmp_path / "adapter"), "# A card")
    sent = dict(engine.named_weights())
    close(engine)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rows = {n: len(w) for n, w in saved.items() if n.endswith(".gate_proj.lora_B.weight")}
    assert set(rows.values()) == {32, 96}
    assert rows[f"base_model.model.model.layers.{dense}.mlp.gate_proj.lora_B.weight"] == 96
    tolerance = 3e-5 * float(want_NLV.abs().max())
    assert (want_NLV - start_NLV).abs().max() > 100 * tolerance, "training moved nothing"
    if family == "qwen2_moe":  # of deepseek_v3 peft 0.21 puts the adapters on the experts instead
        assert (peft_logits(base, tmp_path / "adapter") - want_NLV).abs().max() < tolerance
    merge(str(tmp_path / "adapter"), tmp_path / "merged", "float32")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    mlp = [n for n in stored if n.endswith("gate_proj.weight") and n in sent]
    assert len(mlp) == len(rows)
    assert all((sent[n] - stored[n]).abs().max() < 1e-6 for n in mlp)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert (model(IDS_NL).logits - want_NLV).abs().max() < tolerance


def test_what_the_model_keeps_in_float32_is_not_rounded(assets, tmp_path):
    """Routing by nearly equal biases: rounded, other experts are chosen."""
    base = save_family("deepseek_v3", tmp_path / "deepseek_v3", assets)
    lora = {"rank": 2, "alpha": 4.0, "targets": ["o_proj"]}
    training = {"mixed_precision_param": "bfloat16"}
    over = dict(lora=lora, export={"merge": True, "dtype": "bfloat16"}, training=training)
    engine = start(base, tmp_path / "run", **over)
    assert engine.compute_dtype == "bfloat16"
    sent = dict(engine.named_weights())
    engine._export(str(tmp_path / "merged"), "# A card")
    close(engine)
    check_float32(base, load_file(tmp_path / "merged" / "model.safetensors"), ROUTING)
    check_float32(base, sent, ROUTING)


def test_a_folder_that_peft_wrote_is_a_model_to_train(assets, tmp_path):
    """Without tokenizer and config of its own; the trained model begins at base + adapter."""
    base = AutoModelForCausalLM.from_pretrained(assets / "llama3", dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = LoraConfig(
            r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights=False
        )
        model = get_peft_model(base, settings)
    model.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        want_NLV = model.eval()(IDS_NL).logits
    assert Chat(str(tmp_path / "peft")).vocab_size == Chat(str(assets / "llama3")).vocab_size
    over = dict(lora={"rank": 0}, checkpoint={"interval": 1000})
    engine = start(tmp_path / "peft", tmp_path / "run", **over)
    scale = float(want_NLV.abs().max())
    assert (logits(engine, IDS_NL) - want_NLV).abs().max() < 3e-5 * scale
    train(engine)
    assert (logits(engine, IDS_NL) - want_NLV).abs().max() > 1e-3 * scale
    assert engine.restore(0) == 0  # back to what it started from, the adapter included
    assert (logits(engine, IDS_NL) - want_NLV).abs().max() < 3e-5 * scale
    close(engine)


def test_an_adapter_on_an_adapter_is_refused(assets, tmp_path):
    engine = start(assets / "qwen3", tmp_path / "run")
    engine._export(str(tmp_path / "adapter"), "# A card")
    close(engine)
    with pytest.raises(ValueError, match="is a LoRA adapter, and lora.rank = 4 would.*Merge it"):
        start(tmp_path / "adapter", tmp_path / "second")


@pytest.mark.parametrize("rank, merged", [(0, False), (4, False), (4, True)])
def test_every_export_renders_what_was_trained(assets, tmp_path, rank, merged):
    """Also where the file is gone by then, and of what is made of the adapter later."""
    own, ask = tmp_path / "own.jinja", [{"role": "user", "content": "Why?"}]
    own.write_text("{% for m in messages %}Q: {{ m['content'] }}\n{% endfor %}A: ")
    over = dict(lora={"rank": rank}, export={"merge": merged}, model={"template": str(own)})
    engine = start(assets / "qwen3", tmp_path / "run", **over)
    own.unlink()
    folders = [tmp_path / "out"]
    engine._export(str(folders[0]), "# A card")
    close(engine)
    if rank and not merged:
        folders.append(tmp_path / "merged")
        assert merge_command([str(tmp_path / "out"), str(folders[1])]) == 0
    for chat in (Chat(str(folder)) for folder in folders):
        assert chat.tokenizer.decode(chat.prompt_ids(ask)) == "Q: Why?\nA: "


def test_target_modules_name_what_was_trained_and_nothing_else():
    layers = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qk"]
    assert short_targets(layers, layers) == ["k_proj", "q_proj"]
    assert short_targets(layers[:1], layers) == layers[:1]
    table = peft_config(layers, layers, LoraSection(rank=2, alpha=16.0), "/base")
    assert table["lora_alpha"] == 16 and isinstance(table["lora_alpha"], int)
    assert set(table) <= set(LoraConfig(r=2).to_dict()), "keys that peft does not know"
