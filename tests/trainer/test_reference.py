"""docs/config_reference.md is what the dataclasses say, and says it of every option."""

from pathlib import Path

from reflux.trainer import reference
from reflux.trainer.config.options import own_sections, reasons
from reflux.trainer.config.schema import TITAN_SECTIONS, sections

PAGE = Path(__file__).parents[2] / "docs" / "config_reference.md"


def test_the_page_is_not_stale(capsys):
    assert reference.main(["--check", str(PAGE)]) == 0, (
        "python -m reflux.trainer.reference --out docs/config_reference.md"
    )


def test_a_stale_page_is_found(tmp_path, capsys):
    (tmp_path / "x.md").write_text(PAGE.read_text().replace("`0.04`", "`0.05`"))
    assert reference.main(["--check", str(tmp_path / "x.md")]) == 1


def test_every_table_and_key_has_its_row():
    text = PAGE.read_text()
    for section in own_sections():
        head = f"## [{section.name}]" if section.name else "## At the head of the file"
        body = text.split(head + "\n")[1].split("\n## ")[0]
        assert all(f"| `{o.key}` |" in body for o in section.options), head
    named = {s.name.split(".")[0] for s in own_sections()}
    heads = {o.key for s in own_sections() if not s.name for o in s.options}
    assert named - {""} | heads | set(TITAN_SECTIONS) >= set(sections())
    assert all(f"## [{name}]\n" in text for name in TITAN_SECTIONS)


def test_reasons_are_the_comments_of_the_fields():
    found = reasons()
    assert found["rollout.prompts"] == "P, per optimizer step, over all ranks"
    assert found["reference.beta"].startswith("raise to >= 0.2 for responses under 64 tokens")
    assert found["proxy.offload"] == found["teacher.offload"], "a field of the base class"
