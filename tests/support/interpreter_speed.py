"""Triton's interpreter without work that changes no result, which is most of its time.

Imported for its effect by support.triton_interpreter. What 3.6 to 3.9 do again and again is done once and kept; what
they throw away is left out.
"""

import dataclasses

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

# Integer sums and products are also computed in int64, for a check that only debug mode makes; it is never on.
builder = interpreter.interpreter_builder
assert not builder.options.debug
builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

# Every call of a device function puts the interpreter's functions into triton.language again. Here they stay there.
original_patch, patched = interpreter._patch_lang, set()


class Nothing:
    def restore(self):
        pass


def patch_once(function):
    """Kernels have the module triton.language among their globals, Triton's own device functions its core."""
    if id(function.__globals__) not in patched:
        original_patch(function)
        patched.add(id(function.__globals__))
    return Nothing()


original_dtype, dtypes = interpreter._get_np_dtype, {}


def kept_dtype(kind):
    if kind.name not in dtypes:
        dtypes[kind.name] = original_dtype(kind)
    return dtypes[kind.name]


original_unwrap = core._unwrap_if_constexpr
NOT_CONSTEXPR = {int, float, bool, str, tl.dtype, tl.block_type, tl.pointer_type, tl.tensor}


def unwrap(value):
    kind = type(value)
    if kind is tl.constexpr:
        return value.value
    return value if kind in NOT_CONSTEXPR else original_unwrap(value)


# Block types and tensors of one shape share what is made of it; nothing changes it.
original_block_type, block_fields = tl.block_type.__init__, {}
original_tensor, tensor_fields = tl.tensor.__init__, {}


def make_block_type(self, element_ty, shape):
    sizes = tuple([size if type(size) is int else unwrap(size) for size in unwrap(shape)])
    if sizes not in block_fields:
        original_block_type(self, element_ty, shape)
        block_fields[sizes] = self.shape, self.numel, str(self.shape)
    self.element_ty, self.sizes = element_ty, sizes
    self.shape, self.numel, text = block_fields[sizes]
    self.name = f"<{text}, {element_ty}>"


def make_tensor(self, handle, type):
    sizes = getattr(type, "sizes", ())
    if sizes not in tensor_fields:
        original_tensor(self, handle, type)
        tensor_fields[sizes] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = tensor_fields[sizes]


original_broadcast = TritonSemantic.broadcast_impl_value


def broadcast(self, left, right):
    return (left, right) if left.shape is right.shape else original_broadcast(self, left, right)


original_equal = tl.dtype.__eq__


def equal(self, other):
    return self is other or original_equal(self, other)


# tl.sort exchanges elements by sums of two with exclusive or, which were reduced one element at a time.
original_reduce = interpreter.ReduceOps.generic_reduce


def reduce(self, inputs):
    if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
        return original_reduce(self, inputs)
    (values,) = inputs
    found = np.bitwise_xor.reduce(values.handle.data, axis=self.axis, keepdims=self.keep_dims)
    return [self.to_tensor(found, values.dtype)]


interpreter._patch_lang = patch_once
interpreter._get_np_dtype = kept_dtype
core._unwrap_if_constexpr = unwrap
tl.block_type.__init__, tl.tensor.__init__, tl.dtype.__eq__ = make_block_type, make_tensor, equal
TritonSemantic.broadcast_impl_value = broadcast
interpreter.ReduceOps.generic_reduce = reduce
