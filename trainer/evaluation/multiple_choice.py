"""Multiple-choice prompts: their options, the order in which they are shown, and which one a model
finds likeliest.

A prompt has its options where graders.MultipleChoice looks for them: a list of texts, or
{"label": [...], "text": [...]}.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.chat import Chat
from reflux.trainer.phase import Engine
from reflux.trainer.rollouts.scoring import score_ids

from .predictions import OptionScores, Prediction, prompt_id

ORDER_STREAM = 1 << 30  # the shuffle of a prompt's options has random numbers of its own


@dataclass(frozen=True)
class Options:
    """The options of one prompt in the order shown. Positions are from 0."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    correct: int  # position

    def position_of(self, label: str | None) -> int | None:
        return self.labels.index(label) if label is not None and label in self.labels else None


def read_options(prompt: Prompt, column: str = "choices", answer_is: str = "letter") -> Options:
    """`column`, `answer_is`: as in graders.MultipleChoice. ValueError where options, their texts or
    the correct one are missing.
    """
    given = prompt.extra.get(column)
    if given is None:
        raise ValueError(
            f"prompt {prompt.index}: no column {column!r} with the options; there are: "
            f"{', '.join(prompt.extra) or 'none'}. Set task.options.choices"
        )
    if isinstance(given, Mapping):
        texts = tuple(map(str, given["text"]))
        labels = tuple(str(x).upper() for x in given["label"])
    else:
        texts = tuple(map(str, given))
        labels = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(texts)])
    if len(texts) < 2 or len(labels) != len(texts) or not all(texts):
        raise ValueError(
            f"prompt {prompt.index}: options {list(texts)}; want two or more (26 at most), none "
            "empty, one label each"
        )
    known = {"letter": labels, "index": tuple(map(str, range(len(texts)))), "text": texts}
    names = known[answer_is]
    answer = (prompt.answer or "").strip()
    answer = answer.upper() if answer_is == "letter" else answer
    if answer not in names:
        raise ValueError(
            f"prompt {prompt.index}: answer {answer!r} is none of {', '.join(names)}. Set "
            "task.options.answer_is"
        )
    return Options(labels, texts, names.index(answer))


def list_options(
    prompt: Prompt, seed: int, column: str = "choices", answer_is: str = "letter"
) -> Prompt:
    """The prompt with its options written under the question, "A) text" a line, in an order drawn
    from (seed, prompt).

    Labels stay in order and texts move, so a preference for a position or a letter is seen; answer
    and column follow.
    """
    options = read_options(prompt, column, answer_is)
    key = np.array([(seed << 32) ^ ORDER_STREAM, prompt.index], dtype=np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(len(options.texts)).tolist()
    texts = [options.texts[i] for i in order]
    correct = order.index(options.correct)
    shown = "\n".join(f"{label}) {text}" for label, text in zip(options.labels, texts))
    answers = {"letter": options.labels[correct], "index": str(correct), "text": texts[correct]}
    *before, last = prompt.messages
    return replace(
        prompt,
        messages=(*before, {**last, "content": f"{last['content']}\n{shown}"}),
        answer=answers[answer_is],
        extra={**prompt.extra, column: {"label": list(options.labels), "text": texts}},
    )


def score_options(
    engine: Engine, chat: Chat, questions: Sequence[tuple[Prompt, Options]], *, tokens: int
) -> list[list[float]]:
    """log p(text of each option | prompt) under the engine's model, nats, without a stop token
    behind it. tokens: of a batch. Collective.
    """
    jobs = [
        (chat.prompt_ids(prompt.messages), tuple(chat.encode(text)))
        for prompt, options in questions
        for text in options.texts
    ]
    scores = iter(score_ids(engine, engine, jobs, chat, tokens=tokens, stop=False))
    return [[float(next(scores).logp.sum()) for _ in options.texts] for _, options in questions]


def choices_by_likelihood(
    prompt: Prompt, options: Options, logp: Sequence[float], id: str | None = None
) -> list[Prediction]:
    """The likeliest option in sum, and per byte (which does not favour short ones); the first of
    equals. id: the question's; none given: that of this prompt.
    """
    sizes = [len(text.encode()) for text in options.texts]
    per_byte = [x / n for x, n in zip(logp, sizes)]
    scores = OptionScores(tuple(logp), tuple(sizes))
    predictions = []
    for mode, values in (("likelihood_sum", logp), ("likelihood_per_byte", per_byte)):
        best = max(range(len(values)), key=values.__getitem__)
        predictions.append(
            Prediction(
                mode=mode,
                prompt=prompt.index,
                sample=0,
                id=id or prompt_id(prompt),
                answer=prompt.answer,
                reward=float(best == options.correct),
                correct=best == options.correct,
                extracted=options.texts[best],
                error=None,
                position=options.correct,
                choice_at=best,
                options=scores,
            )
        )
    return predictions
