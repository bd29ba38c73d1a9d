"""vLLM where the configuration needs it: installed here, or behind the addresses that are named."""

from reflux.trainer.config.schema import Config
from reflux.trainer.rollouts.client import Servers, check_servers
from reflux.trainer.rollouts.vllm_engine import check_installed

from .report import Finding

INFO_S = 20.0  # in which a server has to say what it serves


def engine_findings(cfg: Config) -> list[Finding]:
    """One finding for each engine of the configuration; empty where there is none."""
    findings = []
    if cfg.rollout.engine == "vllm":
        try:
            version = check_installed("rollout.engine = 'vllm'")
            findings.append(Finding("ok", f"rollout.engine = 'vllm': vLLM {version}"))
        except ValueError as error:
            findings.append(Finding("error", str(error), "or set rollout.engine = 'embedded'"))
    asked = (
        ("rollout.servers", cfg.rollout.servers, cfg.model.path, False),
        ("teacher.servers", cfg.teacher.servers, cfg.teacher.path, True),
    )
    for option, addresses, path, weights in asked:
        if addresses:
            findings.append(_servers(option, addresses, path, weights))
    return findings


def _servers(option: str, addresses: tuple[str, ...], path: str, weights: bool) -> Finding:
    servers = Servers(addresses, INFO_S, 0)
    try:
        facts = check_servers(servers, path, weights=weights, option=option)
    except ValueError as error:
        return Finding("error", str(error), "docs/engines.md, 'Servers', has the command")
    return Finding(
        "ok",
        f"{option}: {len(addresses)} servers of vLLM {facts['vllm']} in {facts['dtype']}, texts of "
        f"{facts['max_len']} tokens, top {facts['max_logprobs']} at most, the model of {path}",
    )
