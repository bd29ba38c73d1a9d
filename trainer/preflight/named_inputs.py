"""The folders and files that a configuration names are there: looked at before the imports of a
run, which take seconds. What they hold is checked where they are read.
"""

from collections.abc import Iterator

from reflux.trainer.adapter_folder import model_folder
from reflux.trainer.config.data import SourceSection
from reflux.trainer.config.phases import roles, spec_of
from reflux.trainer.config.schema import Config
from reflux.trainer.data.sources import check_file, source_files


def check_named_inputs(cfg: Config) -> None:
    """ValueError with the option and its value for a model folder without a config.json, and for a
    source that ends like a file, or is a pattern or a list of files, and is not there.
    """
    for role in roles(cfg):
        if not role.elsewhere:
            model_folder(role.model.path, role.option)
    for option, section in _sources(cfg):
        try:
            if not source_files(section.source) and isinstance(section.source, str):
                check_file(section.source)
        except ValueError as error:
            raise ValueError(f"{option} = {section.source!r}: {error}") from None


def _sources(cfg: Config) -> Iterator[tuple[str, SourceSection]]:
    """Those that the phase reads, with the option that names each."""
    found: dict[str, SourceSection] = {"eval": cfg.eval}
    found |= {f"eval.parts.{name}": part for name, part in cfg.eval.parts.items()}
    if spec_of(cfg.phase).data_section == "data":
        found["data"] = cfg.data
        found |= {f"data.parts.{name}": part for name, part in cfg.data.parts.items()}
    for path, section in found.items():
        if section.source:
            yield f"{path}.source", section
