"""objective = "policy_gradient" in a run: advantages by their definition on softmax rows of
transformers; the baseline.
"""

import numpy as np
import pytest
import torch
from byte_cases import masses_of, tokens_of
from enumerated_texts import MERGES, World
from runs import config, run_here
from transformers import AutoModelForCausalLM

from reflux.tokenalign.byte_trie import ByteTrie
from reflux.tokenalign.byte_windows import byte_windows, settled_prefix_logp
from reflux.tokenalign.credit import prefix_to_go
from reflux.tokenalign.vocab_map import Vocabulary
from reflux.trainer.data.chat import Chat
from reflux.trainer.distillation.text_rewards import less_the_others

pytestmark = pytest.mark.usefixtures("titan_process")


def rows(folder, prompt, ids, size):
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([prompt + ids])).logits
    return logits[0, len(prompt) - 1 : -1, :size].double().softmax(1)


def advantage_by_definition(student, teacher, folder, sample):
    """Without the baseline: (R - prefixes) [n]."""
    r, ids = sample.rollout, sample.rollout.ids
    text = student.table.bytes_of(r.content_ids)
    read = teacher.encode(text.decode())
    space = teacher.table.bytes_of(read) == b" " + text
    full = (*read, teacher.stop_id)
    prob_RV = rows(folder, teacher.prompt_ids(r.prompt.messages), full, teacher.vocab_size)
    logq = prob_RV[torch.arange(len(full)), list(full)].log().numpy()
    total = logq[:-1].sum() - sum(r.logp[: len(r.content_ids)])
    if r.ended:
        total += np.log(prob_RV[-1, list(teacher.stop_ids)].sum()) - r.stop_logp
    trie = ByteTrie.of(Vocabulary(teacher.table, teacher.stop_ids, teacher.vocab_size))
    w = byte_windows(trie, tokens_of([full], [space]))
    prefix = settled_prefix_logp(w, masses_of(w, trie, prob_RV)).numpy()
    start = [len(student.table.bytes_of(ids[:t])) for t in range(len(ids))]
    own = np.array(r.logp)
    return prefix_to_go(float(total), prefix[start], np.cumsum(own) - own)


@pytest.mark.parametrize("group", [1, 2])
def test_advantages_are_by_definition(talkers, tmp_path, seen, group):
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=1,
            rollout={"prompts": 2, "group": group, "max_tokens": 10},
            teacher={"path": str(talkers / "proxy"), "dtype": "float32"},
            distill={"objective": "policy_gradient"},
        )
    )
    student, teacher = (Chat(str(talkers / name)) for name in ("policy", "proxy"))
    samples = seen["score"][0]
    to_go = [advantage_by_definition(student, teacher, talkers / "proxy", s) for s in samples]
    want = less_the_others(to_go, [s.rollout.prompt.index for s in samples])
    for s, advantage in zip(samples, want):
        np.testing.assert_allclose(s.advantage, advantage, atol=1e-3, rtol=1e-4)
    tokens = sum(len(s.rollout.ids) for s in samples)
    step = run.steps[0]
    assert step["loss"] == pytest.approx(-sum(x.sum() for x in want) / tokens, rel=1e-3, abs=1e-4)
    assert step["unaligned"] == pytest.approx(1 - len(samples) / (2 * group))
    assert step["grad_norm"] > 0


@pytest.mark.parametrize("name", ["the proxy merges 2", "both merge 3"])
def test_the_baseline_keeps_the_expected_gradient(name):
    """Every text and every other text of its group listed."""
    world = World(*MERGES[name], tokens=2)
    to_go = {
        x.ids: prefix_to_go(x.total, *world.prefixes(x, exact=False)) for x in world.trajectories
    }
    credit = {
        x.ids: sum(
            y.prob * less_the_others([to_go[x.ids], to_go[y.ids]], [0, 0])[0]
            for y in world.trajectories
        )
        for x in world.trajectories
    }
    want = world.gradient(lambda x: np.full(len(x.ids), x.total))
    np.testing.assert_allclose(world.gradient(lambda x: credit[x.ids]), want, atol=1e-12)


def test_texts_of_other_groups_are_no_baseline():
    one, two, three = np.array([3.0, 1.0]), np.array([1.0]), np.array([9.0])
    got = less_the_others([one, two, three], [0, 0, 1])
    assert [x.tolist() for x in got] == [[2.0, 0.0], [-2.0], [9.0]]


def test_a_tempered_student_is_refused(talkers, tmp_path):
    with pytest.raises(ValueError, match="temperature = 2.0.*full softmax"):
        config(
            talkers,
            tmp_path / "run",
            "distill",
            rollout={"temperature": 2.0},
            distill={"objective": "policy_gradient"},
        )
