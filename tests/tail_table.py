"""What several test files share: tail table."""

# T4: the ray along which all logits of the support fall together, while their shape stays
SHIFTS = [0.0, -1.0, -2.0, -5.0, -10.0, -20.0]


# at P = 0.228: the values by which un-renormalised reverse KL was found to pay for leaving the
# support
TABLE = {
    "truncated": [0.227, -0.017, -0.067, -0.014, 0.0, 0.0],
    "renorm": [0.227] * 6,
    "bucket": [0.116, 0.050, 0.110, 0.241, 0.259, 0.259],
    "full": [0.314, 0.303, 0.392, 0.542, 0.562, 0.562],
}
