"""A diagnosis on disk: diagnosis.json, tokens.jsonl, report.md with its plots, heat.html."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reflux.trainer.config.schema import Config
from reflux.trainer.data.chat import Chat
from reflux.trainer.runs.markdown_table import table, write_json, write_whole

from .heatmap import heat_page
from .measure import DIRECTIONS, TokenStats
from .plots import plot_diagnosis
from .summary import estimate_text

STOP = "<stop>"  # how a span page shows the end of a text


def write_diagnosis(
    folder: Path,
    cfg: Config,
    found: dict[str, Any],
    readings: Sequence[TokenStats],
    chats: tuple[Chat, Chat],
) -> None:
    """Everything a person or a program wants to know later. chats: student's and teacher's. Files
    appear whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = token_rows(readings, *chats)
    write_whole(
        folder / "tokens.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    write_json(folder / "diagnosis.json", found)
    plots = plot_diagnosis(folder, found)
    shown = [
        row
        for writer in ("student", "teacher", "dataset")
        for row in rows
        if row["writer"] == writer
    ][: cfg.diagnose.heatmap_texts]
    if shown:
        write_whole(
            folder / "heat.html",
            heat_page(shown, f"{cfg.model.path} (student) and {cfg.teacher.path} (teacher)"),
        )
    write_whole(folder / "report.md", render(cfg, found, plots, bool(shown)))


def token_rows(readings: Sequence[TokenStats], chat: Chat, teacher_chat: Chat) -> list[dict]:
    """One row a text for tokens.jsonl: every per-token number, rounded to six digits. Of two
    tokenizers the unit is a span: `pieces` are the spans' texts, and KLs are null where the two
    cannot be compared.
    """
    return [
        _span_row(r, chat, teacher_chat)
        if r.across
        else {
            **_row(r),
            "pieces": _spell(chat, r.rollout.ids),
            "overlap": _numbers(r.overlap_n),
            **{f"kl_{d}": _numbers(kl) for d, kl in r.kl.items()},
        }
        for r in readings
    ]


def _row(r: TokenStats) -> dict:
    return {
        "prompt": r.rollout.prompt.index,
        "writer": r.writer,
        "right": r.right,
        "answer": r.answer,
        "text": r.rollout.text,
        "ids": list(r.rollout.ids),
        "student_logp": _numbers(r.student_n),
        "teacher_logp": _numbers(r.teacher_n),
        **({} if r.outside_n is None else {"outside_nucleus": [int(x) for x in r.outside_n]}),
    }


def _span_row(r: TokenStats, chat: Chat, teacher_chat: Chat) -> dict:
    a, spans = r.across, len(r.student_n)
    sides = []
    for c, ids, span in (
        (chat, r.rollout.content_ids, a.student_span),
        (teacher_chat, a.teacher_ids, a.teacher_span),
    ):
        pieces = _spell(c, ids)
        sides.append([[pieces[i] for i in np.flatnonzero(span == s)] for s in range(spans)])
    text = r.rollout.text.encode()
    ends = [*r.start_n[1:].tolist(), r.n_bytes]
    units = [text[b:e].decode(errors="replace") for b, e in zip(r.start_n.tolist(), ends)]
    if r.rollout.ended:
        units[-1] = STOP
        for side, c in zip(sides, (chat, teacher_chat)):
            side[-1] = _spell(c, [c.stop_id])
    kls: dict[str, list] = {f"kl_{d}": [None] * spans for d in r.kl}
    for d, kl in r.kl.items():
        for s, value in zip(a.place_span.tolist(), _numbers(kl)):
            kls[f"kl_{d}"][s] = value
    return {
        **_row(r),
        "teacher_ids": list(a.teacher_ids),
        "pieces": units,
        "student_pieces": sides[0],
        "teacher_pieces": sides[1],
        "student_span": a.student_span.tolist(),
        "teacher_span": a.teacher_span.tolist(),
        **kls,
    }


def _spell(chat: Chat, ids: Sequence[int]) -> list[str]:
    """Tokens as text; a control token, which spells nothing, by its id."""
    return [chat.table.pieces[i].decode(errors="replace") for i in ids]


def _numbers(x: Sequence[float]) -> list[float]:
    return [round(float(v), 6) for v in x]


def render(cfg: Config, found: Mapping[str, Any], plots: Mapping[str, str], heat: bool) -> str:
    """report.md: the verdict on one page, then the tables behind it."""
    parts = [
        f"# Diagnosis: student `{cfg.model.path}`, teacher `{cfg.teacher.path}`",
        _verdict(found),
        _texts(found),
        _across(found),
        _grid(found),
        _tail(found),
        _off_policy(found),
        _runs(found),
        _gap(found),
        _symptoms(found),
    ]
    parts += [f"![{title}]({name})" for name, title in plots.items()]
    if heat:
        parts.append(
            "Some texts, token by token: [heat.html](heat.html). Every number of every token: "
            "`tokens.jsonl`."
        )
    parts.append(
        "Intervals are 95 %, bootstrapped over prompts (gradients: jackknife over micro-batches; "
        "runs: Student's t). KL forward is teacher || student, reverse student || teacher, in "
        "nats. Definitions: docs/method.md."
    )
    return "\n\n".join(p for p in parts if p) + "\n"


def _verdict(found: Mapping[str, Any]) -> str:
    said = {True: "**caught**", False: "not caught", None: "unknown"}
    rows = [
        (
            t["trap"],
            said[t["present"]],
            f"{t['measure']}: {estimate_text(t)}",
            f"{t['reference']:g}",
            t["advice"],
        )
        for t in found["verdict"]
    ]
    return table(("trap", "", "measured", "healthy pair", "what to do"), rows)


def _texts(found: Mapping[str, Any]) -> str:
    return (
        "Measured on "
        + ", ".join(
            f"{t['texts']} texts ({t['tokens']} tokens, {t['prompts']} prompts) by the {w}"
            if w != "dataset"
            else f"{t['texts']} given texts ({t['tokens']} tokens)"
            for w, t in found["texts"].items()
        )
        + "."
    )


def _across(found: Mapping[str, Any]) -> str:
    """What two tokenizers leave of it, and what is not defined for them."""
    a = found.get("across")
    if not a:
        return ""
    return (
        f"Two tokenizers. Log-probabilities are those of {a['spans']} common byte spans "
        f"({a['student_tokens_per_span']:.2f} tokens of the student and "
        f"{a['teacher_tokens_per_span']:.2f} of the teacher each, stopping is one "
        'more); "tokens" below are spans. KLs are taken where both have read the same '
        f"bytes, at {a['places']} span starts ({a['compared']:.0%} of the spans, "
        f"{a['compared_bytes']:.0%} of the bytes), between the masses of the longest tokens "
        "that both vocabularies have, and the stop set: lower bounds of finer KLs (tokens "
        f"that both have hold {a['common_mass']['student']:.1%} of the student's mass there "
        f"and {a['common_mass']['teacher']:.1%} of the teacher's). {_unaligned(a)}. Entropies "
        "and overlaps are those of the classes; a KL of whole texts from exact terms is not "
        "defined. Bits per byte, student - teacher: "
        + ", ".join(
            f"{estimate_text(e)} on texts by the {w}" for w, e in a["bits_per_byte_gap"].items()
        )
        + "."
    )


def _unaligned(a: Mapping[str, Any]) -> str:
    by = (
        f" ({', '.join(f'{n} by the {w}' for w, n in a['unaligned_by'].items())})"
        if a["unaligned"]
        else ""
    )
    return (
        f"{a['unaligned']} texts{by} could not be aligned and are left out of all but the symptoms"
    )


def _grid(found: Mapping[str, Any]) -> str:
    rows = [
        (d, w, *(estimate_text(cell[unit]) for unit in ("per_token", "per_byte", "per_text")))
        for d in DIRECTIONS
        for w, cell in found["grid"][d].items()
    ]
    rows += [
        (
            f"{d}, sampled tokens only",
            f"{'teacher' if d == 'forward' else 'student'}",
            "",
            "",
            estimate_text(s["sampled_tokens"]),
        )
        for d, s in found["sequence"].items()
    ]
    return "## KL by direction and prefix\n\n" + table(
        ("KL", "prefix by", "per token", "per byte", "per text"), rows
    )


def _tail(found: Mapping[str, Any]) -> str:
    rows = []
    for d, t in found["tail"].items():
        rows.append(
            (
                d,
                f"{t['k_share']} of {t['k'][-1]}",
                f"{t['gradient_outside']:.1%}",
                estimate_text(t["tail_noise_index"], 2),
                f"{t['sparsity']:.0%}",
            )
        )
    share = next(iter(found["tail"].values()))["share"]
    types = [
        (
            name,
            *(
                f"{found['tail'][d]['types'][name][key]:.1%}"
                for d in DIRECTIONS
                for key in ("share", "share_at_10")
            ),
            f"{found['tail']['forward']['types'][name]['frequency']:.1%}",
        )
        for name in found["tail"]["forward"]["types"]
    ]
    head = (
        "KL",
        f"classes that hold {share:.0%}",
        "gradient outside them",
        "tail-noise index",
        "tokens that hold 80 %",
    )
    return "\n\n".join(
        filter(
            None,
            (
                "## Tail noise",
                table(head, rows),
                table(
                    (
                        "token type",
                        "forward KL",
                        "in the first 10",
                        "reverse KL",
                        "in the first 10",
                        "frequency",
                    ),
                    types,
                ),
                _bands(found),
            ),
        )
    )


def _bands(found: Mapping[str, Any]) -> str:
    """KL by how frequent a class is in the texts; frequencies are those of each direction's own
    texts.
    """
    rows = [
        (
            name,
            d,
            f"{b['share']:.1%}",
            f"{b['share_at_10']:.1%}",
            f"{b['frequency']:.1%}",
            _number(b["lift"]),
            _number(b["lift_at_10"]),
        )
        for d in DIRECTIONS
        for name, b in found["tail"][d]["bands"].items()
    ]
    head = (
        "classes by frequency",
        "KL",
        "share of it",
        "in the first 10",
        "of the tokens",
        "lift",
        "in the first 10",
    )
    return table(head, rows) if rows else ""


def _number(x: float) -> str:
    return f"{x:.2f}" if math.isfinite(x) else "-"


def _off_policy(found: Mapping[str, Any]) -> str:
    o = found["off_policy"]
    rows = [
        (f"KL {d} on student / on teacher prefixes", estimate_text(e))
        for d, e in o.get("prefix_ratio", {}).items()
    ]
    rows += [
        (
            f"KL {d}: change from first to last tenth, student prefixes (teacher prefixes)",
            f"{s['student']:+.3f} ({s['teacher']:+.3f})",
        )
        for d, s in o.get("drift", {}).items()
    ]
    rows += [
        (f"effective share of teacher texts under the student, {name}", estimate_text(e))
        for name, e in o.get("effective_samples", {}).items()
    ]
    if size := o.get("log_ratio"):
        rows.append(
            (
                "log-ratio of the teacher's tokens, size in nats: mean; 99 % are below; largest",
                f"{estimate_text(size['mean'])}; {size['p99']:.2f}; {size['max']:.2f}",
            )
        )
    rows += _gradient(o.get("gradient"))
    return "## Off-policy instability\n\n" + table(("measure", "value"), rows) if rows else ""


def _gradient(gradient: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not gradient:
        return []
    size = f"{gradient['batches']} micro-batches, {gradient['texts_of_each']} texts by each writer"
    rows = [
        (
            f"signal to noise of the gradient, KL {d}, texts by the {w} ({size}, {tokens} tokens)",
            estimate_text(gradient[d][w]["unbiased"]),
        )
        for d in DIRECTIONS
        for w, tokens in gradient["tokens"].items()
    ]
    return rows + [
        (
            f"signal to noise of the gradient, KL {d}: student's texts - "
            f"{gradient[d]['on_minus_off']['off']}'s",
            estimate_text(gradient[d]["on_minus_off"]),
        )
        for d in DIRECTIONS
        if "on_minus_off" in gradient[d]
    ]


def _runs(found: Mapping[str, Any]) -> str:
    r = found.get("runs")
    if not r:
        return ""
    rows = [
        (
            x["folder"],
            x["seed"],
            x["steps"],
            f"{x['unstable']:.1%}",
            f"{x['worst']:.1f}",
            ", ".join(f"{m} {v:.3f}" for m, v in x["scores"].items()) or "-",
        )
        for x in r["runs"]
    ]
    if len(r["runs"]) > 1:
        score = r["score"]
        rows.append(
            (
                "all",
                "",
                sum(x["steps"] for x in r["runs"]),
                f"{r['unstable']:.1%}",
                f"{r['worst']:.1f}",
                f"{score['metric']} {estimate_text(score)}, range {score['range']:.3f}"
                if score
                else "-",
            )
        )
    head = (
        "run",
        "seed",
        "steps",
        "gradient norm over 10 x running median",
        "largest / median norm",
        "last score",
    )
    return "## Finished distillations of this pair\n\n" + table(head, rows)


def _gap(found: Mapping[str, Any]) -> str:
    g = found["gap"]
    rows = [
        ("top-K overlap", estimate_text(g["overlap"])),
        ("teacher mass in the student's top K", estimate_text(g["teachable"])),
        ("entropy of teacher - student, nats", estimate_text(g["entropy_gap"])),
    ]
    if bits := g.get("right_teacher_bits_per_byte"):
        rows.append(
            (
                "right teacher texts, bits per byte under the student (teacher)",
                f"{estimate_text(bits['student'])} ({estimate_text(bits['teacher'])})",
            )
        )
    if solved := g.get("on_solved_by_teacher"):
        rows += [
            (
                f"student's pass@{solved['n']} where the teacher was right once "
                f"({solved['accuracy']['n']} prompts)",
                estimate_text(solved["pass_at_n"]),
            ),
            ("student's accuracy there", estimate_text(solved["accuracy"])),
        ]
    if wrong := g.get("wrong_trace"):
        rows += [
            (
                f"wrong-trace preference ({wrong['usable_prompts']} prompts with right and wrong "
                "texts)",
                estimate_text(wrong["pair"]),
            ),
            ("the same, pairs of like length", estimate_text(wrong["matched_pair"])),
            ("margin of wrong over right, nats/byte", estimate_text(wrong["margin"])),
            ("pull towards wrong texts, nats/byte", estimate_text(wrong["pull"])),
            ("bytes of wrong / right texts", f"{wrong['length_gap']:.2f}"),
        ]
    if "degraded_prefix" in g:
        rows.append(("reverse KL on wrong / on right texts", f"{g['degraded_prefix']:.2f}"))
    return "## Teacher-student gap\n\n" + table(("measure", "value"), rows)


def _symptoms(found: Mapping[str, Any]) -> str:
    s = found["symptoms"]
    named = {
        "repeated_4grams": "repeated 4-grams",
        "looping": "looping texts",
        "truncated": "cut at the limit",
        "broken_text": "broken characters",
        "format_breaks": "finished texts without an answer",
        "off_nucleus": "sampled tokens outside the teacher's top-p 0.999 set",
    }
    rows = [(title, f"{s[key]:.1%}") for key, title in named.items() if key in s]
    if c := s.get("confidence"):
        rows += [
            ("wrong with confidence >= 0.9", f"{c['confident_wrong']:.1%}"),
            ("mean confidence - accuracy", f"{c['overconfidence']:+.3f}"),
            ("expected calibration error", f"{c['ece']:.3f}"),
            ("AUROC of confidence", f"{c['auroc']:.3f}"),
        ]
    if c := s.get("vote_confidence"):
        rows += [
            ("votes as confidence: wrong with >= 0.9", f"{c['confident_wrong']:.1%}"),
            ("votes as confidence: mean - accuracy of the winner", f"{c['overconfidence']:+.3f}"),
            (
                "votes as confidence: calibration error, AUROC",
                f"{c['ece']:.3f}, {_number(c['auroc'])}",
            ),
        ]
    if g := s.get("sampling"):
        rows.append(
            (
                "accuracy greedy - at temperature 1",
                f"{estimate_text(g['gap'])} ({g['greedy']['mean']:.1%} - "
                f"{g['sampled']['mean']:.1%})",
            )
        )
    if c := s.get("own_error"):
        rows.append(
            (
                f"right after half of its own wrong text ({c['texts']} texts); from the start on "
                "the same prompts",
                f"{estimate_text(c['right_after'])}; {estimate_text(c['right_from_the_start'])}",
            )
        )
    if c := s.get("correction"):
        rows += [
            (
                f"right after a clean prefix / after an error ({c['cuts']} cuts)",
                f"{c['right_after_clean']:.1%} / {c['right_after_error']:.1%}",
            ),
            ("recovery", f"{c['recovery']:.2f}"),
            ("texts that revise themselves", f"{c['revises']:.1%}"),
            (
                "log p(correcting) - log p(going on), student (teacher), nats",
                f"{c['student_gain']:+.2f} ({c['teacher_gain']:+.2f})",
            ),
        ]
    return "## Symptoms of the student\n\n" + table(("measure", "value"), rows) if rows else ""
