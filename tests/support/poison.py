"""Makes what `torch.empty` gives recognisable, so that a read or a gap of uninitialised memory shows."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """NaN in floating-point tensors, all bits set in others (-1, FP8 and E8M0 NaN)."""

    def wrap(original):
        def empty(*args, **kwargs):
            tensor = original(*args, **kwargs)
            tensor.view(torch.uint8).fill_(255) if tensor.numel() else None
            return tensor

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, wrap(getattr(torch, name)))
