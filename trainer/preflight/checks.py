"""What can be known before any weight is read: tokenizers, templates, data, grader (docs/method.md,
"Pre-flight").

Everything here returns Findings and loads nothing but tokenizers and rows. preflight.py adds memory
and the models.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.text import Text

from reflux.tokenalign.offsets import side
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import FrozenSection
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.data.tasks import build_task
from reflux.trainer.rollouts.generate import given_rollout
from reflux.trainer.rollouts.scoring import align_texts

FIRST_PROMPTS = 256  # rows whose length is measured
FIRST_TEXTS = 32  # texts that are graded and taken through both tokenizers
ACCEPTED = 0.9  # share of the data's own responses that a grader should call right
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKEN_COLOURS = ("black on bright_cyan", "black on bright_yellow")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "warning", "error"]
    what: str
    advice: str = ""


@dataclass(frozen=True)
class Role:
    """A model of the run and what it is for. `table` is the section of the config that names it."""

    name: str
    model: FrozenSection
    table: str
    trained: bool = False


def roles(cfg: Config) -> list[Role]:
    """The models that this configuration will load, the trained one first."""
    m, a = cfg.model, cfg.reference
    name = {
        "calibrate": "policy",
        "distill": "student",
        "diagnose": "student",
        "evaluate": "model",
    }[cfg.phase]
    own = FrozenSection(m.path, m.backend, m.attention)
    found = [Role(name, own, "model", trained=cfg.trains)]
    if cfg.phase == "calibrate" and (
        a.beta or cfg.calibration.eta and cfg.calibration.denominator == "reference"
    ):
        found.append(Role("reference", replace(own, dtype=a.dtype, offload=a.offload), "model"))
    if cfg.phase == "calibrate" and cfg.calibration.eta:
        found.append(Role("proxy", cfg.proxy, "proxy"))
    if cfg.needs_teacher:
        found.append(Role("teacher", cfg.teacher, "teacher"))
    if cfg.needs_teacher and cfg.phase == "distill":
        found += [
            Role(f"teacher {i}", replace(cfg.teacher, path=path), "distill.more_teachers")
            for i, path in enumerate(cfg.distill.more_teachers, 2)
        ]
    if cfg.defence.proxy:
        found.append(
            Role(
                "serving proxy",
                FrozenSection(cfg.defence.proxy, dtype=cfg.defence.dtype),
                "defence.proxy",
            )
        )
    return found


def missing(role: Role) -> Finding | None:
    """An error when the role's folder is no model folder."""
    if (Path(os.path.expanduser(role.model.path)) / "config.json").is_file():
        return None
    return Finding(
        "error",
        f"{role.name}: {role.table}.path = {role.model.path!r} has no config.json",
        f"set {role.table}.path to a local Hugging Face model folder",
    )


# Tokenizers


def open_chats(parts: Sequence[Role]) -> tuple[dict[str, Chat], list[Finding]]:
    """The tokenizer of every role that has one; roles of one folder share it."""
    by_path: dict[str, Chat] = {}
    chats, findings = {}, []
    for role in parts:
        path = os.path.expanduser(role.model.path)
        # transformers would invent an empty one
        if not any((Path(path) / file).is_file() for file in TOKENIZER_FILES):
            findings.append(_no_tokenizer(role, "none of " + ", ".join(TOKENIZER_FILES)))
            continue
        try:
            chats[role.name] = by_path[path] = by_path.get(path) or Chat(path)
        except (OSError, ValueError, ImportError) as error:
            findings.append(_no_tokenizer(role, _first_line(error)))
    return chats, findings


def _no_tokenizer(role: Role, why: str) -> Finding:
    return Finding(
        "error",
        f"{role.name}: no tokenizer in {role.table}.path = {role.model.path!r}: {why}",
        "put tokenizer.json and tokenizer_config.json beside the weights",
    )


def describe(chat: Chat, head_rows: int) -> dict[str, str]:
    """A tokenizer in words: family, size, special tokens by name and id, what ends a turn, padding
    of the head.
    """
    t = chat.tokenizer
    name = lambda i: "none" if i is None else f"{t.convert_ids_to_tokens(i)} {i}"
    try:
        family, print_ = chat.table.family, chat.table.fingerprint()[:12]
    except ValueError:
        family, print_ = "no byte table", "-"
    return {
        "family": family,
        "fingerprint": print_,
        "ids": str(chat.vocab_size),
        "head rows": str(head_rows),
        "padded columns": str(max(head_rows - chat.vocab_size, 0)),
        "BOS": name(t.bos_token_id),
        "EOS": name(t.eos_token_id),
        "pad": name(t.pad_token_id),
        "stop set": ", ".join(map(name, chat.stop_ids)),
        "ends a turn": name(chat.stop_id),
        "template": "yes" if t.chat_template else "none",
    }


def tokenizer_findings(role: Role, chat: Chat, head_rows: int) -> list[Finding]:
    """Ids without a row in the head, stop tokens that cannot be said, templates that never end a
    turn.
    """
    found = [_head_finding(role, chat, head_rows)]
    silent = [i for i in chat.stop_ids if i >= head_rows]
    if silent:
        found.append(
            Finding(
                "error",
                f"{role.name}: stop ids {silent} lie outside its head of {head_rows} rows",
                "take the tokenizer that belongs to the weights",
            )
        )
    if not chat.tokenizer.chat_template:
        found.append(
            Finding(
                "warning",
                f"{role.name}: no chat template; messages are joined by line breaks",
                "right for a base model. An instruct model needs its chat_template",
            )
        )
    elif chat.stop_id not in _rendered_turn(chat):
        found.append(
            Finding(
                "warning",
                f"{role.name}: its template ends a turn with no stop token; "
                f"{chat.tokenizer.convert_ids_to_tokens(chat.stop_id)!r} is used",
                "name the token that ends a turn in generation_config.json, eos_token_id",
            )
        )
    return found


def _head_finding(role: Role, chat: Chat, rows: int) -> Finding:
    if chat.vocab_size <= rows:
        return Finding(
            "ok",
            f"{role.name}: {chat.vocab_size} ids, {rows} head rows ({rows - chat.vocab_size} "
            "padded columns, never read)",
        )
    added = chat.tokenizer.added_tokens_decoder
    beyond = [i for i in range(rows, chat.vocab_size) if not (i in added and added[i].special)]
    if not beyond:
        return Finding(
            "warning",
            f"{role.name}: {chat.vocab_size - rows} special tokens beyond its head of {rows} rows",
            "harmless while prompts do not hold them",
        )
    return Finding(
        "error",
        f"{role.name}: its tokenizer has {chat.vocab_size} ids, its head {rows} rows",
        "take the tokenizer that belongs to the weights",
    )


def _rendered_turn(chat: Chat) -> list[int]:
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = chat.tokenizer.apply_chat_template(turn, tokenize=False)
    return chat.tokenizer(text[text.rindex("b") + 1 :], add_special_tokens=False)["input_ids"]


def pair(cfg: Config) -> tuple[str, str] | None:
    """Who writes and who reads the same text, by role name."""
    if cfg.phase == "calibrate" and cfg.calibration.eta:
        return "policy", "proxy"
    return ("student", "teacher") if cfg.needs_teacher else None


def share_ids(cfg: Config, chats: dict[str, Chat]) -> bool:
    """Whether the pair speaks in the same ids, by the rule of its phase."""
    writer, reader = (chats[name] for name in pair(cfg))
    if cfg.phase == "distill":
        return same_vocabulary(writer, reader)
    return writer is reader or writer.table.fingerprint() == reader.table.fingerprint()


def pair_findings(cfg: Config, chats: dict[str, Chat]) -> list[Finding]:
    """Identity of the pair's vocabularies by id map, never by size, and what the objective makes of
    it.
    """
    names = pair(cfg)
    if names is None or not set(names) <= chats.keys():
        return []
    a, b = (chats[name] for name in names)
    found = []
    if bool(a.tokenizer.chat_template) != bool(b.tokenizer.chat_template):
        found.append(
            Finding(
                "warning",
                f"only one of {names[0]} and {names[1]} has a chat template",
                "a base model beside an instruct model reads prompts it was not trained on",
            )
        )
    broken = [f for name in names for f in _table_error(name, chats[name])]
    if broken and (
        cfg.phase in ("calibrate", "diagnose") or cfg.distill.objective in ("span", "class")
    ):
        return found + broken
    same = share_ids(cfg, chats)
    words = (
        "the same id -> token map"
        if same
        else f"different tokenizers ({_differing(a, b)} ids differ)"
    )
    what = f"{names[0]} and {names[1]}: {words}"
    if cfg.phase == "distill" and cfg.distill.objective == "kl" and not same:
        return [
            *found,
            Finding(
                "error",
                what,
                "distill.objective = 'kl' compares token by token; use 'class' or 'span', or a "
                "teacher of the student's family",
            ),
        ]
    if cfg.phase == "distill" and cfg.distill.objective in ("span", "class") and same:
        return [
            *found,
            Finding(
                "warning",
                what,
                "distill.objective = 'kl' is exact here; "
                f"{cfg.distill.objective!r} is for different tokenizers",
            ),
        ]
    if not same and cfg.phase == "calibrate" and cfg.calibration.score_norm == "per_token":
        return [
            *found,
            Finding(
                "warning",
                what,
                "calibration.score_norm = 'per_token' counts different tokens on the two "
                "sides; use 'sum' or 'per_byte'",
            ),
        ]
    return [*found, Finding("ok", what)]


def _table_error(name: str, chat: Chat) -> list[Finding]:
    try:
        chat.table  # noqa: B018  built and verified on first use
        return []
    except ValueError as error:
        return [
            Finding(
                "error",
                f"{name}: {_first_line(error)}",
                "its texts cannot be aligned by bytes; take another model",
            )
        ]


def _differing(a: Chat, b: Chat) -> int:
    x, y = ({i: piece for piece, i in chat.tokenizer.get_vocab().items()} for chat in (a, b))
    return sum(x.get(i) != y.get(i) for i in x.keys() | y.keys())


# Data


def first_prompts(cfg: Config) -> tuple[list[Prompt], list[Finding]]:
    """The first rows of the data (of the held-out set when the phase only evaluates)."""
    d = cfg.eval if cfg.phase == "evaluate" else cfg.data
    limit = min(d.limit or FIRST_PROMPTS, FIRST_PROMPTS)
    try:
        prompts = list(load_prompts(d.source, split=d.split, columns=d.columns, limit=limit))
    except (OSError, ValueError, ImportError) as error:
        table = "eval" if cfg.phase == "evaluate" else "data"
        return [], [
            Finding(
                "error",
                f"{table}.source = {d.source!r} cannot be read: {_first_line(error)}",
                "lengths, grader and texts are not checked",
            )
        ]
    return prompts, []


def length_findings(
    cfg: Config,
    chats: dict[str, Chat],
    prompts: Sequence[Prompt],
    seq_len: int,
    limits: dict[str, int],
) -> list[Finding]:
    """Whether prompt + rollout.max_tokens fits: the trained model's rows are training.seq_len + 1
    tokens at most.

    limits: positions that a role's model has (max_position_embeddings), by role name.
    """
    found = []
    for name, chat in chats.items():
        own = name in ("policy", "student", "model")
        room = seq_len + 1 if own else limits[name]
        if name == "reference" or not prompts:
            continue
        lengths = [len(chat.prompt_ids(p.messages)) for p in prompts]
        longest, most = max(lengths), cfg.rollout.max_tokens
        over = sum(n + most > room for n in lengths) / len(lengths)
        knob = "training.seq_len + 1" if own else "positions of the model"
        what = (
            f"{name}: longest of the first {len(prompts)} prompts {longest} + rollout.max_tokens "
            f"{most} = {longest + most} tokens, {knob} {room}"
        )
        if over:
            fix = (
                f"set training.seq_len >= {longest + most - 1}"
                if own
                else "take a model with a longer context"
            )
            found.append(
                Finding(
                    "error" if own else "warning",
                    f"{what}: {over:.1%} of the prompts are too long",
                    f"{fix}, lower rollout.max_tokens, or leave long prompts out",
                )
            )
        else:
            found.append(Finding("ok", what))
    return found


def references(
    cfg: Config, chat: Chat, prompts: Sequence[Prompt]
) -> tuple[list[Rollout], list[Finding]]:
    """The data's own responses that fit into rollout.max_tokens, as the trained model would read
    them.
    """
    with_text = [p for p in prompts if p.response is not None][:FIRST_TEXTS]
    texts = [given_rollout(chat, p, cfg.rollout.max_tokens) for p in with_text]
    whole = [t for t in texts if t.ended]
    if len(whole) == len(texts):
        return whole, []
    share = 1 - len(whole) / len(texts)
    return whole, [
        Finding(
            "warning",
            f"{share:.1%} of the first {len(texts)} responses are cut at rollout.max_tokens = "
            f"{cfg.rollout.max_tokens}",
            "raise rollout.max_tokens; truncated texts teach no ending",
        )
    ]


def task_findings(cfg: Config, texts: Sequence[Rollout]) -> list[Finding]:
    """The grader must accept the data's own responses."""
    if not cfg.task.name:
        return []
    if cfg.task.name == "reward_model":
        return [Finding("ok", "task reward_model: no right or wrong to check")]
    try:
        task = build_task(cfg.task.name, cfg.task.options)
    except (OSError, ValueError, ImportError) as error:
        return [Finding("error", f"task: {_first_line(error)}", "mend task.name or task.options")]
    if not texts:
        return [
            Finding(
                "warning",
                f"task {cfg.task.name}: the data has no responses to grade",
                "the grader is not checked; a `response` column with right answers would do it",
            )
        ]
    grades = task.grade(texts)
    failed = next((g.error for g in grades if g.error is not None), None)
    if failed is not None:
        return [
            Finding(
                "error",
                f"task {cfg.task.name}: the grader failed on the data's own response: {failed}",
                "a failed grade is reward 0; mend the grader",
            )
        ]
    graded = [g.correct for g in grades if g.correct is not None]
    if not graded:
        mean = sum(g.reward for g in grades) / len(grades)
        return [
            Finding(
                "ok",
                f"task {cfg.task.name}: mean reward {mean:.3g} on the data's own {len(grades)} "
                "responses",
            )
        ]
    return [_acceptance(cfg.task.name, graded, texts, grades)]


def _acceptance(task: str, graded: list[bool], texts: Sequence[Rollout], grades: list) -> Finding:
    share = sum(graded) / len(graded)
    what = f"task {task}: accepts {sum(graded)} of the data's own {len(graded)} responses"
    if share >= ACCEPTED:
        return Finding("ok", what)
    at = next(k for k, g in enumerate(grades) if g.correct is False)
    example = (
        f"prompt {texts[at].prompt.index}: {_short(texts[at].text)}, found "
        f"{grades[at].extracted!r}, want {texts[at].prompt.answer!r}"
    )
    return Finding(
        "warning" if share else "error",
        f"{what}; {example}",
        "check task.name, task.options (marker, pattern) and the answer column",
    )


# Texts through two tokenizers


def alignment_findings(
    cfg: Config, chats: dict[str, Chat], texts: Sequence[Rollout]
) -> list[Finding]:
    """The first text cut into the spans both tokenizers share, and the share of texts that do not
    round-trip.
    """
    names = pair(cfg)
    needed = names and (
        cfg.phase in ("calibrate", "diagnose") or cfg.distill.objective in ("span", "class")
    )
    if not needed or not texts or share_ids(cfg, chats):
        return []
    writer, reader = (chats[name] for name in names)
    texts = list(texts)[:FIRST_TEXTS]
    lossy = [
        t
        for t in texts
        if t.ended and not side(writer.table, t.content_ids, t.text.encode()).reproduces
    ]
    aligned = align_texts(writer, reader, texts, same=False)
    failed = [t for t, a in zip(texts, aligned) if a.spans is None or t in lossy]
    found = [_round_trip(cfg, names, len(failed), texts, failed[0].text if failed else "")]
    shown = next(((t, a) for t, a in zip(texts, aligned) if a.spans), None)
    if shown:
        found.append(_alignment(names, writer, *shown))
    return found


def _round_trip(
    cfg: Config, names: tuple[str, str], failed: int, texts: Sequence[Rollout], example: str
) -> Finding:
    share = failed / len(texts)
    what = (
        f"{names[0]} -> {names[1]}: {share:.1%} of the first {len(texts)} texts do not round-trip"
    )
    if not failed:
        return Finding("ok", what)
    allowed = cfg.calibration.max_unaligned if cfg.phase == "calibrate" else 0.5
    return Finding(
        "error" if share > allowed else "warning",
        f"{what}, the first: {_short(example)}",
        "one tokenizer changes the text (normaliser, unknown characters); such texts "
        "are not scored. "
        "Take a model with a lossless tokenizer, or clean the data",
    )


def _alignment(names: tuple[str, str], writer: Chat, text: Rollout, aligned) -> Finding:
    lens = writer.table.lens[list(text.content_ids)]
    covered = int(lens[aligned.sampler_span >= 0].sum())
    return Finding(
        "ok",
        f"{names[0]} {len(text.content_ids)} tokens, {names[1]} {len(aligned.scorer_ids)} tokens "
        f"-> {aligned.spans} shared spans over {covered} of {aligned.n_bytes} bytes (coverage "
        f"{covered / max(aligned.n_bytes, 1):.0%}): {_short(text.text)}",
    )


def render(chat: Chat, prompt: Prompt, response: str, *, colour: bool) -> Text:
    """One example as this role reads it: prompt dim, response tokens alternating (no loss outside
    them), stop marked.

    Without colour every response token stands in square brackets and the stop token in double angle
    brackets.
    """
    out = Text(chat.tokenizer.decode(list(chat.prompt_ids(prompt.messages))), style="dim")
    for k, i in enumerate(chat.encode(response)):
        piece = chat.table.pieces[i].decode("utf-8", "backslashreplace")
        out.append(piece if colour else f"[{piece}]", style=TOKEN_COLOURS[k % 2])
    stop = chat.tokenizer.convert_ids_to_tokens(chat.stop_id)
    out.append(stop if colour else f"«{stop}»", style="bold white on red")
    return out


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:400]


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
