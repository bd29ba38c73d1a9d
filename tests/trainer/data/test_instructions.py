"""Every kind of verifiable instruction: a text that follows it and one that does not."""

import json

import pytest

from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.graders import Instructions
from reflux.trainer.data.instructions import CHECKS, follows

KEYS = {"keywords": ["cat", "dog"]}
CASES = [
    # a keyword counts inside other words and "[]" is a placeholder: so in the paper's code
    ("keywords:existence", KEYS, "A Cat and a hotdog.", "A cat and a do-g."),
    (
        "keywords:frequency",
        {"keyword": "tea", "frequency": 2, "relation": "at least"},
        "Tea and teapots.",
        "Tea.",
    ),
    (
        "keywords:frequency",
        {"keyword": "tea", "frequency": 2, "relation": "less than"},
        "One tea.",
        "tea tea",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["no"]}, "I know nothing.", "Oh no."),
    (
        "keywords:letter_frequency",
        {"letter": "a", "let_frequency": 3, "let_relation": "at least"},
        "banana",
        "Anna?",
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2}, "One. Two!", "One."),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "It costs 3.5 euros. And",
        "A. B. C.",
    ),
    ("length_constraints:number_words", {"num_words": 3}, "one don't two-three", "one two"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}, "a *** b *** c", "a *** *** c"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        'First.\n\n"Then" it was.',
        "Then.\n\nFirst.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a], [b c]", "[a] [b"),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "Bye.\nP. S. more",
        "Bye. PS more",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n** b **"),
    ("detectable_format:constrained_response", {}, "Well. My answer is no.", "No."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and **b c**",
        "*a* and ** **",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1 x SECTION 2 y",
        "SECTION 1 x SECTION two",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<A tale>>\nOnce", "<A tale> << >>"),
    ("combination:two_responses", {}, "a ****** b", "a ****** a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. Yes", "Yes"),
    ("startend:end_checker", {"end_phrase": "The end."}, 'So. "the end."', "The end. Not."),
    ("startend:quotation", {}, ' "all of it" ', '"'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NASA and ESA",
        "NASA and Esa",
    ),
    ("change_case:english_capital", {}, "ALL OF IT", "ALL of IT"),
    ("change_case:english_lowercase", {}, "all of it", "all Of it"),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
]


@pytest.mark.parametrize("kind, options, good, bad", CASES)
def test_a_text_that_follows_and_one_that_does_not(kind, options, good, bad):
    assert follows(kind, good, options) and not follows(kind, bad, options)
    assert not follows(kind, " \n", options), "an empty response follows nothing"


WORDS = {"num_words": 5, "relation": "exactly"}
CAPITALS = {"capital_frequency": 3, "capital_relation": "exactly"}
SECOND = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"}
PUBLISHED = [
    ("length_constraints:number_words", WORDS, "I don't co-operate", True),  # was three words
    ("keywords:existence", {"keywords": ["friend"]}, "FRIENDS", True),  # was whole words only
    ("keywords:existence", {"keywords": ["c++ (17)"]}, "In C++ (17).", True),  # no expression
    ("keywords:frequency", {"keyword": " cat ", "frequency": 3}, "Cats, a cat, concat.", True),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "Cats concatenate.", True),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A CAT!", False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Best. P.S. Call me.", True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "p. s. no", True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "p.  s. no", False),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "So p. p.s", True),
    ("detectable_content:postscript", {"postscript_marker": "N.B."}, "so n.b. x", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[[a] []", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}, "[a\n]", False),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "---\n• a\n-b", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "*\n* a", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "***a***", True),
    ("detectable_format:title", {}, "<<a <b> c>>", True),
    ("detectable_format:title", {}, "<<\n a>> <<<>>", False),
    ("detectable_format:json_format", {}, "```Json\n{}```", True),
    ("combination:two_responses", {}, "a ****** ****** b", False),
    ("combination:two_responses", {}, "****** a ****** b ******", True),
    ("length_constraints:nth_paragraph_first_word", SECOND, "a\n\nThen's", True),
    ("length_constraints:nth_paragraph_first_word", SECOND, "a\n\n**Then** b", False),
    ("length_constraints:nth_paragraph_first_word", SECOND, "a\n\n\n\nThen b", False),
    ("change_case:capital_word_frequency", CAPITALS, "The U.S. (NASA's) AB-C.", True),
    ("change_case:capital_word_frequency", CAPITALS, "I DON'T know", True),  # I DO N'T
]


@pytest.mark.parametrize("kind, options, text, follow", PUBLISHED)
def test_what_follows_is_what_the_papers_code_accepts(kind, options, text, follow):
    """Or scores are none of IFEval's: words, keywords and postscripts had rules of our own."""
    assert follows(kind, text, options) is follow


@pytest.mark.parametrize("text", ["[" * 300_000, "<<" * 150_000, "*" * 300_000, "\n" * 300_000])
def test_hostile_texts_are_read_in_linear_time(text):
    for kind, options, *_ in CASES:
        follows(kind, text + "a", options)


def test_every_kind_is_tested():
    assert {kind for kind, *_ in CASES} == set(CHECKS) - {"language:response_language"}


def test_languages():
    pytest.importorskip("langdetect")
    kind, german = "language:response_language", "Das ist ein ganz gewöhnlicher deutscher Satz."
    assert follows(kind, german, {"language": "de"}) and not follows(
        kind, german, {"language": "fr"}
    )


def test_a_language_without_its_package_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "langdetect", None)
    with pytest.raises(ValueError, match="wants the package langdetect"):
        follows("language:response_language", "text", {"language": "de"})


def test_the_grade_is_the_fraction_that_is_followed():
    row = {
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
        "kwargs": [{}, None],
    }
    grader = Instructions()
    half = grader(Prompt(0, (), extra=row), "Quite so")
    whole = grader(Prompt(0, (), extra=row), "quite so")
    assert (half.reward, half.correct, half.extracted) == (0.5, False, "punctuation:no_comma")
    assert (whole.reward, whole.correct) == (1.0, True)


@pytest.mark.parametrize(
    "row, says",
    [
        ({}, "want names of instructions"),
        ({"instruction_id_list": ["a:b"], "kwargs": []}, "as many tables"),
        ({"instruction_id_list": ["a:b"], "kwargs": [{}]}, "unknown instruction 'a:b'; known: "),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{}]},
            "instruction keywords:existence: KeyError 'keywords' with {}",
        ),
    ],
)
def test_what_is_no_instruction_is_an_error_of_the_grade(row, says):
    with pytest.raises(ValueError) as error:
        Instructions()(Prompt(0, (), extra=row), "text")
    assert says in str(error.value)


def test_a_row_of_ifeval_is_taken_as_it_is(tmp_path):
    """Its tables hold every option of every kind, most of them null."""
    from reflux.trainer.data.prompts import load_prompts

    options = {"num_words": 3, "relation": "at most", "keywords": None}
    row = {"key": 1, "prompt": "Be short.", "kwargs": [options]}
    row["instruction_id_list"] = ["length_constraints:number_words"]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    prompt = load_prompts(str(file))[0]
    assert Instructions()(prompt, "Very short.").correct
    assert not Instructions()(prompt, "Not so very short.").correct
