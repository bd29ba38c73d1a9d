"""Which option a text decides for.

Forms in order of precedence, the last of each: \boxed{B}, also \boxed{B. 42}; "answer is B",
"Answer: (B)", <answer>B</answer>; "the best option is B"; a last or first line "B", or "B. because"
unless several letters head lines so; "B is correct."; "option B"; "(B)"; a line "B) because".

An option that is turned down is not named: "option A is wrong", "not (A)", "a tempting but
incorrect answer is A", "whether the answer is A". "Answer: B or C" decides for none.
"""

import re
from collections import deque
from dataclasses import dataclass
from functools import lru_cache

FULL_WIDTH = str.maketrans("：（）［］。，．", ":()[].,.")
MARKUP = re.compile(r"\\(?:text\w*|mathrm|mathbf)\{([^{}]*)\}|\\[()\[\]]|[*$`]")
BEFORE = 60  # characters that are read to see whether what follows them is turned down
NEWEST = 100  # mentions of an option that are looked at, from the end
# what is said, in the same clause, in front of an option that is not chosen
FILLER = (
    r"(?: (?:the|a|an|that|this|it|is|my|our|correct|right|best|final|possible|answer|choice|"
    r"option))*"
)
DOUBT = "".join(f"(?<!{no} )" for no in ("no", "little", "without", "beyond", "any", "n't", "not"))
DOUBT += "doubt"
TURNS_DOWN = re.compile(
    r"\b(?:(?:incorrect|wrong|false|mistaken|erroneous|invalid|bad|(?<!most )(?:tempting|plausible|"
    r"attractive|unlikely)|naive|second|third|second[- ]best|next[- ]best|(?<!only )other|another|"
    r"alternative|rejected)(?: possible)?(?: (?:answer|choice|option))?|not(?: the)?|"
    rf"(?:if|whether|unless|suppose|supposing|assume|assuming|{DOUBT}|unsure){FILLER}|"
    rf"(?:not|false|unlikely|impossible|untrue|wrong|incorrect) that{FILLER}|"
    r"(?:not|never|cannot|\w+n't) (?:think|believe|say|claim|tell|know|mean|sure|certain)"
    rf"{FILLER}|(?:rul(?:e|es|ed|ing) out|eliminat\w+|reject\w*|exclud\w+|discard\w*|dismiss\w*|"
    r"unlike|instead of|rather than|except)(?: the)?) $",
    re.I,
)
# "with the rest eliminated the answer is B": the participle is of what stands before it
OTHERS_GONE = re.compile(r"(?:ruled out|\b\w+ed)(?: the)? $", re.I)
CLAUSE_END = re.compile(r"[.,;:!?\n]|\bthen\b")


def decided_letter(text: str, letters: str) -> str | None:
    """None where the text decides for none. Linear in the text."""
    text, forms = _plain(text), _letter_forms(letters)
    lines = text.split("\n")
    for form in (forms.boxed, forms.answer_is, forms.choice_is):
        if last := _last(form, text):
            return None if last.get("other") else last["letter"].upper()  # "B or C" is no answer
    heads = {match[1].upper() for match in forms.head.finditer(text)}
    heads = heads if len(heads) == 1 else set()  # several: a list of the options
    for line in (lines[-1], lines[0]):
        if match := forms.alone.match(line) or (heads and forms.head.match(line)):
            return match[1].upper()
    for form in (forms.is_right, forms.mentioned, forms.in_brackets):
        if last := _last(form, text):
            return last["letter"].upper()
    for line in (lines[-1], lines[0]):
        if match := forms.leads.match(line):
            return match[1].upper()
    return None


def _plain(text: str) -> str:
    """Without bold, maths, code, tags and runs of blanks."""
    text = MARKUP.sub(r"\1", text.translate(FULL_WIDTH)).replace("\u2019", "'")
    text = re.sub(
        r"</answer>", "\n", re.sub(r"<answer>", "\nAnswer: ", text, flags=re.I), flags=re.I
    )
    # bounded gaps: no quadratic search in a page of blanks
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text.strip())).strip()


def _last(form: re.Pattern[str], text: str) -> dict[str, str] | None:
    """The last match that is not turned down by what stands in front of it."""
    for match in reversed(deque(form.finditer(text), maxlen=NEWEST)):
        before = CLAUSE_END.split(text[max(0, match.start() - BEFORE) : match.start()])[-1]
        if match[0].lower().startswith("answer"):
            before = OTHERS_GONE.sub("", before)
        if not TURNS_DOWN.search(before):
            return match.groupdict()
    return None


@dataclass(frozen=True)
class _LetterForms:
    """How a text names an option, by what it says of it."""

    boxed: re.Pattern[str]
    answer_is: re.Pattern[str]  # "answer: B"; group `other` of "answer: B or C"
    choice_is: re.Pattern[str]  # "the best option is B"
    is_right: re.Pattern[str]  # "B is correct."
    mentioned: re.Pattern[str]  # "option B", unless it is turned down: "option B is wrong"
    in_brackets: re.Pattern[str]
    alone: re.Pattern[str]  # a line
    head: re.Pattern[str]  # "B. ", "B) " at the beginning of a line or behind a blank
    leads: re.Pattern[str]  # what a line may begin with


@lru_cache
def _letter_forms(letters: str) -> _LetterForms:
    one, both = f"[{letters}]", f"[{letters}{letters.lower()}]"
    ends = r"(?![\w']|\.\d)"
    # a small letter needs brackets: "the answer is a matter of taste"; "I think" is no option I
    pronoun = r"(?!I (?:think|believe|guess|suppose|would|will|am|do|can|have|know|need|was)\b)"
    option = r"(?i:(?:option|choice)\s)?"
    letter = rf"{option}(?:[(\[](?={both}[)\]])|{pronoun}(?={one}{ends}))(?P<letter>{both})"
    sentence_end = r"(?=[.,;:!?\n]|$)"
    maybe = r"(?i:maybe|perhaps|possibly)"
    second = rf"{option}[(\[]?{pronoun}{one}{ends}[)\]]?"
    other = (
        rf"(?P<other>[)\]]?(?:,? \(?(?:or(?: {maybe}| (?i:even|else|also))?|{maybe}) {second}|"
        rf"(?:,? and | ?[/,&] ?){second}{sentence_end}))?"
    )
    surely = r"(?i:(?:(?:most |very )?(?:likely|probably)|clearly|definitely|certainly|obviously|"
    surely += r"therefore|thus|hence|indeed|simply|actually|still|then)\s)?"
    link = rf"(?i:\s(?:is|must be|should be)|\s?[是为])?\s?[:=]?\s?{surely}"  # of an announcement
    linked = r"(?=\s?[:=是为]|\s(?i:is|must be|should be)\b)"
    named_last = rf"(?=\s\(?{both}\)?{sentence_end})"  # "Answer B."
    no = r"(?<!not )(?<!n't )(?<!nor )(?<!neither )(?<!Neither )(?<!than )"
    forms = (
        rf"\\boxed ?\{{[ ({{]{{0,3}}(?P<letter>{both})(?:[ )}}.]{{0,3}}\}}|[.:)] )",
        rf"(?i:answer|答案)(?:{linked}|{named_last}){link}{letter}{other}",
        rf"(?i:choice|option){linked}{link}{letter}{other}",
        rf"{_says_right()[0]}[(]?(?P<letter>{one})[)]?{_says_right()[1]}",
        rf"(?:{no}(?i:choice|option|answer))\s?{letter}{_turned_down(option, one)}",
        rf"{no}\((?P<letter>{one})\)(?<!\w\(.\)){_turned_down(option, one)}",
        rf"(?i:[(\[]?({one})[)\]]?[.,:]?$)",
        rf"(?:^|(?<=\s))({one})[.):](?=\s)",
        rf"(?i:\(?({one})(?:$|[.):,](?:\s|$)))",
    )
    return _LetterForms(*map(re.compile, forms))


def _says_right() -> tuple[str, str]:
    """What stands around the letter in "so B is correct.": a sentence of its own, or one that a
    few words open. Not "Plan B is correct" nor "A is correct behaviour".
    """
    opens = "so thus hence therefore that think believe only conclude option choice".split()
    words = "|".join(rf"(?<=\b(?i:{word}) )" for word in opens)
    before = rf"(?:^|(?<=[.,;:!?\n] )|(?<=\n)|{words})"
    right = r"(?:correct|right|the answer|the (?:correct|right|best) (?:answer|option|choice))"
    behind = r"(?=[.;:!\n]|$|,? (?:because|since|as)\b)"
    return before, rf" (?:is|must be)(?: \w+ly| indeed| thus)? {right}{behind}"


def _turned_down(option: str, one: str) -> str:
    return (
        rf"(?!\)?(?: (?:and|or) {option}\(?{one}\)?)? (?:fails?\b|(?:can ?not|can't|could not|"
        r"couldn't) be (?:right|correct|true|it|the)\b|(?:isn't|aren't|wasn't|does not|doesn't)\b|"
        r"(?:is|are|was|were|seems?|looks?|would be|must be)(?: \w+ly| also| just)? (?:not|wrong|"
        r"incorrect|false|untrue|invalid|too|tempting|out|ruled out|excluded|impossible)\b))"
    )
