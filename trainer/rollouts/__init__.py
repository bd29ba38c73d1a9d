"""Samples texts, and scores them under another model. Knows no loss and no reward."""
