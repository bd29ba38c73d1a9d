"""Model ids of the Hugging Face hub, as Qwen/Qwen3-8B, become folders of the hub's cache.

The folder's name holds the commit, so a run's record says which weights it had. Without a network
the cache is enough.
"""

import os
import shlex
import textwrap
from dataclasses import replace
from typing import Any

from reflux.trainer.config.fit import nearest_model
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import HUB_ID

from . import first_rank

SMALL = ("*.json", "*.jinja", "*.txt", "*.model")
WEIGHTS = ("model.safetensors", "model-*.safetensors")


def with_local_models(cfg: Config, *, weights: bool = True) -> Config:
    """`cfg` with every id of the hub replaced by its folder, downloaded where it is not there yet.

    weights: False for what only looks at shapes and tokenizers. ValueError, naming the key, where
    the hub or the model cannot be reached.
    """
    for name in ("model", "teacher", "proxy"):
        section = getattr(cfg, name)
        if is_hub_id(section.path):
            loads = weights and not getattr(section, "from_scratch", False)
            loads = loads and getattr(section, "source", "local") == "local"
            path = local_folder(section.path, section.revision, f"{name}.path", weights=loads)
            cfg = replace(cfg, **{name: replace(section, path=path)})
        elif section.revision:
            raise ValueError(
                f"{name}.revision = {section.revision!r} with {name}.path = {section.path!r}; want "
                "an id of the hub as path: a folder has one version"
            )
    more = tuple(
        local_folder(path, "", "distill.more_teachers", weights=weights)
        if is_hub_id(path)
        else path
        for path in cfg.distill.more_teachers
    )
    if more != tuple(cfg.distill.more_teachers):
        cfg = replace(cfg, distill=replace(cfg.distill, more_teachers=more))
    return cfg


def push_export(cfg: Config) -> str | None:
    """Uploads <folder>/export to export.push_to_hub, by the first rank, and returns the address;
    None where nothing is to be pushed or nothing was exported. The export on disk stays as it is.

    ValueError where the hub does not take it, with the command that tries it again.
    """
    to, folder = cfg.export, os.path.join(cfg.folder, "export")
    if not to.push_to_hub or not first_rank.is_first() or not os.path.isdir(folder):
        return None
    try:
        return _upload(to.push_to_hub, folder, private=to.hub_private, revision=to.hub_revision)
    except Exception as error:  # of the hub, the network, or of what lies below them
        why = " ".join(str(error).split())[:300] or type(error).__name__
        words = [to.push_to_hub, folder, "--revision", to.hub_revision]
        words += ["--private"] if to.hub_private else []
        raise ValueError(
            f"export.push_to_hub = {to.push_to_hub!r}: not uploaded ({why}). The export is whole "
            f"in {folder}; to try again: hf upload {shlex.join(words)}"
        ) from error


def _upload(repository: str, folder: str, *, private: bool, revision: str) -> str:
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    hub.create_repo(repository, private=private, exist_ok=True)
    if private and not hub.repo_info(repository).private:
        raise ValueError(
            "the repository is public already; set export.hub_private = false if that is meant"
        )
    if revision != "main":
        hub.create_branch(repository, branch=revision, exist_ok=True)
    done = hub.upload_folder(
        repo_id=repository,
        folder_path=folder,
        revision=revision,
        commit_message="Export of a run of reflux-llm",
    )
    return str(done.commit_url)


def is_hub_id(path: str) -> bool:
    return bool(HUB_ID.fullmatch(path)) and not os.path.exists(os.path.expanduser(path))


def local_folder(model: str, revision: str, option: str, *, weights: bool) -> str:
    """Of a model's files. ValueError as of with_local_models."""
    import huggingface_hub
    from huggingface_hub import errors

    patterns: Any = [*SMALL, *(WEIGHTS if weights else ())]
    try:
        return str(
            huggingface_hub.snapshot_download(
                model, revision=revision or None, allow_patterns=patterns
            )
        )
    except errors.GatedRepoError:
        why = "its owner wants a login: accept the terms on its page, then hf auth login"
    except errors.RevisionNotFoundError:
        why = f"the hub has the model, but no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        why = "the hub has no such model, or it is private: hf auth login"
    except (OSError, ValueError, errors.HfHubHTTPError) as error:  # no network, no cache, no space
        why = _without_address(str(error))
    near = nearest_model(model).removeprefix(", ")
    raise ValueError(
        f"{option} = {model!r}: no folder here{f' ({near})' if near else ''}, and the hub gave no "
        f"model ({why}). Want a Hugging "
        f"Face model folder, or where the hub can be reached: hf download {model} --local-dir DIR"
    )


def _without_address(message: str) -> str:
    """The cause in a message of the hub's library, which goes on about an address that may be
    empty.
    """
    words = " ".join(message.split()).removeprefix("Got: ")
    return textwrap.shorten(words.split(" An error happened while")[0], 200, placeholder=" ...")
