"""Ranges of numbers in a table of a configuration; ValueError with the range outside of it."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit


def positive(table: Any, *names: str) -> None:
    for name in names:
        if getattr(table, name) < 1:
            raise ValueError(f"{name} = {getattr(table, name)}; want >= 1")


def not_negative(table: Any, *names: str) -> None:
    for name in names:
        if not getattr(table, name) >= 0:
            raise ValueError(f"{name} = {getattr(table, name)}; want >= 0")


def above_zero(table: Any, *names: str) -> None:
    for name in names:
        if not getattr(table, name) > 0:
            raise ValueError(f"{name} = {getattr(table, name)}; want > 0")


def fraction(table: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(table, name) <= 1:
            raise ValueError(f"{name} = {getattr(table, name)}; want 0 to 1")


def check_addresses(servers: Sequence[str]) -> None:
    """http://host:port, each once."""
    for server in servers:
        parts = urlsplit(server)
        try:
            known = parts.scheme == "http" and parts.hostname and parts.port
        except ValueError:  # of a port that is no number
            known = False
        if not known or parts.path.strip("/") or parts.query or parts.fragment:
            raise ValueError(f"servers: {server!r}; want http://host:port")
    if len(set(servers)) < len(servers):
        raise ValueError(f"servers = {list(servers)}; want each address once")


def positive_limit(table: Any) -> None:
    if table.limit is not None and table.limit < 1:
        raise ValueError(f"limit = {table.limit}; want >= 1, or leave it out for all rows")
