"""No scorer of reasoning_gym runs an answer, and answers score what they scored."""

import random
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflux.trainer.data.batch import Rollout
from reflux.trainer.data.graders import ReasoningGym
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.data.reasoning_gym_scorers import SCORERS, score_answer
from reflux.trainer.data.tasks import build_task

ENTRIES = 20


@pytest.fixture(scope="module")
def sources():
    from reasoning_gym.factory import create_dataset

    return {name: create_dataset(name, size=ENTRIES, seed=5) for name in SCORERS}


def payloads(path):
    make = f"__import__('os').mkdir({str(path)!r})"
    return [
        make,
        f"[{make}]",
        f"({make},)",
        f"1 + {make}",
        f"{make} + x",
        f"Symbol({make})",
        f"x.func({make})",
        f"''.join([str({make})])",
        f"(lambda: {make})()",
        f"[{make} for _ in [1]]",
        f"exec({make!r})",
        f"sympify({make!r})",
        f"S({make!r})",
    ]


def spellings(answer):
    """Of a correct answer: as it is, as a list, with more and less of it, and wrong ones."""
    rows = [line.split() for line in answer.splitlines()]
    yield from (answer, answer + "\n", f" {answer}", answer[:-1], answer + "0", f"({answer})")
    yield from (repr(list(answer)), repr(tuple(answer)), repr(answer), repr(answer.split()))
    yield from (
        repr(rows),
        repr(tuple(map(tuple, rows))),
        str([list(map(int_of, r)) for r in rows]),
    )
    yield from ("", "0", "1 2 3", "[]", "[[]]", "[1, 2]", "[[0, 1], [1, 0]]", "None", "no answer")
    yield from (
        answer.replace("C", "c"),
        answer.replace("C", "K1"),
        "x",
        "x**2",
        "1 + 1",
        "1/0",
        "24",
        "(",
        "x +",
        f"{answer} + 0",
        f"-({answer})",
    )


def int_of(text):
    return int(text) if text.isdigit() else text


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_those_of_reasoning_gym(sources, name):
    source, seen = sources[name], set()
    for k in range(ENTRIES):
        entry = source[k]
        for answer in spellings(entry["answer"]):
            theirs = source.score_answer(answer, entry)
            quoted = answer[:1] in ("'", '"') and "integration" in name  # sympy reads that, too
            expected = 0.0 if quoted else theirs
            assert score_answer(source, answer, entry) == expected, (answer, entry)
            seen.add(theirs)
        assert score_answer(source, entry["answer"], entry) == 1.0
    assert len(seen) > 1


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["countdown", "puzzle24"]), st.integers(0, ENTRIES - 1), st.randoms())
def test_any_arithmetic_scores_what_it_scored(sources, name, k, draw: random.Random):
    entry = sources[name][k]
    numbers = [str(n) for n in entry["metadata"]["numbers"]]
    draw.shuffle(numbers)
    while len(numbers) > 1:
        a, b = numbers.pop(), numbers.pop()
        numbers.append(f"({a} {draw.choice('+-*/')} {b})")
    answer = numbers[0]
    theirs = sources[name].score_answer(answer, entry)
    assert score_answer(sources[name], answer, entry) == theirs


@pytest.mark.parametrize("name", SCORERS)
def test_a_payload_runs_in_their_scorer_and_not_in_ours(sources, name, tmp_path):
    source, made = sources[name], tmp_path / "made"
    entry = source[0]
    for payload in payloads(made):
        assert score_answer(source, payload, entry) <= 0.01 and not made.exists(), payload
    for payload in payloads(made):
        source.score_answer(payload, entry)
    assert made.exists(), f"{name} evaluates no more: it can lose its own scorer"


def rollouts(name, made):
    prompt = load_prompts(f"reasoning_gym:{name}?size=1&seed=5")[0]
    blank = Rollout(prompt, (1,), (2,), (-0.1,), 0.0, "", True)
    return [
        replace(blank, text=f"<answer>{text}</answer>")
        for text in (prompt.answer, *payloads(made), prompt.answer)
    ]


@pytest.fixture(scope="module")
def task():
    return build_task("reasoning_gym", {})


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("name", SCORERS)
def test_a_payload_does_not_run_in_a_task(task, name, thread, tmp_path):
    grades = []

    def grade():
        grades.extend(task.grade(rollouts(name, tmp_path / "made")))

    if thread:
        worker = threading.Thread(target=grade)
        worker.start()
        worker.join(120)
    else:
        grade()
    assert not (tmp_path / "made").exists()
    assert grades[0].correct and grades[-1].correct and len(grades) > 10
    assert not any(grade.correct or grade.error for grade in grades[1:-1])


@pytest.mark.parametrize("name", SCORERS)
def test_a_payload_does_not_run_without_a_sandbox_either(name, tmp_path):
    """The grader itself, in this process: isolate = false, which a task refuses."""
    first, *bad, last = rollouts(name, tmp_path / "made")
    grades = [ReasoningGym()(r.prompt, r.text) for r in (first, *bad, last)]
    assert not (tmp_path / "made").exists()
    assert grades[0].correct and grades[-1].correct and not any(g.correct for g in grades[1:-1])
    with pytest.raises(ValueError, match="isolate = false"):
        build_task("reasoning_gym", {"isolate": False})


def test_a_composite_scores_by_its_parts(tmp_path):
    from reasoning_gym.composite import CompositeConfig, CompositeDataset, DatasetSpec

    specs = [DatasetSpec(name, 1.0, {}) for name in ("n_queens", "chain_sum")]
    source = CompositeDataset(CompositeConfig(size=8, seed=1, datasets=specs))
    for k in range(8):
        assert score_answer(source, source[k]["answer"], source[k]) == 1.0
        for payload in payloads(tmp_path / "made"):
            assert score_answer(source, payload, source[k]) < 0.99
    assert not (tmp_path / "made").exists()


AUDIT = """
import sys
from reasoning_gym.factory import DATASETS, create_dataset
from reflux.trainer.data.reasoning_gym_scorers import score_answer
ran = set()

def hook(event, args):
    if event == "exec" and "PAYLOAD" in repr((args[0].co_names, args[0].co_consts)):
        ran.add(name)

sys.addaudithook(hook)
tried = 0
theirs = bool(int(sys.argv[1]))
for name in sorted(DATASETS):
    if name == "composite":  # its parts
        continue
    source = create_dataset(name, size=1, seed=5)
    entry, tried = source[0], tried + 1
    for answer in ("PAYLOAD", "PAYLOAD()", "[PAYLOAD]", "['PAYLOAD']", "1 + PAYLOAD", "PAYLOAD(x)"):
        for text in (answer, answer + chr(10) + answer, str(entry["answer"]) + " + " + answer):
            try:
                source.score_answer(text, entry) if theirs else score_answer(source, text, entry)
            except Exception:
                pass
print()  # one data set prints dots
print(tried, *sorted(ran))
"""


@pytest.mark.parametrize("theirs", [True, False])
def test_of_all_data_sets_only_those_with_an_own_scorer_run_answers(theirs):
    """Python itself reports what is run. A new release of reasoning_gym may bring more of them."""
    command = [sys.executable, "-c", AUDIT, str(int(theirs))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tried, *ran = done.stdout.splitlines()[-1].split()
    assert int(tried) > 100 and ran == (sorted(SCORERS) if theirs else [])
