"""The table of docs/kernels.md: what each tail pays for leaving the support (T4)."""

# all logits of the support fall together, their shape unchanged
SHIFTS = [0.0, -1.0, -2.0, -5.0, -10.0, -20.0]

# reverse KL at P = 0.228; without renormalisation ("truncated") it falls as the support is left
TABLE = {
    "truncated": [0.227, -0.017, -0.067, -0.014, 0.0, 0.0],
    "renorm": [0.227] * 6,
    "bucket": [0.116, 0.050, 0.110, 0.241, 0.259, 0.259],
    "full": [0.314, 0.303, 0.392, 0.542, 0.562, 0.562],
}
