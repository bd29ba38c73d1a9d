"""Which of several models a row is for: a column names one (distill.route,
calibration.proxy_route).
"""

from collections.abc import Sequence
from pathlib import Path

from .prompt import Prompt


def chosen_model(prompt: Prompt, column: str, paths: Sequence[str], option: str) -> int:
    """The index among `paths` that the prompt's column names: by number, or by the last part of a
    folder's path. ValueError where it names none of them, or two folders end alike.
    """
    value = prompt.extra.get(column)
    names = [Path(path).name for path in paths]
    if type(value) is int and 0 <= value < len(paths):
        return value
    if isinstance(value, str) and names.count(value) == 1:
        return names.index(value)
    raise ValueError(
        f"{option} = {column!r}: prompt {prompt.index} has {value!r} there; want 0 to "
        f"{len(paths) - 1}, or one of {', '.join(names)}, the last part of a folder's path"
    )
