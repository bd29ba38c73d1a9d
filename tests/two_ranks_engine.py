"""Two ranks against transformers on one process; test_model_builder.py runs it under torchrun."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from assets import make_trainer
from engine_cases import load_frozen
from transformers import AutoModelForCausalLM

from bench.model_families import make_model
from reflux.trainer.engine.decoding import gathered, kv_decoder
from reflux.trainer.engine.export import export_hf
from reflux.trainer.engine.forward import hidden_states
from reflux.trainer.engine.head import head_weight
from reflux.trainer.engine.hf_models import HFDecoder


def check(trainer, path, out):
    """Decoding, frozen hidden states, gradients and export of one model."""
    model, tensor_parallel = trainer.model_parts[0], trainer.parallel_dims.tp_enabled
    # the ranks of a tensor-parallel group see the same rows
    rank = 0 if tensor_parallel else dist.get_rank()
    ids_NL = torch.randint(
        3, 384, (1 + rank, 16 + rank), generator=torch.Generator().manual_seed(rank)
    )
    positions_NL = torch.arange(ids_NL.shape[1]).expand_as(ids_NL)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        want_NLV = reference(ids_NL).logits
    frozen = load_frozen(trainer, path)
    before = frozen.weights_hash()
    with gathered(model):  # first of all: nothing has run through the root yet
        for _ in range(1 + rank):  # ranks may decode different amounts
            with kv_decoder(model) as step:
                real_NL = torch.ones_like(ids_NL, dtype=torch.bool)
                logits_NV = step(ids_NL, positions_NL, real_NL, True)
    assert (logits_NV - want_NLV[:, -1]).abs().max() < 2e-5
    hidden_NLD = frozen.hidden(ids_NL, positions_NL)
    with frozen.open_head() as head_VD:
        assert (hidden_NLD @ head_VD.T - want_NLV).abs().max() < 2e-5
    logits_NLV = hidden_states(model, ids_NL, positions_NL) @ head_weight(model).T
    logits_NLV.square().sum().backward()
    reference(ids_NL).logits.square().sum().backward()
    for got, want in gradients(model, reference):
        if not tensor_parallel:
            dist.all_reduce(want.grad)  # gradients are summed over ranks
        assert (got.grad.full_tensor() - want.grad).abs().max() <= 2e-5 * want.grad.abs().max()
    check_one_reduction(model, ids_NL, positions_NL)
    assert frozen.weights_hash() == before
    export_hf(trainer, out, path, dtype="float32", card="two ranks")
    exported = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(
        torch.equal(exported[name], weight) for name, weight in reference.state_dict().items()
    )


def check_one_reduction(model, ids_NL, positions_NL):
    """training.sync_every_microbatch = false: two batches, one reduction, twice the gradient."""
    want = {name: 2 * p.grad.full_tensor() for name, p in model.named_parameters()}
    model.zero_grad()
    for last in (False, True):
        model.set_requires_gradient_sync(last)
        logits_NLV = hidden_states(model, ids_NL, positions_NL) @ head_weight(model).T
        logits_NLV.square().sum().backward()
    for name, p in model.named_parameters():
        gap = (p.grad.full_tensor() - want[name]).abs().max()
        assert gap <= 1e-5 * want[name].abs().max(), name


def gradients(model, reference):
    """Pairs of weights: ours, and transformers'."""
    if not isinstance(model, HFDecoder):
        yield model.lm_head.weight, reference.lm_head.weight
        yield model.norm.weight, reference.model.norm.weight
        return
    theirs = dict(reference.named_parameters())
    for name, weight in model.hf.named_parameters():
        yield weight, theirs[name.replace("_checkpoint_wrapped_module.", "")]


def make_family(family: str, folder: Path, assets: Path) -> None:
    """A random model with the tokenizer of another; by the first rank."""
    if dist.get_rank() == 0:
        make_model(family, folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(assets / "qwen3" / name, folder / name)
    dist.barrier()


def main(assets: Path, folder: Path) -> None:
    from torchtitan.config import ParallelismConfig  # only once the engine has been imported

    plain = ParallelismConfig(spmd_backend="partial_dtensor")
    for name, degree in (("llama3", 1), ("gemma3", 1), ("qwen3_tied", 2)):
        parallelism = replace(plain, tensor_parallel_degree=degree)
        trainer = make_trainer(assets / name, folder / name, parallelism=parallelism)
        check(trainer, str(assets / name), str(folder / f"{name}_out"))
        trainer.close()
    # mixtures of experts, one with a routing bias in float32; a hybrid, a multimodal folder
    for family in ("qwen3_moe", "afmoe", "qwen3_next", "gemma3"):
        make_family(family, folder / "models" / family, assets)
        trainer = make_trainer(folder / "models" / family, folder / family, parallelism=plain)
        check(trainer, str(folder / "models" / family), str(folder / f"{family}_out"))
        trainer.close()
    print("all equal", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
