"""Scores on data that training never saw."""
