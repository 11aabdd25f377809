"""Makes Triton's interpreter right on the CPU: bfloat16 arithmetic and FP8 casts, wrong in 3.6 to 3.9 without it.

Imported for its effect; tests/conftest.py sets TRITON_INTERPRET. The interpreter keeps bfloat16 as uint16 and computes
on those integers; here such values become float32 for every operation and are rounded to nearest even after it.
"""

import ml_dtypes
import numpy as np
import triton.language as tl
from support import interpreter_speed  # noqa: F401
from triton.runtime import interpreter

FP8 = {tl.float8e4nv: ml_dtypes.float8_e4m3fn, tl.float8e5: ml_dtypes.float8_e5m2}
FP8_MAX = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
original_dtype = interpreter._get_np_dtype


def to_float32(handle):
    """The values of a handle."""
    kind = handle.dtype.scalar
    if kind == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.view(FP8[kind]).astype(np.float32) if kind in FP8 else handle.data.astype(np.float32)


def from_float32(values, kind):
    """A handle of `kind` with the values rounded to it; FP8 saturates as the hardware's conversions do."""
    kind, values = kind.scalar, np.ascontiguousarray(values, dtype=np.float32)
    if kind == tl.bfloat16:
        return Handle(values.astype(ml_dtypes.bfloat16).view(np.uint16), kind)
    if kind in FP8:
        limit = FP8_MAX[kind]
        clipped = np.where(np.isnan(values), values, np.clip(values, -limit, limit))
        return Handle(clipped.astype(FP8[kind]).view(np.uint8), kind)
    return Handle(values.astype(original_dtype(kind)), kind)


def is_narrow(kind):
    return kind.scalar == tl.bfloat16 or kind.scalar in FP8


def cast(original):
    def replacement(self, source, kind, *rest):
        if not (is_narrow(source.dtype) or is_narrow(kind)):
            return original(self, source, kind, *rest)
        values = to_float32(source) if source.dtype.scalar.is_floating() else source.data.astype(np.float32)
        if kind.scalar.is_floating():
            return from_float32(values, kind)
        return Handle(values.astype(original_dtype(kind)), kind.scalar)

    return replacement


def binary(self, left, right, operation):
    if left.dtype.scalar == tl.bfloat16:
        result = operation(to_float32(left), to_float32(right))
        return Handle(result, tl.int1) if result.dtype == bool else from_float32(result, left.dtype)
    result = original_binary(self, left, right, operation)
    # The interpreter leaves a comparison the type of its operands; a scalar one then becomes no mask when splatted.
    return Handle(result.data, tl.int1) if result.data.dtype == bool else result


def unary(self, argument, operation):
    if argument.dtype.scalar != tl.bfloat16:
        return original_unary(self, argument, operation)
    return from_float32(operation(to_float32(argument)), argument.dtype)


def dot(self, left, right, accumulator, *_):
    """Summed in float64: a float32 sum of NumPy has other bits in another row of the tile."""
    product = np.matmul(to_float32(left), to_float32(right), dtype=np.float64).astype(accumulator.data.dtype)
    return Handle(product + accumulator.data, accumulator.dtype.scalar)


def set_attribute(self, target, name, value):
    """Run-time loop bounds: int() of an array with one element is an error since NumPy 2.4."""
    if name == "__index__":
        return original_set(self, target, name, lambda tensor: int(tensor.handle.data.reshape(-1)[0]))
    return original_set(self, target, name, value)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def scaled_rows(values, scale):
    """float64 [rows, depth] of FP4 pairs or narrow floats [rows, ..], times E8M0 per 32; 255 is NaN."""
    data = values.data
    if values.dtype.scalar == tl.uint8:
        data = np.stack([E2M1[data & 15], E2M1[data >> 4]], axis=-1).reshape(len(data), -1)
    else:
        data = to_float32(values)
    exponents = scale.data.astype(np.float64)
    return data.astype(np.float64) * np.repeat(np.where(exponents == 255, np.nan, 2.0 ** (exponents - 127)), 32, axis=1)


def dot_scaled(self, left, left_scale, left_format, right, right_scale, right_format, *rest):
    """Summed in float64, so that a row has the same bits wherever it lies in a tile. 3.6 does not get here.

    Both operands are packed along K, E2M1 as uint8 and E4M3 as float8e4nv.
    """
    accumulator = rest[-1]
    product = scaled_rows(left, left_scale) @ scaled_rows(Handle(right.data.T, right.dtype), right_scale).T
    return Handle((product + accumulator.data).astype(np.float32), tl.float32)


original_binary, original_unary = Builder.binary_op, Builder.unary_op
original_set = interpreter._LangPatchScope.set_attr
Builder.cast_impl, Builder.create_fp_to_fp = cast(Builder.cast_impl), cast(Builder.create_fp_to_fp)
Builder.binary_op, Builder.unary_op, Builder.create_dot = binary, unary, dot
Builder.create_dot_scaled = dot_scaled
interpreter._LangPatchScope.set_attr = set_attribute
