"""Prompts are frozen, plain data, and need no torch."""

import json
import pickle
import subprocess
import sys

import pytest

from reflux.trainer.data.graders import ReasoningGym
from reflux.trainer.data.prompt import Prompt, fill_template
from reflux.trainer.data.prompts import load_prompts


def test_a_prompt_is_frozen_and_still_plain_data():
    message, extra = {"role": "user", "content": "?"}, {"level": 3}
    prompt = Prompt(0, (message,), extra=extra)
    for change in (
        lambda: prompt.messages[0].update(content="!"),
        lambda: prompt.extra.pop("level"),
        lambda: prompt.extra.__setitem__("level", 4),
    ):
        with pytest.raises(TypeError, match="a prompt is frozen"):
            change()
    message["content"], extra["level"] = "!", 4  # of the caller, not of the prompt
    assert prompt.messages[0]["content"] == "?" and prompt.extra == {"level": 3}
    assert json.loads(json.dumps(prompt.messages)) == [{"role": "user", "content": "?"}]
    assert pickle.loads(pickle.dumps(prompt)) == prompt


def test_the_grading_process_starts_without_torch():
    code = (
        "import sys, reflux.trainer.data.sandbox_worker, reflux.trainer.data.grader_options, "
        "reflux.trainer.data.attempt; print('torch' in sys.modules, 'sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_row_cannot_pose_as_a_generated_entry(tmp_path):
    """Whose scorer evaluates parts of it."""
    posing = {
        "dataset": "number_sorting",
        "options": {},
        "entry": {"answer": "made", "metadata": {}},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "?", "reasoning_gym": posing}))
    (prompt,) = load_prompts(str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match="no reasoning_gym entry"):
        ReasoningGym()(prompt, "<answer>[1]</answer>")


def test_a_text_that_names_a_placeholder_is_a_text():
    """One after the other, a question with {text} in it would get the answer written into it."""
    filled = fill_template(
        "{prompt}\n{text} {other} {{x}}", prompt="What is {text}?", text="{prompt}"
    )
    assert filled == "What is {text}?\n{prompt} {other} {{x}}"
