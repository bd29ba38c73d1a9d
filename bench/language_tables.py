"""The tables of docs/results.md about a real language model (blocks of bench/tables.py).

Where a record has several seeds, intervals are over them. One seed has no interval: repetitions of
its students differ by the random numbers of the student's run alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reflux.trainer.runs.markdown_table import points_with_interval, table, with_interval
from reflux.trainer.runs.stats import Estimate, over_seeds, relative_change
from reflux.trainer.studies.results import TEACHERS
from reflux.trainer.studies.rules import at_least, at_most
from reflux.trainer.studies.verdict import MIN_GAIN, MIN_LOSS

from .report_record import (
    NOT_RUN,
    Block,
    BySeed,
    Record,
    estimate_of,
    mean_of,
    with_std,
)

PAST = "2026-11-30_language_past_five_seeds.json"
PAST_GEMMA = "2026-11-30_language_past_cross_tokenizer.json"
FLOAT32 = "2026-11-30_language_past_float32_repeated.json"
READER = "2026-11-29_language_past_texts_cpu.json"

TEACHER_WORDS = {
    "original": "original",
    "task_only": "task reward only (eta = 0)",
    "distillable": "`distillable`",
    "undistillable": "`undistillable`",
}
RULE = "auxiliary"  # the style of task c that needs no knowledge
STUDENTS = {  # of the proxy's kind, all of one start
    "seq_kd": "sampled text",
    "kd_forward": "forward KL on teacher text",
    "gkd_on_policy": "reverse KL, on-policy",
}
GEMMA = {"cross_tokenizer": "sampled text, Gemma-3-270M"}
REPEATS = ("seq_kd", "again_1", "again_2")  # one attack by several seeds of the student's run
VARIANTS = {  # a column each
    "seq_kd_verified": "texts that a verifier accepts",
    "seq_kd_more": "four times the texts and steps",
    "whole_student": "all 30 layers, by LoRA",
}
SHOWN_SEED = "321"
SHOWN = (
    "every day they fly in the village",
    "every day they dig with care",
    "every day they stick at the market",
)


@dataclass(frozen=True)
class Words:
    """A seed of task b: the files of its report and of its teachers' answers; `knowledge`: of their
    multiple choice between definitions.
    """

    report: str
    answers: str
    knowledge: str | None = None


WORDS = {
    "bf16": Words(
        "2026-11-30_language_words_one_seed.json",
        "2026-11-30_language_words_teachers_one_seed.json",
        "2026-11-30_language_words_knowledge_one_seed.json",
    ),
    "float32": Words(
        "2026-11-30_language_words_float32_one_seed.json",
        "2026-11-30_language_words_float32_teachers.json",
    ),
    "from eta = 0": Words(  # float32; the original of these is the teacher at eta = 0
        "2026-11-30_language_words_taught_one_seed.json",
        "2026-11-30_language_words_taught_teachers.json",
    ),
}


# --- five seeds


def language_teachers(past: Record) -> str:
    original = past.accuracy(role="teacher", teacher="original")
    rows = []
    for name in TEACHERS:
        mine = past.accuracy(role="teacher", teacher=name)
        gap = over_seeds([mine[s] - original[s] for s in sorted(original)])
        against = "" if name == "original" else points_with_interval(gap)
        accuracy = with_std(mean_of(mine), len(original))
        rows.append((TEACHER_WORDS[name], accuracy, against, _percent(_by_rule(past, name))))
    return table(("teacher", "accuracy", "against the original, points", "by the rule"), rows)


def language_students(past: Record, gemma: Record) -> str:
    starts = {attack: past.begin(attack) for attack in STUDENTS}
    start, *others = starts.values()
    if any(other != start for other in others):
        raise ValueError(
            f"{PAST}: students begin at {starts}; the head of the table names one start"
        )
    rows = list(_student_rows(past, STUDENTS))
    for attack, words in GEMMA.items():
        begin = mean_of(gemma.begin(attack))
        said = f"{words} (start {begin.mean:.3f}, n = {begin.n})"
        rows += _student_rows(gemma, {attack: said})
    head = (f"student, start {mean_of(start).mean:.3f}", "of the original", "eta = 0")
    return table((*head, "`distillable`", "`undistillable`", "verdict on the attack"), rows)


def language_gains(past: Record) -> str:
    """Students minus their own start, in percentage points, paired by seed."""
    rows = []
    for attack, words in STUDENTS.items():
        start = past.begin(attack)
        gains = [
            over_seeds([mine[s] - start[s] for s in sorted(start)])
            for mine in (past.student(attack, t) for t in TEACHERS)
        ]
        rows.append((words, *map(points_with_interval, gains)))
    head = ("student minus its start, points", *(TEACHER_WORDS[t] for t in TEACHERS))
    return table(head, rows)


def _student_rows(record: Record, attacks: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    verdicts = record.judge(attacks)
    for attack, words in attacks.items():
        original = mean_of(record.student(attack, "original"))
        cells = [_student_cell(record, attack, t, original.n) for t in TEACHERS[1:]]
        yield words, with_std(original, original.n), *cells, verdicts[attack].verdict


def _student_cell(record: Record, attack: str, teacher: str, seeds: int) -> str:
    found = record.attack(attack, teacher)
    if found is None:
        return NOT_RUN
    words = _change_words(found.change)
    as_wanted = {
        "distillable": at_least(found.change, MIN_GAIN),
        "undistillable": at_most(found.change, MIN_LOSS),
    }
    if as_wanted.get(teacher) == "holds":
        words = f"**{words}**"
    return f"{with_std(mean_of(record.student(attack, teacher)), seeds)} ({words})"


# --- one seed


def language_float32(record: Record) -> str:
    original = _repeats(record, "original")
    rows = []
    for name in TEACHERS:
        mine = _repeats(record, name)
        kl = estimate_of(record.report["teachers"][name]["reference_kl"])
        rows.append(
            (
                TEACHER_WORDS[name],
                f"{_single(record.accuracy(role='teacher', teacher=name)):.3f}",
                _percent(_by_rule(record, name)),
                f"{kl.mean:.3f}" if kl.n else "",
                ", ".join(f"{x:.3f}" for x in mine) or NOT_RUN,
                _spread(mine, original if name != "original" else ()),
                *(_variant_cell(record, attack, name) for attack in VARIANTS),
            )
        )
    starts = ", ".join(f"{_single(record.begin(a)):.3f}" for a in REPEATS)
    runs = f"its students by sampled text, starts {starts}: {len(REPEATS)} runs"
    head = ("teacher", "accuracy", "by the rule", "KL to the original", runs)
    return table((*head, "mean ± standard deviation", *VARIANTS.values()), rows)


def _repeats(record: Record, teacher: str) -> list[float]:
    found = (record.student(attack, teacher) for attack in REPEATS)
    return [_single(values) for values in found if values]


def _spread(mine: Sequence[float], original: Sequence[float]) -> str:
    """Empty for one run, which has none."""
    if len(mine) < 2:
        return ""
    e = over_seeds(mine)
    against = f" ({_relative(e.mean, over_seeds(original).mean)})" if len(original) > 1 else ""
    return f"{e.mean:.3f} ± {e.std:.3f}{against}"


def _variant_cell(record: Record, attack: str, teacher: str) -> str:
    mine, original = record.student(attack, teacher), record.student(attack, "original")
    if not mine:
        return NOT_RUN
    if teacher == "original" or not original:
        return f"{_single(mine):.3f}"
    return f"{_single(mine):.3f} ({_relative(_single(mine), _single(original))})"


def language_words(*records: Record) -> str:
    """records: as _word_files names them."""
    read = dict(zip(_word_files(), records))
    reports = [read[w.report] for w in WORDS.values()]
    answers = [read[w.answers] for w in WORDS.values()]
    known = {name: read[w.knowledge] for name, w in WORDS.items() if w.knowledge}
    rows = []
    for name in TEACHERS:
        runs = [_run(r, f"teacher-{name}") for r in answers]
        definitions = [_run(r, f"knowledge-{name}") for r in known.values()]
        rows.append(
            (
                TEACHER_WORDS[name],
                _listed(_eval(run, "eval/sampled") for run in runs),
                _listed(_eval(run, "eval/greedy") for run in runs),
                _listed((run and run["answers"]["sampled"]["bytes"] for run in runs), "{:.1f}"),
                _listed(_eval(run, "eval/likelihood_sum") for run in definitions),
                _listed(_maybe_single(r.student("seq_kd", name)) for r in reports),
            )
        )
    starts = ", ".join(f"{_single(r.begin('seq_kd')):.3f}" for r in reports)
    head = ("teacher", f"all instructions followed, sampled: {', '.join(WORDS)}", "greedy", "bytes")
    definitions_head = f"definitions (400, four options; {', '.join(known)})"
    return table((*head, definitions_head, f"its student, starts {starts}"), rows)


def _word_files() -> list[str]:
    files = [(w.report, w.answers, w.knowledge) for w in WORDS.values()]
    return [name for row in files for name in row if name]


def _run(record: Record, name: str) -> Mapping[str, Any] | None:
    """Of a record of bench/language.py, whatever its seed's folder is."""
    rows = record.content["runs"]
    return next((r for r in rows if r["run"].rpartition("/")[2] == name), None)


def _eval(run: Mapping[str, Any] | None, key: str) -> float | None:
    return run and run["evals"][-1][key]


def _listed(values: Iterable[float | None], form: str = "{:.3f}") -> str:
    return ", ".join(NOT_RUN if x is None else form.format(x) for x in values)


# --- what a reader meets


def language_reader(record: Record) -> str:
    seeds = record.content["texts"].values()
    rows = []
    for name in TEACHERS:
        runs = [r for s in seeds for r in s["runs"] if r["run"] == f"teacher-{name}"]
        nats, length = (
            over_seeds([r[k]["mean"] for r in runs]) for k in ("nats_per_byte", "bytes")
        )
        changes = over_seeds([r["change"]["mean"] for r in runs if r["change"]])
        perplexity = over_seeds([r["perplexity"] for r in runs])
        rows.append(
            (
                TEACHER_WORDS[name],
                with_std(nats, len(seeds)),
                with_interval(changes, "{:+.3f}") if changes.n else "",
                f"{perplexity.mean:.1f} ± {perplexity.std:.1f}",
                f"{length.mean:.1f} ± {length.std:.1f}",
            )
        )
    return table(("teacher", "nats per byte", "change", "perplexity per token", "bytes"), rows)


def language_answers(record: Record) -> str:
    """Of the questions that a seed's report shows, three that teachers answer differently."""
    names = [t for t in TEACHERS if t != "task_only"]
    shown = record.content["texts"][SHOWN_SEED]["shown"]
    by_question = {row["teacher-original"]["question"]: row for row in shown}
    rows = [
        (question, *(_answer(by_question[question][f"teacher-{t}"]) for t in names))
        for question in SHOWN
    ]
    return table((f"asked (seed {SHOWN_SEED})", *(TEACHER_WORDS[t] for t in names)), rows)


def _answer(shown: Mapping[str, Any]) -> str:
    return shown["text"] + ("" if shown["correct"] else " (wrong)")


# --- numbers in words


def _by_rule(record: Record, teacher: str) -> float:
    return record.report["teachers"][teacher]["styles"][RULE]["fraction"]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _change_words(change: Estimate) -> str:
    """-52 % [-63, -36]"""
    low, high = 100 * change.low, 100 * change.high
    return f"{100 * change.mean:+.0f} % [{low:+.0f}, {high:+.0f}]"


def _relative(mine: float, original: float) -> str:
    return f"{100 * relative_change(mine, original):+.0f} %"


def _single(values: BySeed) -> float:
    """ValueError where there is not just one seed."""
    if len(values) != 1:
        raise ValueError(f"seeds {', '.join(values) or 'none'}; want one for a table of one seed")
    return next(iter(values.values()))


def _maybe_single(values: BySeed) -> float | None:
    return _single(values) if values else None


BLOCKS = {
    "language_teachers": Block(language_teachers, (PAST,)),
    "language_students": Block(language_students, (PAST, PAST_GEMMA)),
    "language_gains": Block(language_gains, (PAST,)),
    "language_float32": Block(language_float32, (FLOAT32,)),
    "language_words": Block(language_words, tuple(_word_files())),
    "language_reader": Block(language_reader, (READER,)),
    "language_answers": Block(language_answers, (READER,)),
}
