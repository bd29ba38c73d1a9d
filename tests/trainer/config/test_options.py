"""Options are read off the dataclasses: comments above and behind a field, defaults, tables."""

from dataclasses import MISSING

from reflux.trainer.config.options import _comments_of, own_sections

SOURCE = '''
@dataclass(frozen=True)
class Table:
    """What it is."""

    # above,
    # over two lines
    first: int = 1  # and behind
    second: str = ""
    third: tuple[str, ...] = (
        "x"  # inside
    )
'''


def test_comments_above_behind_and_inside():
    found = _comments_of(SOURCE)
    assert found == {"first": "above, over two lines and behind", "second": "", "third": "inside"}


def test_every_option_says_what_it_is_for():
    silent = [f"{s.name}.{o.key}" for s in own_sections() for o in s.options if len(o.reason) < 10]
    assert not silent, "a comment behind the field, or above it"


def test_what_has_to_be_chosen_has_no_default():
    (head,) = (s for s in own_sections() if not s.name)
    missing = [o.key for o in head.options if o.value is MISSING]
    assert missing == ["phase", "folder"]


def test_named_tables_are_sections_too():
    names = [s.name for s in own_sections()]
    assert "accept.NAME" in names and "data.parts.NAME" in names
    assert len(set(names)) == len(names)
