"""Align two tokenizers on one text, or measure them on a body of text.

    python -m reflux.tokenalign A B --text "the catalog"
        both tokenizations, one above the other, cut where both agree
    python -m reflux.tokenalign A B --file essay.txt --html essay.html
    python -m reflux.tokenalign A B --scores rollout.json
        with log-probabilities: T - S per span, bits per byte
    python -m reflux.tokenalign A B --corpus texts.jsonl
        counts, failures with reasons, throughput

A, B: Hugging Face folders, names in the local cache, or tokenizer files that ByteTable.of reads.
--scores takes a JSON object with `text` or `ids_a`, and any of `ids_b`, `logp_a`, `logp_b`,
`stop_a`, `stop_b` and `prompt_bytes`. Given ids are used as they are, never re-encoded.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .corpus import (
    CorpusReport,
    Counts,
    LoadedTokenizer,
    as_json,
    count,
    documents,
    measure,
    summary,
)
from .given_text import GivenError, checked, raise_at, read_given, read_text
from .offsets import Side, spell
from .scores import Scores, sequence_scores
from .spans import Alignment, after_prompt, align_spans
from .view import Marks, to_terminal
from .view_html import to_html

PROGRAM = "python -m reflux.tokenalign"
PAGE_TOKENS = 100_000  # some 25 MB of HTML


@dataclass(frozen=True, eq=False)
class AlignedText:
    """One text under two tokenizers."""

    side_a: Side
    side_b: Side
    alignment: Alignment
    counts: Counts
    scores: Scores | None
    marks: Marks
    problems: tuple[str, ...]  # of sides that do not reproduce the text


def load_tokenizer(path: str, name: str) -> LoadedTokenizer:
    """A file or folder by `table_files.load`, a cached name by AutoTokenizer. ValueError."""
    try:
        if os.path.exists(path):
            from .table_files import load

            loaded = load(path)
        else:
            # slow to import; folders and files may do without it
            from transformers import AutoTokenizer

            loaded = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except ValueError as error:
        raise ValueError(f"tokenizer {name}: {error}") from error
    except Exception as error:  # libraries raise whatever a broken folder makes them raise
        raise ValueError(
            f"tokenizer {name}: cannot load {path!r} ({type(error).__name__}); want a Hugging Face "
            "folder, the name of one in the local cache, or a tokenizer file"
        ) from error
    return LoadedTokenizer(name, loaded)


def align_text(a: LoadedTokenizer, b: LoadedTokenizer, given: Mapping[str, Any]) -> AlignedText:
    """Align one text. `given`: see --scores.

    GivenError, a ValueError: what `given_text.checked` refuses, ids that are no text,
    log-probabilities that do not fit.
    """
    given = checked(given, len(a.table), len(b.table))
    text = given["text"] if "text" in given else spell(a.table, given["ids_a"]).text
    if text is None:
        raise GivenError("ids_a", "ids_a do not spell UTF-8, so B cannot encode them")
    if not text:
        raise GivenError("ids_a", "ids_a spell no text: there is nothing to align")
    source = text.encode()
    if given.get("prompt_bytes", 0) > len(source):
        raise GivenError(
            "prompt_bytes", f"prompt_bytes = {given['prompt_bytes']} of {len(source)} bytes of text"
        )
    ids_a = given["ids_a"] if "ids_a" in given else a.encode(text)
    ids_b = given["ids_b"] if "ids_b" in given else b.encode(text)
    for key, ids in (("logp_a", ids_a), ("logp_b", ids_b)):
        if key in given and len(given[key]) != len(ids):
            raise GivenError(
                key, f"{key} has {len(given[key])} numbers for {len(ids)} tokens; want one per id"
            )
    side_a, side_b = a.side(ids_a, source), b.side(ids_b, source)
    problems = tuple(
        tokenizer.explain(ids, source)[1]
        for tokenizer, ids, side in ((a, ids_a, side_a), (b, ids_b, side_b))
        if not side.reproduces
    )
    alignment = align_spans([side_a], [side_b])[0]
    scored = after_prompt(alignment, given.get("prompt_bytes", 0))
    scores = _scores(scored, given)
    marks = Marks(("A", "B"), (ids_a, ids_b), seam=given.get("prompt_bytes"), stop=_stop(given))
    if scores:
        difference = scores.span_logp_a - scores.span_logp_b
        marks = replace(
            marks,
            token_values=(given["logp_a"], given["logp_b"]),
            span_values=np.where(scored.exact, difference, np.nan),
            token_label="log p, nats",
            span_label="log p of A - log p of B, nats",
        )
    counts = count(source, side_a, side_b, alignment)
    return AlignedText(side_a, side_b, alignment, counts, scores, marks, problems)


def facts(aligned: AlignedText) -> list[tuple[str, str]]:
    """Names and values of what was counted."""
    c = aligned.counts
    out = [
        ("bytes", f"{c.num_bytes:,}"),
        ("tokens", f"{c.tokens_a:,} and {c.tokens_b:,}"),
        ("spans", f"{c.spans:,}"),
        ("1:1", f"{c.one_to_one_fraction:.1%}"),
        ("tokens per span", "{:.2f} and {:.2f}".format(*c.tokens_per_span)),
        ("longest span", f"{c.longest[0]} bytes"),
        ("coverage", f"{c.coverage:.1%}"),
    ]
    if s := aligned.scores:
        out += [
            ("bits per byte", f"{s.bits_per_byte_a:.3f} and {s.bits_per_byte_b:.3f}"),
            ("log p of A - of B", f"{s.log_ratio_unclipped:+.2f} nats, clipped {s.log_ratio:+.2f}"),
        ]
    return out


def _scores(alignment: Alignment, given: Mapping[str, Any]) -> Scores | None:
    if "logp_a" not in given:
        return None
    return sequence_scores(
        alignment,
        given["logp_a"],
        given["logp_b"],
        stop_a=given.get("stop_a"),
        stop_b=given.get("stop_b"),
    )


def _stop(given: Mapping[str, Any]) -> tuple[str, str] | None:
    stop_a, stop_b = given.get("stop_a"), given.get("stop_b")
    if stop_a is None or stop_b is None:
        return None
    return f"stop {stop_a:+.2f}", f"stop {stop_b:+.2f}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"reflux.tokenalign: {message}. See {self.prog} --help\n")


def _arguments(words: list[str] | None = None, prog: str = PROGRAM) -> argparse.Namespace:
    parser = _Parser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tokenizers", nargs=2, metavar="TOKENIZER", help="A and B")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text")
    what.add_argument("--file", help="a UTF-8 text file; - reads standard input")
    what.add_argument("--scores", metavar="JSON", help="a text with ids and log-probabilities")
    what.add_argument(
        "--corpus",
        metavar="PATH",
        help="text or .jsonl (field text or prompt), or a folder of them",
    )
    parser.add_argument(
        "--html", metavar="OUT", help="also write one self-contained page (not with --corpus)"
    )
    parser.add_argument("--json", metavar="OUT", help="also write the statistics (with --corpus)")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: on a terminal without NO_COLOR",
    )
    parser.add_argument(
        "--width", type=int, default=0, help="columns; default: those of the terminal, else 100"
    )
    arguments = parser.parse_args(words)
    if arguments.corpus and arguments.html or arguments.json and not arguments.corpus:
        parser.error(
            "--html draws one text (--text, --file, --scores), --json holds the statistics of "
            "--corpus"
        )
    return arguments


def _given(arguments: argparse.Namespace) -> Mapping[str, Any]:
    if arguments.scores:
        return read_given(arguments.scores)
    if arguments.text is not None:
        return {"text": arguments.text}
    raw = sys.stdin.buffer.read() if arguments.file == "-" else Path(arguments.file).read_bytes()
    return {"text": read_text(arguments.file, raw)}


def _align_given(
    a: LoadedTokenizer, b: LoadedTokenizer, arguments: argparse.Namespace
) -> AlignedText:
    """ValueError with file and line for what cannot be aligned."""
    given = _given(arguments)
    try:
        return align_text(a, b, given)
    except ValueError as error:
        if arguments.scores:
            raise_at(arguments.scores, error)
        raise ValueError(f"{arguments.file or '--text'}: {error}") from None


def _show(a: LoadedTokenizer, b: LoadedTokenizer, arguments: argparse.Namespace) -> None:
    aligned = _align_given(a, b, arguments)
    picture = aligned.side_a, aligned.side_b, aligned.alignment, aligned.marks
    color = arguments.color == "always" or (
        arguments.color == "auto"
        and sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") != "dumb"
    )
    width = arguments.width or shutil.get_terminal_size((100, 24)).columns
    listed, names = facts(aligned), tuple(arguments.tokenizers)
    print(to_terminal(*picture, width=max(20, width), color=color))
    print(f"A = {names[0]}, B = {names[1]}")
    print("; ".join(f"{name} {value}" for name, value in listed))
    print(*aligned.problems, sep="\n", end="\n" if aligned.problems else "")
    if arguments.html:
        if (tokens := aligned.counts.tokens_a + aligned.counts.tokens_b) > PAGE_TOKENS:
            raise ValueError(
                f"--html: {tokens:,} tokens are too many for a browser; want at most "
                f"{PAGE_TOKENS:,}, a part of the text"
            )
        page = to_html(*picture, title=f"{names[0]} and {names[1]}", facts=listed)
        Path(arguments.html).write_text(page, encoding="utf-8")


def _measure(a: LoadedTokenizer, b: LoadedTokenizer, arguments: argparse.Namespace) -> None:
    def show_progress(report: CorpusReport) -> None:
        print(f"\r{report.counts.documents:,} documents", end="", file=sys.stderr, flush=True)

    terminal = sys.stderr.isatty()
    texts = documents(arguments.corpus)
    report = measure(a, b, texts, progress=show_progress if terminal else None)
    if terminal:
        print("\r", end="", file=sys.stderr)
    print(summary(report, *arguments.tokenizers))
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps(as_json(report, *arguments.tokenizers), indent=1, ensure_ascii=False) + "\n"
        )


def main(words: list[str] | None = None, prog: str = PROGRAM) -> None:
    """The command. Exit code 2 and one line for an error of the user's."""
    arguments = _arguments(words, prog)
    try:
        a, b = (
            load_tokenizer(path, name)
            for path, name in zip(arguments.tokenizers, "AB", strict=True)
        )
        (_measure if arguments.corpus else _show)(a, b, arguments)
    except (ValueError, OSError) as error:
        print("reflux.tokenalign: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    main()
