"""dsv4serve: a serving engine for one model family, DeepSeek-V4."""

__version__ = "0.1.0"
