"""Ids of the hub become folders; where they cannot, the message says why and what to do."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import errors
from runs import config

from reflux.trainer.config.loader import to_toml
from reflux.trainer.runs.hub import is_hub_id, push_export, with_local_models


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the hub was asked for; the hub gives tmp_path."""
    calls = []

    def download(model, revision=None, allow_patterns=None):
        calls.append((model, revision, "model.safetensors" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_ids_become_folders_and_folders_stay(talkers, tmp_path, asked):
    over = {"model": {"path": "Qwen/Qwen3-8B", "revision": "v2"}}
    cfg = config(talkers, tmp_path / "run", "distill", **over)
    got = with_local_models(cfg)
    assert asked == [("Qwen/Qwen3-8B", "v2", True)]
    assert got.model.path == str(tmp_path) and got.teacher == cfg.teacher
    with_local_models(cfg, weights=False)
    assert asked[1] == ("Qwen/Qwen3-8B", "v2", False)
    more = replace(cfg, distill=replace(cfg.distill, more_teachers=("a/b", cfg.teacher.path)))
    assert with_local_models(more).distill.more_teachers == (str(tmp_path), cfg.teacher.path)


def test_a_folder_is_never_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    assert not is_hub_id("Qwen/Qwen3-8B") and is_hub_id("Qwen/Qwen3-4B")
    assert not any(map(is_hub_id, ("", "model", "/a/b", "./a/b", "~/model", "a/b/c")))


@pytest.mark.parametrize(
    "error, message",
    [
        (errors.GatedRepoError, "accept the terms"),
        (errors.RevisionNotFoundError, "no revision 'v9'"),
        (errors.RepositoryNotFoundError, "no such model"),
    ],
)
def test_what_the_hub_refuses_is_said(talkers, tmp_path, monkeypatch, error, message):
    def download(*_, **__):
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    over = {"model": {"path": "Qwen/Qwen3-8B", "revision": "v9"}}
    with pytest.raises(ValueError, match=f"model.path = 'Qwen/Qwen3-8B': .*{message}.*hf download"):
        with_local_models(config(talkers, tmp_path / "run", "distill", **over))


def test_without_hub_and_cache_the_message_says_so(talkers, tmp_path):
    over = {"teacher": {"path": "no-such-owner/no-such-model", "dtype": "float32"}}
    with pytest.raises(ValueError, match="teacher.path = 'no-such-owner/.*no folder here, and"):
        with_local_models(config(talkers, tmp_path / "run", "distill", **over))


def test_an_address_that_is_empty_is_not_quoted(talkers, tmp_path, monkeypatch):
    said = "Got: ConnectError: unknown An error happened while trying to locate the files on ."
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=OSError(said)))
    with pytest.raises(ValueError, match=r"gave no model \(ConnectError: unknown\)\. Want"):
        with_local_models(config(talkers, tmp_path / "run", "distill", model={"path": "a/b"}))


def test_a_folder_has_no_revision(talkers, tmp_path):
    over = {"model": {"path": str(talkers / "policy"), "revision": "main"}}
    with pytest.raises(ValueError, match="model.revision = 'main' .*a folder has one version"):
        with_local_models(config(talkers, tmp_path / "run", "distill", **over))


# --- export.push_to_hub, to a hub that is made up


class Hub:
    """Stands in for HfApi; `public` repositories exist and are public, `down` takes nothing."""

    def __init__(self, public=(), down=False):
        self.public, self.down, self.calls = public, down, []

    def create_repo(self, repo, private, exist_ok):
        self.calls.append(("repo", repo, private))

    def repo_info(self, repo):
        return SimpleNamespace(private=repo not in self.public)

    def create_branch(self, repo, branch, exist_ok):
        self.calls.append(("branch", branch))

    def upload_folder(self, repo_id, folder_path, revision, commit_message):
        if self.down:
            raise ConnectionError("no route")
        self.calls.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir())))
        return SimpleNamespace(commit_url=f"hub/{repo_id}/{revision}")


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


def exported(talkers, tmp_path, **export):
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "config.json").write_text("{}")
    over = {"export": {"enable": True, **export}}
    return config(talkers, tmp_path / "run", "distill", **over)


def test_nothing_is_pushed_unless_asked_for(talkers, tmp_path, hub):
    assert push_export(exported(talkers, tmp_path)) is None and hub.calls == []


def test_a_push_is_private_and_goes_to_its_branch(talkers, tmp_path, hub):
    cfg = exported(talkers, tmp_path, push_to_hub="me/mine", hub_revision="v2")
    assert push_export(cfg) == "hub/me/mine/v2"
    assert hub.calls == [
        ("repo", "me/mine", True),
        ("branch", "v2"),
        ("upload", "me/mine", ["config.json"]),
    ]


def test_a_public_repository_is_not_written_to_by_accident(talkers, tmp_path, hub):
    hub.public = ("me/mine",)
    cfg = exported(talkers, tmp_path, push_to_hub="me/mine")
    with pytest.raises(ValueError, match="public already; set export.hub_private = false"):
        push_export(cfg)
    assert [c[0] for c in hub.calls] == ["repo"]
    meant = replace(cfg, export=replace(cfg.export, hub_private=False))
    assert push_export(meant) == "hub/me/mine/main"


def test_a_failed_upload_keeps_the_export_and_says_how_to_go_on(
    talkers, tmp_path, hub, monkeypatch, capsys, titan_process
):
    """A whole run: exit code 2 behind a finished run, whose folder says that it has ended."""
    from assets import free_port

    from reflux.trainer import main

    hub.down = True
    over = {"export": {"enable": True, "push_to_hub": "me/mine"}, "steps": 1}
    (tmp_path / "a.toml").write_text(to_toml(config(talkers, tmp_path / "run", "distill", **over)))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(SystemExit) as ended:
        main.main(["--config", str(tmp_path / "a.toml")])
    said = capsys.readouterr().err
    folder = tmp_path / "run" / "export"
    assert ended.value.code == 2 and "Traceback" not in said
    assert f"not uploaded (no route). The export is whole in {folder}" in said
    assert f"hf upload me/mine {folder} --revision main --private" in said
    assert (folder / "config.json").exists() and list(folder.glob("*.safetensors"))
    assert (tmp_path / "run" / "summary.json").exists()
    assert 'from_pretrained("me/mine")' in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "export, says",
    [
        ({"push_to_hub": "mine"}, "want the id of a repository"),
        ({"push_to_hub": "me/mine", "enable": False}, "there is no export to push"),
    ],
)
def test_a_push_that_cannot_be_meant(talkers, tmp_path, export, says):
    with pytest.raises(ValueError, match=says):
        config(talkers, tmp_path / "run", "distill", export=export)
