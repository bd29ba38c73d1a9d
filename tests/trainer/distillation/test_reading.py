"""Teachers routed by row, and a teacher that reads more than the student."""

import json

import pytest
from distillation_cases import GIVEN, kl, logp_nV
from runs import config, run_here

from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.rollouts.generate import given_rollout

pytestmark = pytest.mark.usefixtures("titan_process")
FORWARD = GIVEN | {"divergence": "forward"}


def write_rows(folder, teachers=("teacher", 1), **more):
    """Eight rows that name a teacher each, by name or by number."""
    rows = [
        {"prompt": f"What is {a}+1?", "response": f"{a}+1 is => {a + 1}", "who": teachers[a % 2]}
        | {name: value.format(a + 1) for name, value in more.items()}
        for a in range(8)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def first_loss(talkers, folder, path, **over):
    over = {"rollout": {"prompts": 8, "max_tokens": 12}, "data": {"source": str(path)}} | over
    return run_here(config(talkers, folder, "distill", steps=1, **over)).steps[0]["loss"]


@pytest.mark.parametrize("tail", [{}, {"tail": "bucket", "top_k": 400}])
def test_each_row_is_compared_with_the_teacher_that_it_names(talkers, tmp_path, tail):
    data = write_rows(tmp_path)
    options = FORWARD | tail | {"route": "who", "more_teachers": [str(talkers / "policy")]}
    got = first_loss(talkers, tmp_path / "run", data, distill=options)
    # the second teacher is the student: its rows have nothing to teach
    alone = tmp_path / "alone.jsonl"
    rows = data.read_text().splitlines()
    alone.write_text("\n".join(rows[::2]) + "\n")
    half = {"prompts": 4, "max_tokens": 12}
    first = first_loss(talkers, tmp_path / "half", alone, distill=FORWARD | tail, rollout=half)
    chat = Chat(str(talkers / "policy"))
    lengths = [len(given_rollout(chat, p, 12).ids) for p in load_prompts(str(data))]
    want = first * sum(lengths[::2]) / sum(lengths)
    assert got == pytest.approx(want, rel=2e-4)


def test_texts_are_sampled_by_the_teacher_of_the_row(talkers, tmp_path, seen):
    data = write_rows(tmp_path)
    options = {"objective": "nll", "on_policy": 0.0, "route": "who"}
    options["more_teachers"] = [str(talkers / "policy")]
    first_loss(talkers, tmp_path / "run", data, distill=options)
    texts = [t for step in seen["sample"] for group in step for t in group]
    assert {t.rollout.prompt.index % 2: t.teacher for t in texts} == {0: 0, 1: 1}


def test_a_row_that_names_no_teacher_ends_the_run_before_its_first_step(talkers, tmp_path):
    data = write_rows(tmp_path, teachers=("teacher", "nobody"))
    options = FORWARD | {"route": "who", "more_teachers": [str(talkers / "policy")]}
    with pytest.raises(ValueError, match="distill.route = 'who': prompt 1 has 'nobody' there"):
        first_loss(talkers, tmp_path / "run", data, distill=options)


def test_the_teacher_reads_what_the_student_does_not(talkers, tmp_path, seen):
    """Self-distillation: the same weights behind a longer prompt."""
    data = write_rows(tmp_path, solution="it is {}")
    options = FORWARD | {"privileged": "solution", "privileged_template": "{prompt} {privileged}!"}
    teacher = {"path": str(talkers / "policy"), "dtype": "float32"}
    got = first_loss(talkers, tmp_path / "run", data, distill=options, teacher=teacher)
    chat, total, tokens = Chat(str(talkers / "policy")), 0.0, 0
    for sample in seen["score"][0]:
        row = sample.rollout.prompt
        content = f"{row.messages[0]['content']} {row.extra['solution']}!"
        longer = chat.prompt_ids([{"role": "user", "content": content}])
        student, theirs = (
            logp_nV(talkers / "policy", sample, ids) for ids in (sample.rollout.prompt_ids, longer)
        )
        total, tokens = total + float(kl(theirs, student)), tokens + len(sample.rollout.ids)
    assert got == pytest.approx(total / tokens, rel=2e-4) and got > 1e-3
    with pytest.raises(ValueError, match="distill.privileged = 'hint': prompt . has None there"):
        first_loss(
            talkers,
            tmp_path / "no",
            data,
            distill=options | {"privileged": "hint"},
            teacher=teacher,
        )


def write_long_hints(folder, long):
    """Eight rows, of which some have a privileged text beyond the teacher's 256 positions."""
    path = write_rows(folder)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    hints = ["so " * 300 if i in long else f"it is {i + 1}" for i in range(8)]
    lines = [json.dumps(row | {"hint": hint}) + "\n" for row, hint in zip(rows, hints)]
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("too_long", ["error", "truncate_left", "drop"])
@pytest.mark.parametrize("parts", [False, True], ids=["one source", "a mixture"])
def test_a_privileged_text_that_is_too_long_ends_the_run_or_is_left_out(
    talkers, tmp_path, seen, caplog, too_long, parts
):
    path = write_long_hints(tmp_path, long=(2, 5))
    source = (
        {"source": "", "parts": {"all": {"source": str(path)}}} if parts else {"source": str(path)}
    )
    over = {
        "distill": FORWARD | {"privileged": "hint"},
        "data": source | {"too_long": too_long},
        "teacher": {"path": str(talkers / "policy"), "dtype": "float32"},
    }
    if too_long != "drop":
        with pytest.raises(ValueError, match=r"2 prompts are too long.*at most its 256 positions"):
            first_loss(talkers, tmp_path / "run", path, **over)
        assert not seen["sample"], "before the first step"
        return
    first_loss(talkers, tmp_path / "run", path, **over)
    assert {s.rollout.prompt.index for s in seen["score"][0]} == {0, 1, 3, 4, 6, 7}
    assert "2 of 8 prompts are too long for a teacher with it" in caplog.text


def test_no_part_of_a_mixture_is_left_without_prompts(talkers, tmp_path):
    (tmp_path / "fits").mkdir()
    parts = {
        "short": {"source": str(write_long_hints(tmp_path / "fits", long=()))},
        "long": {"source": str(write_long_hints(tmp_path, long=range(8)))},
    }
    with pytest.raises(ValueError, match="every prompt of data.parts.long is too long"):
        first_loss(
            talkers,
            tmp_path / "run",
            None,
            distill=FORWARD | {"privileged": "hint"},
            data={"source": "", "parts": parts, "too_long": "drop"},
            teacher={"path": str(talkers / "policy"), "dtype": "float32"},
        )


@pytest.mark.parametrize("budget", [0, 8], ids=["step by step", "query budget"])
def test_a_teacher_writes_behind_what_it_reads(talkers, tmp_path, seen, budget):
    """Its distributions are compared behind the privileged text; its own texts were not."""
    data = write_rows(tmp_path, solution="it is {}")
    options = {"privileged": "solution", "privileged_template": "{prompt} {privileged}!"}
    options |= {"on_policy": 0.0, "divergence": "forward", "query_budget": budget}
    first_loss(talkers, tmp_path / "run", data, distill=options)
    chat, own = (Chat(str(talkers / name)) for name in ("teacher", "policy"))
    texts = [t.rollout for step in seen["sample"] for group in step for t in group]
    assert len(texts) == 32  # 8 groups of 4
    for r in texts:
        asked = f"{r.prompt.messages[0]['content']} {r.prompt.extra['solution']}!"
        assert r.prompt_ids == chat.prompt_ids([{"role": "user", "content": asked}])
    for sample in seen["score"][0]:
        assert sample.rollout.prompt_ids == own.prompt_ids(sample.rollout.prompt.messages)
        (view,) = sample.teacher_views
        assert view.prompt_ids in {r.prompt_ids for r in texts}


@pytest.mark.parametrize(
    "options, says",
    [
        ({"route": "who"}, "want more_teachers to choose from"),
        ({"route": "who", "more_teachers": ["t"], "objective": "class"}, "want 'kl' or 'nll'"),
        ({"privileged": "x", "objective": "nll", "on_policy": 0.0}, "Use objective = 'kl'"),
        ({"privileged": "x", "privileged_template": "{prompt}"}, "has no {privileged}"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(talkers, tmp_path, options, says):
    biased = {"allow_biased": True} if options.get("objective") == "class" else {}
    with pytest.raises(ValueError, match=says):
        config(talkers, tmp_path / "run", "distill", distill=options | biased)


def test_a_document_has_nothing_that_a_privileged_text_could_stand_behind(talkers, tmp_path):
    path = tmp_path / "documents.jsonl"
    rows = [{"text": f"A document about {i}.", "hint": "h"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    over = {"task": {"name": ""}, "distill": {"privileged": "hint"}}
    with pytest.raises(ValueError, match="privileged = 'hint': prompt 0 is a document"):
        first_loss(talkers, tmp_path / "run", path, **over)
