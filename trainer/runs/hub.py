"""Model ids of the Hugging Face hub, as Qwen/Qwen3-8B, become folders of the hub's cache.

The folder's name holds the commit, so a run's record says which weights it had. Without a network
the cache is enough.
"""

import os
import re
from dataclasses import replace
from typing import Any

from reflux.trainer.config.schema import Config

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
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
        why = " ".join(str(error).split())[:200]
    raise ValueError(
        f"{option} = {model!r}: no folder here, and the hub gave no model ({why}). Want a Hugging "
        f"Face model folder, or where the hub can be reached: hf download {model} --local-dir DIR"
    )
