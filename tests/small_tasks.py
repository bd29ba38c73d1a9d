"""Graders of runs in tests. Imports nothing: the process that grades starts with it."""


def reward_vowels(prompt, text: str) -> float:
    """A task that a random model can partly solve: the fraction of vowels."""
    return sum(c in "aeiou" for c in text) / max(len(text), 1)


def is_even(prompt, text: str) -> bool:
    """Correct for about half of all texts."""
    return sum(map(ord, text)) % 2 == 0


def praise_or_blame(prompt, text: str) -> float:
    """A reward without right and wrong, below 0 for about half of all texts."""
    return 1.0 if is_even(prompt, text) else -1.0


def is_right(prompt, text: str) -> bool:
    """Always."""
    return True


def is_easy(prompt, text: str) -> bool:
    """All correct, all incorrect, or mixed, by prompt."""
    return (True, False, is_even(prompt, text))[prompt.index % 3]


def is_answer_of_prompt_0(prompt, text: str) -> bool:
    """Correct for one prompt only."""
    return prompt.index == 0


def raise_sometimes(prompt, text: str) -> float:
    """A grader that fails on short texts."""
    return 1.0 / (len(text) // 20)


def fail_always(prompt, text: str) -> float:
    """A grader that is broken."""
    raise RuntimeError("no such column")


def fail_on_odd_lengths(prompt, text: str) -> bool:
    """is_even, for texts that it does not fail on."""
    if len(text) % 2:
        raise RuntimeError("an odd length")
    return is_even(prompt, text)
