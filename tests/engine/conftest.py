import tempfile
from pathlib import Path

import pytest
from support.engine_process import EngineProcess

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def children_find_the_fakes(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


@pytest.fixture
def endpoint():
    with tempfile.TemporaryDirectory(prefix="dsv4test-") as folder:
        yield f"ipc://{folder}/engine"


@pytest.fixture
def engine(endpoint):
    engine = EngineProcess(endpoint)
    yield engine
    engine.stop()
