"""The only door to torchtitan: model, FSDP2, optimizer, checkpoints, export. Knows no phase."""
