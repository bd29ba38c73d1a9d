"""The two models that score the same texts: whether they share token ids, and how well texts align
where they do not.
"""

from collections.abc import Mapping, Sequence

from reflux.tokenalign.offsets import side
from reflux.tokenalign.vocab_map import first_merge
from reflux.trainer.config.phases import pair_of, spec_of
from reflux.trainer.config.roles import Pair
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Rollout
from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.data.stop_sets import name_them, stop_advice, tokens_in_words, unknown_stops
from reflux.trainer.rollouts.scoring import Aligned, align_texts

from .report import Finding, first_line, short

FIRST_TEXTS = 32  # texts that are aligned


def shares_ids(pair: Pair, chats: Mapping[str, Chat]) -> bool:
    """Whether the pair has the same token ids, by the rule of its phase."""
    a, b = chats[pair.sampled_by], chats[pair.scored_by]
    if pair.same_ids == "vocabulary":
        return same_vocabulary(a, b)
    return a is b or a.table.fingerprint() == b.table.fingerprint()


def pair_findings(cfg: Config, chats: Mapping[str, Chat]) -> list[Finding]:
    """Whether the pair's vocabularies are the same, id by id, and what the phase makes of it."""
    pair = pair_of(cfg)
    if pair is None or not {pair.sampled_by, pair.scored_by} <= chats.keys():
        return []
    a, b = chats[pair.sampled_by], chats[pair.scored_by]
    findings = []
    if bool(a.tokenizer.chat_template) != bool(b.tokenizer.chat_template):
        findings.append(
            Finding(
                "warning",
                f"only one of {pair.sampled_by} and {pair.scored_by} has a chat template",
                "a base model beside an instruct model gets prompts it was not trained on",
            )
        )
    broken = [f for name in (pair.sampled_by, pair.scored_by) for f in _table_error(name, chats)]
    if broken and (pair.aligned or pair.same_ids == "bytes"):
        return findings + broken
    same = shares_ids(pair, chats)
    different = f"different tokenizers ({_differing(a, b)} ids differ)"
    what = f"{pair.sampled_by} and {pair.scored_by}: " + (
        "the same id -> token map" if same else different
    )
    merge = first_merge(a.table) if pair.aligned and not same else None
    advice = spec_of(cfg.phase).pair_advice(cfg, same, merge)
    if advice is None:
        return [*findings, Finding("ok", what)]
    return [*findings, Finding(advice.level, what, advice.text)]


def stop_findings(cfg: Config, chats: Mapping[str, Chat]) -> list[Finding]:
    """Of every teacher with the student's ids that ends texts with tokens at which the student does
    not stop.
    """
    student = chats.get("student")
    teachers = [name for name in chats if name.split()[0] == "teacher"]
    if student is None:
        return []
    return [
        _stop_finding(cfg, student, chats[name], name)
        for name in teachers
        if same_vocabulary(student, chats[name]) and unknown_stops(student, chats[name])
    ]


def _stop_finding(cfg: Config, student: Chat, teacher: Chat, name: str) -> Finding:
    unknown = unknown_stops(student, teacher)
    what = (
        f"{name} stops at {tokens_in_words(teacher, unknown)}, the student at "
        f"{tokens_in_words(student, student.stop_ids)}"
    )
    if not cfg.trains:
        fix = name_them(student, unknown)
        return Finding("warning", what, f"they would differ at the end of every text. {fix}")
    advice = stop_advice(cfg.distill.objective, student, teacher)
    if advice is None:
        return Finding("ok", f"{what}: texts that the student learns end with its own")
    return Finding(advice.level, what, advice.text)


def _table_error(name: str, chats: Mapping[str, Chat]) -> list[Finding]:
    """An error for a tokenizer whose ids do not spell its texts."""
    try:
        chats[name].table.fingerprint()  # the table is built and verified on first use
    except ValueError as error:
        return [
            Finding(
                "error",
                f"{name}: {first_line(error)}",
                "its texts cannot be aligned by bytes; take another model",
            )
        ]
    return []


def _differing(a: Chat, b: Chat) -> int:
    x, y = ({i: piece for piece, i in chat.tokenizer.get_vocab().items()} for chat in (a, b))
    return sum(x.get(i) != y.get(i) for i in x.keys() | y.keys())


def alignment_findings(
    cfg: Config, chats: Mapping[str, Chat], texts: Sequence[Rollout]
) -> list[Finding]:
    """The fraction of texts that do not round-trip through both tokenizers, and the first text cut
    into the spans that both share.
    """
    pair = pair_of(cfg)
    if pair is None or not pair.aligned or not texts or shares_ids(pair, chats):
        return []
    sampler, scorer = chats[pair.sampled_by], chats[pair.scored_by]
    texts = list(texts)[:FIRST_TEXTS]
    aligned = align_texts(sampler, scorer, texts, same=False)
    failed = [t for t, a in zip(texts, aligned) if a.spans is None or _is_lossy(sampler, t)]
    findings = [_round_trip(pair, len(texts), failed)]
    shown = next(((t, a) for t, a in zip(texts, aligned) if a.spans), None)
    if shown:
        findings.append(_alignment(pair, sampler, *shown))
    return findings


def _is_lossy(chat: Chat, text: Rollout) -> bool:
    """Whether the ids of a text that ended do not spell it."""
    if not text.ended:
        return False
    return not side(chat.table, text.content_ids, text.text.encode()).reproduces


def _round_trip(pair: Pair, count: int, failed: Sequence[Rollout]) -> Finding:
    fraction = len(failed) / count
    what = (
        f"{pair.sampled_by} -> {pair.scored_by}: {fraction:.1%} of the first {count} texts do not "
        "round-trip"
    )
    if not failed:
        return Finding("ok", what)
    return Finding(
        "error" if fraction > pair.max_unaligned else "warning",
        f"{what}, the first: {short(failed[0].text)}",
        "one tokenizer changes the text (normaliser, unknown characters); such texts are not "
        "scored. Take a model with a lossless tokenizer, or clean the data",
    )


def _alignment(pair: Pair, sampler: Chat, text: Rollout, aligned: Aligned) -> Finding:
    lens = sampler.table.lens[list(text.content_ids)]
    covered = int(lens[aligned.sampler_span >= 0].sum())
    return Finding(
        "ok",
        f"{pair.sampled_by} {len(text.content_ids)} tokens, {pair.scored_by} "
        f"{len(aligned.scorer_ids)} tokens -> {aligned.spans} shared spans over {covered} of "
        f"{aligned.n_bytes} bytes (coverage {covered / max(aligned.n_bytes, 1):.0%}): "
        f"{short(text.text)}",
    )
