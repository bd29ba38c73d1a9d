"""Keys of another section, and of other libraries, are answered with ours."""

import re
from typing import get_type_hints

import pytest

from reflux.trainer.config.loader import fill, nested
from reflux.trainer.config.other_names import ELSEWHERE
from reflux.trainer.config.schema import Config
from reflux.trainer.engine.titan_options import NOTES

BASE = {"phase": "distill", "folder": "f", "model": {"path": "m"}, "data": {"source": "d"}}


@pytest.mark.parametrize(
    "key, says",
    [
        ("lr", "did you mean optim.lr?"),
        ("model.lr", "did you mean optim.lr?"),
        ("learning_rate", "did you mean optim.lr?"),
        ("optim.learning_rate", "did you mean optim.lr?"),
        ("rollout.num_generations", "did you mean rollout.group?"),
        ("on_policy", "did you mean distill.on_policy?"),
        ("max_tokens", "did you mean rollout.max_tokens?"),
        ("optim.lt", "did you mean optim.lr?"),  # a typing error, in its own section
        ("optim.zzz", "unknown key optim.zzz. Known there"),
    ],
)
def test_the_answer_is_a_key_that_exists(key, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        fill(Config, BASE | nested(key, 1), "x.toml")


def test_every_answer_exists():
    hints = get_type_hints(Config)
    for ours in ELSEWHERE.values():
        section, _, key = ours.rpartition(".")
        of_section = get_type_hints(hints[section]) if section in hints else {}
        assert ours in NOTES or key in (of_section if section else hints), ours


def test_all_missing_keys_are_said_at_once():
    with pytest.raises(ValueError, match="phase is missing.*; folder is missing.*; model.path is"):
        fill(Config, {}, "x.toml")
    with pytest.raises(ValueError) as error:
        fill(Config, {"phase": "distill", "folder": "f"} | {"model": {"path": "m"}}, "x.toml")
    assert "model.path" not in str(error.value)
