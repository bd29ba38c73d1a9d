"""Phase evaluate, and the evaluator that the training phases call: predictions, metrics,
acceptance.
"""
