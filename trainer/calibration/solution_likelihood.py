"""A raising rival: the reward of Reinforcement-Learned Teachers (Cetin, Zhao, Tang,
arXiv:2506.08388), for comparison with likelihood_ratio.

    r_cal = mean_i log p_C(solution token i | x, y, solution tokens before it)
          + KL_WEIGHT [log p_C(y | x) / tokens of C - log p_D(y | x) / tokens of D]

C the proxy, their student; D the policy or the reference. The second term is minus their KL of the
teacher's text, estimated from its sampled tokens. [ours]: the solution is the prompt's `answer`
behind the text and a line feed, for a teacher here is not shown it; their terms of the least likely
token are left out; sampled tokens instead of whole distributions, so that tokenizers may differ.

n tokens of a solution.
"""

from collections.abc import Sequence
from dataclasses import replace

from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.phase import CalibrationScore, Engine, TextScore
from reflux.trainer.rollouts.scoring import Aligned, score_ids

from .likelihood_ratio import LikelihoodRatio

KL_WEIGHT = 1.0
BEFORE_SOLUTION = "\n"


class SolutionLikelihood(LikelihoodRatio):
    """How likely the proxy finds the solution after the text, and the text itself."""

    def __init__(self, cfg: Config, engine: Engine, chat: Chat):
        if cfg.calibration.score_norm != "per_token":
            raise ValueError(
                "calibration.reward = 'solution_likelihood' with calibration.score_norm = "
                f"{cfg.calibration.score_norm!r}; want 'per_token', as the reward is defined"
            )
        super().__init__(cfg, engine, chat)

    def score(
        self,
        rollouts: Sequence[Rollout],
        behaviour: Sequence[TextScore],
        reference: Sequence[TextScore] | None,
        metric_sums: MetricSums,
    ) -> list[CalibrationScore]:
        """One score per rollout. ValueError, on every rank, for a prompt without an answer.
        Collective.
        """
        missing = self.engine.sum(float(sum(not r.prompt.answer for r in rollouts)))
        if missing:
            raise ValueError(
                f"calibration.reward = 'solution_likelihood': {missing:.0f} rollouts are of "
                "prompts without `answer`; want a solution in every row of data.source"
            )
        texts = super().score(rollouts, behaviour, reference, metric_sums)
        solutions = self._solutions(rollouts)
        metric_sums.add("cal/solution", [s for s, t in zip(solutions, texts) if t.scored])
        return [
            replace(text, value=solution + KL_WEIGHT * text.value) if text.scored else text
            for text, solution in zip(texts, solutions)
        ]

    def _row(self, rollout: Rollout, aligned: Aligned) -> int:
        """With the solution behind the text."""
        prompt_ids, text, answer = self._read(rollout)
        read = len(prompt_ids) + len(text) + len(answer)
        return max(super()._row(rollout, aligned), read)

    def _read(self, rollout: Rollout) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Prompt, text and solution in the proxy's tokens."""
        chat, prompt = self.proxy_chat, rollout.prompt
        text = self.chat.whole_text(rollout.content_ids, rollout.text) + BEFORE_SOLUTION
        return chat.prompt_ids(prompt.messages), chat.encode(text), chat.encode(str(prompt.answer))

    def _solutions(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Mean log-probability of each solution's tokens under the proxy, nats; 0 where it has no
        positions for them, and the text has no score.
        """
        read = [self._read(r) for r in rollouts]
        fits = [i for i, ids in enumerate(read) if self.proxy_chat.has_room(sum(map(len, ids)))]
        jobs = [(prompt, (*text, *answer)) for prompt, text, answer in (read[i] for i in fits)]
        scores = score_ids(
            self.proxy,
            self.engine,
            jobs,
            self.proxy_chat,
            tokens=self.cfg.batch.tokens,
            temperature=self.cfg.rollout.temperature,
            stop=False,
        )
        found = dict(zip(fits, scores))
        return [
            float(found[i].logp[len(text) :].mean()) if i in found else 0.0
            for i, (_, text, _) in enumerate(read)
        ]
