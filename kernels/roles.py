"""What Gluon kernels whose warps have roles share: barriers, and names that differ between Triton 3.6 and 3.9."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

meet = getattr(gl, "barrier", None) or gl.thread_barrier  # of the warps of one role
# Into shared memory, while the threads go on
copy_ahead = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def seen_as(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """Shared memory as another tensor of as many bytes."""
        return memory.reinterpret(DTYPE, SHAPE, LAYOUT)

else:

    @gluon.jit
    def seen_as(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """Shared memory as another tensor of as many bytes."""
        return memory._reinterpret(DTYPE, SHAPE, LAYOUT)


@gluon.jit
def buffer_barriers(NUM: gl.constexpr, READERS: gl.constexpr):
    """Two barriers for each of NUM buffers: that it is full, one arrival a phase, and that it is empty again, one of
    each of READERS."""
    full = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(NUM):
        mbarrier.init(full.index(buffer), count=1)
        mbarrier.init(empty.index(buffer), count=READERS)
    fence_async_shared()
    return full, empty
