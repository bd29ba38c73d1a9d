"""Verifiable instructions, by rule: the kinds of IFEval (arXiv:2311.07911, table 1) by its names.
Its rows are taken as they are: columns instruction_id_list and kwargs.

Differences to the paper's code: sentences are counted by their end marks, not by a trained
splitter; a language wants the package langdetect.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[str, Mapping[str, Any]], bool]

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda count, n: count >= n,
    "less than": lambda count, n: count < n,
    "at most": lambda count, n: count <= n,
    "exactly": lambda count, n: count == n,
}
WORD = re.compile(r"\w+(?:['’-]\w+)*")
SENTENCE_END = re.compile(r"[.!?。！？]+(?=[\s\"'”’)\]]|$)")
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
STARS = "******"


def follows(kind: str, text: str, options: Mapping[str, Any]) -> bool:
    """Whether a response follows one instruction. ValueError for a kind that is not known or an
    option that is missing.
    """
    if kind not in CHECKS:
        raise ValueError(f"unknown instruction {kind!r}; known: {', '.join(CHECKS)}")
    try:
        return bool(text.strip()) and CHECKS[kind](text, options)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"instruction {kind}: {type(error).__name__} {error} with {dict(options)}"
        ) from error


def _compare(count: int, options: Mapping[str, Any], number: str, relation: str) -> bool:
    """Without a relation: at least."""
    return RELATIONS[options.get(relation) or "at least"](count, int(options[number]))


def _has(text: str, word: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.I))


# --- words


def _existence(text: str, o: Mapping[str, Any]) -> bool:
    return all(_has(text, word) for word in o["keywords"])


def _frequency(text: str, o: Mapping[str, Any]) -> bool:
    count = len(re.findall(rf"(?<!\w){re.escape(o['keyword'])}(?!\w)", text, re.I))
    return _compare(count, o, "frequency", "relation")


def _forbidden(text: str, o: Mapping[str, Any]) -> bool:
    return not any(_has(text, word) for word in o["forbidden_words"])


def _letters(text: str, o: Mapping[str, Any]) -> bool:
    return _compare(text.lower().count(o["letter"].lower()), o, "let_frequency", "let_relation")


def _language(text: str, o: Mapping[str, Any]) -> bool:
    try:
        from langdetect import DetectorFactory, LangDetectException, detect
    except ImportError as error:
        raise ValueError("language:response_language wants the package langdetect") from error
    DetectorFactory.seed = 0
    try:
        return detect(text) == o["language"]
    except LangDetectException:  # no letters at all
        return False


# --- lengths


def _sentences(text: str, o: Mapping[str, Any]) -> bool:
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    unended = WORD.search(text, ends[-1] if ends else 0) is not None
    return _compare(len(ends) + unended, o, "num_sentences", "relation")


def _words(text: str, o: Mapping[str, Any]) -> bool:
    return _compare(len(WORD.findall(text)), o, "num_words", "relation")


def _paragraphs(text: str, o: Mapping[str, Any]) -> bool:
    """Divided by a line of three stars."""
    parts = re.split(r"\s?\*\*\*\s?", text.strip())
    inner = [p for i, p in enumerate(parts) if p.strip() or 0 < i < len(parts) - 1]
    return all(p.strip() for p in inner) and len(inner) == int(o["num_paragraphs"])


def _first_word(text: str, o: Mapping[str, Any]) -> bool:
    parts = [p.strip() for p in re.split(r"\n\n+", text) if p.strip()]
    n = int(o["nth_paragraph"])
    if len(parts) != int(o["num_paragraphs"]) or not 1 <= n <= len(parts):
        return False
    first = WORD.search(parts[n - 1])
    return first is not None and first[0].lower() == o["first_word"].lower()


# --- content and format


def _placeholders(text: str, o: Mapping[str, Any]) -> bool:
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= int(o["num_placeholders"])


def _postscript(text: str, o: Mapping[str, Any]) -> bool:
    marker = re.sub(r"\s+", "", o["postscript_marker"]).lower()
    lines = (re.sub(r"\s+", "", line).lower() for line in text.splitlines())
    return any(line.startswith(marker) for line in lines)


def _bullets(text: str, o: Mapping[str, Any]) -> bool:
    found = re.findall(r"^[ \t]*(?:\*(?!\*)|-|•)[ \t]*\S", text, re.M)
    return len(found) == int(o["num_bullets"])


def _constrained(text: str, o: Mapping[str, Any]) -> bool:
    return any(answer in text for answer in CONSTRAINED)


def _highlights(text: str, o: Mapping[str, Any]) -> bool:
    bold = re.findall(r"\*\*[^\n*]+\*\*", text)
    plain = re.findall(r"\*[^\n*]+\*", re.sub(r"\*\*[^\n*]+\*\*", "", text))
    marked = [m for m in bold + plain if m.strip("*").strip()]
    return len(marked) >= int(o["num_highlights"])


def _sections(text: str, o: Mapping[str, Any]) -> bool:
    name = re.escape(o["section_spliter"])  # spelled so in the data set
    return len(re.findall(rf"\s?{name}\s?\d+\s?", text)) >= int(o["num_sections"])


def _json(text: str, o: Mapping[str, Any]) -> bool:
    body = re.sub(r"^```(?:json|JSON)?\s*|\s*```$", "", text.strip())
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, o: Mapping[str, Any]) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^\n<>]+)>>", text))


# --- the whole response


def _two_responses(text: str, o: Mapping[str, Any]) -> bool:
    parts = [p.strip() for p in text.split(STARS) if p.strip()]
    return len(parts) == 2 and parts[0] != parts[1]


def _repeats(text: str, o: Mapping[str, Any]) -> bool:
    return text.strip().lower().startswith(o["prompt_to_repeat"].strip().lower())


def _ends(text: str, o: Mapping[str, Any]) -> bool:
    return text.strip().strip('"').lower().endswith(o["end_phrase"].strip().lower())


def _quoted(text: str, o: Mapping[str, Any]) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == '"' == text[-1]


def _capital_words(text: str, o: Mapping[str, Any]) -> bool:
    count = sum(word.isupper() for word in WORD.findall(text))
    return _compare(count, o, "capital_frequency", "capital_relation")


def _upper(text: str, o: Mapping[str, Any]) -> bool:
    return text.isupper()


def _lower(text: str, o: Mapping[str, Any]) -> bool:
    return text.islower()


def _no_comma(text: str, o: Mapping[str, Any]) -> bool:
    return "," not in text


CHECKS: dict[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_words": _words,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _upper,
    "change_case:english_lowercase": _lower,
    "punctuation:no_comma": _no_comma,
}
