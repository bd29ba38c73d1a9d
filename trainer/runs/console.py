"""What a run prints: a line a step, its events and samples in words."""

from collections.abc import Mapping
from typing import Any

LOG = "run.jsonl"
LOG_ONLY = ("head", "resume", "directory")  # fields of events that the console does not show
SAMPLE_LOG_ONLY = ("spans", "extracted")  # the same of samples
# phases that do their work once, without steps: what they print it as, and pages with all of it
ONCE = {
    "evaluate": ("evaluation", "report.md and evaluation.json"),
    "diagnose": ("diagnosis", "report.md and diagnosis.json"),
    "cache": ("cache", ""),
}
FEW_NUMBERS = 8  # of an evaluation, beside its estimates; more are only counted

# Metrics of the console line, in this order, if a step has them: name -> label and format of a
# number. Parts of the loss ("loss/...") follow the loss. All other metrics are in the log only.
CONSOLE = {
    "loss": ("loss", "{:.4f}"),
    "reward/task": ("task", "{:.3f}"),
    "reward/cal": ("cal", "{:+.3f}"),
    "eta": ("eta", "{:g}"),
    "accuracy": ("correct", "{:.1%}"),
    "reference_kl": ("reference KL", "{:.4f}"),
    "kl": ("KL", "{:.4f}"),
    "grad_norm": ("grad", "{:.2f}"),
    "length": ("length", "{:.0f}"),
    "truncated": ("truncated", "{:.1%}"),
    "tokens_per_s": ("tok/s", "{:,.0f}"),
    "memory_gib": ("mem", "{:.1f} GiB"),
}


def step_line(step: int, total_steps: int, metrics: Mapping[str, Any], left: str) -> str:
    """left: the time until the last step."""
    parts = [f"step {step}/{total_steps}"]
    for name, (label, form) in CONSOLE.items():
        if name in metrics:
            parts.append(f"{label} {_word(metrics[name], form)}")
        if name == "loss":
            terms = sorted(key for key in metrics if key.startswith("loss/"))
            parts += [f"{key[5:]} {_word(metrics[key], form)}" for key in terms]
    return " | ".join([*parts, f"left {left}"])  # not "ETA": eta is a weight here


def _word(value: Any, form: str = "{:.4g}") -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return form.format(value) if number else str(value)


def event_lines(
    name: str, step: Any, fields: Mapping[str, Any], phase: str = "", folder: str = ""
) -> list[str]:
    """One line; of an evaluation one for each estimate with an interval, of verdicts one each.

    phase, folder: of the run; of one without steps its pages are named. folder = "": they are not.
    """
    shown = {key: v for key, v in fields.items() if key not in LOG_ONLY}
    if name == "eval" and phase in ONCE:
        what, pages = ONCE[phase]
        where = [f"    all of them: {folder}/{pages}"] if pages and folder else []
        return [f"{what}:", *_evaluation_lines(shown), *where]
    if name == "eval":
        return [f"evaluation after step {step}:", *_evaluation_lines(shown)]
    if name == "resume":
        return [_resumed(step, fields["lines_cut"])]
    if name == "accept":
        return ["acceptance:", *(f"    {k.removeprefix('accept/')} {v}" for k, v in shown.items())]
    if name == "alarm":  # "alarm of truncation: ..."
        kind = f" of {shown['alarm']}" if "alarm" in shown else ""
        return [f"alarm{kind}: {shown['message']}"]
    words = ", ".join(f"{key} {_word(v)}" for key, v in shown.items())
    return [f"{name}: {words}" if words else name]


def _resumed(step: int, lines_cut: int) -> str:
    begin = f"goes on after step {step}" if step else "begins again: no step was saved before"
    cut = f"; {lines_cut} lines of later steps were cut from {LOG}" if lines_cut else ""
    return f"resume: {begin}{cut}"


def _evaluation_lines(fields: Mapping[str, Any]) -> list[str]:
    """A table of the estimates with intervals; all other numbers are few, or counted."""
    estimates = [key for key in fields if f"{key}_low" in fields]
    ends = {f"{key}_{end}" for key in estimates for end in ("low", "high")}
    others = [key for key in fields if key not in ends and key not in estimates]
    names = {key: key.removeprefix("eval/") for key in fields}
    few = others if len(others) <= FEW_NUMBERS else []
    width = max((len(names[key]) for key in (*estimates, *few)), default=0)
    lines = [f"    {names[key]:<{width}}  {_estimate(fields, key)}" for key in estimates]
    lines += [f"    {names[key]:<{width}}  {_word(fields[key])}" for key in few]
    left = len(others) - len(few)
    return [*lines, f"    and {left} more numbers in {LOG}"] if left else lines


def _estimate(fields: Mapping[str, Any], key: str) -> str:
    mean, low, high = (_word(fields[key + end], "{:.3f}") for end in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"


def _visible(character: str) -> str:
    """Line breaks, escapes and other control characters as Python writes them."""
    return character if character.isprintable() else repr(character)[1:-1]


def shorten_sample(sample: Mapping[str, Any], width: int = 240) -> str:
    """One line a field; of a long text its beginning and its end, where the answer is."""
    rows = []
    for key, value in sample.items():
        if key in SAMPLE_LOG_ONLY:
            continue
        text = "".join(map(_visible, _word(plain(value))))
        if len(text) > width:
            text = f"{text[: width // 2]} ... {text[-width // 2 :]}"
        rows.append(f"    {key}: {text}")
    return "\n".join(rows)


def plain(value: Any) -> Any:
    """Scalars of torch and numpy as Python numbers."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
