"""Memory of a forward pass or a training step, measured or computed from shapes alone."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .forms import device_type
from .options import unknown_name_error
from .planning import BODIES, planned_for, round_up, workspace

MIB = 2**20
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# moments of a matrix or kernel, and of a vector
_MOMENTS = {"adamw": (2, 2), "sgd": (1, 1), "muon": (1, 2), "none": (0, 0)}


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _rounded(x: Tensor) -> int:
    """Bytes of the storage of ``x`` in the allocator of CUDA."""
    return round_up(x.untyped_storage().nbytes(), 512)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _forward(
    forward: Callable[[], Any], own: Iterable[Tensor], where: Callable[[], str] = str
) -> tuple[Any, Counter[str]]:
    """Run a forward pass: its output, and the bytes that it stores for backward by ``where()``.

    Storages of the tensors ``own`` are not counted.
    """
    held: list[tuple[weakref.ref[Tensor], str]] = []

    def keep(tensor: Tensor) -> Tensor:
        alone = tensor.detach()  # an output that held itself would never be freed
        held.append((weakref.ref(alone), where()))
        return alone

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = forward()
    seen, found = {_storage(t) for t in own}, Counter[str]()
    for reference, place in held:
        tensor = reference()  # those of a branch that the output does not need are already freed
        if tensor is not None and _storage(tensor) not in seen:
            seen.add(_storage(tensor))
            found[place] += tensor.untyped_storage().nbytes()
    return output, found


def bytes_kept(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Count the bytes that a forward pass stores for the backward pass.

    Parameters and buffers are not counted. Each storage counts once and completely: a view stores
    all of its base.
    """
    output, found = _forward(forward, [*module.parameters(), *module.buffers()])
    del output  # alive until here, so that no address is reused
    return found.total()


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a training step, or of inference, in bytes.

    Attributes:
        weights: parameters and buffers.
        gradients: of the parameters.
        optimizer: state of the optimizer.
        average: copy of the weights for an exponential moving average.
        inputs: images and labels.
        kept: activations stored for the backward pass.
        peak: maximum of everything.
        peak_module: module in whose forward or backward pass the maximum is reached.
        modules: ``kept`` by module.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    inputs: int
    kept: int
    peak: int
    peak_module: str
    modules: dict[str, int]

    def __str__(self) -> str:
        """The parts in MiB, and the modules that store most."""
        parts = ("weights", "gradients", "optimizer", "average", "inputs", "kept", "peak")
        rows = [(part, getattr(self, part)) for part in parts]
        lines = [f"{part:<10}{size / MIB:>12,.1f} MiB" for part, size in rows if size]
        lines[-1] += f", in {self.peak_module or 'the model'}"
        most = Counter(self.modules).most_common(5)
        return "\n".join(
            [*lines, *(f"  kept by {n or 'the model'}: {size / MIB:,.1f} MiB" for n, size in most)]
        )


def memory(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    optimizer: Literal["adamw", "sgd", "muon", "none"] = "adamw",
    training: bool = True,
    average: bool = False,
    accumulate: bool = False,
    device: Literal["cuda", "cpu"] = "cuda",
) -> Memory:
    """Compute the memory of a training step or of inference from shapes, without running it.

    The model is executed symbolically, with tensors that have no data (``FakeTensorMode``), so the
    time and memory that this takes do not grow with those of the model, and no GPU is needed. Not
    counted are the CUDA context, workspaces of libraries and fragmentation, together about 1 GiB.

    Args:
        model: any model of images, on any device, also "meta". It is not changed. Activation
            checkpointing is taken into account if the model has it on.
        shape: of the images, (B, C, H, W).
        precision: of autocast; with "fp32", tensors have the dtype of the model.
        optimizer: "adamw", "sgd" (with momentum), "muon" (AdamW for vectors) or "none".
        training: a training step with dropout; otherwise inference without gradients.
        average: whether an exponential moving average of the weights is held.
        accumulate: whether gradients of earlier batches are held during the step.
        device: whose operators are used. "cpu" takes those that a CPU would use instead.

    Returns:
        The parts and the maximum.

    Raises:
        ValueError: for an unknown option, sizes that are not positive, images that do not fit the
            model, training without a parameter to train, or a model whose operations depend on the
            values of its tensors.
    """
    for name, value, known in (
        ("precision", precision, _PRECISIONS), ("optimizer", optimizer, _MOMENTS),
        ("device", device, ("cuda", "cpu")),
    ):  # fmt: skip
        if value not in known:
            raise unknown_name_error(name, value, known)
    shape = _checked(shape)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # as outside of any context of the caller
    with caches_kept(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        twin = without_data(model, fake).train(training)
        own = [*twin.parameters(), *twin.buffers()]
        learned = [p for p in twin.parameters() if p.requires_grad and training]
        with fake, planned_for(device):
            dtype = next((p.dtype for p in own if p.is_floating_point()), torch.float32)
            x = torch.empty(shape, dtype=dtype, device="cpu")
            labels = torch.empty(shape[:1], dtype=torch.long, device="cpu")
            inputs = [x, labels]
            step = _Step(twin, [*own, *inputs])
            lower = _PRECISIONS[precision]
            autocast = torch.autocast("cpu", lower, enabled=lower is not None)
            try:
                with torch.set_grad_enabled(training), step.counter:
                    for _ in range(1 + (accumulate and training)):
                        step.run(partial(_loss, twin, x, labels, autocast), training)
            except (RuntimeError, ValueError, AssertionError, TypeError) as error:
                raise ValueError(
                    f"the memory of {type(model).__name__} for images of shape {shape} "
                    f"cannot be computed: {str(error).strip().splitlines()[0]}"
                ) from error
        weights, gradients = _bytes(own), _bytes(learned)
        state = sum(_MOMENTS[optimizer][p.dim() < 2] * p.nbytes for p in learned)
        copied = weights if average else 0
        held = weights + state + copied + _bytes(inputs)
        return Memory(
            weights, gradients, state, copied, _bytes(inputs), step.kept.total(),
            held + step.counter.peak, step.counter.peak_place, dict(step.kept),
        )  # fmt: skip


def _checked(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape as a tuple; a ValueError unless it consists of positive integers."""
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ValueError(f"shape {shape!r} must be positive integers, such as (8, 3, 224, 224)")
    return sizes


def without_data(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """Copy a model with parameters and buffers that have no data."""
    memo: dict[int, Any] = {}
    with fake:
        for own in (*model.parameters(), *model.buffers()):
            twin = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device="cpu")
            is_parameter = isinstance(own, nn.Parameter)
            memo[id(own)] = nn.Parameter(twin, own.requires_grad) if is_parameter else twin
    return copy.deepcopy(model, memo)


def _loss(model: nn.Module, x: Tensor, labels: Tensor, autocast: Any) -> Tensor:
    """A loss of all outputs: cross-entropy of logits (B, classes), the mean of other tensors."""
    with autocast:
        outputs = [y for y in tree_leaves(model(x)) if isinstance(y, Tensor)]
        losses = [F.cross_entropy(y, labels) if y.dim() == 2 else y.mean()
                  for y in outputs if y.is_floating_point()]  # fmt: skip
        return torch.stack([loss.float() for loss in losses]).sum()


class _Step:
    """Training steps of a model without data, which note the module that is executed.

    Args:
        model: the model.
        held: tensors that are not counted.
    """

    def __init__(self, model: nn.Module, held: Sequence[Tensor]) -> None:
        self.held, self.kept, self.places = held, Counter[str](), [""]
        self.counter = StorageCounter(held, lambda: self.places[-1])
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(partial(self._leave, name), always_call=True)

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        self.places.append(name)

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self.places.pop()
        for y in tree_leaves(output):
            if isinstance(y, Tensor) and y.requires_grad:
                y.register_hook(partial(self._return_to, name))

    def _return_to(self, name: str, gradient: Tensor) -> None:
        """The gradient of the output of a module is known: its backward pass begins."""
        self.places[-1] = name

    def run(self, forward: Callable[[], Tensor], training: bool) -> None:
        """Forward, and backward in training."""
        loss, self.kept = _forward(forward, self.held, lambda: self.places[-1])
        if training:
            if not loss.requires_grad:
                raise ValueError("no parameter of it requires gradients, so use training=False")
            loss.backward()
        self.places = [""]


class StorageCounter(TorchDispatchMode):
    """Count the bytes of the storages that are made inside the context and are still alive.

    Args:
        held: tensors that are not counted.
        where: name of the module that is executed.
    """

    def __init__(self, held: Iterable[Tensor] = (), where: Callable[[], str] = str) -> None:
        super().__init__()
        self.known, self.where = {_storage(t) for t in held}, where
        self.alive: dict[int, weakref.ref[Any]] = {}
        self.live, self.peak, self.peak_place = 0, 0, ""

    def restart(self) -> None:
        """Count from here on: what is alive now is no longer counted."""
        self.known |= self.alive.keys()
        self.alive.clear()
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # gradients are enabled where checkpointing recomputes a forward pass
        in_backward = torch._C._current_autograd_node() is not None and not torch.is_grad_enabled()
        if in_backward and func is torch.ops.aten.add.Tensor:
            self._reuse(*args)
        output = func(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                self._add(x)
        self._reach(self.live + workspace(func, args) + _inside(func, args, output))
        return output

    def _reuse(self, *gradients: Any) -> None:
        """Drop one of two gradients: autograd adds the other to it in place."""
        for x in gradients:
            if isinstance(x, Tensor) and _storage(x) in self.alive:
                del self.alive[_storage(x)]
                self.live -= _rounded(x)
                return

    def _reach(self, size: int) -> None:
        if size > self.peak:
            self.peak, self.peak_place = size, self.where()

    def _add(self, x: Tensor) -> None:
        key, size = _storage(x), _rounded(x)
        if key in self.known or key in self.alive:
            return

        def free(_: Any) -> None:
            self.live -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(x.untyped_storage(), free)
        self.live += size


def _inside(func: Any, args: tuple[Any, ...], output: Any) -> int:
    """Bytes of the intermediate tensors of an operator of ours; on a CPU, blocks are small."""
    if func not in BODIES or device_type(args[0]) == "cpu":
        return 0
    with StorageCounter(x for x in args if isinstance(x, Tensor)) as counter:
        BODIES[func](*args)
    return counter.peak - sum(map(_rounded, output))


@contextlib.contextmanager
def caches_kept() -> Iterator[None]:
    """Clear ``functools`` caches that hold tensors without data afterwards."""
    try:
        yield
    finally:
        for cache in gc.get_objects():
            if hasattr(type(cache), "cache_clear") and _holds_fake(cache):
                cache.cache_clear()


def _holds_fake(thing: Any, depth: int = 4) -> bool:
    if isinstance(thing, FakeTensor):
        return True
    if depth == 0 or not isinstance(thing, (tuple, list, dict)):
        return depth == 4 and any(_holds_fake(t, 3) for t in gc.get_referents(thing))
    return any(_holds_fake(t, depth - 1) for t in gc.get_referents(thing))
