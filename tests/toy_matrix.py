"""A matrix of three toy cells, two of which wait for the first."""

from pathlib import Path

TABLE = """
folder = "{folder}"
seeds = [0, 1]
parallel = 2
[[cell]]
name = "a"
module = "toy_cell"
arguments = ["a"]
[[cell]]
name = "b-{{x}}"
each = {{ x = ["1", "2"] }}
after = ["a"]
module = "toy_cell"
arguments = ["b{{x}}"]
labels = {{ role = "student", teacher = "t", attack = "{{x}}" }}
"""


def write_toy(folder: Path) -> None:
    """m.toml, whose runs go to folder/runs."""
    (folder / "m.toml").write_text(TABLE.format(folder=folder / "runs"))
