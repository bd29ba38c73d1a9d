"""A model that has learned to answer with a payload trains and is evaluated, and nothing runs.

The payload makes a folder.
"""

import json
import subprocess

import pytest
from assets import save_model, save_tokenizer, sentences, train_tokenizer
from fault_runs import budget
from runs import command, config, environment, make_talker

from reflux.trainer.config.schema import Config
from reflux.trainer.data.prompts import load_prompts

pytestmark = pytest.mark.faults
SOURCE = "reasoning_gym:{}?size=2&seed=1"
GRADER = """
def runs_text(prompt, text):
    return eval(text.removeprefix("<answer>").removesuffix("</answer>")) is None
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("payload")


@pytest.fixture(scope="module")
def poisoned(folder):
    """poisoned(data set) -> a folder with a `policy` and a `proxy` that answer with the payload."""

    def make(name):
        home = folder / name
        home.mkdir(exist_ok=True)
        if not (home / "policy").exists():
            payload = f"__import__('os').makedirs('{folder}/made')"
            prompts = load_prompts(SOURCE.format(name))
            rows = [
                {"messages": list(p.messages), "response": f"<answer>{payload}</answer>"}
                for p in prompts
            ]
            data = home / "rows.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            save_model(home / "base", "qwen2", max_position_embeddings=1024)
            save_tokenizer(train_tokenizer(sentences(300), 512), home / "base")
            make_talker(home / "base", home / "policy", data, steps=100)
            (home / "proxy").symlink_to(home / "policy")
        return home

    return make


def run(cfg: Config, folder) -> tuple[int, str]:
    file = folder / f"{cfg.phase}.toml"
    paths = {"PYTHONPATH": f"{environment()['PYTHONPATH']}:{folder}"}
    done = subprocess.run(
        command(cfg, file),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment() | paths,
    )
    return done.returncode, done.stdout + done.stderr


def poisoned_run(poisoned, folder, name, phase, task):
    """Runs it to its end; an evaluation has answered with the payload."""
    home = poisoned(name)
    (folder / "my_grader.py").write_text(GRADER)
    kind = f"{task['name'].partition(':')[0]}-{len(task)}"
    out = folder / f"{name}-{phase}-{kind}"
    over = {
        "data" if phase == "calibrate" else "eval": {"source": SOURCE.format(name)},
        "task": {**task, "max_failed": 1.0},
        "rollout": {"max_tokens": 96, "temperature": 0.5},
        "training": {"seq_len": 640},
    }
    if phase == "calibrate":
        over["calibration"] = {"mode": "off", "max_unaligned": 1.0, "truncated": "score_prefix"}
    code, said = run(config(home, out, phase, **over), folder)
    assert code == 0, said
    if phase == "evaluate":
        texts = [p.read_text() for p in (out / "predictions").glob("*.jsonl")]
        assert "makedirs" in "".join(texts)


CASES = [
    ("puzzle24", "reasoning_gym", "evaluate"),
    ("puzzle24", "my_grader:runs_text", "calibrate"),
    ("binary_matrix", "reasoning_gym", "calibrate"),
    ("binary_matrix", "my_grader:runs_text", "evaluate"),
    ("puzzle24", "reasoning_gym", "calibrate"),
    ("puzzle24", "my_grader:runs_text", "evaluate"),
    ("binary_matrix", "reasoning_gym", "evaluate"),
    ("binary_matrix", "my_grader:runs_text", "calibrate"),
]


@pytest.mark.parametrize("name, task, phase", CASES[: budget(2, 4, 8)])
def test_a_learned_payload_does_not_run(poisoned, folder, record_property, name, task, phase):
    record_property("fault", f"a payload as the answer: {name}, {task}, {phase}")
    poisoned_run(poisoned, folder, name, phase, {"name": task})
    assert not (folder / "made").exists()


@pytest.mark.parametrize("phase", ["evaluate", "calibrate"][: budget(1, 1, 2)])
def test_it_would_run_in_the_trainers_process(poisoned, folder, phase):
    """What the test above is worth."""
    task = {"name": "my_grader:runs_text", "options": {"isolate": False}}
    poisoned_run(poisoned, folder, "puzzle24", phase, task)
    (folder / "made").rmdir()
