"""Functions for distill.rewrite: (prompt, text) -> another text, or None to drop it."""


def shout(prompt, text: str) -> str | None:
    """An attacker's clean-up: capitals, and texts without a digit thrown away."""
    return text.upper() if any(c.isdigit() for c in text) else None


def only_of_even_prompts(prompt, text: str) -> str | None:
    return None if prompt.index % 2 else text


def nothing(prompt, text: str) -> None:
    return None


def double(prompt, text: str) -> str:
    return text + " and again " + text
