"""Constraints on what a model may generate: vocabulary and compiler (xgrammar), and the token masks of a step."""
