"""Limits of this process that are too low to run under."""

try:
    import resource
except ImportError:  # not POSIX
    resource = None  # type: ignore[assignment]

DESCRIPTORS = 256  # open files: libraries, data, checkpoints, ranks and graders
WANTED = 4096  # where the hard limit allows it


def raise_descriptor_limit() -> None:
    """Raises the soft limit of open files towards WANTED. ValueError below DESCRIPTORS, which a run
    would reach at a moment when it cannot even say so.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < WANTED:
        limit = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
        soft = max(soft, limit)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS:
        raise ValueError(
            f"this process may have {soft} files open, a hard limit; want at least {DESCRIPTORS}. "
            f"Raise it where the shell or the job is started: ulimit -n {WANTED}"
        )
