"""Models behind torchtitan: transformers' function, packed rows apart, decoding = forward, the head
a group of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from assets import MODELS, make_trainer, save_model
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from reflux.trainer.engine import model_builder as tm
from reflux.trainer.engine import native_models as titan_native
from reflux.trainer.engine.decoding import gathered, kv_decoder
from reflux.trainer.engine.frozen import build_frozen

from torchtitan.config import ParallelismConfig  # isort: skip  after titan_compat

NATIVE = ["qwen3", "qwen3_tied", "llama3"]
BOTH = [(name, "native" if name in NATIVE else "hf") for name in MODELS] + [("qwen3_tied", "hf")]


@pytest.fixture(scope="module")
def host(assets, titan_process, tmp_path_factory):
    trainer = make_trainer(assets / "qwen3", tmp_path_factory.mktemp("host"))
    yield trainer
    trainer.close()


def frozen(host, path, backend="auto"):
    spec = tm.build_spec(str(path), backend=backend)
    return build_frozen(
        spec, str(path), host.config, host.parallel_dims, host.device, dtype="float32", seq_len=64
    )


def random_ids(*shape, seed=0):
    return torch.randint(3, 384, shape, generator=torch.Generator().manual_seed(seed))


def positions(*lengths, rows=1):
    return torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1)


def reference_logits(path, ids_NL):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids_NL).logits


def head_of(model, hidden_NLD):
    """What a fused loss does: the head as a matrix, then the documented scale and cap."""
    with tm.open_head(model) as head_VD:
        z = tm.logit_scale(model) * hidden_NLD @ head_VD.T
    cap = tm.logit_softcap(model)
    return z if cap is None else cap * torch.tanh(z / cap)


@pytest.mark.parametrize("name, backend", BOTH)
def test_logits_are_transformers_own(host, assets, name, backend):
    model = frozen(host, assets / name, backend).model
    assert isinstance(model, tm.HFDecoder) == (backend == "hf")
    ids_NL = random_ids(2, 40)
    want_NLV = reference_logits(assets / name, ids_NL)
    with torch.no_grad():
        hidden_NLD = tm.hidden_states(model, ids_NL, positions(40, rows=2))
        worst = (tm.head_logits(model, hidden_NLD) - want_NLV).abs().max()
        # llama3: complex RoPE in pairs, another rounding
        assert worst <= (2e-5 if name == "llama3" else 0.0)
        assert (head_of(model, hidden_NLD) - want_NLV).abs().max() <= 2e-5
        assert torch.equal(
            model(ids_NL, positions=positions(40, rows=2)), tm.head_logits(model, hidden_NLD)
        )


@pytest.mark.parametrize(
    "kind, config",
    [
        ("gemma2", dict(head_dim=16, final_logit_softcapping=3.0, sliding_window=8)),
        ("cohere", dict(logit_scale=0.25, head_dim=16)),
        ("granite", dict(logits_scaling=4.0)),
    ],
)
def test_cap_and_scale_of_the_logits_are_known_outside_the_model(host, tmp_path, kind, config):
    save_model(tmp_path, kind, **config)
    fz = frozen(host, tmp_path)
    ids_NL = random_ids(2, 12)
    got_NLV, want_NLV = (
        head_of(fz.model, fz.hidden(ids_NL, positions(12, rows=2))),
        reference_logits(tmp_path, ids_NL),
    )
    assert (got_NLV - want_NLV).abs().max() <= 1e-5
    with fz.open_head() as head_VD:
        bare = fz.hidden(ids_NL, positions(12, rows=2)) @ head_VD.T
    assert (bare - want_NLV).abs().max() > 0.1, "cap or scale changed nothing: the test is blind"


@pytest.mark.parametrize("name, backend", BOTH)
def test_packed_documents_do_not_see_each_other(host, assets, name, backend):
    fz, lengths = frozen(host, assets / name, backend), (15, 1, 11, 13)
    ids_NL = random_ids(2, 40)
    apart = [
        fz.hidden(ids, positions(n, rows=2)) for n, ids in zip(lengths, ids_NL.split(lengths, 1))
    ]
    packed = fz.hidden(ids_NL, positions(*lengths, rows=2), packed=True)
    scale = packed.abs().max()
    assert (packed - torch.cat(apart, 1)).abs().max() <= 2e-6 * scale
    assert (fz.hidden(ids_NL, positions(40, rows=2)) - packed).abs().max() > 0.1 * scale, (
        "the test is blind"
    )
    if backend == "hf":  # the way flash attention takes packed rows: one long row
        fz.model.flattens_packed_rows = True
        assert (
            fz.hidden(ids_NL, positions(*lengths, rows=2), packed=True) - packed
        ).abs().max() <= 2e-6 * scale


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_padding_on_either_side_changes_no_real_token(host, assets, name):
    fz, ids_NL = frozen(host, assets / name), random_ids(1, 12)
    want = fz.hidden(ids_NL, positions(12))
    for left, right in ((5, 0), (0, 5), (3, 2)):
        padded = torch.cat([random_ids(1, left, seed=1), ids_NL, random_ids(1, right, seed=2)], 1)
        real = torch.zeros(1, 17, dtype=torch.bool)
        real[:, left : left + 12] = True
        at = (real.long().cumsum(1) - 1).clamp(min=0)
        got = fz.hidden(padded, at, mask_NL=real)
        assert (
            got[:, left : left + 12] - want
        ).abs().max() <= 1e-6 * want.abs().max() and got.isfinite().all()


@given(rows=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_mask_is_causal_within_documents_and_never_empty(rows):
    L = max(map(sum, rows))
    at = torch.stack(
        [
            torch.cat([positions(*row)[0], torch.zeros(L - sum(row), dtype=torch.long)])
            for row in rows
        ]
    )
    mask = tm.document_mask(at, packed=True)
    assert mask.shape == (len(rows), 1, L, L) and mask.diagonal(dim1=-2, dim2=-1).all()
    assert not mask.triu(1).any()
    # a token sees its document's past: as many as its position says
    assert torch.equal(mask[:, 0].sum(-1), at + 1)
    assert tm.document_mask(at, packed=False) is None


@pytest.mark.parametrize("name, backend", BOTH)
@pytest.mark.parametrize("room", [0, 64])
def test_decoding_with_a_cache_is_the_full_forward(host, assets, name, backend, room):
    fz, ids_NL = frozen(host, assets / name, backend), random_ids(2, 30)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :5] = False  # row 0 is padded on the left
    at = (real.long().cumsum(1) - 1).clamp(min=0)
    with fz.gathered(), kv_decoder(fz.model, max_length=room) as step:
        got = [step(ids_NL[:, :12], at, real, True)]
        for t in range(12, 30):
            at, real = at[:, -1:] + 1, torch.cat([real, real.new_ones(2, 1)], 1)
            got.append(step(ids_NL[:, t : t + 1], at, real, False))
    got = torch.stack(got, 1)
    for row, padding in ((0, 5), (1, 0)):
        want = reference_logits(assets / name, ids_NL[row : row + 1, padding:])[0, 11 - padding :]
        assert (got[row] - want).abs().max() <= 3e-6 * want.abs().max()
    assert not any(
        module.cache for module in fz.model.modules() if isinstance(module, tm.MaskedSDPA)
    )


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("L", [1, 7])
def test_grouped_attention_is_attention_with_repeated_heads(group, masked, L):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, L, 8, generator=g) for n in (4, 4 // group, 4 // group))
    mask = (
        (torch.rand(2, 1, L, L, generator=g) > 0.5) | torch.eye(L, dtype=torch.bool)
        if masked
        else None
    )
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * 0.3
    seen = mask if masked else torch.ones(L, L, dtype=torch.bool).tril()
    want = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)
    assert torch.allclose(titan_native.grouped_sdpa(q, k, v, mask, 0.3), want, atol=1e-6)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(0, 9))
def test_the_cache_returns_everything_ever_stored(lengths, capacity):
    cache, keys = titan_native.KVCache(capacity), torch.randn(2, 3, sum(lengths), 4)
    values, end = keys.neg(), 0
    for n in lengths:
        got_k, got_v = cache.append(keys[:, :, end : end + n], values[:, :, end : end + n])
        end += n
        assert torch.equal(got_k, keys[:, :, :end]) and torch.equal(got_v, values[:, :, :end])


@pytest.mark.parametrize("name", ["qwen3", "qwen3_tied", "gemma3"])
def test_the_head_is_a_group_of_its_own_and_the_norm_belongs_to_the_root(host, assets, name):
    model = frozen(host, assets / name).model
    norm = model.decoder.norm if isinstance(model, tm.HFDecoder) else model.norm
    assert (
        isinstance(model, FSDPModule)
        and isinstance(model.lm_head, FSDPModule)
        and not isinstance(norm, FSDPModule)
    )
    assert all(isinstance(block, FSDPModule) for block in model.layers.values())
    groups = (
        [
            [p._module_info.param_name for p in g.fsdp_params]
            for g in model._get_fsdp_state()._fsdp_param_groups
        ]
        if hasattr(model._get_fsdp_state(), "_fsdp_param_groups")
        else None
    )
    assert groups is None or groups == [["weight"]], "the root holds the final norm alone"
    assert (model.lm_head.weight is model.tok_embeddings.weight) == (name != "qwen3")


@pytest.mark.parametrize(
    "name, backend", [("qwen3", "native"), ("qwen3_tied", "native"), ("qwen3_tied", "hf")]
)
def test_gradients_through_the_head_matrix_are_those_of_the_head_module(
    assets, host, tmp_path, name, backend
):
    trainer = make_trainer(assets / name, tmp_path, backend=backend)
    model, ids_NL = trainer.model_parts[0], random_ids(2, 16)

    def gradients(matrix: bool):
        trainer.optimizers.zero_grad()
        hidden_NLD = tm.hidden_states(model, ids_NL, positions(16, rows=2))
        logits = (
            hidden_NLD @ tm.head_weight(model).T if matrix else tm.head_logits(model, hidden_NLD)
        )
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids_NL[:, 1:].flatten()
        ).backward()
        return {key: weight.grad.full_tensor().clone() for key, weight in model.named_parameters()}

    want, got = gradients(False), gradients(True)
    assert got.keys() == want.keys() and len(got) > 20
    for key in want:
        assert torch.allclose(got[key], want[key], atol=1e-6, rtol=1e-5), key
    # decoding between two steps leaves training alone
    with gathered(model), kv_decoder(model) as step:
        step(ids_NL, positions(16, rows=2), torch.ones(2, 16, dtype=torch.bool), True)
        assert not model.training
    again = gradients(True)
    assert model.training and all(torch.equal(again[key], got[key]) for key in got)
    trainer.close()


@pytest.mark.parametrize("policy", ["default", "always", "never"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_tied", "gemma3"])
def test_decoding_leaves_every_group_resharding_as_before(assets, host, tmp_path, name, policy):
    parallelism = ParallelismConfig(
        spmd_backend="partial_dtensor", fsdp_reshard_after_forward=policy
    )
    trainer = make_trainer(assets / name, tmp_path, parallelism=parallelism)
    model, ids_NL = trainer.model_parts[0], random_ids(1, 8)

    def sharded_after_a_forward():
        # with grad: under no_grad the root's post-forward differs
        model(ids_NL, positions=positions(8)).sum()
        return [
            isinstance(weight, DTensor)
            for unit in tm.fsdp_units(model)
            for weight in unit.parameters(recurse=False)
        ]

    before = sharded_after_a_forward()
    with gathered(model, policy):
        assert not any(isinstance(weight, DTensor) for weight in model.parameters())
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    assert sharded_after_a_forward() == before
    trainer.close()


@pytest.mark.parametrize(
    "config, reason",
    [
        (
            dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
            "rope type 'yarn'",
        ),
        (dict(attention_bias=True), "biases"),
        (dict(hidden_act="gelu"), "activation"),
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding-window"),
    ],
)
def test_what_torchtitan_would_compute_differently_goes_to_transformers(tmp_path, config, reason):
    save_model(tmp_path, "qwen3", head_dim=32, **config)
    assert tm.build_spec(str(tmp_path)).name == "hf"
    with pytest.raises(ValueError, match=reason):
        tm.build_spec(str(tmp_path), backend="native")


def test_choices_that_cannot_work_are_refused(assets, tmp_path):
    qwen2 = str(assets / "qwen2")
    for options, message in (
        (dict(backend="titan"), "want 'auto', 'native' or 'hf'"),
        (dict(attention="fast"), "want 'auto'"),
        (dict(backend="native"), "knows qwen3, llama and not 'qwen2'"),
    ):
        with pytest.raises(ValueError, match=message):
            tm.build_spec(qwen2, **options)
    with pytest.raises(ValueError, match="no config.json"):
        tm.build_spec(str(tmp_path))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            tm.build_spec(qwen2, attention="flash_attention_2")
    save_model(tmp_path, "phi")
    with pytest.raises(ValueError, match="without bias"), torch.device("meta"):
        tm.build_spec(str(tmp_path)).model.build()


def test_two_ranks_compute_what_one_does(assets, tmp_path):
    """Two gloo processes, data and tensor parallel: logits, gradients, decoding, export as
    transformers' on one.
    """
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--standalone",
            str(Path(__file__).parents[2] / "two_ranks_titan.py"),
            str(assets),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("all equal") == 2
