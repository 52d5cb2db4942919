"""A GPU that is none: tensors that say they are on `cuda` and keep their numbers on the CPU, under the rules that a real device has for its tensors.

    with simulated_gpu.simulate() as traffic: train_gpt.main(["DEVICE=cuda", "COMPILE=0", ...])
    python tests/simulated_gpu.py DEVICE=cuda COMPILE=0 ...                  also by torchrun

An operation that mixes devices, a CPU generator for numbers made on the device and a collective on the wrong group raise, as on a real one. `traffic` lists
what makes the host wait for the device, as far as it is known here: not what solvers and searches for unique values do. Kernels, streams, memory and the
compiler are not simulated: tests/gpu needs the device itself.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

import train_gpt

ATEN = torch.ops.aten
CUDA = torch.device("cuda", 0)
# Operations whose result, or the size of it, the host has to wait for.
WAITING = {
    ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.is_nonzero, ATEN.equal, ATEN.bincount, ATEN._unique2, ATEN.repeat_interleave,
}  # fmt: skip
# On a real device the index of `x[index]` may lie on the CPU, at the price of a copy that the host waits for.
INDEXING = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}


class Traffic:
    """What has made the host wait while `watching`: (kind, where in train_gpt.py)."""

    def __init__(self) -> None:
        self.watching = False
        self.waits: list[tuple[str, str]] = []

    def wait(self, kind: str) -> None:
        """Records that the host waits."""
        if self.watching:
            frames = [frame for frame in traceback.extract_stack() if frame.filename.endswith("train_gpt.py")]
            self.waits.append((kind, f"{frames[-1].name}: {frames[-1].line}" if frames else "?"))


TRAFFIC = Traffic()


def leaves(tree: Any) -> Iterator[Any]:
    """Yields what lies in nested tuples, lists and dictionaries. PyTorch's own trees do the same five times slower."""
    if isinstance(tree, tuple | list):
        for each in tree:
            yield from leaves(each)
    elif isinstance(tree, dict):
        yield from leaves(list(tree.values()))
    else:
        yield tree


def replaced(tree: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """Returns the same with every tensor replaced."""
    if isinstance(tree, Tensor):
        return replace(tree)
    if isinstance(tree, tuple | list):
        return type(tree)([replaced(each, replace) for each in tree])
    return {key: replaced(each, replace) for key, each in tree.items()} if isinstance(tree, dict) else tree


class OnGpu(Tensor):
    """A tensor on the simulated device; `inner` holds its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        assert not isinstance(inner, OnGpu)
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None) -> Any:
        packet, flat = operation.overloadpacket, list(leaves((arguments, options)))
        if packet in WAITING:
            TRAFFIC.wait(str(packet))
        foreign = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnGpu)]
        if packet in INDEXING:
            if foreign or any(x.dtype == torch.bool for x in flat[1:] if isinstance(x, Tensor)):
                TRAFFIC.wait(str(packet))
        elif any(x.dim() for x in foreign):
            raise RuntimeError(f"{operation}: expected all tensors on one device, found cuda:0 and cpu {[tuple(x.shape) for x in foreign]}")
        outer = {id(x.inner): x for x in flat if isinstance(x, OnGpu)}
        own_arguments, own_options = replaced((arguments, options or {}), lambda x: x.inner if isinstance(x, OnGpu) else x)
        return replaced(operation(*own_arguments, **own_options), lambda x: outer[id(x)] if id(x) in outer else OnGpu(x))


def is_cuda(device: Any) -> bool:
    """Whether this names the simulated device."""
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def move(x: Tensor, device: Any, *, waits: bool) -> Tensor:
    """Returns x on another device, a copy."""
    if is_cuda(device) == isinstance(x, OnGpu):
        return x
    if waits:
        TRAFFIC.wait("copy between host and device")
    if isinstance(x, OnGpu):
        return x.inner.detach().clone()
    return OnGpu(x.detach().clone())


class SimulatedGpu(TorchFunctionMode):
    """Gives every call that names the device to the CPU, and its result to the device."""

    def __torch_function__(self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None) -> Any:
        given = dict(options or {})
        name, x = getattr(function, "__name__", ""), arguments[0] if arguments else None
        if function is Tensor.to:
            return self.to(*arguments, **given)
        if function is Tensor.cpu:
            return move(x, "cpu", waits=True)
        if function is Tensor.cuda:
            return move(x, "cuda", waits=not given.get("non_blocking"))
        if function is Tensor.pin_memory:
            assert not isinstance(x, OnGpu), "only memory of the host is pinned"
            pinned = x.clone()
            pinned.is_staged = True
            return pinned
        if function is Tensor.numpy:
            assert not isinstance(x, OnGpu), "TypeError: can't convert cuda:0 device type tensor to numpy"
        if function in (Tensor.copy_, torch._foreach_copy_):
            return self.copy(function, *arguments, **given)
        if name in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__") and isinstance(x, OnGpu):
            TRAFFIC.wait(name)
            return function(x.inner.detach(), *arguments[1:], **given)
        if given.pop("pin_memory", False):
            made = function(*arguments, **given)
            made.is_staged = True
            return made
        if function is Tensor.new_tensor and isinstance(x, OnGpu):
            TRAFFIC.wait(name)
            return OnGpu(torch.tensor(*arguments[1:], **{"dtype": x.dtype, **given}))
        if is_cuda(given.get("device")):
            generator = given.get("generator")
            assert generator is None or generator.device.type == "cuda", f"{name}: a generator of the CPU for numbers on the device"
            if name in ("tensor", "as_tensor", "asarray"):
                TRAFFIC.wait(f"torch.{name} on the device")
            made = function(*arguments, **{**given, "device": "cpu"})
            return made if isinstance(made, OnGpu) else OnGpu(made)
        return function(*arguments, **given)

    def to(self, x: Tensor, *arguments: Any, **given: Any) -> Tensor:
        """Tensor.to, of a device first, of a dtype, or of a tensor whose dtype is meant."""
        device = given.pop("device", arguments[0] if arguments else None)
        arguments = arguments[1:] if arguments and arguments[0] is device else arguments
        if isinstance(device, Tensor):
            device, arguments = device.device, (device.dtype, *arguments)
        if not isinstance(device, str | torch.device):
            return Tensor.to(x, *(() if device is None else (device,)), *arguments, **given)
        waits = not given.get("non_blocking") or not (isinstance(x, OnGpu) or getattr(x, "is_staged", False))
        moved = move(x, device, waits=waits)
        local = "meta" if torch.device(device).type == "meta" else "cpu"
        return Tensor.to(moved, local, *arguments, **given)

    def copy(self, function: Any, target: Any, source: Any, non_blocking: bool = False) -> Any:
        """copy_ in both forms, which may go from one device to another."""
        for into, what in zip(*([side] if isinstance(side, Tensor) else side for side in (target, source)), strict=True):
            if isinstance(into, OnGpu) == isinstance(what, OnGpu):
                into.copy_(what)
            else:
                staged = getattr(into if isinstance(what, OnGpu) else what, "is_staged", False)
                into.copy_(move(what, into.device, waits=not (non_blocking and staged)))
        return target


class Event:
    """Of CUDA; nothing is queued here."""

    def record(self) -> None:
        """Marks the end of what has been queued."""

    def synchronize(self) -> None:
        """Waits for the mark alone: what HostCopy is for."""


def on_device(tensor: Tensor, group: Any) -> Tensor:
    """Returns the numbers of a tensor that is sent; the group of all ranks is NCCL's, which knows only the device, and another one is gloo's."""
    assert isinstance(tensor, OnGpu) == (group is None), "NCCL sends what is on the device, gloo what is not"
    return tensor.inner if isinstance(tensor, OnGpu) else tensor


def collective(function: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """Returns a collective whose first arguments are so many tensors."""

    def run(*arguments: Any, group: Any = None, **options: Any) -> Any:
        return function(*(on_device(each, group) for each in arguments[:tensors]), *arguments[tensors:], group=group, **options)

    return run


def of_objects(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a collective of Python objects: over NCCL these would pass through the device, and the host would wait for it."""

    def run(*arguments: Any, group: Any = None, **options: Any) -> Any:
        assert group is not None, "objects travel by gloo"
        return function(*arguments, group=group, **options)

    return run


def start_groups(backend: str, **options: Any) -> None:
    """init_process_group, with gloo in NCCL's place."""
    assert backend == "nccl" and options.pop("device_id").type == "cuda"
    START_GROUPS("gloo", **options)


START_GROUPS = dist.init_process_group


@contextmanager
def simulate() -> Iterator[Traffic]:
    """The simulated device is there inside."""
    with ExitStack() as stack:
        for name, stand_in in {
            "is_available": lambda: True, "set_device": lambda device: None, "synchronize": lambda: TRAFFIC.wait("synchronize"), "Event": Event,
            "get_device_name": lambda: "simulated", "get_device_capability": lambda: (9, 0), "max_memory_allocated": lambda: 0,
        }.items():  # fmt: skip
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        for name, stand_in in {
            "init_process_group": start_groups, "all_reduce": collective(dist.all_reduce, 1), "broadcast": collective(dist.broadcast, 1),
            "all_gather_object": of_objects(dist.all_gather_object), "broadcast_object_list": of_objects(dist.broadcast_object_list),
        }.items():  # fmt: skip
            stack.enter_context(mock.patch.object(dist, name, stand_in))
        for name in ("reduce_scatter", "all_gather"):
            stack.enter_context(mock.patch.object(train_gpt, name, collective(getattr(train_gpt, name), 2)))
        stack.enter_context(mock.patch.object(torch, "inference_mode", torch.no_grad))  # which has no place for a tensor's inner one
        # A mode is of one thread.
        threads = partial(ThreadPoolExecutor, initializer=lambda: SimulatedGpu().__enter__())
        stack.enter_context(mock.patch.object(train_gpt, "ThreadPoolExecutor", threads))
        # It transposes in place, and the shape of an OnGpu cannot change.
        orthogonal = train_gpt.MATRIX_STARTS["orthogonal"]
        stack.enter_context(mock.patch.dict(train_gpt.MATRIX_STARTS, orthogonal=lambda x: orthogonal(x.inner if isinstance(x, OnGpu) else x)))
        # New parameters on the device, for a plain one cannot become an OnGpu.
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, torch.__future__.get_overwrite_module_params_on_conversion())
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(SimulatedGpu())
        TRAFFIC.waits, TRAFFIC.watching = [], False
        yield TRAFFIC


if __name__ == "__main__":
    with simulate():
        code = train_gpt.main(sys.argv[1:])
    sys.exit(code)
