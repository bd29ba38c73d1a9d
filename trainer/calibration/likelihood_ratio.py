"""The paper's calibration reward: how likely a frozen proxy with its own tokenizer finds the
teacher's text, against the teacher itself (equation (2) of docs/method.md).

Policy and reference model score the sampled ids; only the proxy tokenizes the text. Both sides are
summed over the byte spans that the two tokenizations share, so they cover the same bytes. All
log-probabilities are those at rollout.temperature: a proxy that is the policy leaves nothing to
calibrate, whatever the temperature.

Shapes: n tokens of one response, S spans.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from reflux.tokenalign.byte_trie import ByteTrie
from reflux.tokenalign.credit import before_each, following_span
from reflux.tokenalign.scores import compare_spans, span_logprobs
from reflux.tokenalign.vocab_map import Vocabulary
from reflux.trainer.config.roles import calibrate_advice
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.phase import CalibrationScore, Engine, TextScore
from reflux.trainer.rollouts.scoring import Aligned, Prefixes, align_texts, score_ids
from reflux.trainer.runs import commands

from .rewards import UNALIGNED, calibration_score
from .spellings import marginal_excess


class LikelihoodRatio:
    """r_cal = [log p_proxy(text) - log p_denominator(text)] / z(text)."""

    def __init__(self, cfg: Config, engine: Engine, chat: Chat):
        self.cfg, self.engine, self.chat = cfg, engine, chat
        self.proxy_chat = Chat.of(cfg.proxy)
        self.same_ids = chat.table.fingerprint() == self.proxy_chat.table.fingerprint()
        advice = calibrate_advice(cfg, self.same_ids)
        if advice is not None and advice.level == "error":  # before a model is loaded for nothing
            raise ValueError(advice.text)
        self.proxy = engine.frozen(cfg.proxy)
        self.trie: ByteTrie | None = None
        if cfg.calibration.credit == "prefix" and not self.same_ids:
            own = self.proxy_chat
            vocabulary = Vocabulary(own.table, own.stop_ids, own.vocab_size)
            self.trie = ByteTrie.of(vocabulary, engine.device)
        if cfg.calibration.score_norm == "per_token" and not self.same_ids:
            warnings.warn(
                "calibration.score_norm = 'per_token' is not fair across tokenizers: the two sides "
                "count different tokens. Use 'sum' or 'per_byte'",
                stacklevel=2,
            )

    def score(
        self,
        rollouts: Sequence[Rollout],
        behaviour: Sequence[TextScore],
        reference: Sequence[TextScore] | None,
        metric_sums: MetricSums,
    ) -> list[CalibrationScore]:
        """One score per rollout; UNALIGNED where the proxy's tokenizer cannot spell the text, where
        the proxy has no positions for it, and for truncated ones unless calibration.truncated =
        "score_prefix". Collective.
        """
        cal = self.cfg.calibration
        aligned = align_texts(self.chat, self.proxy_chat, rollouts, same=self.same_ids)
        unaligned = np.array([a.spans is None for a in aligned], bool)
        asked = [
            i
            for i, (rollout, a) in enumerate(zip(rollouts, aligned))
            if a.spans is not None and (rollout.ended or cal.truncated == "score_prefix")
        ]
        scorable = [
            i for i in asked if self.proxy_chat.has_room(self._row(rollouts[i], aligned[i]))
        ]
        too_long = sorted({*asked} - {*scorable})
        unaligned[too_long] = True
        metric_sums.add("cal/unaligned", unaligned)
        self._check_unaligned(float(unaligned.sum()), len(too_long), len(rollouts))
        proxy_scores = self._proxy_scores(rollouts, aligned, scorable)
        own = reference if cal.denominator == "reference" else behaviour
        assert own is not None
        excess = self._excess(rollouts, behaviour)
        return [
            self._score_one(rollouts[i], aligned[i], proxy_scores[i], own[i], excess[i])
            if i in proxy_scores
            else UNALIGNED
            for i in range(len(rollouts))
        ]

    def _row(self, rollout: Rollout, aligned: Aligned) -> int:
        """Tokens that the proxy reads of a text, with prompt and stop."""
        prompt_ids = self.proxy_chat.prompt_ids(rollout.prompt.messages)
        return len(prompt_ids) + len(aligned.scorer_ids) + 1

    def _excess(self, rollouts: Sequence[Rollout], behaviour: Sequence[TextScore]) -> list[float]:
        """What denominator = "marginal" adds to the log-probability of the sampled ids."""
        if self.cfg.calibration.denominator != "marginal":
            return [0.0] * len(rollouts)
        return marginal_excess(
            self.chat,
            self.engine,
            rollouts,
            [b.logp for b in behaviour],
            tokens=self.cfg.batch.tokens,
            temperature=self.cfg.rollout.temperature,
        )

    def _proxy_scores(
        self, rollouts: Sequence[Rollout], aligned: Sequence[Aligned], scorable: list[int]
    ) -> dict[int, TextScore]:
        """The proxy's log-probabilities of the rollouts at these indices, behind its own rendering
        of the prompt.
        """
        jobs = [
            (self.proxy_chat.prompt_ids(rollouts[i].prompt.messages), aligned[i].scorer_ids)
            for i in scorable
        ]
        scores = score_ids(
            self.proxy,
            self.engine,
            jobs,
            self.proxy_chat,
            tokens=self.cfg.batch.tokens,
            temperature=self.cfg.rollout.temperature,
            prefixes=self._prefixes([aligned[i] for i in scorable]),
        )
        return dict(zip(scorable, scores))

    def _prefixes(self, aligned: Sequence[Aligned]) -> Prefixes | None:
        """What credit = "prefix" asks the proxy for."""
        if self.trie is None:
            return None
        return Prefixes(self.trie, [_space_in_front(a, self.proxy_chat) for a in aligned])

    def _before(
        self, rollout: Rollout, proxy: TextScore, own_logp_n: np.ndarray
    ) -> np.ndarray | None:
        """CalibrationScore.before: proxy minus denominator, of the text before each token."""
        if self.same_ids:
            proxy_n = np.append(proxy.logp, proxy.stop)[: len(rollout.ids)]
            return before_each(proxy_n - own_logp_n)
        if proxy.prefix_logp is None:
            return None
        lens_n = self.chat.table.lens[list(rollout.ids)]
        start_n = np.minimum(before_each(lens_n), len(proxy.prefix_logp) - 1)
        return proxy.prefix_logp[start_n] - before_each(own_logp_n)

    def _score_one(
        self,
        rollout: Rollout,
        aligned: Aligned,
        proxy: TextScore,
        own: TextScore,
        excess: float = 0.0,
    ) -> CalibrationScore:
        """own: what the denominator says of the sampled ids."""
        assert aligned.spans is not None
        cal = self.cfg.calibration
        content_n = own.logp[: len(rollout.content_ids)]
        with_stop = cal.score_stop and rollout.ended
        scores = compare_spans(
            span_logprobs(proxy.logp, aligned.scorer_span, aligned.spans),
            span_logprobs(content_n, aligned.sampler_span, aligned.spans),
            num_bytes=aligned.n_bytes,
            tokens=(len(aligned.scorer_ids), len(rollout.content_ids)),
            stop_a=proxy.stop if with_stop else None,
            stop_b=own.stop if with_stop else None,
            clip=cal.span_clip,
        )
        # with the same ids every span is a token; across tokenizers only allow_biased takes the
        # spans before a token's own as settled, which the proxy may still cut anew
        settled = None
        if self.same_ids or cal.allow_biased:
            settled = following_span(aligned.sampler_span, aligned.spans, len(rollout.ids))
        before = self._before(rollout, proxy, own.logp) if cal.credit == "prefix" else None
        score = calibration_score(scores, aligned.sampler_span, cal, settled, before)
        if not excess:
            return score
        unit = max(score.n_bytes, 1) if cal.score_norm == "per_byte" else 1
        return replace(
            score,
            value=score.value - excess / unit,
            raw=score.raw - excess,
            stop=score.stop - excess,
        )

    def _check_unaligned(self, unaligned: float, too_long: int, total: int) -> None:
        """ValueError above calibration.max_unaligned, over all ranks. too_long: of the unaligned,
        those that the proxy has no positions for.
        """
        count = max(self.engine.sum(float(total)), 1.0)
        fraction, limit = self.engine.sum(unaligned) / count, self.cfg.calibration.max_unaligned
        if fraction <= limit:
            return
        long, chat = self.engine.sum(float(too_long)) / count, self.proxy_chat
        why, fixes = [], []
        if long < fraction:
            why.append("do not round-trip through the proxy's tokenizer")
            fixes.append(f"To see examples:\n  {commands.check()}")
        if long:
            share = f" ({long:.0%})" if why else ""
            why.append(f"are longer than the {chat.positions} positions of {chat.path}{share}")
            fixes.insert(0, "Lower rollout.max_tokens, or take a proxy with a longer context.")
        raise ValueError(
            f"{fraction:.0%} of the rollouts {' or '.join(why)}; want at most {limit:.0%} "
            f"(calibration.max_unaligned). {' '.join(fixes)}"
        )


def _space_in_front(aligned: Aligned, proxy: Chat) -> bool | None:
    """Whether the proxy's tokenizer put a space before the text; None where its ids spell other
    bytes than the sampler's.
    """
    if aligned.parts is None:
        return None
    source, ids = aligned.parts[1].source, aligned.scorer_ids
    read = proxy.table.bytes_of(ids)
    if source is None or not proxy.table.lens[list(ids)].all():
        return None
    return True if read == b" " + source else False if read == source else None
