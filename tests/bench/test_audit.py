"""What pip-audit says is read as it is meant: no data is not "nothing found"."""

import json
import sys

import pytest

from bench.audit import installed, read_audit, run_audit, write_list

CLEAN = {"name": "numpy", "version": "2.0", "vulns": []}
HIT = {"name": "x", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
SKIPPED = {"name": "y", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    "dependencies, code",
    [([CLEAN], 0), ([CLEAN, HIT], 1), ([CLEAN, SKIPPED], 0), ([SKIPPED] * 3, 3), ([], 3)],
)
def test_the_exit_code_says_what_is_known(dependencies, code):
    audit = read_audit({"dependencies": dependencies})
    assert audit.exit_code == code
    assert audit.audited + audit.skipped == len(dependencies)
    assert audit.vulnerable == (("x 1: CVE-1 (fixed in 2)",) if code == 1 else ())


def fake_tool(folder, text, error=""):
    tool = folder / "tool"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nprint({text!r})\nsys.stderr.write({error!r})\n"
    )
    tool.chmod(0o755)
    return str(tool)


def test_a_tool_without_network_has_audited_nothing(tmp_path, capsys):
    assert run_audit(fake_tool(tmp_path, "Traceback ..."), "x").exit_code == 3
    assert capsys.readouterr().err == "no output\n"
    assert run_audit(fake_tool(tmp_path, "", "Traceback ...\nno route\n"), "x").exit_code == 3
    assert capsys.readouterr().err == "no route\n"
    report = json.dumps({"dependencies": [CLEAN], "fixes": []})
    assert run_audit(fake_tool(tmp_path, report), "x").audited == 1


def test_the_list_has_what_is_installed_and_what_is_known(tmp_path):
    pins = installed()
    names = [pin.partition("==")[0] for pin in pins]
    assert "torch" in names and names == sorted(names)
    write_list(tmp_path / "list.txt", read_audit({"dependencies": [SKIPPED]}), pins)
    head, *rest = (tmp_path / "list.txt").read_text().splitlines()
    assert "no advisories could be reached: nothing is known" in head and rest == pins
    write_list(tmp_path / "list.txt", read_audit({"dependencies": [HIT]}), [])
    text = (tmp_path / "list.txt").read_text()
    assert "1 known vulnerabilities" in text and "CVE-1" in text
