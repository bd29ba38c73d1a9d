"""Requests and answers of an engine, without one."""

from dataclasses import replace

import numpy as np
import pytest

from reflux.trainer.data.batch import Prompt
from reflux.trainer.phase import Sampling
from reflux.trainer.rollouts.engine_texts import (
    SampledText,
    check_versions,
    group_seed,
    rollout_of,
    text_request,
)


class Chat:
    vocab_size, stop_ids, stop_id = 9, (3, 5), 5

    def prompt_ids(self, messages):
        return (1, 2)

    def decode(self, ids):
        return "".join(map(str, ids))


PROMPT, CHAT, SAMPLING = Prompt(4, ()), Chat(), Sampling(4, seed=1, step=2, temperature=0.7)
REQUEST = text_request(PROMPT, CHAT, 2, SAMPLING)


def text(*ids, logp=None, stop=-0.25):
    logp = [-0.5] * len(ids) if logp is None else logp
    return SampledText(np.array(ids, np.int64), np.array(logp, np.float32), stop, ("v",))


def test_a_seed_is_that_of_the_prompt_the_step_and_the_repeat_alone():
    """The members of no two groups share a seed, and all fit into 63 bits."""
    seeds = {
        group_seed(replace(PROMPT, index=i, repeat=r), replace(SAMPLING, seed=s, step=t))
        for i in range(8)
        for r in range(2)
        for s in range(4)
        for t in range(4)
    }
    assert len(seeds) == 256 and max(seeds) < 2**63 and min(seeds) >= 0
    low = sorted(seed % 2**32 for seed in seeds)  # what a CPU generator takes of them
    assert min(b - a for a, b in zip(low, low[1:])) > 16
    assert group_seed(PROMPT, SAMPLING) == group_seed(PROMPT, replace(SAMPLING, rows=1))


def test_the_rules_of_sampling_reach_the_request():
    assert (REQUEST.n, REQUEST.max_tokens, REQUEST.stop_ids) == (2, 4, (3, 5))
    assert (REQUEST.temperature, REQUEST.top_p, REQUEST.top_k) == (0.7, 1.0, 0)
    cut = text_request(PROMPT, CHAT, 1, replace(SAMPLING, top_p=0.9, top_k=5))
    assert (cut.top_p, cut.top_k) == (0.9, 5)
    greedy = text_request(PROMPT, CHAT, 1, replace(SAMPLING, greedy=True, top_k=5))
    assert (greedy.temperature, greedy.top_p, greedy.top_k) == (0.0, 1.0, 0)
    with pytest.raises(ValueError, match="rollout.group = 65537; want at most 65536"):
        text_request(PROMPT, CHAT, 65537, SAMPLING)


def test_a_text_that_stops_and_one_that_is_cut():
    ended = rollout_of(PROMPT, REQUEST, text(7, 3), CHAT)
    assert (ended.ids, ended.text, ended.ended, ended.stop_logp) == ((7, 3), "7", True, -0.25)
    cut = rollout_of(PROMPT, REQUEST, text(7, 7, 7, 8), CHAT)
    assert (cut.text, cut.ended, cut.stop_logp, cut.prompt_ids) == ("7778", False, 0.0, (1, 2))


@pytest.mark.parametrize(
    "wrong",
    [
        text(),
        text(7, 7),  # neither stopped nor full
        text(7, 3, 7, 7),  # went on
        text(7, 7, 7, 7, 3),  # too long
        text(7, 3, logp=[-0.5]),
        text(7, 3, logp=[-0.5, -np.inf]),
        text(9, 3),  # a padded column
    ],
)
def test_an_answer_that_breaks_the_rules_is_an_error(wrong):
    with pytest.raises(ValueError, match="prompt 4: the engine answered"):
        rollout_of(PROMPT, REQUEST, wrong, CHAT)


@pytest.mark.parametrize("versions", [(), ("run/1",), ("run/2", "run/3"), ("half-loaded",)])
def test_a_text_of_other_weights_is_refused(versions):
    check_versions(("run/2",), "run/2", "http://a:1")
    with pytest.raises(ValueError, match="http://a:1 answered with the weights .*; want run/2"):
        check_versions(versions, "run/2", "http://a:1")
