"""Package data: official model configs, recipes, and the embedded default checkpoint."""
