"""Ranks, their process groups, and which rank holds which experts."""
