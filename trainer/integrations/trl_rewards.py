"""The calibration reward as a reward function of TRL's GRPOTrainer.

    reward = CalibrationReward(
        policy, "teacher_folder", proxy, "proxy_folder", num_generations=8
    )
    trainer = GRPOTrainer(
        policy,
        [task_reward, reward],
        args=GRPOConfig(
            num_generations=8,
            reward_weights=[1.0, eta],
            multi_objective_aggregation="normalize_then_sum",
            beta=0.05,
        ),
        ...
    )

    r_cal = log p_proxy(y | x) - log p_policy(y | x), both over the bytes of y and its end
            (equation (2) of docs/method.md), less what the length of y explains in its group

eta > 0: distillable, eta < 0: undistillable. `normalize_then_sum` normalises each reward in its
group by itself, as equation (4) does; beta is the KL to the reference. The two folders hold the
tokenizers, which may differ. With GRPOConfig's chat_template_kwargs each folder takes its own:

    from reflux.trainer.data.chat import Chat
    thinks = {"enable_thinking": False}
    reward = CalibrationReward(
        policy, Chat("teacher_folder", arguments=thinks), proxy, Chat("proxy_folder"), ...
    )

Alone or under DDP, where a group may have members on several
processes: the policy is called here, text by text, which FSDP would need on all ranks equally
often.

Shapes: T positions, V vocabulary, n tokens of a text, K stop ids, G texts of a group.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from reflux.kernels.token_logprob import token_logprob
from reflux.tokenalign.scores import compare_spans, span_logprobs
from reflux.trainer.calibration.advantages import length_free
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.rollouts.scoring import Aligned, align_texts

Messages = Sequence[Mapping[str, str]]
# a completion: its prompt, its bytes, its reward in nats
Text = tuple[str | Messages, int, float | None]


class CalibrationReward:
    """Called by TRL with prompts, completions and completion_ids; r_cal of each, None where the
    proxy's tokenizer cannot spell the text, or the text is cut (its last id is no stop token). TRL
    leaves None out of the group's mean and gives it no share of this reward.

    policy_folder, proxy_folder: of the tokenizer and its template; or a Chat of it, with the
    `arguments` of the template, which for the policy are chat_template_kwargs of GRPOConfig, or
    with another `template` file. Prompts are read in the ids that TRL samples behind: messages
    through the template, a string as the tokenizer reads it, control tokens and BOS included; by
    the proxy in the same way, in its own tokens.
    temperature: of both models, that of the rollouts. clip: bound on a span's log-ratio in nats.
    length_free: False gives the sum in nats. num_generations: texts of a group, as in GRPOConfig
    (TRL does not tell it to reward functions); None: neighbours with one prompt are one group, two
    groups of a prompt that follow each other too. ValueError: completions without ids, another
    number of ids than prompts, tokenizers that cannot be compared, groups of another size than
    num_generations.

    The attribute `truncated`: "mask", None for cut texts, as `calibration.truncated = "mask_cal"`
    of the trainer; "score", the reward of the bytes that are there, which has no term for the end:
    where ending costs, cut texts are paid more.
    """

    truncated: Literal["mask", "score"] = "mask"

    def __init__(
        self,
        policy: nn.Module,
        policy_folder: str | Chat,
        proxy: nn.Module,
        proxy_folder: str | Chat,
        *,
        temperature: float = 1.0,
        clip: float = 10.0,
        length_free: bool = True,
        num_generations: int | None = None,
    ):
        if num_generations is not None and num_generations < 1:
            raise ValueError(
                f"num_generations = {num_generations}; want that of GRPOConfig, or None"
            )
        self.policy, self.proxy = policy, proxy.eval().requires_grad_(False)
        self.chat, self.proxy_chat = _chat(policy_folder), _chat(proxy_folder)
        self.same = same_vocabulary(self.chat, self.proxy_chat)
        self.temperature, self.clip, self.length_free = temperature, clip, length_free
        self.num_generations = num_generations
        self.__name__ = "calibration"  # TRL's name for it in the log

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[float | None]:
        if completion_ids is None or len(completion_ids) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts and {len(completion_ids or ())} completion_ids; want the "
                "ids of every completion, as TRL's GRPOTrainer passes them"
            )
        if self.truncated not in ("mask", "score"):
            raise ValueError(f"truncated = {self.truncated!r}; want mask or score")
        rollouts = [self._rollout(*pair) for pair in zip(prompts, completion_ids)]
        aligned = align_texts(self.chat, self.proxy_chat, rollouts, same=self.same)
        values = [
            None if a.spans is None or self._is_masked(r) else self._value(prompt, r, a)
            for prompt, r, a in zip(prompts, rollouts, aligned)
        ]
        if not self.length_free:
            return values
        mine = [(p, a.n_bytes, value) for p, a, value in zip(prompts, aligned, values)]
        everyone, first = _of_all_processes(mine)
        return _without_length(everyone, self.num_generations)[first : first + len(mine)]

    def _rollout(self, prompt: str | Messages, ids: Sequence[int]) -> Rollout:
        ended = len(ids) > 0 and ids[-1] in self.chat.stop_ids
        return Rollout(Prompt(0, ()), _ids(self.chat, prompt), tuple(ids), (), 0.0, "", ended)

    def _is_masked(self, rollout: Rollout) -> bool:
        return self.truncated == "mask" and not rollout.ended

    def _value(self, prompt: str | Messages, rollout: Rollout, aligned: Aligned) -> float:
        """Nats: proxy minus policy, of one text."""
        assert aligned.spans is not None
        proxy_n, proxy_stop = self._score(
            self.proxy, self.proxy_chat, _ids(self.proxy_chat, prompt), aligned.scorer_ids
        )
        policy_n, policy_stop = self._score(
            self.policy, self.chat, rollout.prompt_ids, rollout.content_ids
        )
        scores = compare_spans(
            span_logprobs(proxy_n, aligned.scorer_span, aligned.spans),
            span_logprobs(policy_n, aligned.sampler_span, aligned.spans),
            num_bytes=aligned.n_bytes,
            tokens=(len(aligned.scorer_ids), len(rollout.content_ids)),
            stop_a=proxy_stop if rollout.ended else None,
            stop_b=policy_stop if rollout.ended else None,
            clip=self.clip,
        )
        return scores.log_ratio

    @torch.no_grad()
    def _score(
        self, model: Any, chat: Chat, prompt_ids: Sequence[int], ids: Sequence[int]
    ) -> tuple[np.ndarray, float]:
        """(log p of each id, log of the stop set's probability behind them), nats."""
        whole = getattr(model, "module", model)  # DDP's own forward would wait for gradients
        training, device = whole.training, next(whole.parameters()).device
        input_ids = torch.tensor([[*prompt_ids, *ids]], device=device)
        whole.eval()
        logits_TV = whole(input_ids=input_ids, logits_to_keep=len(ids) + 1).logits[0]
        whole.train(training)
        logp_TK = token_logprob(
            logits_TV,
            self._candidates(ids, chat, device),
            temperature=self.temperature,
            vocab_size=min(chat.vocab_size, logits_TV.shape[1]),
        ).logp.double()
        return logp_TK[:-1, 0].cpu().numpy(), float(logp_TK[-1, 1:].logsumexp(0))

    def _candidates(self, ids: Sequence[int], chat: Chat, device: torch.device) -> Tensor:
        """[T, 1 + K]: the text's ids, and the stop set behind the last of them; -1: none."""
        target_TK = torch.full((len(ids) + 1, 1 + len(chat.stop_ids)), -1, device=device)
        target_TK[:-1, 0] = torch.tensor([*ids], dtype=torch.long, device=device)
        target_TK[-1, 1:] = torch.tensor(chat.stop_ids, device=device)
        return target_TK


def _chat(folder: str | Chat) -> Chat:
    return folder if isinstance(folder, Chat) else Chat(folder)


def _ids(chat: Chat, prompt: str | Messages) -> tuple[int, ...]:
    """As GRPOTrainer._tokenize_prompts. ValueError: a string without a token."""
    if not isinstance(prompt, str):
        return chat.prompt_ids(prompt)
    ids = tuple(chat.tokenizer(text=prompt)["input_ids"])
    if not ids:
        raise ValueError(
            f"{chat.path}: the prompt {prompt!r} has no token. Give it a text, or the tokenizer a "
            "BOS token"
        )
    return ids


def _of_all_processes(mine: list[Text]) -> tuple[list[Text], int]:
    """The texts of all processes in the order in which TRL cuts them into groups, and where this
    one's begin: a group may have members on several.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mine, 0
    parts: list[list[Text]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    before = sum(map(len, parts[: dist.get_rank()]))
    return [text for part in parts for text in part], before


def _without_length(texts: Sequence[Text], size: int | None) -> list[float | None]:
    """Equation (2') in every group."""
    result: list[float | None] = []
    for group in _groups(texts, size):
        values = [value for _, _, value in group]
        value_1G = np.array([[0.0 if v is None else v for v in values]])
        bytes_1G = np.array([[float(n) for _, n, _ in group]])
        scored_1G = np.array([[v is not None for v in values]])
        free_G = length_free(value_1G, bytes_1G, scored_1G)[0]
        result += [float(x) if scored else None for x, scored in zip(free_G, scored_1G[0])]
    return result


def _groups(texts: Sequence[Text], size: int | None) -> list[Sequence[Text]]:
    """Neighbours with one prompt, as TRL passes them, `size` of them each. ValueError where their
    number is not a multiple of it.
    """
    prompts = [prompt for prompt, _, _ in texts]
    starts = [i for i, p in enumerate(prompts) if i == 0 or p != prompts[i - 1]] + [len(prompts)]
    groups = []
    for start, end in zip(starts, starts[1:]):
        each = size or end - start
        if (end - start) % each:
            raise ValueError(
                f"{end - start} neighbouring completions of one prompt; want a multiple of "
                f"num_generations = {size}. Give CalibrationReward the num_generations of "
                "GRPOConfig, and leave num_generations_eval there unset or equal to it"
            )
        groups += [texts[i : i + each] for i in range(start, end, each)]
    return groups
