"""What a fused layer keeps besides its parameters: packed weights and the kernel chosen for each input shape.

All of it is derived, so none of it is copied, pickled or saved: it is made again from the parameters when it is needed,
and whenever they have changed. It lies beside the convolution that is called as a module; the functional form and
graphs of torch.compile, which know tensors only, find theirs by the weight.
"""

from __future__ import annotations

import gc
import logging
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from r3d_kernels import _check, _cpu, _extension, _fork, _pooled, backends
from r3d_kernels._kernel import reads_weight
from r3d_kernels.problems import ConvProblem

if TYPE_CHECKING:
    from r3d_kernels.ops.clip import ClipSource

__all__ = ["ATTRIBUTE", "LayerState", "layer_packs", "layer_plans", "plan_key", "state_of", "state_of_weight"]

logger = logging.getLogger("r3d_kernels")

Triple = tuple[int, int, int]
Norm = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]

ATTRIBUTE = "_r3d_layer_state"  # of a convolution
_MAX_PLANS = 64  # input shapes remembered for one layer


# What of a weight's contents a key has, as `fingerprint` is told.
_NOT_COPIED, _SAMPLED, _ALL = 0, 1, 2


class _Snapshot:
    """Everything derived from one version of the parameters."""

    def __init__(self, key: list[object], counted: bool, layer: backends.Layer) -> None:
        self.seen = key, _NOT_COPIED  # what `_key` returned, and for which contents
        self.counted = counted
        self.layer = layer
        self.packs: dict[tuple[str, object], Any] = {}
        # (input shape, dtype, ...) -> (kernel, its pack, request, choice)
        self.plans: dict[object, tuple[backends.Kernel, Any, backends.Request, backends.Choice]] = {}


def _key(
    weight: Tensor, conv_bias: Tensor | None, norm: Norm | None, contents: int, counted: bool = True
) -> list[object]:
    """Something that differs when any of the tensors has changed: its memory, layout, dtype, version or contents.

    Version counters count in-place writes. Writes through `.data` escape them, and tensors made in inference mode have
    none (not `counted`). So what is copied is looked at in CPU memory: vectors as a whole; a weight not at all where
    every kernel reads the parameter itself (_NOT_COPIED), else 32 bytes in each of 256 parts, at places as good as
    random (_SAMPLED), or as a whole where nothing is counted (_ALL).

    What is left: on a GPU contents are not looked at. On a CPU a write through `.data` to a fraction f of a large,
    copied float32 weight, scattered, goes unseen with a probability of (1 - f) ** 2048; a contiguous one is seen for
    certain from 2/256 of the weight on.

    Raises:
        RuntimeError: where a tensor has no counter, unless not `counted`; where memory was freed.
    """
    tensors: tuple[Tensor | None, ...] = (weight, conv_bias)
    key: list[object] = [None]
    if norm is not None:
        mean, var, gamma, beta, eps = norm
        tensors, key = (weight, conv_bias, mean, var, gamma, beta), [eps]
    present = []
    for t in tensors:
        if t is None:
            key.append(None)
        else:
            present.append(t)
            key.append(t._version if counted else 0)
    if _extension.error is None:
        key.append(torch.ops.r3d_kernels.fingerprint(present, contents))
    else:
        key += [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in present]
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

    _living = 0

    def __init__(self) -> None:
        LayerState._living += 1
        weakref.finalize(self, LayerState._gone).atexit = False
        self._lock = _fork.Lock()
        self._snapshot: _Snapshot | None = None
        self.owner: weakref.ref[nn.Module] | None = None  # the module that runs it

    @staticmethod
    def _gone() -> None:
        LayerState._living -= 1
        if LayerState._living == 0:  # the last model's outputs have nobody to wait for
            _cpu.release_free_memory()

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
        key, contents = snapshot.seen
        try:
            return snapshot if _key(weight, conv_bias, norm, contents) == key else None
        except RuntimeError:
            return None

    def snapshot(self, weight: Tensor, conv_bias: Tensor | None, norm: Norm | None) -> _Snapshot:
        tensors = (weight, conv_bias, norm)
        current = self._snapshot
        contents = _NOT_COPIED if current is None else current.seen[1]
        counted = followed = True
        try:
            key = _key(*tensors, contents)
        except RuntimeError:  # half the price of asking every tensor before
            counted, followed = False, weight.is_cpu
            contents = min(contents, _SAMPLED) * 2  # all of what is copied
            key = _key(*tensors, contents, counted)
        if current is not None and followed and current.seen == (key, contents):
            return current
        with self._lock:
            current = self._snapshot
            if current is None or not followed or current.seen != (key, contents):
                key = _key(*tensors, _NOT_COPIED, counted)  # nothing is, yet
                with torch.no_grad():
                    current = _Snapshot(key, counted, backends.Layer.of(*tensors))
                if backends.settled(weight.device):
                    self._snapshot = current
            return current

    @staticmethod
    def _watch(snapshot: _Snapshot) -> None:
        """From now on the weight's contents count: a plan has a copy of them."""
        key, contents = snapshot.seen
        if contents == _NOT_COPIED:
            layer, contents = snapshot.layer, _SAMPLED if snapshot.counted else _ALL
            # The versions stay those from before the copy was made: another thread may have written since.
            key = [*key[:-1], _key(layer.weight, layer.conv_bias, layer.norm, contents, False)[-1]]
            snapshot.seen = key, contents

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
            if weight.is_cpu and not reads_weight(choice.kernel, plan[1], snapshot.layer):
                if _extension.error is not None:
                    return plan  # nobody could tell that the copy is stale
                self._watch(snapshot)
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


def _use_count(storage: torch.UntypedStorage) -> int:
    """Tensors and others that hold the storage, its Python object among them."""
    return torch._C._storage_Use_Count(storage._cdata)


class _States:
    """States by weight, as long as anybody else has the weight.

    A weak reference would tell when that ends, but would forbid swapping the tensor (`torch.utils.swap_tensors`). So a
    state is found by its weight's place in memory, which cannot be another's while the state's own alias holds it, and
    goes when nothing but that alias is left: looked for at collections of garbage, and for one state at each look-up.
    """

    _MOST = 4096  # where torch does not tell who holds a storage

    def __init__(self) -> None:
        self._lock = _fork.Lock()
        self._of: dict[object, LayerState] = {}
        self._turn: list[object] = []  # whom to look at next

    @staticmethod
    def _place(weight: Tensor) -> object:
        storage = weight.untyped_storage()
        return storage._cdata, weight.storage_offset(), weight.shape, weight.stride(), weight.dtype

    def get(self, weight: Tensor) -> LayerState | None:
        if weight.layout is not torch.strided or type(weight) not in (Tensor, nn.Parameter):
            return None
        return self._of.get(self._place(weight))

    def setdefault(self, weight: Tensor) -> LayerState:
        place = self._place(weight)
        state = self._of.get(place)
        with self._lock:
            if state is None:
                state = self._of.setdefault(place, LayerState())
                while len(self._of) > self._MOST:
                    del self._of[next(iter(self._of))]
            if not self._turn:
                self._turn = list(self._of)
            other = self._turn.pop()
            if other != place:
                self._drop_unused([other])
        return state

    def _drop_unused(self, places: Iterable[object]) -> None:
        for place in places:
            state = self._of.get(place)
            snapshot = None if state is None else state._snapshot
            if snapshot is not None and _use_count(snapshot.layer.weight.untyped_storage()) <= _ALIAS_ALONE:
                self._of.pop(place, None)

    def sweep(self, phase: str, info: dict[str, int]) -> None:
        """To be called by the garbage collector."""
        if phase == "stop" and info["generation"] == 2 and self._of:
            with self._lock:
                self._drop_unused(list(self._of))


_ALIAS_ALONE = _use_count(torch.empty(1).untyped_storage()) + 1
_states = _States()
gc.callbacks.append(_states.sweep)


def state_of_weight(weight: Tensor) -> LayerState:
    """The state kept for a weight, whoever it belongs to."""
    return _states.setdefault(weight)


def state_of(conv: nn.Module) -> LayerState:
    """The state kept beside a convolution's parameters: that of its weight where a graph has run it before.

    Modules that share a weight have one each: their norms differ.
    """
    state = conv.__dict__.get(ATTRIBUTE)
    if state is None or state.owner is None:  # a copy belongs to nobody yet
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
