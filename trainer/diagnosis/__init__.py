"""Phase diagnose: tail noise, off-policy instability and teacher-student gap of a pair, measured
without moving a weight.
"""
