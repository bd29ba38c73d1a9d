"""Every option of a run: unit, reason, default; TOML in, ValueError out. Door: `loader`. Knows no
torch.
"""
