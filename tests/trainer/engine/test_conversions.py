"""Names and shapes of the hub's files against those of transformers' modules: there and back."""

import re

import pytest
import torch
from engine_cases import edited, load_frozen, positions, random_ids, reference_logits
from safetensors.torch import load_file

from bench.model_families import make_model
from reflux.trainer.engine.hf_adapter import HFAdapter
from reflux.trainer.engine.model_builder import build_spec
from reflux.trainer.engine.weight_files import stored_tensors
from reflux.trainer.engine.weights import adapter_of

# renamed; fused; split; stacked experts; experts in files as in the model; a buffer that routes
FAMILIES = ["gpt_neox", "exaone", "olmo_hybrid", "mixtral", "qwen3_moe", "gpt_oss", "granitemoe"]
FAMILIES += ["deepseek_v3", "jamba"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a family: its folder, made once."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("families") / family
            make_model(family, made[family])
        return made[family]

    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_files_become_the_model_and_the_model_becomes_the_same_files(host, folders, family):
    path = folders(family)
    frozen, ids_NL = load_frozen(host, path), random_ids(2, 9)
    with torch.no_grad():
        got_NLV = frozen.model(ids_NL, positions=positions(9, rows=2))
    assert (got_NLV - reference_logits(path, ids_NL)).abs().max() < 1e-5
    adapter = adapter_of(build_spec(str(path)), str(path))
    weights = adapter.to_hf(frozen.model.state_dict())
    files = adapter.files(weights, stored_tensors(str(path)), torch.float32)
    want = load_file(path / "model.safetensors")
    assert files.keys() == want.keys()
    for name, tensor in files.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        assert torch.equal(whole, want[name]), name


def test_a_router_keeps_float32_in_an_export_of_bfloat16(folders):
    path = str(folders("deepseek_v3"))
    adapter = adapter_of(build_spec(path), path)
    names = adapter.model.state_dict()
    kept = {n for n in names if adapter.keeps_float32(n)}
    assert {n for n in names if n.endswith("e_score_correction_bias")} <= kept
    assert all(".mlp.gate." in n for n in kept)


def test_so_do_the_parts_of_other_modalities(host, folders, monkeypatch):
    path = folders("gemma3")
    monkeypatch.setattr(HFAdapter, "keeps_float32", lambda self, name: "projector" in name)
    adapter = adapter_of(build_spec(str(path)), str(path))
    weights = adapter.to_hf(load_frozen(host, path).model.state_dict())
    files = adapter.files(weights, stored_tensors(str(path)), torch.bfloat16)
    others = {n: w for n, w in files.items() if "projector" in n or "vision" in n}
    dtypes = {"projector" in n: w.dtype for n, w in others.items()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    want = load_file(path / "model.safetensors")
    assert all(torch.equal(w, want[n]) for n, w in others.items() if "projector" in n)


LAST = "model.layers.1.mlp.experts.3"


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda t: [t.pop(f"{LAST}.{p}_proj.weight") for p in ("gate", "up", "down")],
            r"'model.layers.1.mlp.experts.0.gate_proj.weight' and 5 others make \(3, 64, 64\); .*"
            r"wants \(4, 64, 64\)",
        ),
        (lambda t: t.pop(f"{LAST}.up_proj.weight"), "and 6 others do not fit together"),
        (
            lambda t: t.update({f"{LAST}.up_proj.weight": torch.ones(3, 3)}),
            "and 7 others do not fit together",
        ),
        (
            lambda t: t.update({f"{LAST}.up_proj.scale": torch.ones(3)}),
            f"1 tensors that the model does not have, first '{LAST}.up_proj.scale'",
        ),
        (
            lambda t: t.update({f"{LAST}.up_proj.weight": torch.ones(32, 64, dtype=torch.int8)}),
            f"'{LAST}.up_proj.weight' is I8; want float32",
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp.experts" in n],
            r"no tensor 'model.layers.1.mlp.experts.gate_up_proj' \(4, 64, 64\)",
        ),
        (
            lambda t: t[f"{LAST}.up_proj.weight"].fill_(torch.nan),
            "'model.layers.1.mlp.experts.gate_up_proj' holds NaN",
        ),
    ],
)
def test_experts_that_do_not_fit_are_errors_that_name_file_and_tensor(
    host, folders, tmp_path, edit, message
):
    path = edited(folders("qwen3_moe").parent, "qwen3_moe", tmp_path, edit)
    with pytest.raises(ValueError, match=message) as error:
        load_frozen(host, path)
    assert re.search("model(-.*)?.safetensors", str(error.value))
