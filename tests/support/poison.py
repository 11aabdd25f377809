"""Memory that nothing wrote, made recognisable, so that a read of it or a gap in a result shows."""

import pytest
import torch


@pytest.fixture
def poisoned():
    """`torch.empty` gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
