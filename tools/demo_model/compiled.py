"""The operations as a GPU trains them: other forms of some, and torch.compile for many small elementwise calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from tools.demo_model import operations

FORMS = {
    "dsv4_kernels.gemm.reference": ("linear",),
    "dsv4_kernels.out_proj.reference": ("grouped_out_proj",),
    "dsv4_kernels.mega_moe.reference": ("mega_moe",),
}
COMPILED = {
    "dsv4_kernels.mhc.reference": ("mhc_pre", "mhc_post", "mhc_head"),
    "dsv4_kernels.norm.reference": ("rms_norm",),
    "dsv4_kernels.rope.reference": ("_rotate",),
    "dsv4_kernels.sparse_attention.reference": ("attend",),
    "dsv4_kernels.mega_moe.reference": ("_activate",),
    "dsv4_kernels.compressor.reference": ("pool_sequence",),
    "dsv4_kernels.quant.reference": ("_round_fp8", "_round_fp4"),
    "tools.demo_model.operations": ("linear",),
    "tools.demo_model.network": ("cross_entropy",),
    "tools.demo_model.step": ("_mass", "_index_loss"),
    "tools.demo_model.rounding": ("rounded",),
    "tools.demo_model.muon": ("orthogonalize",),
}
_USERS = ("dsv4_kernels", "dsv4serve.model", "tools.demo_model")


def compile_operations() -> None:
    """Replace each operation, or what wraps its reference, in all modules that use it."""
    torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is written
    for module_name, names in FORMS.items():
        for name in names:
            _replace(module_name, name, getattr(operations, name))
    for module_name, names in COMPILED.items():
        for name in names:
            _replace(module_name, name, torch.compile(getattr(sys.modules[module_name], name), dynamic=False))


def _replace(module_name: str, name: str, form: Callable[..., Any]) -> None:
    original = getattr(sys.modules[module_name], name)
    for user, module in list(sys.modules.items()):
        used = getattr(module, name, None) if user.startswith(_USERS) else None
        if used is not None and original in (used, getattr(used, "__wrapped__", None)):
            setattr(module, name, form)
