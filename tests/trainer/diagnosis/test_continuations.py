"""Answers that are cut short and continued: as much room as any other answer has, and no more."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from runs import config, run_here
from token_stats_cases import token_stats

from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.diagnosis.continuations import Continuations, ContinuedChat
from reflux.trainer.rollouts.generate import EmbeddedSampler

pytestmark = [pytest.mark.usefixtures("titan_process"), pytest.mark.filterwarnings("ignore")]
ANSWERS = {"name": "exact", "options": {"marker": "=>"}}


def symptoms(talkers, folder, **over):
    """Of a diagnosis of four prompts whose given answers are correct: "a+b is => c"."""
    over = {"task": ANSWERS, "rollout": {"max_tokens": 16}, "data": {"limit": 4}} | over
    options = {"prefixes": ["dataset"], "gradient_batches": 0} | over.pop("diagnose", {})
    run_here(config(talkers, folder, "diagnose", diagnose=options, **over))
    return json.loads((folder / "diagnosis.json").read_text())["symptoms"]


def test_correct_texts_are_cut(talkers, tmp_path):
    """Every correct text holds digits to break."""
    probe = symptoms(talkers, tmp_path / "run")["correction"]
    assert 1 <= probe["cuts"] <= 12 and 0 <= probe["correct_after_error"] <= 1
    assert probe["student_gain"] != probe["teacher_gain"]


@pytest.fixture
def continued(monkeypatch):
    """(tokens of the beginning, of the continuation) of every continued text."""
    found, sample = [], EmbeddedSampler.sample

    def watched(self, prompts, *rest):
        groups = sample(self, prompts, *rest)
        if isinstance(self.chat, ContinuedChat):
            begun = [len(self.chat.encode(p.messages[-1]["content"])) for p in prompts]
            found.extend((n, len(r.ids)) for n, group in zip(begun, groups) for r in group)
        return groups

    monkeypatch.setattr(EmbeddedSampler, "sample", watched)
    return found


@pytest.mark.parametrize("what", ["row", "positions"])
def test_a_continued_text_is_never_longer_than_another_answer(talkers, tmp_path, continued, what):
    """Where a prompt and its answer just fit, in a row or in the positions of the model, too."""
    chat = Chat(str(talkers / "policy"))
    prompts = list(load_prompts(str(talkers / "data.jsonl")))[:4]
    seq_len = max(len(chat.prompt_ids(p.messages)) for p in prompts) + 12 - 1
    over = {"training": {"seq_len": seq_len}, "rollout": {"max_tokens": 12}}
    over["task"] = {"name": "small_tasks:is_even"}  # also of texts that run on to the end
    if what == "positions":
        model = shutil.copytree(talkers / "policy", tmp_path / "model")
        table = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(table | {"max_position_embeddings": seq_len}))
        over["model"] = {"path": str(model)}
    more = {"prefixes": ["student"], "student_texts": 4}
    found = symptoms(talkers, tmp_path / "run", diagnose=more, **over)
    assert continued and max(begun + n for begun, n in continued) == 12
    assert found["correction"]["cuts"] >= 1
    # " Wait, no: " and the correction have more tokens than the text had
    assert found["correction"]["gains"] < found["correction"]["cuts"]


class Letters:
    """A tokenizer of one character a token; 9 is the stop."""

    def encode(self, text):
        return tuple(map(ord, text))

    def decode(self, ids):
        return "".join(map(chr, ids))


class Outcomes(Continuations):
    """What becomes of each continued text is given: `after`, by stream."""

    after: dict = {}

    def _continued(self, stage, prefixes, stream):
        outcomes = self.after.get(stream) or [True] * len(prefixes)
        assert len(outcomes) == len(prefixes)
        return [(correct, "") for correct in outcomes]

    def _gains(self, cuts):
        return [None] * len(cuts)


def outcomes_of(text, after, max_tokens=20, correct=True):
    """Of the cuts of one text, and of the halves of two texts alike."""
    ids = (*map(ord, text), 9)
    rollouts = [
        Rollout(Prompt(i, ()), (1,), ids, (0.0,) * len(ids), 0.0, text, True) for i in (0, 1)
    ]
    stats = [replace(token_stats(i, "student", correct), rollout=r) for i, r in enumerate(rollouts)]
    cfg = SimpleNamespace(seed=0, rollout=SimpleNamespace(max_tokens=max_tokens))
    probe = Outcomes(cfg, SimpleNamespace(rank=0), None, (Letters(), Letters()), None)
    Outcomes.after = after
    return probe.correction(None, stats[:1]), probe.own_errors(None, stats)


def test_a_cut_without_room_is_left_out_and_counted():
    """As of a text that has more tokens in the student's tokenizer than in the teacher's."""
    assert [len(outcomes_of("12345678", {}, n)[0]) for n in (9, 6, 4, 2)] == [3] * 4
    assert [outcomes_of("12345678", {}, n)[0].count(None) for n in (9, 6, 4, 2)] == [0, 1, 2, 3]


def test_a_continued_text_without_a_grade_is_left_out():
    after = {"clean": [True, None, True], "error": [None, False, False]}
    (cut,) = outcomes_of("12345678", after)[0]
    assert (cut.correct_after_clean, cut.correct_after_error) == (True, False)
    assert outcomes_of("12345678", {"own": [None, True]}, correct=False)[1] == [(0, True)]
