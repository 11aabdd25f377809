"""Builds the embedded demo model: data, tokenizer, training, quantisation, export, evaluation. Not part of the wheel."""
