"""A diagnosis on disk: diagnosis.json, tokens.jsonl, report.md with its plots, heatmap.html. This
file computes the rows of report.md; report.md.jinja lays them out.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from reflux.trainer.config.schema import Config
from reflux.trainer.data.chat import Chat
from reflux.trainer.runs.files import write_json, write_whole
from reflux.trainer.runs.markdown_table import render_template, table

from .gradient_snr import GradientNoise
from .heatmap import heatmap_page
from .measure import SampledBy, TokenStats
from .metrics import DIVERGENCES
from .plots import plot_diagnosis
from .results import CrossTokenizer, Diagnosis, OffPolicy, measured
from .summary import SEQUENCE_SOURCE
from .symptoms import Confidence, Correction, Symptoms
from .token_rows import TextRow, token_rows
from .training_stability import TrainingStability

Rows = list[tuple[Any, ...]]
# whose texts the heatmap shows first
SHOWN: tuple[SampledBy, ...] = ("student", "teacher", "dataset")
PRESENT = {True: "**detected**", False: "not detected", None: "inconclusive"}


class Interval(Protocol):
    """A mean with its 95 % interval."""

    @property
    def mean(self) -> float: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


def write_texts(
    folder: Path, cfg: Config, stats: Sequence[TokenStats], chats: tuple[Chat, Chat]
) -> bool:
    """tokens.jsonl, and heatmap.html where it shows a text: whether it does. chats: student's and
    teacher's. Each file appears whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = token_rows(stats, *chats)
    lines = [json.dumps(measured(row), ensure_ascii=False) + "\n" for row in rows]
    write_whole(folder / "tokens.jsonl", "".join(lines))
    shown = every_writer(rows, cfg.diagnose.heatmap_texts)
    if shown:
        title = f"{cfg.model.path} (student) and {cfg.teacher.path} (teacher)"
        write_whole(folder / "heatmap.html", heatmap_page(shown, title))
    return bool(shown)


def write_results(cfg: Config, diagnosis: Diagnosis, *, heatmap: bool, whole: bool = True) -> None:
    """diagnosis.json, report.md and its plots. heatmap: is there a heatmap.html? whole: with what
    is measured last.
    """
    folder = Path(cfg.folder)
    write_json(folder / "diagnosis.json", measured(diagnosis))
    plots = plot_diagnosis(folder, diagnosis)
    write_whole(folder / "report.md", render(cfg, diagnosis, plots, heatmap, whole=whole))


def every_writer(rows: Sequence[TextRow], count: int) -> list[TextRow]:
    """The first `count` texts, one of each writer for a prompt before a second of any, in the order
    of their prompts.
    """
    seen: Counter[tuple[int, SampledBy]] = Counter()
    ranked = []
    for row in rows:
        ranked.append((seen[row.prompt, row.sampled_by], row))
        seen[row.prompt, row.sampled_by] += 1
    ranked.sort(key=lambda x: (x[0], x[1].prompt, SHOWN.index(x[1].sampled_by)))
    chosen = [row for _, row in ranked[:count]]
    return sorted(chosen, key=lambda row: (row.prompt, SHOWN.index(row.sampled_by)))


def render(
    cfg: Config,
    diagnosis: Diagnosis,
    plots: Mapping[str, str],
    heatmap: bool,
    *,
    whole: bool = True,
) -> str:
    """report.md: the verdict on one page, then the tables behind it. plots: file name -> title;
    heatmap: is there a heatmap.html? whole: else it says what is missing.
    """
    cross = diagnosis.cross_tokenizer
    return render_template(
        Path(__file__).with_name("report.md.jinja"),
        table=table,
        student=cfg.model.path,
        teacher=cfg.teacher.path,
        whole=whole,
        failed=diagnosis.failed_grades,
        verdict=_verdict(diagnosis),
        texts=_texts(diagnosis),
        cross_tokenizer=None if cross is None else _cross_tokenizer(cross),
        grid=_grid(diagnosis),
        tail_head=_tail_head(diagnosis),
        tail=_tail(diagnosis),
        types=_types(diagnosis),
        bands=_bands(diagnosis),
        off_policy=_off_policy(diagnosis.off_policy),
        runs=_runs(diagnosis.runs),
        gap=_gap(diagnosis),
        symptoms=_symptoms(diagnosis.symptoms),
        plots=plots,
        heatmap=heatmap,
    )


def estimate_text(e: Interval, digits: int = 3) -> str:
    """0.123 [0.100, 0.150]; in words where there is no number."""
    if math.isnan(e.mean):
        return "no number"
    if math.isnan(e.low):
        return f"{e.mean:.{digits}f} (no interval)"
    return f"{e.mean:.{digits}f} [{e.low:.{digits}f}, {e.high:.{digits}f}]"


def _number(x: float) -> str:
    return f"{x:.2f}" if math.isfinite(x) else "-"


def _verdict(diagnosis: Diagnosis) -> Rows:
    return [
        (
            t.trap,
            PRESENT[t.present] if t.missing is None else "not measured",
            f"{t.measure}: {estimate_text(t)}" if t.missing is None else t.measure,
            f"{t.reference:g}",
            t.advice,
        )
        for t in diagnosis.verdict
    ]


def _texts(diagnosis: Diagnosis) -> list[str]:
    return [
        f"{t.texts} given texts ({t.tokens} tokens)"
        if source == "dataset"
        else f"{t.texts} texts ({t.tokens} tokens, {t.prompts} prompts) by the {source}"
        for source, t in diagnosis.texts.items()
    ]


def _cross_tokenizer(c: CrossTokenizer) -> dict[str, Any]:
    by = ", ".join(f"{n} by the {source}" for source, n in c.unaligned_by.items())
    return {
        "student_bytes": f"{c.bytes_per_token.student:.2f}",
        "teacher_bytes": f"{c.bytes_per_token.teacher:.2f}",
        "positions": c.byte_positions,
        "compared": f"{c.compared:.1%}",
        "student_missing": f"{c.missing.student:.2%}",
        "teacher_missing": f"{c.missing.teacher:.2%}",
        "unaligned": f"{c.unaligned} texts" + (f" ({by})" if by else ""),
        "bits_per_byte_gap": [
            f"{estimate_text(e)} on texts by the {source}"
            for source, e in c.bits_per_byte_gap.items()
        ],
    }


def _grid(diagnosis: Diagnosis) -> Rows:
    rows: Rows = [
        (d, source, *map(estimate_text, (kl.per_token, kl.per_byte, kl.per_text)))
        for d in DIVERGENCES
        for source, kl in diagnosis.grid[d].items()
    ]
    return rows + [
        (f"{d}, sampled tokens only", SEQUENCE_SOURCE[d], "", "", estimate_text(kl.sampled_tokens))
        for d, kl in diagnosis.sequence.items()
    ]


def _tail_head(diagnosis: Diagnosis) -> tuple[str, ...]:
    return (
        "KL",
        f"classes that hold {diagnosis.tail['forward'].kl_fraction:.0%}",
        "gradient outside them",
        "tail-noise index",
        "tokens that hold 80 %",
    )


def _tail(diagnosis: Diagnosis) -> Rows:
    return [
        (
            d,
            f"{t.top_k} of {t.k[-1]}",
            f"{t.gradient_outside:.1%}",
            estimate_text(t.tail_noise_index, 2),
            f"{t.sparsity:.0%}",
        )
        for d, t in diagnosis.tail.items()
    ]


def _types(diagnosis: Diagnosis) -> Rows:
    forward, reverse = diagnosis.tail["forward"].types, diagnosis.tail["reverse"].types
    return [
        (
            name,
            f"{f.fraction:.1%}",
            f"{f.fraction_at_10:.1%}",
            f"{reverse[name].fraction:.1%}",
            f"{reverse[name].fraction_at_10:.1%}",
            f"{f.frequency:.1%}",
        )
        for name, f in forward.items()
    ]


def _bands(diagnosis: Diagnosis) -> Rows:
    """KL by how frequent a class is in the texts; frequencies are those of each divergence's own
    texts.
    """
    return [
        (
            name,
            d,
            f"{b.fraction:.1%}",
            f"{b.fraction_at_10:.1%}",
            f"{b.frequency:.1%}",
            _number(b.lift),
            _number(b.lift_at_10),
        )
        for d in DIVERGENCES
        for name, b in diagnosis.tail[d].bands.items()
    ]


def _off_policy(o: OffPolicy) -> Rows:
    rows: Rows = [
        (f"KL {d} on student / on teacher prefixes", estimate_text(e))
        for d, e in (o.prefix_ratio or {}).items()
    ]
    rows += [
        (
            f"KL {d}: change from first to last tenth, student prefixes (teacher prefixes)",
            f"{change.student:+.3f} ({change.teacher:+.3f})",
        )
        for d, change in (o.drift or {}).items()
    ]
    rows += [
        (f"effective fraction of teacher texts under the student, {name}", estimate_text(e))
        for name, e in (o.effective_samples or {}).items()
    ]
    if size := o.log_ratio:
        rows.append(
            (
                "log-ratio of the teacher's tokens, size in nats: mean; 99 % are below; largest",
                f"{estimate_text(size.mean)}; {size.p99:.2f}; {size.max:.2f}",
            )
        )
    return rows + (_gradient(o.gradient) if o.gradient else [])


def _gradient(gradient: GradientNoise) -> Rows:
    size = f"{gradient.batches} micro-batches, {gradient.texts_of_each} texts by each source"
    rows: Rows = []
    for d in DIVERGENCES:
        for source, tokens in gradient.tokens.items():
            if ratio := gradient.of(d).of(source):
                what = f"KL {d}, texts by the {source} ({size}, {tokens} tokens)"
                rows.append(
                    (f"signal to noise of the gradient, {what}", estimate_text(ratio.unbiased))
                )
    for d in DIVERGENCES:
        if difference := gradient.of(d).on_minus_off:
            what = f"KL {d}: student's texts - {difference.off}'s"
            rows.append((f"signal to noise of the gradient, {what}", estimate_text(difference)))
    return rows


def _runs(stability: TrainingStability | None) -> Rows:
    if stability is None:
        return []
    rows: Rows = [
        (
            r.folder,
            r.seed,
            r.steps,
            f"{r.unstable:.1%}",
            f"{r.worst:.1f}",
            ", ".join(f"{metric} {x:.3f}" for metric, x in r.scores.items()) or "-",
        )
        for r in stability.runs
    ]
    if len(rows) > 1:
        steps = sum(r.steps for r in stability.runs)
        score = stability.score
        last = f"{score.metric} {estimate_text(score)}, range {score.range:.3f}" if score else "-"
        unstable, worst = f"{stability.unstable:.1%}", f"{stability.worst:.1f}"
        rows.append(("all", "", steps, unstable, worst, last))
    return rows


def _gap(diagnosis: Diagnosis) -> Rows:
    g = diagnosis.gap
    rows: Rows = [
        ("top-K overlap", estimate_text(g.overlap)),
        ("teacher mass in the student's top K", estimate_text(g.teachable)),
        ("entropy of teacher - student, nats", estimate_text(g.entropy_gap)),
    ]
    if bits := g.correct_teacher_bits_per_byte:
        rows.append(
            (
                "correct teacher texts, bits per byte under the student (teacher)",
                f"{estimate_text(bits.student)} ({estimate_text(bits.teacher)})",
            )
        )
    if solved := g.on_solved_by_teacher:
        rows += [
            (
                f"student's pass@{solved.n} where the teacher was correct once "
                f"({solved.accuracy.n} prompts)",
                estimate_text(solved.pass_at_n),
            ),
            ("student's accuracy there", estimate_text(solved.accuracy)),
        ]
    if wrong := g.wrong_trace:
        rows += [
            (
                f"wrong-trace preference ({wrong.usable_prompts} prompts with correct and wrong "
                "texts)",
                estimate_text(wrong.pair),
            ),
            ("the same, pairs of like length", estimate_text(wrong.matched_pair)),
            ("margin of wrong over correct, nats/byte", estimate_text(wrong.margin)),
            ("pull towards wrong texts, nats/byte", estimate_text(wrong.pull)),
            ("bytes of wrong / correct texts", f"{wrong.length_gap:.2f}"),
        ]
    if g.degraded_prefix is not None:
        rows.append(("reverse KL on wrong / on correct texts", f"{g.degraded_prefix:.2f}"))
    return rows


def _symptoms(s: Symptoms) -> Rows:
    fractions = {
        "repeated 4-grams": s.repeated_4grams,
        "looping texts": s.looping,
        "truncated": s.truncated,
        "broken characters": s.broken_text,
        "finished texts without an answer": s.format_breaks,
        "sampled tokens outside the teacher's top-p 0.999 set": s.off_nucleus,
    }
    rows: Rows = [(title, f"{x:.1%}") for title, x in fractions.items() if x is not None]
    rows += _confidence(s.confidence) + _votes(s.vote_confidence)
    if g := s.sampling:
        rows.append(
            (
                "accuracy greedy - at temperature 1",
                f"{estimate_text(g.gap)} ({g.greedy.mean:.1%} - {g.sampled.mean:.1%})",
            )
        )
    if own := s.own_error:
        rows.append(
            (
                f"correct after half of its own wrong text ({own.texts} texts); from the start on "
                "the same prompts",
                f"{estimate_text(own.correct_after)}; {estimate_text(own.correct_from_the_start)}",
            )
        )
    if s.cuts_without_room:
        rows.append(("cuts left out, with no room for what follows", str(s.cuts_without_room)))
    return rows + _correction(s.correction)


def _confidence(c: Confidence | None) -> Rows:
    if c is None:
        return []
    return [
        ("wrong with confidence >= 0.9", f"{c.confident_wrong:.1%}"),
        ("mean confidence - accuracy", f"{c.overconfidence:+.3f}"),
        ("expected calibration error", f"{c.ece:.3f}"),
        ("AUROC of confidence", f"{c.auroc:.3f}"),
    ]


def _votes(c: Confidence | None) -> Rows:
    if c is None:
        return []
    return [
        ("votes as confidence: wrong with >= 0.9", f"{c.confident_wrong:.1%}"),
        ("votes as confidence: mean - accuracy of the winner", f"{c.overconfidence:+.3f}"),
        ("votes as confidence: calibration error, AUROC", f"{c.ece:.3f}, {_number(c.auroc)}"),
    ]


def _correction(c: Correction | None) -> Rows:
    if c is None:
        return []
    few = f" ({c.gains} cuts)" if c.gains < c.cuts else ""
    rows: Rows = [
        (
            f"correct after a clean prefix / after an error ({c.cuts} cuts)",
            f"{c.correct_after_clean:.1%} / {c.correct_after_error:.1%}",
        ),
        ("recovery", f"{c.recovery:.2f}"),
        ("texts that revise themselves", f"{c.revises:.1%}"),
    ]
    if c.gains:
        rows.append(
            (
                f"log p(correcting) - log p(going on), student (teacher), nats{few}",
                f"{c.student_gain:+.2f} ({c.teacher_gain:+.2f})",
            )
        )
    return rows
