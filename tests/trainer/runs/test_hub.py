"""Ids of the hub become folders; where they cannot, the message says why and what to do."""

from dataclasses import replace

import huggingface_hub
import pytest
from huggingface_hub import errors
from runs import config

from reflux.trainer.runs.hub import is_hub_id, with_local_models


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


def test_a_folder_has_no_revision(talkers, tmp_path):
    over = {"model": {"path": str(talkers / "policy"), "revision": "main"}}
    with pytest.raises(ValueError, match="model.revision = 'main' .*a folder has one version"):
        with_local_models(config(talkers, tmp_path / "run", "distill", **over))
