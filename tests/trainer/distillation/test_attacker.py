"""What an attacker does with bought texts: selection against an oracle in float64, paraphrases
against the paraphraser itself.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import config, run_here
from transformers import AutoModelForCausalLM

from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.data.chat import Chat
from reflux.trainer.distillation import texts as texts_module

pytestmark = pytest.mark.usefixtures("titan_process")
BUDGET = {"objective": "nll", "on_policy": 0.0, "query_budget": 8}


def bought(talkers, folder, monkeypatch, prompts=8, **distill):
    """The texts of a run's query budget."""
    found, real = [], texts_module.TextSource._query_budget
    monkeypatch.setattr(
        texts_module.TextSource,
        "_query_budget",
        lambda self, count: found.append(real(self, count)) or found[-1],
    )
    over = {"rollout": {"prompts": prompts, "group": 2, "max_tokens": 20}, "steps": 1}
    run_here(config(talkers, folder, "distill", distill=BUDGET | distill, **over))
    return [text.rollout for group in found[0] for text in group]


def per_token(model, chat, rollout):
    """Mean log-probability of text and stop, by transformers in float64."""
    before = chat.prompt_ids(rollout.prompt.messages)
    ids = (*chat.encode(rollout.text), *((chat.stop_id,) if rollout.ended else ()))
    with torch.no_grad():
        logits_nV = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
    return float(logits_nV.log_softmax(1).gather(1, torch.tensor(ids)[:, None]).mean())


def test_the_likeliest_texts_under_the_student_are_kept(talkers, tmp_path, monkeypatch):
    whole = bought(talkers, tmp_path / "all", monkeypatch)
    monkeypatch.undo()
    kept = bought(talkers, tmp_path / "kept", monkeypatch, keep_likeliest=0.3)
    chat = Chat(str(talkers / "policy"))
    model = AutoModelForCausalLM.from_pretrained(talkers / "policy").double()
    assert len(chat.stop_ids) == 1  # else the stop is a set
    scores = {i: per_token(model, chat, r) for i, r in enumerate(whole)}
    best = sorted(scores, key=lambda i: -scores[i])[: math.ceil(0.3 * len(whole))]
    assert len(kept) == len(best) < len(whole)
    assert [r.text for r in kept] == [whole[i].text for i in sorted(best)]


def test_paraphrases_are_the_paraphrasers_own_words(talkers, tmp_path, monkeypatch):
    """Its greedy words, nearly: at a low temperature it writes what transformers' argmax does."""
    options = {"paraphraser": str(talkers / "policy"), "paraphrase_template": "{prompt} {text}"}
    asked, real = [], texts_module.paraphrase
    monkeypatch.setattr(
        texts_module,
        "paraphrase",
        lambda cfg, engine, rollouts: (
            asked.append((rollouts, real(cfg, engine, rollouts))) or asked[-1][1]
        ),
    )
    texts = bought(talkers, tmp_path / "run", monkeypatch, **options)
    (rollouts, written) = asked[0]
    assert sorted(x for x in written if x is not None) == sorted(r.text for r in texts)
    assert len(rollouts) == 16 and len({id(r) for r in rollouts}) == 16
    assert any(w is not None and w != r.text for w, r in zip(written, rollouts))
    chat = Chat(str(talkers / "teacher"))
    for r in texts:  # in the teacher's tokens, and what it once said of them is gone
        if r.ended and set(r.logp) == {0.0}:
            assert r.ids == (*chat.encode(r.text), chat.stop_id)


def test_a_paraphrase_that_is_too_long_is_left_out(talkers, tmp_path, monkeypatch, caplog):
    """By the teacher's tokens, not the paraphraser's; what it did not end is left out, too."""
    options = {"paraphraser": str(talkers / "policy"), "paraphrase_template": "{prompt} {text}"}
    written = ["ok", "1 + 2 " * 40, None]
    monkeypatch.setattr(
        texts_module,
        "paraphrase",
        lambda cfg, engine, rollouts: [written[i % 3] for i in range(len(rollouts))],
    )
    texts = bought(talkers, tmp_path / "run", monkeypatch, **options)
    assert [r.text for r in texts] == ["ok"] * 6  # of 16
    assert "10 of 16 texts are left out" in caplog.text
    assert "longer than rollout.max_tokens = 20 in the teacher's tokens" in caplog.text


def test_a_paraphraser_reads_question_and_text(talkers, tmp_path, monkeypatch):
    from reflux.trainer.distillation import attacker

    prompts = []

    class Sampler:
        def __init__(self, *_):
            pass

        def sample(self, asked, group, sampling):
            prompts.extend(asked)
            new = [texts_module.replace(rollouts[0], text="new", ended=i > 0) for i in range(2)]
            return [[x] for x in new[: len(asked)]]

    rollouts = bought(talkers, tmp_path / "run", monkeypatch, prompts=2)[:2]
    monkeypatch.setattr(attacker, "EmbeddedSampler", Sampler)
    options = {"paraphraser": str(talkers / "policy"), "paraphrase_template": "<{text}|{prompt}>"}
    cfg = config(talkers, tmp_path / "x", "distill", distill=BUDGET | options)
    engine = SimpleNamespace(frozen=lambda role: role, gathered_frozen_weights=None)
    monkeypatch.setattr(attacker, "partial", lambda function, model: None)
    assert attacker.paraphrase(cfg, engine, rollouts) == [None, "new"]
    question = rollouts[0].prompt.messages[-1]["content"]
    assert prompts[0].messages[-1]["content"] == f"<{rollouts[0].text}|{question}>"
    assert prompts[0].index != prompts[1].index  # two texts of one prompt
    document = texts_module.replace(
        rollouts[0], prompt=texts_module.replace(rollouts[0].prompt, messages=())
    )
    assert attacker._asked(cfg, document)["content"] == f"<{document.text}|>"
    # without positions for what it reads and writes, it is not asked
    read = Chat(str(talkers / "policy")).prompt_ids
    longest = max(len(read([attacker._asked(cfg, r)])) for r in rollouts) + cfg.rollout.max_tokens
    for room, asked in ((longest - 1, 2), (1, 0)):
        prompts.clear()
        monkeypatch.setattr(Chat, "positions", room)
        written = attacker.paraphrase(cfg, engine, rollouts)
        assert len(written) == 2 and len(prompts) == asked


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep_likeliest": 0.0}, "want 0 < keep_likeliest <= 1"),
        ({"keep_likeliest": 0.5, "query_budget": 0}, "Set query_budget > 0"),
        ({"paraphraser": "m", "source": "dataset"}, "source = 'teacher'"),
        ({"paraphraser": "m", "paraphrase_template": "again"}, "has no {text}"),
        (
            {"paraphraser": "m", "objective": "span", "allow_biased": True},
            "with rewrite or paraphraser",
        ),
    ],
)
def test_what_cannot_be_done_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        DistillSection(**(BUDGET | options))


def test_texts_are_ranked_per_token_and_the_end_is_one_of_them(talkers, monkeypatch):
    """By the mean log-probability of the tokens and of the end, where the text has come to one:
    not by the sum, nor with the end of a cut text, nor without that of another.
    """
    from reflux.trainer.data.batch import Prompt, Rollout
    from reflux.trainer.distillation import attacker
    from reflux.trainer.phase import TextScore

    chat = Chat(str(talkers / "policy"))
    # text: log p of its tokens, of the end, whether it has ended
    scores = {
        "1": ((-1.9,), -9.0, False),  # -1.9
        "2": ((-0.2,), -4.0, True),  # -4.2 / 2
        "3": ((-1.0, -1.0, -1.0, -1.0), -1.0, True),  # -5 / 5
        "4": ((-1.5,), -0.1, False),  # -1.5
        "5": ((-0.7,), -0.7, True),  # -1.4 / 2
    }
    rows = [
        Rollout(Prompt(i, ({"role": "user", "content": "x"},)), (1,), (2,), (0.0,), 0.0, t, ended)
        for i, (t, (_, _, ended)) in enumerate(scores.items())
    ]

    def score_ids(scorer, engine, jobs, chat, tokens):
        found = [scores[chat.decode(ids)] for _, ids in jobs]
        return [TextScore(np.array(logp), stop) for logp, stop, _ in found]

    monkeypatch.setattr(attacker, "score_ids", score_ids)
    engine = SimpleNamespace(rank=0, world=1, gather=lambda x: x, seq_len=99)
    kept = [attacker.likeliest(engine, chat, rows, n / 5, 100) for n in range(1, 6)]
    order = sorted(scores, key=lambda t: -sum(row[list(scores).index(t)] for row in kept))
    assert "".join(order) == "53412" and [sum(row) for row in kept] == [1, 2, 3, 4, 5]


def test_two_ranks_keep_the_same_texts_as_one(talkers, monkeypatch):
    """Scores are per token, the stop counts where the text ended, equal ones go by their order."""
    from reflux.trainer.data.batch import Prompt, Rollout
    from reflux.trainer.distillation import attacker
    from reflux.trainer.phase import TextScore

    chat = Chat(str(talkers / "policy"))
    logp = {"1": (-1.0, -3.0, 0.0), "2": (-2.0,), "3": (-4.0, -1.0), "4": (-2.0,), "5": (-9.0,)}
    rows = [
        Rollout(Prompt(i, ({"role": "user", "content": "x"},)), (1,), (2,), (0.0,), 0.0, t, t < "4")
        for i, t in enumerate(logp)
    ]

    def score_ids(scorer, engine, jobs, chat, tokens):
        texts = [chat.decode(ids) for _, ids in jobs]
        return [TextScore(np.array(logp[t]), -1.0) for t in texts]

    monkeypatch.setattr(attacker, "score_ids", score_ids)
    # per token: -5/4, -3/2, -6/3, -2 (no stop), -9
    sent = {}

    def keep(rank, world, fraction, gather, seq_len=99):
        engine = SimpleNamespace(rank=rank, world=world, gather=gather, seq_len=seq_len)
        return attacker.likeliest(engine, chat, rows, fraction, 100)

    for rank in (0, 1):
        keep(rank, 2, 0.5, lambda x, rank=rank: sent.setdefault(rank, x))
    both = [keep(r, 2, 0.5, lambda x: sent[0] + sent[1]) for r in (0, 1)]
    assert both[0] == both[1] == keep(0, 1, 0.5, lambda x: x) == [True, True, True, False, False]
    assert keep(0, 1, 0.7, lambda x: x) == [True, True, True, True, False]
    assert keep(0, 1, 0.01, lambda x: x) == [True, False, False, False, False]
    # what is longer than a row of the student is not read, and comes last
    rows[0] = replace(rows[0], text="1111111")
    logp["1111111"], room = logp["1"], len(chat.prompt_ids(rows[1].prompt.messages)) + 1
    assert keep(0, 1, 0.5, lambda x: x, room) == [False, True, True, True, False]
