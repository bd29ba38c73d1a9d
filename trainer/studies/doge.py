"""A lowering rival: Defensive Output Generation (Li et al., arXiv:2505.19504). The teacher's last
linear layer, and nothing else, is tuned against a frozen proxy:

    python -m reflux.trainer.studies.doge --teacher FOLDER --proxy FOLDER --data FILE --out FOLDER

    L = mean_t [- log p_T(y_t)] - weight mean_t KL(p_T^(1/alpha) || p_P^(1/alpha))

y worked answers, T the teacher, P the proxy with the teacher's vocabulary, alpha the temperature of
both softmaxes; both means over the response tokens. The first term keeps the teacher right on the
answers, the second drives it away from what the proxy would say. In their code the divergence is
taken over the whole vocabulary, from the teacher to the proxy, at every token unless a mask leaves
the final answer out. [ours]: no mask, because in the miniatures the steps are the answer, so the
price in accuracy is theirs with a mask at best; a head that is tied to the embedding is untied
first, so that only the head moves.

Writes a model folder with the teacher's tokenizer, and doge.json.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.runs.files import to_json, write_json

from .worked_answers import WorkedAnswer, batches, load_answers, load_model, save_model


@dataclass(frozen=True)
class DogeSettings:
    """weight and temperature as in the equation; rows of a batch, AdamW's learning rate, seed."""

    weight: float = 0.03
    temperature: float = 2.0
    steps: int = 100
    rows: int = 64
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self):
        for name in ("temperature", "steps", "rows", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"doge: {name} = {getattr(self, name)}; want > 0")
        if self.weight < 0:
            raise ValueError(
                f"doge: weight = {self.weight}; want >= 0. A weight below 0 is distillation"
            )


@dataclass(frozen=True, eq=False)
class DogeLoss:
    """nats a response token."""

    total: Tensor
    nll: Tensor
    kl: Tensor  # of the softened distributions, teacher to proxy


def doge_loss(
    teacher_TV: Tensor, proxy_TV: Tensor, target_T: Tensor, weight: float, temperature: float
) -> DogeLoss:
    """The equation above, from logits [T, V]; gradients reach the teacher's alone. The KL is of the
    ids that both heads have: they may be padded beyond the tokenizer's.
    """
    nll = cross_entropy(teacher_TV, target_T)
    V = min(teacher_TV.shape[1], proxy_TV.shape[1])
    log_t_TV = (teacher_TV[:, :V] / temperature).log_softmax(1)
    log_p_TV = (proxy_TV[:, :V].detach() / temperature).log_softmax(1)
    kl = (log_t_TV.exp() * (log_t_TV - log_p_TV)).sum(1).mean()
    return DogeLoss(nll - weight * kl, nll, kl)


def only_head(model: Any) -> nn.Parameter:
    """The head's weight, untied from the embedding where it is tied; the rest is frozen."""
    head = model.get_output_embeddings()
    model.requires_grad_(False)
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    head.weight.requires_grad_(True)
    return head.weight


def tune(model: Any, proxy: Any, answers: list[WorkedAnswer], spec: DogeSettings) -> list[DogeLoss]:
    """Trains the model's head in place; the loss of every step, detached."""
    optimizer = torch.optim.AdamW([only_head(model)], lr=spec.lr, weight_decay=0.0)
    losses: list[DogeLoss] = []
    epoch = 0
    while len(losses) < spec.steps:
        for batch in batches(answers, spec.rows, seed=spec.seed * 1000 + epoch):
            with torch.no_grad():
                proxy_TV = batch.logits_of(proxy)
            loss = doge_loss(
                batch.logits_of(model), proxy_TV, batch.target_T, spec.weight, spec.temperature
            )
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            losses.append(DogeLoss(*(x.detach() for x in (loss.total, loss.nll, loss.kl))))
            if len(losses) == spec.steps:
                break
        epoch += 1
    return losses


def write_teacher(teacher: str, proxy: str, data: Path, out: Path, spec: DogeSettings) -> None:
    """The tuned teacher and doge.json in `out`. ValueError where the vocabularies differ."""
    chat = Chat(teacher)
    if not same_vocabulary(chat, Chat(proxy)):
        raise ValueError(
            f"doge: proxy {proxy!r} has another vocabulary than teacher {teacher!r}: the KL "
            "compares token by token. Want a proxy with the teacher's tokenizer"
        )
    model = load_model(teacher)
    losses = tune(model, load_model(proxy), load_answers(data, chat), spec)
    save_model(model, out, teacher)
    first, last = ({"nll": float(x.nll), "kl": float(x.kl)} for x in (losses[0], losses[-1]))
    write_json(out / "doge.json", to_json(spec) | {"first": first, "last": last})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.doge",
        description="Tune a teacher's head against a proxy (arXiv:2505.19504).",
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--proxy", required=True)
    parser.add_argument("--data", type=Path, required=True, help="JSON lines: prompt, response")
    parser.add_argument("--out", type=Path, required=True)
    for name, kind in (
        ("weight", float),
        ("temperature", float),
        ("steps", int),
        ("rows", int),
        ("lr", float),
        ("seed", int),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(DogeSettings, name))
    args = parser.parse_args(arguments)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        spec = DogeSettings(
            args.weight, args.temperature, args.steps, args.rows, args.lr, args.seed
        )
        write_teacher(args.teacher, args.proxy, args.data, args.out, spec)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
