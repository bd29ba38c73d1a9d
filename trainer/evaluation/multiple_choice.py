"""Which option of a multiple-choice prompt a model finds likeliest."""

from collections.abc import Sequence

from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.options import Options
from reflux.trainer.phase import Engine
from reflux.trainer.rollouts.scoring import score_ids

from .predictions import OptionScores, Prediction, prompt_id


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
                part=prompt.part,
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
