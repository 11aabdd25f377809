"""What Triton would compile on a GPU, of launches that do nothing here.

A launch compiles when a process has not seen its key yet: constants, and of every other argument the type and what the
compiler specialises on (the integer 1, multiples of 16, addresses at multiples of 16 bytes). The keys are made by
Triton's own code.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import jit
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from dsv4_kernels import capability, dependent

MOST_BYTES = 1 << 20  # of memory that is cleared: indices and logits are smaller


def record_keys(monkeypatch: Any, is_hopper: bool = True) -> set[str]:
    """From now on launches do nothing but add their keys to the set, and choices are those for Hopper or for what came
    after it. Small memory that nothing wrote is zero; products of the library, which has no kernel of ours, are, too.
    """
    keys: set[str] = set()

    def run(kernel: InterpretedFunction | JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        settings = vars(kernel) if isinstance(kernel, JITFunction) else kernel.kwargs
        fixed = tuple(settings.get("do_not_specialize") or ())
        _, specialisation, options = _binder(kernel.fn, fixed)(*args, **kwargs)
        keys.add(f"{kernel.fn.__module__}.{kernel.fn.__name__}: {specialisation} {options}")

    def scaled_mm(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return torch.zeros(len(x), weight.shape[1], dtype=torch.bfloat16)

    mm, empty, empty_like = torch.mm, torch.empty, torch.empty_like

    def wide_mm(x: Tensor, weight: Tensor, **settings: Any) -> Tensor:
        if "out_dtype" in settings:
            return torch.zeros(len(x), weight.shape[1], dtype=settings["out_dtype"])
        return mm(x, weight, **settings)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(JITFunction, "run", run)  # Gluon's kernels, which are not interpreted
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(capability, "is_hopper", lambda device: is_hopper)
    monkeypatch.setattr(dependent, "_can_launch_early", lambda device: True)

    def cleared(made: Tensor) -> Tensor:
        return made.zero_() if made.nbytes <= MOST_BYTES else made

    for name, make in (("empty", empty), ("empty_like", empty_like)):
        monkeypatch.setattr(torch, name, lambda *args, make=make, **kwargs: cleared(make(*args, **kwargs)))
    return keys


@functools.cache
def _binder(function: Any, do_not_specialize: tuple[str, ...]) -> Any:
    """Binds arguments as a compiled launch of the kernel would."""
    kernel = JITFunction(function, do_not_specialize=list(do_not_specialize))
    return jit.create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
