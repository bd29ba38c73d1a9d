"""Multiple-choice prompts: their options, the order in which they are shown, and which one a model
finds likeliest.

A prompt keeps its options where graders.MultipleChoice looks for them: a list of texts, or
{"label": [...], "text": [...]}.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.chat import Chat
from reflux.trainer.rollouts.scoring import score_ids

ORDER = 1 << 30  # the shuffle of a prompt's options has random numbers of its own


@dataclass(frozen=True)
class Options:
    """The options of one prompt in the order shown; `right` is a place in it, from 0."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    right: int

    def place_of(self, label: str | None) -> int | None:
        return self.labels.index(label) if label in self.labels else None


def read_options(prompt: Prompt, column: str = "choices", answer_is: str = "letter") -> Options:
    """`column`, `answer_is`: as in graders.MultipleChoice. ValueError where options, their texts or
    the right one are missing.
    """
    given = prompt.extra.get(column)
    if given is None:
        raise ValueError(
            f"prompt {prompt.index}: no column {column!r} with the options; there are: "
            f"{', '.join(prompt.extra) or 'none'}. Set task.options.choices"
        )
    texts = tuple(map(str, given["text"] if isinstance(given, Mapping) else given))
    labels = (
        tuple(str(x).upper() for x in given["label"])
        if isinstance(given, Mapping)
        else tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(texts)])
    )
    if len(texts) < 2 or len(labels) != len(texts) or not all(texts):
        raise ValueError(
            f"prompt {prompt.index}: options {list(texts)}; want two or more (26 at most), none "
            "empty, one label each"
        )
    answer = (prompt.answer or "").strip()
    known = {"letter": labels, "index": tuple(map(str, range(len(texts)))), "text": texts}[
        answer_is
    ]
    answer = answer.upper() if answer_is == "letter" else answer
    if answer not in known:
        raise ValueError(
            f"prompt {prompt.index}: answer {answer!r} is none of {', '.join(known)}. Set "
            "task.options.answer_is"
        )
    return Options(labels, texts, known.index(answer))


def list_options(
    prompt: Prompt, seed: int, column: str = "choices", answer_is: str = "letter"
) -> Prompt:
    """The prompt with its options written under the question, "A) text" a line, in an order drawn
    from (seed, prompt).

    Labels keep their order and texts move, so a model that prefers a place or a letter is seen;
    answer and column follow.
    """
    options = read_options(prompt, column, answer_is)
    key = np.array([(seed << 32) ^ ORDER, prompt.index], dtype=np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(len(options.texts)).tolist()
    texts, right = [options.texts[i] for i in order], order.index(options.right)
    shown = "\n".join(f"{label}) {text}" for label, text in zip(options.labels, texts))
    *before, last = prompt.messages
    answer = {"letter": options.labels[right], "index": str(right), "text": texts[right]}[answer_is]
    return replace(
        prompt,
        messages=(*before, last | {"content": f"{last['content']}\n{shown}"}),
        answer=answer,
        extra={**prompt.extra, column: {"label": list(options.labels), "text": texts}},
    )


def score_options(
    engine: Any, chat: Chat, asked: Sequence[tuple[Prompt, Options]], *, tokens: int
) -> list[list[float]]:
    """log p(text of each option | prompt) under the engine's model, nats, without a stop token
    behind it. Collective.
    """
    jobs = [
        (chat.prompt_ids(prompt.messages), chat.encode(text))
        for prompt, options in asked
        for text in options.texts
    ]
    sums = iter(
        float(s.logp.sum())
        for s in score_ids(engine, engine, jobs, chat, tokens=tokens, stop=False)
    )
    return [[next(sums) for _ in options.texts] for _, options in asked]


def likelihood_rows(prompt: Prompt, options: Options, logp: Sequence[float]) -> list[dict]:
    """The likeliest option in sum, and per byte (which does not favour short ones); the first of
    equals.
    """
    sizes = [len(text.encode()) for text in options.texts]
    rows = []
    for mode, scores in (
        ("likelihood_sum", logp),
        ("likelihood_per_byte", [x / n for x, n in zip(logp, sizes)]),
    ):
        best = max(range(len(scores)), key=scores.__getitem__)
        rows.append(
            {
                "mode": mode,
                "prompt": prompt.index,
                "sample": 0,
                "answer": prompt.answer,
                "extracted": options.texts[best],
                "correct": best == options.right,
                "reward": float(best == options.right),
                "error": None,
                "position": options.right,
                "choice_at": best,
                "logp": list(logp),
                "bytes": sizes,
            }
        )
    return rows
