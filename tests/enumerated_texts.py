"""Small worlds in which every text can be listed, so that expectations are sums: two vocabularies
that cut a text longest-first, the policy's trajectories and the proxy's scores of them.

S: spans. T: tokens of the policy, its stop token included.
"""

from dataclasses import dataclass

import numpy as np
import torch
from byte_cases import masses_of, tokens_of
from vocab_pairs import longest_first, table_of

from reflux.tokenalign.byte_trie import ByteTrie
from reflux.tokenalign.byte_windows import byte_windows, settled_prefix_logp
from reflux.tokenalign.credit import following_span
from reflux.tokenalign.next_byte import next_byte_ref
from reflux.tokenalign.offsets import side
from reflux.tokenalign.scores import sequence_scores
from reflux.tokenalign.spans import align_spans
from reflux.tokenalign.vocab_map import Vocabulary

# (policy, proxy): merges of 2 and 3 bytes on either side and on both
MERGES = {
    "no merge": (["a", "b"], ["a", "b"]),
    "the proxy merges 2": (["a", "b"], ["a", "b", "ab"]),
    "the proxy merges 3": (["a", "b"], ["a", "b", "aba"]),
    "the proxy merges 2 and 3": (["a", "b"], ["a", "b", "ab", "bab"]),
    "the policy merges 2": (["a", "b", "ab"], ["a", "b"]),
    "the policy merges 3": (["a", "b", "aba"], ["a", "b"]),
    "both merge 2": (["a", "b", "ab"], ["a", "b", "ba"]),
    "both merge 3": (["a", "b", "aba"], ["a", "b", "bab"]),
    "words": (["un", "it", "happy", "a"], ["un", "unit", "happy", "it", "a", "ita"]),
    "a proxy that never merges across a comma": (["a", "b", ","], ["a", "b", ",", "ab"]),
}


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One sampled text, ended by the stop id len(policy) or cut after the most tokens."""

    ids: tuple[int, ...]
    prob: float
    value_S: np.ndarray  # log q - log p of each span, clipped
    bounds: np.ndarray  # [S]
    span: np.ndarray  # [content tokens]
    end: float  # of the stop term; 0 if the text was cut

    @property
    def total(self) -> float:
        return float(self.value_S.sum() + self.end)

    @property
    def following(self) -> np.ndarray:
        """[T] the spans that end before each token."""
        return following_span(self.span, len(self.value_S), len(self.ids))


class World:
    """All texts of at most `tokens` policy tokens; both models' conditionals are random, one for
    every history.
    """

    def __init__(self, policy: list[str], proxy: list[str], *, seed=0, tokens=3, clip=0.0):
        self.policy, self.proxy, self.tokens, self.clip = policy, proxy, tokens, clip
        self.rng = np.random.default_rng(seed)
        self.logp: dict[tuple[int, ...], np.ndarray] = {}
        self.logq: dict[tuple[int, ...], np.ndarray] = {}
        self.tables = [table_of([p.encode() for p in pieces]) for pieces in (proxy, policy)]
        self.trajectories = [self._scored(ids) for ids in self._listed(())]

    def _listed(self, history):
        if len(history) == self.tokens:
            return [history]
        stop = len(self.policy)
        longer = [t for i in range(stop) for t in self._listed((*history, i))]
        return ([(*history, stop)] if history else []) + longer

    def _conditional(self, known, history, count):
        """log-probabilities of `count` pieces and, but at the start of a text, the stop."""
        if history not in known:
            logits = self.rng.normal(size=count + bool(history)) * 1.5
            known[history] = logits - np.logaddexp.reduce(logits)
        return known[history]

    def _logp(self, known, ids, count):
        return np.array([self._conditional(known, ids[:t], count)[i] for t, i in enumerate(ids)])

    def _scored(self, ids):
        stop = len(self.policy)
        ended = ids[-1] == stop
        content = ids[:-1] if ended else ids
        text = "".join(self.policy[i] for i in content)
        read = longest_first(text, self.proxy)
        if ended:
            read = (*read, len(self.proxy))
        logp = self._logp(self.logp, ids, stop)
        logq = self._logp(self.logq, read, len(self.proxy))
        sides = (
            side(table, list(x)[: len(x) - ended], text.encode())
            for table, x in zip(self.tables, (read, ids))
        )
        (alignment,) = align_spans(*([s] for s in sides))
        cut = -1 if ended else None
        scores = sequence_scores(alignment, logq[:cut], logp[:cut], clip=self.clip)
        end = float(logq[-1] - logp[-1]) if ended else 0.0
        prob = float(np.exp(logp.sum()))
        return Trajectory(ids, prob, scores.span_ratio, alignment.bounds, alignment.span_b, end)

    def prefixes(self, trajectory: Trajectory, exact: bool) -> tuple[np.ndarray, np.ndarray]:
        """[T] log-probabilities of what stands before each token, of the proxy and the policy:
        the proxy's by all covers, or by the windows of its one reading of the text.
        """
        ids, stop = trajectory.ids, len(self.policy)
        own = self._logp(self.logp, ids, stop)
        content = [i for i in ids if i != stop]
        starts = np.cumsum([0, *(len(self.policy[i]) for i in content)])[: len(ids)]
        text = "".join(self.policy[i] for i in content)
        value = self._covered if exact else self._settled_values
        return value(text)[starts], np.cumsum(own) - own

    def _covered(self, text: str) -> np.ndarray:
        """Independent of what follows a prefix by definition."""
        count = len(self.proxy)
        vocabulary = Vocabulary(self.tables[0], [count])

        def conditional(history):
            row = np.exp(self._conditional(self.logq, history, count))
            return np.append(row, [0.0] * (count + 1 - len(row)))

        def value(prefix):
            return np.log(next_byte_ref(conditional, vocabulary, prefix).prefix)

        return np.array([value(text[:k].encode()) for k in range(len(text) + 1)])

    def _settled_values(self, text: str) -> np.ndarray:
        count = len(self.proxy)
        trie = ByteTrie.of(Vocabulary(self.tables[0], [count]))
        read = (*longest_first(text, self.proxy), count)
        rows = [self._conditional(self.logq, read[:t], count) for t in range(len(read))]
        prob = np.array([[*np.exp(x), *[0.0] * (count + 1 - len(x))] for x in rows])
        windows = byte_windows(trie, tokens_of([read]))
        masses = masses_of(windows, trie, torch.from_numpy(prob))
        return settled_prefix_logp(windows, masses).numpy()

    def settled(self, trajectory: Trajectory) -> np.ndarray:
        """[T] by the definition: the spans in front that are the same in every continuation."""
        counts = []
        for t in range(len(trajectory.ids)):
            among = [x for x in self.trajectories if x.ids[:t] == trajectory.ids[:t]]
            count = 0
            while count < trajectory.following[t] and all(
                len(x.value_S) > count
                and x.bounds[count] == trajectory.bounds[count]
                and x.value_S[count] == trajectory.value_S[count]
                for x in among
            ):
                count += 1
            counts.append(count)
        return np.array(counts)

    def gradient(self, credit) -> np.ndarray:
        """The expected policy gradient in the logits of all histories; credit(x) -> [T]."""
        got = {h: np.zeros_like(row) for h, row in self.logp.items()}
        for x in self.trajectories:
            for h, part in self._terms(x, credit):
                got[h] += x.prob * part
        return np.concatenate([got[h] for h in sorted(got)])

    def variance(self, credit) -> float:
        """Of the gradient of one sampled text, summed over the logits."""
        square = sum(
            x.prob * sum((part**2).sum() for _, part in self._terms(x, credit))
            for x in self.trajectories
        )
        return float(square - (self.gradient(credit) ** 2).sum())

    def _terms(self, x: Trajectory, credit):
        """(history, gradient in its logits) of one text; its histories are distinct."""
        for t, (i, c) in enumerate(zip(x.ids, credit(x), strict=True)):
            score = -np.exp(self.logp[x.ids[:t]])
            score[i] += 1
            yield x.ids[:t], c * score
