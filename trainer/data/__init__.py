"""Prompt -> Rollout -> Sample -> Batch: prompts, chat templates, tasks and their graders. Knows no
trainer.
"""
