"""What a fused layer keeps besides its parameters: packed weights and the kernel chosen for each input shape.

All of it is derived, so none of it is copied, pickled or saved: it is made again from the parameters when it is needed,
and whenever they have changed. It lies beside the convolution that is called as a module; the functional form and
graphs of torch.compile, which know tensors only, find theirs by the weight.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from r3d_kernels import _check, _cpu, _extension, _fork, _pooled, backends
from r3d_kernels.problems import ConvProblem

if TYPE_CHECKING:
    from r3d_kernels.ops.clip import ClipSource

__all__ = ["ATTRIBUTE", "LayerState", "layer_packs", "layer_plans", "plan_key", "state_of", "state_of_weight"]

logger = logging.getLogger("r3d_kernels")

Triple = tuple[int, int, int]
Norm = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]

ATTRIBUTE = "_r3d_layer_state"  # of a convolution
_MAX_PLANS = 64  # input shapes remembered for one layer


class _Snapshot:
    """Everything derived from one version of the parameters."""

    def __init__(self, key: object, layer: backends.Layer) -> None:
        self.key = key
        self.layer = layer
        self.packs: dict[tuple[str, object], Any] = {}
        # (input shape, dtype, ...) -> (kernel, its pack, request, choice)
        self.plans: dict[object, tuple[backends.Kernel, Any, backends.Request, backends.Choice]] = {}


def _key(weight: Tensor, conv_bias: Tensor | None, norm: Norm | None, counted: bool = True) -> list[object]:
    """Something that differs when any of the tensors has changed.

    Version counters count in-place writes. Writes through `.data` escape them, and tensors made in inference mode
    have none (not `counted`): for tensors in CPU memory a fingerprint of the bytes is added (of all bytes where nothing
    counts).

    Raises:
        RuntimeError: where a tensor has no counter, unless not `counted`.
    """
    tensors: tuple[Tensor | None, ...] = (weight, conv_bias)
    key: list[object] = [None]
    if norm is not None:
        mean, var, gamma, beta, eps = norm
        tensors, key = (weight, conv_bias, mean, var, gamma, beta), [eps]
    for t in tensors:
        if t is None:
            key.append(None)
        else:
            key += (t.data_ptr(), t._version if counted else 0, t.dtype)
    if weight.is_cpu and _extension.error is None:
        present = [t for t in tensors if t is not None]
        key.append(torch.ops.r3d_kernels.fingerprint(present, not counted))
    return key


def plan_key(
    x: Tensor,
    dtype: torch.dtype,  # to compute in
    residual: Tensor | None,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    activation: str | None,
) -> tuple[object, ...]:
    """All that the choice of a kernel depends on beside the parameters. As cheap as it can be: every call asks."""
    shape = None if residual is None else residual.shape
    asked = backends.current_backend()
    threads = torch.get_num_threads()
    key = (x.shape, dtype, x.device, shape, stride, padding, dilation, groups, activation, asked, threads)
    if x.is_cuda and dtype is not torch.float32:
        return (
            key  # one way to compute: the switches, some of which take a microsecond to read, do not matter
        )
    return *key, *backends.settings(), x.is_cuda and backends.tf32_allowed()


def _place(kernel: backends.Kernel, request: backends.Request) -> tuple[str, object]:
    """What kernels that share packed weights have in common."""
    return getattr(kernel, "packs_of", kernel.name), kernel.pack_key(request)


def _call(
    kernel: backends.Kernel,
    pack: Any,
    x: Tensor,
    residual: Tensor | None,
    request: backends.Request,
    source: ClipSource | None,
) -> Tensor:
    if source is None:
        return kernel.run(pack, x, residual, request)
    run_clip = getattr(kernel, "run_clip", None)
    if run_clip is not None and residual is None:
        return run_clip(pack, x, source, request)
    return kernel.run(pack, source.convert(x), residual, request)


class LayerState:
    """Packs and plans of one convolution with its batch norm. Shared by threads; copies and pickles are empty."""

    def __init__(self) -> None:
        self._lock = _fork.Lock()
        self._snapshot: _Snapshot | None = None
        self.owner: weakref.ref[nn.Module] | None = None  # the module that runs it

    def __deepcopy__(self, memo: object) -> LayerState:
        return LayerState()

    def __copy__(self) -> LayerState:
        return LayerState()

    def __reduce__(self) -> tuple[type[LayerState], tuple[()]]:
        return LayerState, ()

    # ---- following the parameters ----

    def current(self, weight: Tensor, conv_bias: Tensor | None, norm: Norm | None) -> _Snapshot | None:
        """What was derived from the parameters as they are now; None where nothing was, or nobody knows."""
        snapshot = self._snapshot
        if snapshot is None:
            return None
        try:
            return snapshot if _key(weight, conv_bias, norm) == snapshot.key else None
        except RuntimeError:
            return None

    def snapshot(self, weight: Tensor, conv_bias: Tensor | None, norm: Norm | None) -> _Snapshot:
        followed = True
        try:
            key = _key(weight, conv_bias, norm)
        except RuntimeError:  # half the price of asking every tensor before
            key, followed = _key(weight, conv_bias, norm, False), weight.is_cpu
        current = self._snapshot
        if current is not None and followed and current.key == key:
            return current
        with self._lock:
            current = self._snapshot
            if current is None or not followed or current.key != key:
                with torch.no_grad():
                    current = _Snapshot(key, backends.Layer.of(weight, conv_bias, norm))
                if backends.settled(weight.device):
                    self._snapshot = current
            return current

    def forget(self) -> None:
        """Frees the packed weights; the next call makes them again."""
        with self._lock:
            self._snapshot = None

    # ---- running ----

    def run(
        self,
        x: Tensor,  # [N, C, D, H, W], of the dtype to compute in
        residual: Tensor | None,  # [N, K, D', H', W'], same dtype
        weight: Tensor,
        conv_bias: Tensor | None,
        norm: Norm | None,
        stride: Triple,
        padding: Triple,
        dilation: Triple,
        groups: int,
        activation: str | None,
        source: ClipSource | None = None,
        pool_frames: int = 0,
    ) -> Tensor:
        """act(bn(conv(x)) + residual) by the kernel chosen for this shape. No gradient.

        With `source`, x is a raw clip of any dtype on a GPU, and the layer is that of x as `source` says. It is chosen
        for as if x were converted already: what a kernel that reads clips saves is not counted. With `pool_frames` the
        max-pool of `_pooled.WINDOWS` follows.

        Raises:
            ValueError: where the shapes make no convolution, before any kernel runs.
        """
        asked = backends.current_backend()
        snapshot = self.snapshot(weight, conv_bias, norm)
        dtype = x.dtype if source is None else source.dtype
        key = plan_key(x, dtype, residual, stride, padding, dilation, groups, activation)
        if pool_frames:
            key = (*key, pool_frames)
        plan = snapshot.plans.get(key)
        if plan is not None and plan[3].doubtful():
            plan = None
        if plan is not None and not torch.is_grad_enabled():
            kernel, pack, request, _ = plan
            return _call(kernel, pack, x, residual, request, source)
        with torch.no_grad():
            if plan is None:
                example = x if source is None else source.convert(x)
                geometry = (stride, padding, dilation, groups)
                plan = self._plan(snapshot, key, asked, example, residual, *geometry, activation, pool_frames)
            kernel, pack, request, _ = plan
            return _call(kernel, pack, x, residual, request, source)

    def _plan(
        self,
        snapshot: _Snapshot,
        key: object,
        asked: str,
        x: Tensor,
        residual: Tensor | None,
        stride: Triple,
        padding: Triple,
        dilation: Triple,
        groups: int,
        activation: str | None,
        pool_frames: int,
    ) -> tuple[backends.Kernel, Any, backends.Request, backends.Choice]:
        weight = snapshot.layer.weight
        shape = None if residual is None else residual.shape
        _check.output_shape(
            x.shape, weight.shape, stride, padding, dilation, groups, shape, _check.activation(activation)
        )
        problem = ConvProblem(
            *x.shape,
            k=weight.shape[0],
            kernel=tuple(weight.shape[2:]),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            residual=residual is not None,
            activation=activation,
        )
        request = backends.Request(problem, x.dtype, x.device, torch.get_num_threads())
        _fork.computed_in_parallel()
        with self._lock:
            plan = snapshot.plans.get(key)
            if plan is not None and not plan[3].doubtful():
                return plan

            packs = dict(snapshot.packs)

            def packed(kernel: backends.Kernel) -> Any:
                place = _place(kernel, request)
                if place not in packs:
                    packs[place] = kernel.pack(snapshot.layer, request)
                return packs[place]

            using = None if plan is None else plan[0]
            if isinstance(using, _pooled.Apart):
                using = using.kernel
            choice = backends.choose(request, asked, packed, x, residual, using)
            if pool_frames:
                choice = _pooled.choose(choice, request, asked, pool_frames, packed, x, residual)
            plan = (choice.kernel, packed(choice.kernel), request, choice)
            if not backends.settled(x.device):
                warnings.warn(
                    f"a fused layer ({request}) runs for the first time while a CUDA graph is captured: the graph "
                    f"packs its weights at every replay and has an unmeasured kernel ({choice.kernel.name}); call "
                    "the model once before the capture",
                    stacklevel=2,
                )
                return plan
            if len(snapshot.plans) >= _MAX_PLANS:
                backends.synchronize(x.device)  # another stream may still read the pack
                snapshot.plans.pop(next(iter(snapshot.plans)))
            snapshot.plans[key] = plan
            # Only what a plan uses stays in memory.
            used = {_place(k, r) for k, _, r, _ in snapshot.plans.values()}
            snapshot.packs = {place: pack for place, pack in packs.items() if place in used}
        if choice.measured_now and x.is_cpu:
            _cpu.release_free_memory()  # what the losers used would add to the peak of the next layer
        logger.debug("%s -> %s (%s)", request, choice.kernel.name, choice.reason)
        return plan

    def plans(self) -> list[tuple[backends.Request, backends.Choice]]:
        """What has run since the parameters last changed."""
        snapshot = self._snapshot
        return [] if snapshot is None else [(r, c) for _, _, r, c in list(snapshot.plans.values())]

    def planned(self, key: object) -> backends.Kernel | None:
        """The kernel that the last call with this `plan_key` took; None where its plan is gone."""
        snapshot = self._snapshot
        plan = None if snapshot is None else snapshot.plans.get(key)
        return None if plan is None else plan[0]


_states = WeakTensorKeyDictionary()  # weight -> LayerState: packs live as long as the weight


def state_of_weight(weight: Tensor) -> LayerState:
    """The state kept for a weight, whoever it belongs to."""
    state = _states.get(weight)
    return _states.setdefault(weight, LayerState()) if state is None else state


def state_of(conv: nn.Module) -> LayerState:
    """The state kept beside a convolution's parameters: that of its weight where a graph has run it before.

    Modules that share a weight have one each: their norms differ.
    """
    state = conv.__dict__.get(ATTRIBUTE)
    if state is None or state.owner is None:  # a copy belongs to nobody yet
        # Looked up, never made: a weak reference to the weight would forbid swapping it (torch.utils.swap_tensors).
        weight = conv._parameters.get("weight")
        of_weight = None if weight is None else _states.get(weight)
        other = None if of_weight is None or of_weight.owner is None else of_weight.owner()
        if of_weight is not None and other in (None, conv):
            state = conv.__dict__[ATTRIBUTE] = of_weight
        elif state is None:
            state = conv.__dict__.setdefault(ATTRIBUTE, LayerState())  # atomic: threads get the same one
        state.owner = weakref.ref(conv)
    return state


def _states_of(module: nn.Module) -> Iterator[LayerState]:
    """All that is kept for a module, by itself and by its weight; nothing where no fused layer has run it."""
    weight = module._parameters.get("weight")
    mine, of_weight = module.__dict__.get(ATTRIBUTE), None if weight is None else _states.get(weight)
    if isinstance(mine, LayerState):
        yield mine
    if isinstance(of_weight, LayerState) and of_weight is not mine and of_weight.owner is None:
        yield of_weight


def layer_plans(module: nn.Module) -> Iterator[tuple[backends.Request, backends.Choice]]:
    """(request, choice) of a module that a fused layer has run; nothing for any other."""
    seen = set()  # what has run as a module and in a graph is told once
    for state in _states_of(module):
        plans = [(r, c) for r, c in state.plans() if (r, c.kernel.name) not in seen]
        seen.update((r, c.kernel.name) for r, c in plans)
        yield from plans


def layer_packs(module: nn.Module) -> list[Any]:
    """The packed weights that the module's plans use now: who holds them keeps their memory."""
    snapshots = [state._snapshot for state in _states_of(module)]
    return [pack for s in snapshots if s is not None for _, pack, _, _ in list(s.plans.values())]
