"""Runs a Gluon kernel on CPU tensors, which Triton's interpreter cannot: values by torch, warps of a role by a thread.

    launch(kernel, grid, arguments, constants, assembler={text: function}, seed=0, elsewhere=[])

As on the GPU are the kernel's own Python, dtypes and their rounding, masks, addresses (those outside of the argument
they were made from raise), shared memory, which begins as NaN, barriers with their phases, and roles that run beside
each other: they stop for a moment now and then, elsewhere with each seed. What only a GPU shows: layouts, registers
that a product still reads, warps, fences; and loops of the compiler, which take a name that is given another one's
first value for unchanged. A barrier that nobody completes raises after SECONDS.
"""

from __future__ import annotations

import itertools
import operator
import random
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from dsv4_kernels.dependent import wait_for_previous
from dsv4_kernels.roles import copy_ahead, meet

SECONDS = 20.0
SPACE = 1 << 44  # addresses of one argument
ELSEWHERE = 1000 * SPACE  # address of the first tensor that no argument is
PAUSE = 2e-4  # seconds
DTYPES = {
    tl.int1: torch.bool, tl.uint8: torch.uint8, tl.int32: torch.int32, tl.int64: torch.int64,
    tl.float32: torch.float32, tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn,
}  # fmt: skip


class Value:
    """A tensor or, without dims, a scalar of the kernel. With `target`: int64 addresses of values of that dtype."""

    type = types.SimpleNamespace(layout=None)

    def __init__(self, data: Tensor, target: torch.dtype | None = None) -> None:
        self.data, self.target = data, target

    shape = property(lambda self: list(self.data.shape))

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        if isinstance(dtype, tl.pointer_type):
            return Value(self.data, DTYPES[dtype.element_ty])
        return Value(self.data.view(DTYPES[dtype]) if bitcast else self.data.to(DTYPES[dtype]))

    def __getitem__(self, index: Any) -> Value:
        return Value(self.data[index], self.target)

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __add__(self, other: Any) -> Value:
        if self.target is not None:
            return Value(self.data + tensor(other).long() * self.target.itemsize, self.target)
        return Value(self.data + plain(other))

    def __floordiv__(self, other: Any) -> Value:  # as in C
        return Value(torch.div(self.data, plain(other), rounding_mode="trunc"))

    def __mod__(self, other: Any) -> Value:
        return Value(torch.fmod(self.data, plain(other)))


def _operation(name: str) -> Callable[..., Value]:
    apply = getattr(operator, name)
    return lambda self, other: Value(apply(self.data, plain(other)))


def _reflected(name: str) -> Callable[..., Value]:
    apply = getattr(operator, name)
    return lambda self, other: Value(apply(plain(other), self.data))


for _name in ("sub", "mul", "truediv", "and_", "or_", "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name.rstrip('_')}__", _operation(_name))
for _name in ("add", "sub", "mul"):
    setattr(Value, f"__r{_name}__", _reflected(_name))
Value.__neg__ = lambda self: Value(-self.data)


def plain(value: Any) -> Any:
    return value.data if isinstance(value, Value) else value


def tensor(value: Any) -> Tensor:
    value = plain(value)
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else None)


class Shared:
    """Shared memory."""

    def __init__(self, data: Tensor, pause: Callable[[], None]) -> None:
        self.data, self.pause, self.shape = data, pause, list(data.shape)

    def load(self, layout: Any) -> Value:
        self.pause()
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        self.pause()
        assert list(value.data.shape) == self.shape
        assert value.data.dtype == self.data.dtype
        self.data.copy_(value.data)

    def index(self, index: Any) -> Shared:
        return Shared(self.data[int(index)], self.pause)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length), self.pause)

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.data.permute(order), self.pause)

    def reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        return Shared(self.data.view(DTYPES[dtype]).view(shape), self.pause)

    _reinterpret = reinterpret  # its name in Triton 3.6


class Program:
    """What the names of Gluon mean in one program of a launch."""

    def __init__(
        self,
        memory: dict[int, Tensor],
        ids: tuple[int, ...],
        num_ids: tuple[int, ...],
        assembler: dict[str, Any],
        seed: str,
    ) -> None:
        self.memory, self.ids, self.num_ids, self.assembler = memory, ids, num_ids, assembler
        self.random, self.failed = random.Random(seed), threading.Event()
        self.changed = threading.Condition()
        self.copies = threading.local()  # of a role: groups, the last of which is open
        self.barriers: dict[int, list[int]] = {}  # by address: arrivals wanted, still missing, phases that ended
        names = {name: getattr(self, name) for name in dir(self) if not name.startswith("_")}
        self.language = Names(names)
        barriers = types.SimpleNamespace(
            init=self._init, wait=self._wait, arrive=self._arrive, MBarrierLayout=lambda: None
        )
        replaced = [
            (tl, self.language),
            (gl, self.language),
            (wait_for_previous, lambda: None),
            (hopper.fence_async_shared, lambda: None),
            (hopper.warpgroup_mma, self._multiply),
            (hopper.warpgroup_mma_wait, lambda count, deps: deps[0] if len(deps) == 1 else tuple(deps)),
            (meet, self._pause),
            (copy_ahead, self._copy),
            (async_copy, types.SimpleNamespace(commit_group=self._commit, wait_group=self._wait_copies)),
            (hopper.mbarrier, barriers),
        ]
        self.replaced = {id(value): other for value, other in replaced}  # a kernel's own hash compiles it

    def python(self, value: Any) -> Any:
        """What a global of the kernel's module stands for here."""
        if id(value) in self.replaced:
            return self.replaced[id(value)]
        if isinstance(value, JITFunction | InterpretedFunction):
            code, of_module = value.fn.__code__, value.fn.__globals__
            namespace = {name: self.python(of_module[name]) for name in code.co_names if name in of_module}
            self.replaced[id(value)] = types.FunctionType(code, namespace)
            return self.replaced[id(value)]
        return value.value if isinstance(value, tl.constexpr) else value

    # The language

    def program_id(self, axis: int) -> Value:
        return Value(torch.tensor(self.ids[axis], dtype=torch.int32))

    def num_programs(self, axis: int) -> Value:
        return Value(torch.tensor(self.num_ids[axis], dtype=torch.int32))

    def arange(self, start: int, end: int, layout: Any = None) -> Value:
        return Value(torch.arange(start, end, dtype=torch.int32))

    def zeros(self, shape: list[int], dtype: Any, layout: Any = None) -> Value:
        return Value(torch.zeros(shape, dtype=DTYPES[dtype]))

    def where(self, condition: Any, left: Any, right: Any) -> Value:
        target = getattr(left, "target", None)
        return Value(torch.where(tensor(condition), tensor(left), tensor(right)), target)

    def maximum(self, left: Any, right: Any) -> Value:
        return Value(torch.fmax(tensor(left), tensor(right)))

    def minimum(self, left: Any, right: Any) -> Value:
        return Value(torch.fmin(tensor(left), tensor(right)))

    def cdiv(self, left: Any, right: Any) -> Any:
        return (left + (right - 1)) // right

    def exp(self, value: Value) -> Value:
        return Value(torch.exp(value.data))

    def exp2(self, value: Value) -> Value:
        return Value(torch.exp2(value.data))

    def max(self, value: Value, axis: int) -> Value:
        return Value(value.data.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(axis))

    def sum(self, value: Value, axis: int) -> Value:
        return Value(value.data.sum(axis))

    def reshape(self, value: Value, shape: list[int]) -> Value:
        return Value(value.data.reshape(shape))

    def permute(self, value: Value, order: list[int]) -> Value:
        return Value(value.data.permute(order))

    def join(self, left: Value, right: Value) -> Value:
        return Value(torch.stack([left.data, right.data], dim=-1))

    def split(self, value: Value) -> tuple[Value, ...]:
        return tuple(map(Value, value.data.unbind(-1)))

    def broadcast(self, left: Value, right: Value) -> tuple[Value, ...]:
        return tuple(map(Value, torch.broadcast_tensors(left.data, right.data)))

    def convert_layout(self, value: Value, layout: Any) -> Value:
        return value

    def multiple_of(self, value: Value, factor: int) -> Value:
        assert not (value.data % factor).any()
        return value

    def static_range(self, count: int) -> range:
        return range(count)

    def range(self, first: Any, last: Any, step: Any = 1, disable_licm: bool = False) -> Iterator[Value]:
        return (Value(torch.tensor(at, dtype=torch.int32)) for at in range(int(first), int(last), int(step)))

    def load(self, pointers: Value, mask: Any = None, other: Any = 0) -> Value:
        assert pointers.target is not None
        addresses, kept = torch.broadcast_tensors(pointers.data, tensor(True if mask is None else mask))
        size = pointers.target.itemsize
        found = torch.full((*addresses.shape, 1), plain(other)).to(pointers.target).view(torch.uint8)
        for space, chosen, at in self._places(addresses, kept, size):
            found[chosen] = space[at]
        return Value(found.view(pointers.target)[..., 0])

    def store(self, pointers: Value, value: Value, mask: Any = None) -> None:
        assert pointers.target is not None
        addresses, kept = torch.broadcast_tensors(pointers.data, tensor(True if mask is None else mask))
        values = value.data.to(pointers.target).broadcast_to(addresses.shape)
        for space, chosen, at in self._places(addresses, kept, pointers.target.itemsize):
            space[at] = values[chosen][:, None].view(torch.uint8)

    def inline_asm_elementwise(self, text: str, constraints: str, args: list[Value], **settings: Any) -> Any:
        return tuple(map(Value, self.assembler[text](*(arg.data for arg in args))))

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        data = torch.empty(shape, dtype=DTYPES[dtype])
        data.view(torch.uint8).fill_(255)
        return Shared(data, self._pause)

    def warp_specialize(self, roles: list[tuple[Any, Any]], warps: list[int], registers: list[int]) -> None:
        errors: list[BaseException] = []

        def run(function: Any, arguments: Any) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                errors.append(error)
                self.failed.set()

        threads = [threading.Thread(target=run, args=role) for role in roles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    # What stands behind it

    def _places(self, addresses: Tensor, kept: Tensor, size: int) -> Any:
        spaces = addresses // SPACE
        for number in spaces[kept].unique().tolist():
            assert number in self.memory, "an address that nothing has"
            space, chosen = self.memory[number], kept & (spaces == number)
            at = (addresses[chosen] % SPACE)[:, None] + torch.arange(size)
            assert at.max() < len(space), "an address behind its tensor"
            assert not (at[:, 0] % size).any(), "an address that is no multiple of what is there"
            yield space, chosen, at

    def _pause(self) -> None:
        if self.random.random() < 0.05:
            time.sleep(PAUSE)

    def _groups(self) -> list[list[Callable[[], None]]]:
        if not hasattr(self.copies, "groups"):
            self.copies.groups = [[]]
        return self.copies.groups

    def _copy(self, target: Shared, pointers: Value, mask: Any = None) -> None:
        self._groups()[-1].append(lambda: target.store(self.load(pointers, mask)))

    def _commit(self) -> None:
        self._groups().append([])

    def _wait_copies(self, num_outstanding: int) -> None:
        """Only now copies are made: on a GPU none is later."""
        groups = self._groups()
        while len(groups) - 1 > num_outstanding:
            for copy in groups.pop(0):
                copy()

    def _multiply(
        self, left: Shared | Value, right: Shared, sums: Value, use_acc: bool = True, is_async: bool = False
    ) -> Value:
        product = (left.data.double() @ right.data.double()).float()
        return Value(product + sums.data if use_acc else product)

    def _init(self, barrier: Shared, count: int) -> None:
        self.barriers[barrier.data.data_ptr()] = [count, count, 0]

    def _arrive(self, barrier: Shared, count: int = 1, pred: Any = True) -> None:
        self._pause()
        if not pred:
            return
        with self.changed:
            state = self.barriers[barrier.data.data_ptr()]
            state[1] -= count
            assert state[1] >= 0
            if not state[1]:
                state[1], state[2] = state[0], state[2] + 1
            self.changed.notify_all()

    def _wait(self, barrier: Shared, phase: Any) -> None:
        state, phase, end = self.barriers[barrier.data.data_ptr()], int(phase), time.monotonic() + SECONDS
        with self.changed:
            while state[2] % 2 == phase:
                self.changed.wait(0.1)
                if self.failed.is_set() or time.monotonic() > end:
                    raise RuntimeError(f"nobody completed phase {phase} of a barrier")


class Names:
    """The replaced names of the language, and its dtypes and layouts."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(gl, name)


def bytes_of(data: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(data.untyped_storage())


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any],
    assembler: dict[str, Any], seed: int = 0, elsewhere: Sequence[Tensor] = (),
) -> None:  # fmt: skip
    """Run all programs of a launch, one after the other.

    Args:
        assembler: what the inline assembly does to tensors.
        elsewhere: what lies at ELSEWHERE, ELSEWHERE + SPACE, .., for kernels that read addresses.
    """
    memory = {(ELSEWHERE // SPACE) + number: bytes_of(data) for number, data in enumerate(elsewhere)}
    values: list[Value] = []
    for number, argument in enumerate(arguments, 1):
        if isinstance(argument, Tensor):
            memory[number] = bytes_of(argument)
            address = number * SPACE + argument.storage_offset() * argument.element_size()
            values.append(Value(torch.tensor(address), argument.dtype))
        else:
            values.append(Value(tensor(argument)))
            if isinstance(argument, int):
                values[-1].data = values[-1].data.int()
    for ids in itertools.product(*map(range, grid)):
        program = Program(memory, ids, grid, assembler, f"{seed} {ids}")
        program.python(kernel)(*values, **constants)
