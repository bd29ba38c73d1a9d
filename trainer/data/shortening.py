"""data.too_long = "truncate_left": a conversation without the oldest tokens of what its user wrote.

The template stays whole, for only the contents of the user's messages are cut, and it is rendered
anew. The oldest message of the user loses its beginning first; of the last one something stays.
"""

from collections.abc import Callable, Mapping, Sequence

from .chat import Chat

Messages = Sequence[Mapping[str, str]]


def shorten(
    chat: Chat, messages: Messages, excess: Callable[[Messages], int]
) -> list[dict[str, str]] | None:
    """The messages without as many tokens as `excess` counts, 0 or less where they fit. None where
    they would not fit without anything that the user wrote.
    """
    shorter = [dict(m) for m in messages]
    users = [m for m in shorter if m["role"] == "user"]
    while (over := excess(shorter)) > 0:
        oldest = next((m for m in users[:-1] if m["content"]), users[-1])
        content = oldest["content"]
        least = 1 if oldest is users[-1] else 0  # characters that stay
        if len(content) <= least:
            return None
        starts = [*chat.token_starts(content), len(content)]
        cut = max(starts[min(over, len(starts) - 1)], 1)
        oldest["content"] = content[min(cut, len(content) - least) :]
    return shorter
