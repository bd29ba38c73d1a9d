"""What several test files share: text stretches."""


def stretches(got):
    """(begin, end) of each span in the source."""
    return list(zip([0, *got.bounds.tolist()], got.bounds.tolist(), strict=False))
