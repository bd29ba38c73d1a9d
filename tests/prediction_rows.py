"""Predictions of an evaluation, made by hand."""

from typing import Any

from reflux.trainer.evaluation.predictions import Generation, OptionScores, Prediction


def prediction(
    prompt: int, sample: int = 0, mode: str = "sampled", correct: bool | None = True, **more: Any
) -> Prediction:
    """A graded answer without a text."""
    fields = {"id": None, "answer": "a", "extracted": None, "error": None}
    fields |= {"reward": float(bool(correct))} | more
    return Prediction(mode=mode, prompt=prompt, sample=sample, correct=correct, **fields)


def generated(
    prompt: int,
    sample: int = 0,
    mode: str = "sampled",
    correct: bool | None = True,
    *,
    text: str = "x",
    ended: bool = True,
    tokens: int = 5,
    outcome: str | None = None,
    graded: bool = True,
    **more: Any,
) -> Prediction:
    """A graded text."""
    text_of = Generation(text, ended, tokens, nll=0.5, outcome=outcome, graded=graded)
    return prediction(prompt, sample, mode, correct, generation=text_of, **more)


def chosen(
    prompt: int, mode: str, correct: bool, *, logp: list[float], n_bytes: list[int], **more: Any
) -> Prediction:
    """An option by likelihood."""
    scores = OptionScores(tuple(logp), tuple(n_bytes))
    return prediction(prompt, 0, mode, correct, options=scores, **more)
