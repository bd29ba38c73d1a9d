"""What a report shows of one example."""

from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.preflight.report import Example, render


def test_an_example_marks_every_token_with_loss(talkers):
    chat = Chat(str(talkers / "policy"))
    prompt = load_prompts(str(talkers / "data.jsonl"))[0]
    shown = render(Example("policy", chat, prompt, "é 1"), colour=False).plain
    before, after = shown.split("assistant: ")
    assert "What is 0+0?" in before and "[" not in before
    assert after == "[\\xc3][\\xa9][ 1]«<|eos|>»"
    assert render(Example("policy", chat, prompt, "12"), colour=True).plain.endswith("12<|eos|>")
