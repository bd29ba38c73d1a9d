"""Verifiable instructions, by rule: the kinds of IFEval (arXiv:2311.07911, table 1) by its names.
Its rows are taken as they are: columns instruction_id_list and kwargs.

What follows an instruction is what the paper's code accepts (instruction_following_eval in
google-research, strict), oddities included: words are runs of letters and digits ("don't" is two),
a keyword counts inside other words, "[]" is a placeholder, "---" a bullet. The differences:

    keywords, markers   texts, not regular expressions: a row's expression could take forever
    sentences           counted by their end marks, not by a trained splitter
    capital words       divided by rules of ours, near those of nltk's tokenizer
    english_capital,    look at the case alone; the code asks langdetect for English too, which
    english_lowercase   takes much that is in capitals for another language
    response_language   wants the package langdetect, with a fixed seed; a text without a letter
                        does not follow it, there it does
    relations           "at most" and "exactly" too; left out it is "at least", there drawn
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
WORD = re.compile(r"\w+")
TOKEN_END = re.compile(r"[\s,;:@#$%&?!()\[\]{}<>\"“”…]|--|\.\.\.")  # of capital words
CLITIC = re.compile(r"(n't|'(?:s|m|d|ll|re|ve))(?!\w)", re.I)  # a token of its own
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


# --- words


def _existence(text: str, o: Mapping[str, Any]) -> bool:
    return all(re.search(re.escape(word), text, re.I) for word in o["keywords"])


def _frequency(text: str, o: Mapping[str, Any]) -> bool:
    count = len(re.findall(re.escape(o["keyword"].strip()), text, re.I))
    return _compare(count, o, "frequency", "relation")


def _forbidden(text: str, o: Mapping[str, Any]) -> bool:
    words = map(re.escape, o["forbidden_words"])  # whole words, unlike keywords
    return not any(re.search(rf"\b{word}\b", text, re.I) for word in words)


def _letters(text: str, o: Mapping[str, Any]) -> bool:
    return _compare(
        text.lower().count(o["letter"].strip().lower()), o, "let_frequency", "let_relation"
    )


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
    """Divided by an empty line; of two of them there is an empty paragraph, which is counted to
    find the n-th but not in their number.
    """
    parts = text.split("\n\n")
    filled, n = sum(bool(p.strip()) for p in parts), int(o["nth_paragraph"])
    if filled != int(o["num_paragraphs"]) or not 1 <= n <= filled or not parts[n - 1].strip():
        return False
    word = parts[n - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == o["first_word"].lower()


# --- content and format


def _placeholders(text: str, o: Mapping[str, Any]) -> bool:
    return sum(map(_in_brackets, text.split("\n"))) >= int(o["num_placeholders"])


def _in_brackets(line: str) -> int:
    """How often re.findall finds \\[.*?\\], in linear time."""
    count, end = 0, -1
    while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start)) >= 0:
        count += 1
    return count


def _postscript(text: str, o: Mapping[str, Any]) -> bool:
    """Anywhere: it need not begin a line."""
    marker, text = o["postscript_marker"].strip(), text.lower()
    spaced = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    return bool(re.search(spaced.get(marker) or re.escape(marker.lower()), text))


def _bullets(text: str, o: Mapping[str, Any]) -> bool:
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.M)  # a lone star takes the line behind it
    dashes = re.findall(r"^[^\S\n]*-", text, re.M)
    return len(stars) + len(dashes) == int(o["num_bullets"])


def _constrained(text: str, o: Mapping[str, Any]) -> bool:
    return any(answer in text for answer in CONSTRAINED)


def _highlights(text: str, o: Mapping[str, Any]) -> bool:
    found = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    marked = [m for m in found if m.strip("*").strip()]
    return len(marked) >= int(o["num_highlights"])


def _sections(text: str, o: Mapping[str, Any]) -> bool:
    name = re.escape(o["section_spliter"].strip())  # spelled so in the data set
    return len(re.findall(rf"\s?{name}\s?\d+\s?", text)) >= int(o["num_sections"])


def _json(text: str, o: Mapping[str, Any]) -> bool:
    body = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        body = body.removeprefix(fence)
    body = body.removesuffix("```").strip()
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, o: Mapping[str, Any]) -> bool:
    """From the first << of a line to its last >>."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


# --- the whole response


def _two_responses(text: str, o: Mapping[str, Any]) -> bool:
    parts = [p.strip() for p in text.split(STARS)]
    filled = [p for p in parts if p]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _repeats(text: str, o: Mapping[str, Any]) -> bool:
    return text.strip().lower().startswith(o["prompt_to_repeat"].strip().lower())


def _ends(text: str, o: Mapping[str, Any]) -> bool:
    return text.strip().strip('"').lower().endswith(o["end_phrase"].strip().lower())


def _quoted(text: str, o: Mapping[str, Any]) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == '"' == text[-1]


def _capital_words(text: str, o: Mapping[str, Any]) -> bool:
    count = sum(word.isupper() for word in TOKEN_END.split(CLITIC.sub(r" \1 ", text)))
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
