"""How well two tokenizers align on a body of text: counts, failures with reasons, throughput.

A document is a row of a .jsonl file (field `text`, else `prompt`), or a text file; a text file
above 64 KiB is cut at line ends into documents of about that size. A folder is read in the order of
its paths, hidden files left out. One pass, one batch of documents in memory.
"""

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from operator import itemgetter
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np

from .byte_table import CONTROL, TEXT, ByteTable, encode_text, normalizer_of
from .offsets import Side, side
from .spans import Alignment, align_spans
from .vocab_map import common_spellings

CUT = 1 << 16  # characters of one document of a text file
BATCH = 64  # documents aligned by one call of the native core
EXAMPLES = 3  # failures reported in full
STAGES = ("encode_a", "encode_b", "check", "align")  # check: ids against the bytes of the text


@dataclass(frozen=True)
class Document:
    """A text, or why there is none."""

    where: str
    text: str | None
    problem: str = ""


def documents(path: str | Path) -> Iterator[Document]:
    """Stream the documents of a file or a folder. ValueError when there is nothing there."""
    root = Path(path)
    if root.is_dir():
        files = sorted(
            p
            for p in root.rglob("*")
            if p.is_file() and not any(n.startswith(".") for n in p.relative_to(root).parts)
        )
    else:
        files = [root] if root.is_file() else []
    if not files:
        raise ValueError(
            f"corpus: no file at {path}; want a text file, a .jsonl file, or a folder of them."
        )
    for file in files:
        yield from _jsonl(file) if file.suffix in (".jsonl", ".ndjson") else _text(file)


def _jsonl(file: Path) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError:  # of json or of UTF-8
                yield Document(where, None, "the line is not JSON")
                continue
            text = row.get("text", row.get("prompt")) if isinstance(row, dict) else None
            if isinstance(text, str):
                yield Document(where, text)
            else:
                yield Document(where, None, "no field text or prompt that holds a string")


def _text(file: Path) -> Iterator[Document]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:  # line ends as they are
            for part, lines in enumerate(iter(lambda: stream.readlines(CUT), [])):
                yield Document(f"{file}#{part}" if part else str(file), "".join(lines))
    except UnicodeDecodeError:
        yield Document(str(file), None, "the file is not UTF-8")


@dataclass(frozen=True)
class Counts:
    """Counts of aligned documents; they add up. Spans as in `spans.Alignment`."""

    documents: int = 0
    partly: int = 0  # of them, with spans that are not exact
    num_bytes: int = 0
    exact_bytes: int = 0  # in exact spans
    tokens_a: int = 0
    tokens_b: int = 0
    empty_a: int = 0  # tokens of no bytes
    empty_b: int = 0
    inside_a: int = 0  # tokens in spans
    inside_b: int = 0
    spans: int = 0
    one_to_one: int = 0
    longest: tuple[int, str] = (0, "")  # bytes of the longest span, and its text

    def __add__(self, other: "Counts") -> "Counts":
        names = [f.name for f in fields(self) if f.name != "longest"]
        sums: dict[str, Any] = {x: getattr(self, x) + getattr(other, x) for x in names}
        return Counts(**sums, longest=max(self.longest, other.longest, key=itemgetter(0)))

    @property
    def coverage(self) -> float:
        return self.exact_bytes / max(1, self.num_bytes)

    @property
    def one_to_one_fraction(self) -> float:
        return self.one_to_one / max(1, self.spans)

    @property
    def tokens_per_span(self) -> tuple[float, float]:
        return self.inside_a / max(1, self.spans), self.inside_b / max(1, self.spans)


def count(source: bytes, side_a: Side, side_b: Side, alignment: Alignment) -> Counts:
    """Of one document."""
    sizes = np.diff(alignment.bounds, prepend=0)
    a, b = (
        np.bincount(span[span >= 0], minlength=alignment.num_spans)
        for span in (alignment.span_a, alignment.span_b)
    )
    longest = (0, "")
    if len(sizes):
        k = int(sizes.argmax())
        span = source[alignment.bounds[k] - sizes[k] : alignment.bounds[k]]
        longest = int(sizes[k]), span.decode(errors="replace")
    empty_a, empty_b = (int(((one.lens == 0) & (one.ids >= 0)).sum()) for one in (side_a, side_b))
    return Counts(
        1,
        int(not alignment.exact.all()),
        len(source),
        int(sizes[alignment.exact].sum()),
        len(side_a.ids),
        len(side_b.ids),
        empty_a,
        empty_b,
        int(a.sum()),
        int(b.sum()),
        alignment.num_spans,
        int(((a == 1) & (b == 1)).sum()),
        longest,
    )


class LoadedTokenizer:
    """A tokenizer, its table and its normaliser; `name` is what reports call it."""

    def __init__(self, name: str, loaded: Any) -> None:
        """ValueError as for ByteTable.of."""
        self.name, self.loaded = name, loaded
        self.table, self.normalize = ByteTable.of(loaded), normalizer_of(loaded)

    def encode(self, text: str) -> list[int]:
        return encode_text(self.loaded, text)

    def side(self, ids: Sequence[int], source: bytes) -> Side:
        return side(self.table, ids, source, normalize=self.normalize)

    def explain(self, ids: Sequence[int], source: bytes) -> tuple[str, str]:
        """Why a side does not reproduce the source: the kind of reason, and where."""
        spelled, image = self.table.bytes_of(ids), self.normalize(source.decode()).encode()
        if self.table.space_prefix and not image.startswith(b" "):
            spelled = spelled.removeprefix(b" ")
        at = len(commonprefix([spelled, image]))
        kind = f"{self.name}: its ids spell another text (whitespace swallowed or collapsed, "
        kind += "or a name read as a token)"
        if any(i >= 0 and self.table.kind[i] != TEXT for i in ids):
            kind = f"{self.name}: an unknown character, or a name read as a control token"
        return (
            kind,
            f"{kind}: {spelled[at : at + 12]!r} for {image[at : at + 12]!r} at byte {at} of "
            f"{len(image)}",
        )


@dataclass
class CorpusReport:
    """What `measure` has counted so far."""

    counts: Counts = Counts()
    # documents not read, or aligned only in part, by kind of reason
    failures: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)  # the first EXAMPLES failures in full
    # names of control tokens in the text, of A and of B
    controls: tuple[Counter[str], Counter[str]] = field(
        default_factory=lambda: (Counter(), Counter())
    )
    common: int = 0  # spellings that both vocabularies have
    # of each of STAGES; tokens of failures, too
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: Counter[str] = field(default_factory=Counter)

    def fail(self, where: str, kind: str, reason: str = "") -> None:
        self.failures[kind] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{where}: {reason or kind}")

    def spent(self, stage: str, since: float, tokens: int) -> None:
        self.seconds[stage] += time.perf_counter() - since
        self.tokens[stage] += tokens

    def rate(self, stage: str) -> float:
        """Tokens per second; 0 before anything was timed."""
        seconds = self.seconds.get(stage)
        return self.tokens[stage] / seconds if seconds else 0.0


def measure(
    a: LoadedTokenizer,
    b: LoadedTokenizer,
    texts: Iterable[Document],
    *,
    progress: Callable[[CorpusReport], None] | None = None,
) -> CorpusReport:
    """Encode, check and align every document.

    One that cannot be read is counted with its reason and left out of all other numbers. One whose
    ids do not spell it is counted with its reason and aligned around the changed parts
    (`Counts.coverage`). Text is encoded as content: a control token's name in it is plain
    characters, and counted. progress: called after every BATCH documents.
    """
    report, stream = CorpusReport(common=common_spellings(a.table, b.table)), iter(texts)
    names = _control_names(a.table), _control_names(b.table)
    while batch := list(islice(stream, BATCH)):
        good = [sides for document in batch if (sides := _sides(a, b, document, report))]
        start = time.perf_counter()
        rows = align_spans([one for _, one, _ in good], [other for _, _, other in good])
        report.spent("align", start, sum(len(one.ids) + len(other.ids) for _, one, other in good))
        for (source, one, other), row in zip(good, rows, strict=True):
            report.counts += count(source, one, other, row)
            for controls, pattern in zip(report.controls, names, strict=True):
                controls.update(name.decode(errors="replace") for name in pattern.findall(source))
        if progress:
            progress(report)
    return report


def _sides(
    a: LoadedTokenizer, b: LoadedTokenizer, document: Document, report: CorpusReport
) -> tuple[bytes, Side, Side] | None:
    """The source and both sides of a document, or None and a failure in the report."""
    if document.text is None:
        report.fail(document.where, document.problem)
        return None
    try:
        source = document.text.encode()
    except UnicodeEncodeError:
        problem = "the text holds half a surrogate pair: it is not Unicode text"
        report.fail(document.where, problem)
        return None
    sides = []
    for stage, tokenizer in (("encode_a", a), ("encode_b", b)):
        start = time.perf_counter()
        ids = tokenizer.encode(document.text)
        report.spent(stage, start, len(ids))
        start = time.perf_counter()
        sides.append(tokenizer.side(ids, source))
        report.spent("check", start, len(ids))
        if not sides[-1].reproduces:
            report.fail(document.where, *tokenizer.explain(ids, source))
    return source, sides[0], sides[1]


def _control_names(table: ByteTable) -> re.Pattern[bytes]:
    """Finds every name of a control id, of two that begin together the longer one."""
    names = {
        piece
        for piece, kind in zip(table.pieces, table.kind.tolist(), strict=True)
        if kind == CONTROL and piece
    }
    return re.compile(b"|".join(map(re.escape, sorted(names, key=len, reverse=True))) or b"(?!)")


def summary(report: CorpusReport, name_a: str, name_b: str) -> str:
    """The report as text."""
    c, (per_a, per_b) = report.counts, report.counts.tokens_per_span
    bytes_a, bytes_b = c.num_bytes / max(1, c.tokens_a), c.num_bytes / max(1, c.tokens_b)
    rows = [
        (
            "documents",
            f"{c.documents:,} aligned, {c.partly:,} of them in part; "
            f"{sum(report.failures.values()):,} failures",
        ),
        ("bytes", f"{c.num_bytes:,}, {c.coverage:.2%} in exact spans"),
        (
            "tokens",
            f"A {c.tokens_a:,}, B {c.tokens_b:,}; bytes per token A {bytes_a:.2f}, B {bytes_b:.2f}",
        ),
        ("of no bytes", f"A {c.empty_a:,}, B {c.empty_b:,}"),
        (
            "spans",
            f"{c.spans:,}, 1:1 {c.one_to_one_fraction:.1%}; tokens per span A {per_a:.3f}, B "
            f"{per_b:.3f}",
        ),
        ("longest span", f"{c.longest[0]} bytes: {c.longest[1][:60]!r}"),
        ("common vocabulary", f"{report.common:,} spellings, equal by bytes"),
        (
            "control names",
            "; ".join(
                f"{name}: {_top(controls)}"
                for name, controls in zip("AB", report.controls, strict=True)
            ),
        ),
        (
            "tokens per second",
            ", ".join(f"{stage.replace('_', ' ')} {report.rate(stage):,.0f}" for stage in STAGES),
        ),
        *(("failed", f"{n:,} x {kind}") for kind, n in report.failures.most_common()),
    ]
    lines = [f"A = {name_a}, B = {name_b}", *(f"{name:<18} {value}" for name, value in rows)]
    return "\n".join([*lines, *(f"  for example {example}" for example in report.examples)])


def _top(controls: Counter[str]) -> str:
    return ", ".join(f"{name} x {n:,}" for name, n in controls.most_common(5)) or "none"


def as_json(report: CorpusReport, name_a: str, name_b: str) -> dict[str, Any]:
    """The report as JSON data; seconds and rates are of this machine and run."""
    c = report.counts
    return {
        "a": name_a,
        "b": name_b,
        **asdict(c),
        "coverage": c.coverage,
        "one_to_one_fraction": c.one_to_one_fraction,
        "tokens_per_span": c.tokens_per_span,
        "common_spellings": report.common,
        "control_names": {
            side: dict(controls) for side, controls in zip("ab", report.controls, strict=True)
        },
        "failures": dict(report.failures),
        "failure_examples": report.examples,
        "seconds": dict(report.seconds),
        "tokens_per_s": {stage: round(report.rate(stage)) for stage in STAGES},
    }
