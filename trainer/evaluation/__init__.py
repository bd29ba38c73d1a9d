"""How good a model is on held-out prompts: answers, metrics with intervals, acceptance rules, a
report. The doors are evaluator.py for phases that train and phase.py for the phase `evaluate`.
Nothing here knows where a model comes from or how it was trained.
"""
