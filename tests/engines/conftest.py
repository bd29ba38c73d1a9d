"""Fixtures of this folder."""

from engine_servers import policy_server, teacher_server  # noqa: F401
