"""What went wrong in code or files that are not ours, in one line."""

import traceback


def explain(error: BaseException) -> str:
    """Its kind, its message, and the line of the code that raised it: "TypeError: no ... (rows.py,
    line 3)". A SyntaxError names its place itself.
    """
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError | ImportError) or len(frames) < 2:
        return what
    return f"{what} ({frames[-1].filename}, line {frames[-1].lineno})"
