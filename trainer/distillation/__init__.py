"""Phase distill: a student learns from given texts or from frozen teachers."""
