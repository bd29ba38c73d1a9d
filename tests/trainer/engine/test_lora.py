"""Adapters start at the model itself, move nothing else, and have the gradient of the merged model.
What they compute on two ranks and under tensor parallelism is what one process computes.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from assets import free_port
from engine_cases import likelihood_loss, random_ids, whole_weights
from lora_cases import batches, close, logits, start, train
from runs import environment

from reflux.trainer.config.sections import LoraSection
from reflux.trainer.engine.lora import (
    adapted_layers,
    choose_targets,
    gathered_adapters,
    reset_adapters,
)
from reflux.trainer.engine.weights import ADAPTERS
from reflux.trainer.losses import exact_reference_kl

pytestmark = pytest.mark.usefixtures("titan_process")
MODELS = [("qwen3_tied", "native"), ("llama3", "native"), ("qwen3_tied", "hf"), ("mistral", "hf")]
MERGED = {"merge": True, "dtype": "float32"}
NAMES = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.mark.parametrize("name, backend", MODELS)
def test_the_start_is_the_model_and_only_adapters_move(assets, tmp_path, name, backend):
    engine = start(assets / name, tmp_path / "run", model={"backend": backend})
    before, base, kls = whole_weights(engine), engine.base(), []

    def loss(out, batch):
        with engine.forward_no_grad(base, batch, out.vocab_size) as reference:
            kl, _ = exact_reference_kl(out, reference, temperature=1.0)
        kls.append(float(kl.detach()))
        return likelihood_loss(out, batch)

    losses = [engine.step([[batches()]], loss)["loss"] for _ in engine.steps()]
    assert kls[0] == 0.0 and kls[1] > 1e-4, "the anchor is exactly 0 at the start, and not later"
    assert losses[2] < losses[0] - 0.05
    moved = {n for n, w in whole_weights(engine).items() if not torch.equal(w, before[n])}
    assert moved == {n for n in before if n.endswith(ADAPTERS)}
    groups = [group for o in engine._trainer.optimizers for group in o.param_groups]
    trained = [weight for group in groups for weight in group["params"]]
    assert len(trained) == 2 * len(adapted_layers(engine.model)) == 2 * 2 * 7
    close(engine)


def test_the_forward_of_the_base_leaves_the_step_as_it_was(assets, tmp_path):
    """Read between a forward and its backward, the shards of the step are gathered again."""
    over = dict(parallelism={"fsdp_reshard_after_forward": "always"})
    gradients = []
    for reads_base in (False, True):
        engine = start(assets / "qwen3_tied", tmp_path / str(reads_base), **over)
        with torch.no_grad():
            for layer in adapted_layers(engine.model):
                layer.lora_B.fill_(0.01)

        def loss(out, batch, engine=engine, reads_base=reads_base):
            if reads_base:
                with engine.forward_no_grad(engine.base(), batch, out.vocab_size):
                    pass
            return likelihood_loss(out, batch)

        engine.backward(batches(), loss)
        gradients.append([x.lora_A.grad.full_tensor() for x in adapted_layers(engine.model)])
        close(engine)
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert all(g.abs().max() > 0 for g in gradients[0])


@pytest.mark.parametrize("name, backend", MODELS[:3])
def test_gradients_are_those_of_the_merged_model(assets, tmp_path, name, backend):
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW of a full-rank model at W + s B A."""
    own = start(assets / name, tmp_path / "run", model={"backend": backend}, export=MERGED)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(own.model):
            start_of_B = torch.empty(layer.lora_B.shape).normal_(std=0.05, generator=stream)
            layer.lora_B.detach().to_local().copy_(start_of_B)
    own.backward(batches(), likelihood_loss)
    ours = [
        tuple(x.full_tensor() for x in (a.lora_A, a.lora_B, a.lora_A.grad, a.lora_B.grad))
        for a in adapted_layers(own.model)
    ]
    own._export(str(tmp_path / "merged"), "# card")
    close(own)
    over = dict(model={"backend": backend}, lora={"rank": 0})
    full = start(tmp_path / "merged", tmp_path / "full", **over)
    full.backward(batches(), likelihood_loss)
    layers = [m for m in full.model.modules() if isinstance(m, torch.nn.Linear)]
    layers = [m for m in layers if m is not full.model.lm_head]
    scale = LoraSection(rank=4, alpha=12.0).scale
    assert scale == 3.0 and len(layers) == len(ours) == 14
    for (A, B, grad_A, grad_B), layer in zip(ours, layers):
        grad_W = layer.weight.grad.full_tensor()
        for got, want in ((grad_B, scale * grad_W @ A.T), (grad_A, scale * B.T @ grad_W)):
            assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    close(full)


def test_the_start_of_A_is_the_same_on_both_back_ends_and_pefts(assets, tmp_path):
    found = []
    for backend in ("native", "hf"):
        engine = start(assets / "llama3", tmp_path / backend, model={"backend": backend})
        found.append(gathered_adapters(engine.model, engine._config.model_spec))
        close(engine)
    assert found[0].keys() == found[1].keys()
    for name, (A, B) in found[0].items():
        assert torch.equal(A, found[1][name][0]) and not B.any()
        assert 0.9 < A.abs().max() * A.shape[1] ** 0.5 <= 1 and A.mean().abs() < 0.02


def test_sampling_is_from_the_adapted_model(assets, tmp_path):
    engine = start(assets / "qwen3_tied", tmp_path / "run")
    train(engine)
    ids_NL = random_ids(2, 9).remainder(300)
    want_NV = logits(engine, ids_NL)[:, -1]
    positions_NL, real_NL = torch.arange(9).expand(2, -1), torch.ones(2, 9, dtype=torch.bool)
    with engine.gathered_weights() as decode, decode(2, 16) as (step, _):
        got_NV = step(ids_NL, positions_NL, real_NL, True)
    assert (got_NV - want_NV).abs().max() < 2e-5
    reset_adapters(engine.model, 0)
    assert (logits(engine, ids_NL)[:, -1] - want_NV).abs().max() > 0.01
    close(engine)


def test_bf16_keeps_the_frozen_weights_in_bf16_and_the_adapters_in_fp32(assets, tmp_path):
    training = {"mixed_precision_param": "bfloat16"}
    engine = start(assets / "qwen3_tied", tmp_path / "run", training=training)
    dtypes = {n.endswith(ADAPTERS): p.dtype for n, p in engine.model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    stats = train(engine)
    assert stats[-1]["loss"] < stats[0]["loss"]
    close(engine)


def test_targets_are_ends_of_names_or_patterns():
    assert choose_targets(NAMES, (), "m") == NAMES
    assert choose_targets(NAMES, ("q_proj",), "m") == NAMES[::2]
    assert choose_targets(NAMES, ("layers.1.*", "self_attn.q_proj"), "m") == [NAMES[0], *NAMES[2:]]
    with pytest.raises(ValueError, match="'proj', which is the end of no.*q_proj, up_proj"):
        choose_targets(NAMES, ("proj",), "m")
    with pytest.raises(ValueError, match="the head and the embeddings take no adapter"):
        choose_targets(NAMES, ("lm_head",), "m")


def test_no_match_is_an_error_before_anything_is_trained(assets, tmp_path):
    with pytest.raises(ValueError, match="lora.targets holds 'c_attn'"):
        start(assets / "qwen3_tied", tmp_path / "run", lora={"rank": 2, "targets": ["c_attn"]})


def test_two_ranks_and_tensor_parallelism_compute_what_one_process_does(assets, tmp_path):
    cases = [("llama3", "native", 2), ("mistral", "hf", 1)]
    script = Path(__file__).parents[2] / "two_ranks_lora.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), str(script), str(assets), str(tmp_path)]
    done = subprocess.run(
        [*command, json.dumps(cases)], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr[-6000:]
    two = json.loads((tmp_path / "two.json").read_text())
    for (name, backend, _), steps in zip(cases, two, strict=True):
        engine = start(assets / name, tmp_path / name, model={"backend": backend})
        for ours, theirs in zip(train(engine), steps, strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-6)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-5)
        close(engine)
