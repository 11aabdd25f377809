"""Builds the embedded demo model: data, tokenizer, training, export, evaluation. Not part of the wheel."""
