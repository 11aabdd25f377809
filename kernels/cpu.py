"""The C kernels of csrc/cpu, which `pip install` compiles where it finds a C compiler.

Where there is none `library` is None, and the torch references run; so they do for arguments that a C kernel does not
take. Calls go through ctypes: the library depends neither on Python's nor on torch's ABI, and needs no Python headers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 2  # of csrc/cpu/abi.c; raised whenever a signature below changes, so that a library built before is not called
FEW_ROWS = 64  # torch divides more rows than these between its threads, if it has any; the C kernels have one
STREAMS, LANES = 4, 16  # limits of csrc/cpu: most mHC streams, and what head_dim must be a multiple of

# Arguments of each function: p = pointer, n = long, f = float. All return nothing.
SIGNATURES = {
    "linear": "pnpnnpnnn",
    "grouped_out_proj": "pppnppnnnnn",
    "mhc_pre": "pppppppnnnnff",
    "mhc_post": "pppppnnn",
    "mhc_head": "pppppnnnff",
    "mega_moe": "pppppppnppnnnnnf",
    "route": "ppppppppnnnnf",
    "rms_norm": "pnppnnf",
    "apply_rope": "pnppnnnnn",
    "sparse_attention": "pnppnppnppppnnnn",
}
TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_long, "f": ctypes.c_float}


def _load() -> ctypes.CDLL | None:
    for path in Path(__file__).parent.glob("_cpu*.so"):
        loaded = ctypes.CDLL(str(path))
        if loaded.dsv4_abi() != ABI:
            continue
        for name, codes in SIGNATURES.items():
            function = getattr(loaded, f"dsv4_{name}")
            function.argtypes, function.restype = [TYPES[code] for code in codes], None
        return loaded
    return None


library = _load()


@contextmanager
def references() -> Iterator[None]:
    """Inside, the torch references run."""
    global library
    before, library = library, None
    try:
        yield
    finally:
        library = before


def takes(operation: str) -> bool:
    """True if the operation (the name of its folder) has a C kernel that can run here."""
    return library is not None and (Path(__file__).parent / operation / "cpu.py").exists()


def fits(x: Tensor, *others: Tensor) -> bool:
    """All are float32 on the CPU, and one thread is enough for the rows of x."""
    if x.shape[0] > FEW_ROWS and torch.get_num_threads() > 1:
        return False
    for tensor in (x, *others):  # noqa: SIM110 (a generator takes longer than the rest)
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
    return True


def weight_dtype(*weights: Tensor) -> torch.dtype | None:
    """float32 or bfloat16 if all weights on the CPU are that, else None."""
    dtype = weights[0].dtype
    if dtype is not torch.float32 and dtype is not torch.bfloat16:
        return None
    for weight in weights:
        if weight.dtype is not dtype or not weight.is_cpu:
            return None
    return dtype


def by_column(*matrices: Tensor) -> bool:
    """Each [.., rows, columns] lies column by column, without gaps."""
    for matrix in matrices:
        strides, num_rows = matrix.stride(), matrix.shape[-2]
        if strides[-2] != 1 or strides[-1] != num_rows:
            return False
        if len(strides) == 3 and strides[0] != num_rows * matrix.shape[-1]:
            return False
    return True


def preferred(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """The operation `reference`, done by `kernel` where that is possible.

    `kernel` has the same arguments; it calls `library` or returns None for arguments it does not take. It is not
    asked while gradients are recorded or a compiler traces.
    """

    @functools.wraps(reference)
    def operation(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and library is not None:
            result = kernel(*args, **kwargs)
            if result is not None:
                return result
        return reference(*args, **kwargs)

    return operation
