"""The calibration reward in TRL's GRPOTrainer: its values, and a run of the real one."""

import os
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from thread_ranks import ThreadRank, on_ranks
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from reflux.trainer.data.chat import Chat
from reflux.trainer.integrations.trl_rewards import CalibrationReward

needs_trl = pytest.mark.skipif(
    os.environ.get("REFLUX_INTEGRATIONS") != "trl", reason="make test-integrations installs TRL"
)
PROMPT = [{"role": "user", "content": "How many remain?"}]
TEXTS = [" 12 apples remain.", " Seven, so seven.", " 3", " None of them remain, so zero."]


@pytest.fixture(scope="module")
def models(assets):
    """(policy, its folder, proxy of another tokenizer, its folder)"""
    folders = str(assets / "qwen3"), str(assets / "gemma3")
    return [x for f in folders for x in (AutoModelForCausalLM.from_pretrained(f), f)]


def completions(folder: str, *, ended: bool = True) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop = [tokenizer.eos_token_id] if ended else []
    return [tokenizer(t, add_special_tokens=False).input_ids + stop for t in TEXTS]


@torch.no_grad()
def log_likelihood(model, folder: str, text: str, *, ended: bool = True) -> float:
    """log p(text | PROMPT) in float64, the end included, by the model's own logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(rendered, add_special_tokens=False).input_ids
    ids = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * ended
    logits = model.eval()(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logp = logits[:, : len(tokenizer)].double().log_softmax(-1)
    return float(logp.gather(1, torch.tensor(ids)[:, None]).sum())


@pytest.mark.parametrize("ended", [True, False])
def test_the_reward_is_the_log_ratio_of_the_same_bytes(models, ended):
    reward = CalibrationReward(*models, length_free=False, clip=0)
    reward.truncated = "score"
    got = reward([PROMPT] * 4, completion_ids=completions(models[1], ended=ended), other="column")
    want = [
        log_likelihood(*models[2:], text, ended=ended)
        - log_likelihood(*models[:2], text, ended=ended)
        for text in TEXTS
    ]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert reward.__name__ == "calibration"


@pytest.mark.parametrize("length_free", [True, False])
def test_a_cut_text_has_no_reward_and_takes_no_part_in_the_others(models, length_free):
    """Scored, it would escape the term of the end, and move the length fit of its group."""
    ids = completions(models[1])
    cut = ids[1][:-1]
    reward = CalibrationReward(*models, length_free=length_free)
    got = reward([PROMPT] * 4, completion_ids=[ids[0], cut, *ids[2:]])
    assert got[1] is None
    want = reward([PROMPT] * 3, completion_ids=[ids[0], *ids[2:]])
    np.testing.assert_allclose([got[0], *got[2:]], want, rtol=0, atol=1e-6)
    reward.truncated = "score"
    assert None not in reward([PROMPT] * 4, completion_ids=[ids[0], cut, *ids[2:]])


def test_length_is_taken_out_group_by_group(models):
    other = [{"role": "user", "content": "And now?"}]
    ids = completions(models[1])
    reward = CalibrationReward(*models)
    got = np.array(reward([PROMPT] * 4 + [other] * 4, completion_ids=ids + ids))
    bytes_G = np.array([len(text) for text in TEXTS], dtype=float)
    for group in (got[:4], got[4:]):
        assert abs(group.sum()) < 1e-9 and abs(group @ bytes_G) < 1e-7 and group.std() > 0
    np.testing.assert_allclose(got[4:], reward([other] * 4, completion_ids=ids), atol=1e-9)


def test_two_groups_of_one_prompt_that_follow_each_other_are_two(models):
    """As in a data set that holds a prompt twice: each group has a length fit of its own."""
    ids = completions(models[1])
    halves = [ids[:2] + ids[1:3], ids[2:] + ids[:2]]
    alone = CalibrationReward(*models)
    want = [x for half in halves for x in alone([PROMPT] * 4, completion_ids=half)]
    reward = CalibrationReward(*models, num_generations=4)
    np.testing.assert_allclose(
        reward([PROMPT] * 8, completion_ids=halves[0] + halves[1]), want, atol=1e-6
    )
    joined = alone([PROMPT] * 8, completion_ids=halves[0] + halves[1])
    assert np.abs(np.subtract(joined, want)).max() > 1e-2


def test_a_group_whose_members_are_on_several_processes_is_one_group(models, monkeypatch):
    """Cut by processes, each member would be a group of its own, whose reward is 0."""
    ids, reward = completions(models[1]), CalibrationReward(*models)
    want = reward([PROMPT] * 4, completion_ids=ids)
    mine = [ids[:1], ids[1:]]  # by process
    here = threading.local()

    def work(rank: ThreadRank) -> list:
        def gather(parts: list, own: list) -> None:
            parts[:] = rank.gather([own])

        here.rank, here.gather = rank.rank, gather
        return reward([PROMPT] * len(mine[rank.rank]), completion_ids=mine[rank.rank])

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: here.rank)
    monkeypatch.setattr(dist, "all_gather_object", lambda *x: here.gather(*x))
    got = [x for part in on_ranks(2, work) for x in part]
    assert any(abs(x) > 1e-3 for x in want)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_proxy_that_is_the_policy_pays_nothing(models):
    reward = CalibrationReward(*models[:2], *models[:2], length_free=False)
    got = reward([PROMPT] * 4, completion_ids=completions(models[1]))
    np.testing.assert_allclose(got, 0.0, atol=1e-5)


def test_a_model_that_trains_goes_on_training_and_gets_no_gradient(models):
    policy = models[0].train()
    CalibrationReward(*models)([PROMPT], completion_ids=completions(models[1])[:1])
    assert policy.training and all(p.grad is None for p in policy.parameters())
    policy.eval()


def test_mistakes_are_refused_in_words(models):
    with pytest.raises(ValueError, match="2 prompts and 0 completion_ids; want the ids of every"):
        CalibrationReward(*models)([PROMPT] * 2)
    with pytest.raises(ValueError, match="num_generations = 0; want that of GRPOConfig"):
        CalibrationReward(*models, num_generations=0)
    reward = CalibrationReward(*models)
    reward.truncated = "drop"
    with pytest.raises(ValueError, match="truncated = 'drop'; want mask or score"):
        reward([PROMPT], completion_ids=completions(models[1])[:1])
    reward = CalibrationReward(*models, num_generations=3)
    with pytest.raises(ValueError, match="4 neighbouring completions.*multiple of num_generations"):
        reward([PROMPT] * 4, completion_ids=completions(models[1]))


RENDERED = "<|bos|>user: How many remain?<|eos|><|bos|>assistant: "  # by the template of the assets
STRINGS = ["How many remain?", RENDERED]


@pytest.fixture(scope="module")
def begins_with_bos(models, tmp_path_factory):
    """The policy's folder, its tokenizer with a BOS before every text, as Llama's, and a template
    that takes an argument.
    """
    folder = tmp_path_factory.mktemp("bos") / "policy"
    shutil.copytree(models[1], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.eos_token_id)]
    )
    tokenizer.chat_template = (
        "{{ messages[0].content }}{{ ' No thoughts.' if not enable_thinking|default(true) }}"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def log_likelihood_behind(model, prompt: list[int], ids: list[int], vocabulary: int) -> float:
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logp = logits[:, :vocabulary].double().log_softmax(-1)
    return float(logp.gather(1, torch.tensor(ids)[:, None]).sum())


@pytest.mark.parametrize("prompt", STRINGS)
def test_a_string_prompt_is_read_with_its_control_tokens_and_bos(models, begins_with_bos, prompt):
    """As TRL reads it: in other tokens the likelihood is that of a text behind something else."""
    policy, proxy = models[0], models[2]
    reward = CalibrationReward(policy, begins_with_bos, proxy, models[3], length_free=False, clip=0)
    ids = completions(begins_with_bos)
    got = reward([prompt] * 4, completion_ids=ids)
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in (begins_with_bos, models[3])]
    own, others = (t(text=[prompt])["input_ids"][0] for t in tokenizers)
    assert own.count(tokenizers[0].eos_token_id) == (2 if prompt == RENDERED else 1), (
        "it is the BOS"
    )
    want = [
        log_likelihood_behind(proxy, others, theirs, len(tokenizers[1]))
        - log_likelihood_behind(policy, own, mine, len(tokenizers[0]))
        for mine, theirs in zip(ids, completions(models[3]))
    ]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_a_string_without_a_token_is_refused(models):
    with pytest.raises(ValueError, match="the prompt '' has no token. Give it a text"):
        CalibrationReward(*models)([""], completion_ids=completions(models[1])[:1])


@needs_trl
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("prompt", [*STRINGS, PROMPT])
def test_the_reward_reads_the_ids_that_trl_samples_behind(
    models, begins_with_bos, prompt, arguments
):
    from trl import GRPOTrainer

    trainer = SimpleNamespace(
        processing_class=AutoTokenizer.from_pretrained(begins_with_bos),
        chat_template_kwargs=arguments,
        chat_template=None,
        tools=None,
        environment_factories=None,
        _is_vlm=False,
    )
    (want,), _, _ = GRPOTrainer._tokenize_prompts(trainer, [prompt])
    chat = Chat(begins_with_bos, arguments=arguments)
    reward = CalibrationReward(models[0], chat, *models[2:])
    assert reward._rollout(prompt, [1]).prompt_ids == tuple(want)


def test_a_chat_brings_the_arguments_of_its_template(models, begins_with_bos):
    tokenizer = AutoTokenizer.from_pretrained(begins_with_bos)
    for thinks in (True, False):
        text = tokenizer.apply_chat_template(PROMPT, tokenize=False, enable_thinking=thinks)
        chat = Chat(begins_with_bos, arguments={"enable_thinking": thinks})
        reward = CalibrationReward(models[0], chat, models[2], Chat(models[3]))
        want = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert reward._rollout(PROMPT, [1]).prompt_ids == want
        assert ("No thoughts" in text) == (not thinks)


@needs_trl
@pytest.mark.parametrize("eta", [1.0, -1.0])
def test_grpo_runs_with_it(models, assets, tmp_path, eta):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    policy = AutoModelForCausalLM.from_pretrained(models[1])
    # of the policy's tokenizer: the random bytes of a random policy are no text to another one
    folder = str(assets / "llama3")
    proxy = AutoModelForCausalLM.from_pretrained(folder)
    seen = []

    class Watched(CalibrationReward):
        truncated = "score"  # texts of 6 tokens are rarely whole

        def __call__(self, *args, **more):
            seen.append(super().__call__(*args, **more))
            return seen[-1]

    trainer = GRPOTrainer(
        policy,
        [starts_with_vowel, Watched(policy, models[1], proxy, folder, num_generations=4)],
        args=GRPOConfig(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            reward_weights=[1.0, eta],
            multi_objective_aggregation="normalize_then_sum",
            beta=0.05,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": PROMPT}] * 8),
        processing_class=AutoTokenizer.from_pretrained(models[1]),
    )
    trainer.train()
    logged = [log for log in trainer.state.log_history if "rewards/calibration/mean" in log]
    assert len(logged) == len(seen) == 2
    assert all(any(values) for values in seen)  # texts differ, and so do their likelihoods
    assert all(log["reward_std"] > 0 for log in logged)


def starts_with_vowel(completions, **_) -> list[float]:
    return [float(c[0]["content"][:1] in "aeiou") for c in completions]
