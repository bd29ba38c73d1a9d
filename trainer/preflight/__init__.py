"""What is found out before a run: `--check` and `--dry-run`."""
