"""The first prompts, the data's own responses, and what the grader says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from reflux.trainer.config.data import SourceSection
from reflux.trainer.config.guard_schedule import utility_guard_gap
from reflux.trainer.config.parts import input_name, part_configs, tasks
from reflux.trainer.config.phases import spec_of
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import TaskSection
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.failed_grades import count_failed
from reflux.trainer.data.fitted_prompts import training_listing
from reflux.trainer.data.graders import Grade, has_answer
from reflux.trainer.data.prompts import Prompts, load_prompts
from reflux.trainer.data.row_checks import NEEDS_ANSWER
from reflux.trainer.data.sources import source_files
from reflux.trainer.data.tasks import task_grader
from reflux.trainer.data.unused import named_columns
from reflux.trainer.rollouts.generate import given_rollout

from .report import Finding, first_line, short

FIRST_PROMPTS = 256  # rows whose texts are looked at
FIRST_TEXTS = 32  # responses that are graded
ACCEPTED = 0.9  # fraction of the data's own responses that a grader should call correct


def first_prompts(cfg: Config) -> tuple[list[Prompt], list[Finding]]:
    """The first rows of the phase's own prompts."""
    section = spec_of(cfg.phase).data_section
    parts, prompts, findings = part_configs(cfg, section), [], []
    for name, alone in parts.items():
        d = alone.eval if section == "eval" else alone.data
        limit = min(d.limit or FIRST_PROMPTS, FIRST_PROMPTS)
        listing = None if section == "eval" else training_listing(alone)
        where = input_name(section, name)
        try:
            named = named_columns(cfg)
            rows = load_prompts(d, limit=limit, listing=listing, named=named)
            prompts += [replace(p, part=name) for p in rows]
            findings.append(_shape_finding(where, rows))
        except (OSError, ValueError, ImportError) as error:
            what = f"{where}.source = {d.name!r} cannot be read: {first_line(error)}"
            advice = "lengths, grader and texts are not checked"
            return [], [*findings, Finding("error", what, advice)]
    return prompts, findings


def held_out_findings(cfg: Config) -> list[Finding]:
    """An evaluation that asks what the run is trained on."""
    trained = {x for s in (cfg.data, *cfg.data.parts.values()) for x in _inputs(s)}
    asked = {x for s in (cfg.eval, *cfg.eval.parts.values()) for x in _inputs(s)}
    if not (cfg.trains and (both := sorted(trained & asked))):
        return []
    advice = "accuracy is then that of questions it was trained on; hold some out"
    return [Finding("warning", f"[data] and [eval] both read {both[0]}", advice)]


def guard_findings(cfg: Config) -> list[Finding]:
    """A guard that is on and cannot act."""
    gap = utility_guard_gap(cfg)
    if gap is None:
        return []
    what, _, advice = gap.partition(". ")
    return [Finding("warning", what, f"s{advice[1:]}")]


def _inputs(section: SourceSection) -> set[str]:
    """The files of a source, or its name with what is taken of it."""
    if not section.source:
        return set()
    files = {str(file.resolve()) for file in source_files(section.source)}
    return files or {f"{section.name} {section.subset} {section.split}"}


def _shape_finding(section: str, prompts: Prompts) -> Finding:
    """What the columns were taken for."""
    first = prompts[0]
    has = [name for name in ("answer", "response") if getattr(first, name) is not None]
    rest = f"; not used: {', '.join(first.extra)}" if first.extra else ""
    what = f"{section}: rows of shape {prompts.shape}, with {' and '.join(has) or 'prompts only'}"
    return Finding("ok", f"{what}{rest}. The first: {short(first.question)}")


def control_findings(chats: Mapping[str, Chat], prompts: Sequence[Prompt]) -> list[Finding]:
    """Prompts that write out a control token of a model. The model reads it as the token, which can
    end the user's turn and open another one; a model without it reads letters.
    """
    findings = []
    for chat in {c.path: c for c in chats.values()}.values():
        tokens = chat.tokenizer.added_tokens_decoder.values()
        names = [token.content for token in tokens if token.special]
        found = [
            (prompt, name)
            for prompt in prompts
            for name in names
            if any(name in m["content"] for m in prompt.messages)
        ]
        if found:
            count = len({(p.part, p.index) for p, _ in found})
            prompt, name = found[0]
            what = (
                f"{count} of the first {len(prompts)} prompts write out a control token of "
                f"{chat.path}, prompt {prompt.index} {name!r}: it is read as the token"
            )
            advice = "leave these rows out, unless the data mean it so"
            findings.append(Finding("warning", what, advice))
    return findings


def given_responses(
    cfg: Config, chat: Chat, prompts: Sequence[Prompt]
) -> tuple[list[Rollout], list[Finding]]:
    """The data's own responses that fit into rollout.max_tokens, in the tokens of `chat`."""
    with_text = [p for p in prompts if p.response is not None][:FIRST_TEXTS]
    texts = [given_rollout(chat, p, cfg.rollout.max_tokens) for p in with_text]
    whole = [t for t in texts if t.ended]
    if len(whole) == len(texts):
        return whole, []
    what = (
        f"{1 - len(whole) / len(texts):.1%} of the first {len(texts)} responses are cut at "
        f"rollout.max_tokens = {cfg.rollout.max_tokens}"
    )
    advice = "raise rollout.max_tokens; a truncated text has no stop token to learn"
    return whole, [Finding("warning", what, advice)]


def task_findings(cfg: Config, texts: Sequence[Rollout]) -> list[Finding]:
    """Whether the graders accept the data's own responses."""
    findings = []
    for part, task in _tasks_of(cfg).items():
        findings += _task_findings(task, _graded(cfg, part, task, texts))
    return findings


def _graded(cfg: Config, part: str, task: TaskSection, texts: Sequence[Rollout]) -> list[Rollout]:
    """Those of the part; where grades are only shown, without the rows that have no answer, which
    are left out there (length_checks.py names them).
    """
    spec, mine = spec_of(cfg.phase), [t for t in texts if t.prompt.part == part]
    if spec.data_section == "eval" or spec.grades(cfg) or task.name not in NEEDS_ANSWER:
        return mine
    return [t for t in mine if has_answer(t.prompt)]


def _tasks_of(cfg: Config) -> dict[str, TaskSection]:
    """Of the parts whose prompts are looked at."""
    parts = part_configs(cfg, spec_of(cfg.phase).data_section)
    return {name: task for name, task in tasks(cfg).items() if name in parts and task.name}


def _task_findings(task: TaskSection, texts: Sequence[Rollout]) -> list[Finding]:
    try:
        grader = task_grader(task)
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # a device without room
        return [Finding("error", f"task: {first_line(error)}", "mend task.name or task.options")]
    if not texts and task.name == "reward_model":
        return [Finding("ok", "task reward_model: its grades have no correct and incorrect")]
    if not texts:
        return [
            Finding(
                "warning",
                f"task {task.name}: the data has no responses to grade",
                "the grader is not checked; a `response` column with correct answers would do it",
            )
        ]
    return _grader_findings(task, texts, grader.grade(texts))


def sampled_findings(cfg: Config, texts: Sequence[Rollout]) -> list[Finding]:
    """Whether the graders grade at all, on texts of the model where the data have none."""
    whole = [replace(t, ended=True) for t in texts]  # cut short by this check, not by the model
    findings = []
    for part, task in _tasks_of(cfg).items():
        mine = _graded(cfg, part, task, whole)
        if mine:
            grades = task_grader(task).grade(mine)
            findings += _failed_findings(task, grades)
    return findings


def _failed_findings(task: TaskSection, grades: Sequence[Grade]) -> list[Finding]:
    """Failed grades: an error above the budget of a run, else a warning."""
    counts = count_failed(g.error for g in grades if g.graded)
    if not counts.failed:
        return []
    try:
        counts.check(task.name, task.max_failed)
    except ValueError as error:
        return [Finding("error", str(error), "the run would end so")]
    what = f"task {task.name}: grading failed on {counts.failed} of {counts.graded} texts"
    return [Finding("warning", f"{what}: {counts.first_error}", "they will leave their groups")]


def _grader_findings(
    task: TaskSection, texts: Sequence[Rollout], grades: Sequence[Grade]
) -> list[Finding]:
    failed = _failed_findings(task, grades)
    pairs = [(t, g) for t, g in zip(texts, grades) if not g.failed]
    graded = [(t, g) for t, g in pairs if g.correct is not None]
    if not pairs:
        return failed
    if not graded:
        mean = sum(g.reward for _, g in pairs) / len(pairs)
        what = f"task {task.name}: mean reward {mean:.3g} on the data's own {len(pairs)} responses"
        return [*failed, Finding("ok", what)]
    accepted = sum(bool(g.correct) for _, g in graded)
    what = f"task {task.name}: accepts {accepted} of the data's own {len(graded)} responses"
    if accepted / len(graded) >= ACCEPTED:
        return [*failed, Finding("ok", what)]
    text, grade = next((t, g) for t, g in graded if not g.correct)
    example = (
        f"prompt {text.prompt.index}: {short(text.text)}, extracted {grade.extracted!r}, want "
        f"{text.prompt.answer!r}"
    )
    wrong = Finding(
        "warning" if accepted else "error",
        f"{what}; {example}",
        "check task.name, task.options (marker, pattern) and the answer column",
    )
    return [*failed, wrong]
