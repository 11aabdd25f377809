"""Kernels on a real GPU; how to run them is in CONTRIBUTING.md. Elsewhere this folder is not collected.

Under TRITON_INTERPRET, which tests/conftest.py sets, kernels would not run on the GPU: not collected either.
"""

import os
from importlib.util import find_spec

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS, before its first call

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["*"]
else:
    collect_ignore = []
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        collect_ignore.append("test_parallel.py")  # several ranks, under torchrun
    if not all(map(find_spec, ("dsv4serve", "msgspec", "pydantic_settings", "safetensors", "rich"))):
        # The engine's requirements are not here; kernels need none.
        collect_ignore += ["test_engine_gpu.py", "test_drafts_gpu.py", "test_deterministic_gpu.py", "test_ready_gpu.py"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that nothing wrote is NaN (255 in bytes), and random numbers are the same in every run."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
