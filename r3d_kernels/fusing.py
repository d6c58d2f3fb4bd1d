"""`fuse`: the blocks of anyone's model through fused layers, in place.

Every module that holds convolutions is traced once with torch.fx, alone: what its forward does with them, their batch
norms, additions, ReLUs and max-pools becomes calls of `nn.conv_bn_act`. The module keeps its place, parameters, names,
methods and hooks; its class becomes a subclass of itself that runs the traced graph in evaluation mode, and the
module's own forward in every other case. Modules that cannot be traced (their forward branches on data) stay as they
are; those inside them are fused on their own.
"""

from __future__ import annotations

import builtins
import copyreg
import functools
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from r3d_kernels import backends
from r3d_kernels.nn import conv_bn_act, has_hooks, observed_by
from r3d_kernels.nn import max_pool3d as _max_pool3d
from r3d_kernels.ops.conv3d import TENSORS, is_plain

__all__ = ["fuse", "unfuse"]

_NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm)
_NEVER_TRACED = (nn.Conv3d, torch.jit.ScriptModule)
_PLAN = "_r3d_fused_plan"  # of a module: what its forward has become


# ------------------------------------------------------------------------------------------------- what graphs call


def _out_shape(x: Tensor, conv: nn.Conv3d) -> tuple[int, ...] | None:
    """Of conv(x); None where that is not for us to tell."""
    if x.dim() != 5 or isinstance(conv.padding, str):
        return None
    sizes = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
    return (
        x.shape[0],
        conv.out_channels,
        *((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in sizes),
    )


def layer(
    x: Tensor,
    conv: nn.Conv3d,
    bn: nn.Module | None,
    residual: Any = None,
    activation: str | None = None,
    pool: nn.MaxPool3d | None = None,
) -> Tensor:
    """``pool(act(bn(conv(x)) + residual))`` from modules, whatever x and residual are."""
    if type(x) not in TENSORS or x.dim() != 5:  # without a batch axis, or of a type of its own
        y = conv(x) if bn is None else bn(conv(x))
        y = y if residual is None else y + residual
        y = F.relu(y) if activation == "relu" else y
        return y if pool is None else pool(y)
    if residual is None:
        return conv_bn_act(x, conv, bn, activation=activation, pool=pool)
    fits = (
        type(residual) in TENSORS
        and residual.dtype == x.dtype
        and residual.device == x.device
        and tuple(residual.shape) == _out_shape(x, conv)
    )
    if fits:
        return conv_bn_act(x, conv, bn, activation=activation, residual=residual, pool=pool)
    y = conv_bn_act(x, conv, bn, activation=None) + residual  # a sum that broadcasts, or changes the dtype
    y = F.relu(y) if activation == "relu" else y
    return y if pool is None else _max_pool3d(y, pool)


def max_pool(x: Tensor, pool: nn.MaxPool3d) -> Tensor:
    """``pool(x)``, by our kernel where it can."""
    return _max_pool3d(x, pool) if type(x) in TENSORS and x.dim() == 5 else pool(x)


# ---------------------------------------------------------------------------------------------------------- tracing


def _convolutions(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Conv3d)]


def _is_container(module: nn.Module) -> bool:
    """Runs its children one after the other and does nothing else."""
    return isinstance(module, nn.Sequential) and _original(type(module)).forward is nn.Sequential.forward


def _is_library(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and not _is_container(module)


class _Proxy(fx.Proxy):
    """`a += b` writes to what others may read; fx alone would take it for `a = a + b`."""


def _writes(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda a, b: a.tracer.create_proxy("call_function", function, (a, b), {})


_ASSIGNMENTS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
for _name in _ASSIGNMENTS:
    setattr(_Proxy, f"__{_name}__", _writes(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """One module's own forward. Containers are part of it, and, if `inlines`, wrappers of a single convolution."""

    proxy_buffer_attributes = True  # or what a forward does to a buffer would happen now, and never again

    def __init__(self, inlines: bool) -> None:
        super().__init__()
        self.inlines = inlines
        self.inlined: list[nn.Module] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        wrapper = self.inlines and not _is_library(m) and len(_convolutions(m)) == 1
        return not (_is_container(m) or wrapper) or _is_ours(m) or isinstance(m, _NEVER_TRACED)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return self.create_proxy("call_module", name, args, kwargs)
        self.inlined.append(m)
        return m.forward(*args, **kwargs)  # its hooks are not for proxies


def _takes_tensors_only(module: nn.Module) -> bool:
    """Whether forward has no optional arguments: a trace would take them for given."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    required = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return all(p.kind in required and p.default is p.empty for p in parameters)


class _Attributes:
    """What modules keep, to see whether a forward adds to it: nothing that a graph could do."""

    def __init__(self, module: nn.Module) -> None:
        self._held: list[tuple[Any, Any]] = []  # and a copy
        for m in module.modules():
            own = [m.__dict__, *(v for v in m.__dict__.values() if isinstance(v, (dict, list)))]
            self._held += [(v, v.copy()) for v in own]

    def put_back(self) -> bool:
        """Whether anything had changed."""
        changed = False
        for now, was in self._held:
            old, new = (v if isinstance(v, list) else [*v, *v.values()] for v in (was, now))
            if len(old) == len(new) and all(map(operator.is_, old, new)):
                continue
            changed = True
            now.clear()
            (now.extend if isinstance(now, list) else now.update)(was)
        return changed


def _traced(module: nn.Module) -> tuple[fx.Graph, list[nn.Module]] | None:
    """The graph of the module's forward in evaluation, and the modules that are part of it and not called, or None."""
    cls, training = type(module), [m for m in module.modules() if m.training]
    try:
        for m in training:
            m.training = False  # train() may do more
        module.__class__ = _original(cls)  # whose signature is its own
        if not _takes_tensors_only(module):
            return None
        for inlines in (True, False):
            tracer, attributes = _Tracer(inlines), _Attributes(module)
            try:
                with torch.no_grad():
                    graph = tracer.trace(module)
            except Exception:  # whatever a forward does with values that are none
                graph = None
            if not attributes.put_back() and graph is not None:
                return graph, tracer.inlined
        return None
    finally:
        module.__class__ = cls
        for m in training:
            m.training = True


_IN_PLACE = {operator.setitem, *(getattr(operator, name) for name in _ASSIGNMENTS)}


class _Matcher:
    """Chains of a convolution and what follows it, replaced by one call each."""

    def __init__(self, module: nn.Module, graph: fx.Graph, inlined: list[nn.Module]) -> None:
        self.graph = graph
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.absorbed = list(inlined)  # not called any more: their hooks would not be either
        self.convolutions: list[nn.Module] = []
        self.changes = 0

    def module_of(self, node: Any) -> nn.Module | None:
        known = isinstance(node, fx.Node) and node.op == "call_module"
        return self.modules.get(str(node.target)) if known else None

    # ---- what a node does

    def _plain_call(self, node: fx.Node) -> bool:
        return len(node.args) == 1 and not node.kwargs

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.module_of(node)) is nn.ReLU and self._plain_call(node)
        if node.op == "call_method":
            return node.target in ("relu", "relu_") and self._plain_call(node)
        functions = (F.relu, F.relu_, torch.relu, torch.relu_)
        known = node.op == "call_function" and node.target in functions and len(node.args) >= 1
        return known and not set(node.kwargs) - {"inplace"}

    def is_add(self, node: fx.Node) -> bool:
        by_function = node.op == "call_function" and node.target in (
            operator.add,
            operator.iadd,
            torch.add,
        )
        by_method = node.op == "call_method" and node.target in ("add", "add_")
        tensors = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and not node.kwargs
        return (by_function or by_method) and tensors and node.args[0] is not node.args[1]

    def is_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.module_of(node), "inplace", False))
        if node.op == "call_method":
            name = str(node.target)
            return name.endswith("_") and not name.endswith("__")
        if node.op != "call_function":
            return False
        in_place = bool(node.kwargs.get("inplace")) or "out" in node.kwargs
        in_place |= getattr(node.target, "__module__", None) == F.__name__ and True in node.args[1:]
        return in_place or node.target in _IN_PLACE or getattr(node.target, "__name__", "").endswith("_")

    # ---- chains

    def run(self) -> bool:
        """Whether anything was replaced."""
        self._drop_identities()
        taken: set[fx.Node] = set()
        found = [n for n in self.graph.nodes if isinstance(self.module_of(n), nn.Conv3d)]
        # The larger first: of two that are added the smaller one, a shortcut, is the residual of the other.
        for node in sorted(found, key=lambda n: -self._size(n)):
            self._replace(node, taken)
        for node in list(self.graph.nodes):
            pool = self.module_of(node)
            if type(pool) is nn.MaxPool3d and self._plain_call(node):
                with self.graph.inserting_before(node):
                    self._swap([node], max_pool, (node.args[0], self._module(node)), {})
        return self.changes > 0

    def _size(self, node: fx.Node) -> int:
        """Weights; those of a lazy module are not there yet."""
        conv = self.module_of(node)
        return conv.in_channels * conv.out_channels * math.prod(conv.kernel_size)

    def _drop_identities(self) -> None:
        for node in list(self.graph.nodes):
            if type(self.module_of(node)) is nn.Identity and self._plain_call(node):
                self.absorbed.append(self.module_of(node))
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    def _module(self, node: fx.Node) -> fx.Node:
        return self.graph.create_node("get_attr", node.target)

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _disturbed(self, first: fx.Node, last: fx.Node, chain: list[fx.Node]) -> bool:
        """Whether something between them writes in place: what the chain reads may be another value then."""
        node = first.next
        while node is not last:
            if node not in chain and self.is_in_place(node):
                return True
            node = node.next
        return False

    def _residual(self, add: fx.Node, ours: fx.Node) -> fx.Node | None:
        a, b = add.args
        other = b if a is ours else a
        # `residual += ours` changes what others may read: the module's input, or what the residual is a view of
        return None if a is not ours and self.is_in_place(add) else other

    def _replace(self, conv: fx.Node, taken: set[fx.Node]) -> None:
        if not self._plain_call(conv):
            return
        chain, at = [conv], self._only_user(conv)
        bn = residual = pool = activation = None

        def follows(node: fx.Node | None) -> bool:
            return node is not None and node not in taken and not self._disturbed(conv, node, chain)

        if follows(at) and isinstance(self.module_of(at), _NORMS) and self._plain_call(at):
            bn = at
            chain.append(at)
            at = self._only_user(at)
        if follows(at) and self.is_add(at) and (other := self._residual(at, chain[-1])) is not None:
            residual = other
            chain.append(at)
            at = self._only_user(at)
        if follows(at) and self.is_relu(at):
            activation = "relu"
            if at.op == "call_module":
                self.absorbed.append(self.module_of(at))
            chain.append(at)
            at = self._only_user(at)
        if follows(at) and type(self.module_of(at)) is nn.MaxPool3d and self._plain_call(at):
            pool = at
            chain.append(at)
        taken.update(chain)
        with self.graph.inserting_before(chain[-1]):
            modules = [None if n is None else self._module(n) for n in (conv, bn, pool)]
            arguments = (conv.args[0], *modules[:2])
            options = {"residual": residual, "activation": activation, "pool": modules[2]}
            self._swap(chain, layer, arguments, {k: v for k, v in options.items() if v is not None})
        self.convolutions.append(self.modules[str(conv.target)])

    def _swap(self, chain: list[fx.Node], function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        new = self.graph.call_function(function, args, kwargs)
        chain[-1].replace_all_uses_with(new)
        for node in reversed(chain):
            self.graph.erase_node(node)
        self.changes += 1


_left_alone: ContextVar[frozenset[int]] = ContextVar("r3d_kernels_left_alone", default=frozenset())


class _Plan:
    """What a module's forward has become. Copies and pickles of it are empty: it is made again where it is needed."""

    def __init__(self) -> None:
        self.run: Callable[..., Any] | None = None
        self.convolutions: list[nn.Module] = []
        self._absorbed: list[nn.Module] = []
        self._inlined: list[nn.Module] = []
        self._compared = False  # with the module's own forward
        # the parts of the module, and of what is part of its graph, as they were
        self._parts: list[tuple[dict[str, nn.Module | None], list[nn.Module | None]]] | None = None

    def __deepcopy__(self, memo: object) -> _Plan:
        return _Plan()

    def __copy__(self) -> _Plan:
        return _Plan()

    def __reduce__(self) -> tuple[type[_Plan], tuple[()]]:
        return _Plan, ()

    def current(self) -> bool:
        """Whether it was made, and of the modules that are there now."""
        return self._parts is not None and all([*now.values()] == were for now, were in self._parts)

    def make(self, module: nn.Module) -> None:
        self.run, self._compared, inlined = None, False, []
        traced = _traced(module)
        if traced is not None:
            graph, inlined = traced
            matcher = _Matcher(module, graph, inlined)
            if matcher.run():
                code = graph.python_code("self")
                names: dict[str, Any] = {"__builtins__": builtins, **code.globals}
                exec(compile(code.src, f"<{type(module).__name__}, fused>", "exec"), names)
                self._absorbed, self.convolutions = matcher.absorbed, matcher.convolutions
                self.run = names["forward"]
        self._inlined = inlined
        self._parts = [(m._modules, [*m._modules.values()]) for m in (module, *inlined)]

    def runs(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether this call takes the fused way."""
        tensors = bool(args) and all(type(a) in TENSORS for a in args)
        if module.training or not tensors or torch.jit.is_tracing():
            return False
        if not torch.compiler.is_compiling() and id(module) in _left_alone.get():
            return False
        if not is_plain(*args):  # fx, export, vmap, tensors of other kinds
            return False
        if not self.current():
            if torch.compiler.is_compiling():
                return False
            self.make(module)
        return self.run is not None and not any(map(has_hooks, self._absorbed))

    def __call__(self, module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The module's result; the first one is compared with that of its `own` forward.

        A trace cannot tell a forward that asks for the type of what it gets from one that does not.
        """
        if self._compared or torch.compiler.is_compiling() or backends.capturing(args[0].device):
            return self.run(module, *args)
        # Torch's half precision on a CPU is wrong or worse for some shapes, and hooks would see two calls.
        half = args[0].is_cpu and (
            args[0].dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu")
        )
        compares = not half and not any(map(has_hooks, module.modules()))
        given = [a.clone() for a in args] if compares else args  # a forward may write to what it gets
        try:
            y = self.run(module, *args)
        except Exception as e:
            want = own(
                module, *given
            )  # fails as well where the input is wrong, which tells nothing of the graph
            why = f"its graph fails: {type(e).__name__}: {next(iter(str(e).splitlines()), '')}"
        else:
            if not compares:
                return y
            # without what is part of the graph and fused on its own too
            token = _left_alone.set(_left_alone.get() | {id(m) for m in self._inlined})
            try:
                with observed_by(None):
                    want = own(module, *given)
            finally:
                _left_alone.reset(token)
            if _close(y, want):
                self._compared = True
                return y
            why = "its graph computes something else"
        self.run = None
        warnings.warn(
            f"fuse: a {type(module).__name__} keeps its own forward, which cannot be traced: {why}",
            stacklevel=4,
        )
        return want


def _close(y: Any, want: Any) -> bool:
    """Whether two results are of one kind and as far apart as rounding may bring them."""
    (ours, kind), (theirs, its) = tree_flatten(y), tree_flatten(want)
    if kind != its:
        return False
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if a is not b and a != b:
                return False
        elif a.shape != b.shape or a.dtype != b.dtype:
            return False
        else:
            distance, size = float((a.double() - b.double()).norm()), float(b.double().norm())
            if math.isfinite(size) and not distance <= 0.05 * size + 1e-6:
                return False
    return True


class _Fused:
    """What `fuse` puts in front of a module's class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made here and has no name that pickle could find.
        make, arguments, *state = super().__reduce_ex__(2)
        if make is not copyreg.__newobj__:
            return make, arguments, *state
        return _empty, (_original(type(self)),), *state


def _original(cls: type[nn.Module]) -> type[nn.Module]:
    return cls.__mro__[2] if issubclass(cls, _Fused) else cls


@functools.cache
def _fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(cls.forward)  # whoever looks sees its arguments
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__.get(_PLAN)
        if plan is not None and not kwargs and plan.runs(self, args):
            return plan(self, cls.forward, args)
        return cls.forward(self, *args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Fused, cls), {**names, "forward": forward})


def _empty(cls: type[nn.Module]) -> nn.Module:
    fused = _fused_class(cls)
    return fused.__new__(fused)


# ---------------------------------------------------------------------------------------------------------- the call


def _is_ours(module: nn.Module) -> bool:
    """Whether it has a switch of its own."""
    return type(module).__module__.startswith("r3d_kernels.") and hasattr(module, "fused")


def _candidates(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are to be traced."""
    if _is_ours(model) or isinstance(model, _NEVER_TRACED):
        return
    replaced = "forward" in model.__dict__  # by somebody else
    worth_it = any(isinstance(m, (nn.Conv3d, nn.MaxPool3d)) for m in model.modules())
    if worth_it and not replaced and not _is_library(model):
        yield model
    for child in model.children():
        yield from _candidates(child)


def fuse(model: nn.Module) -> nn.Module:
    """Runs the convolutions of any model fused: Conv3d + BatchNorm3d + residual + ReLU (+ max-pool) in one pass each.

    In place: the model keeps its parameters, names, class hierarchy and hooks, trains as before, and its `state_dict`,
    copies and pickles stay as they were (a pickle needs this package where it is read). Fused where the module that
    holds a convolution is in evaluation mode; layers themselves then fall back to their modules wherever
    `nn.conv_bn_act` does: where a gradient is needed, a hook listens to a layer, under `torch.export`. A module whose
    forward depends on values, or keeps something in the module, cannot be traced and stays as it is; flags that a
    forward looks at count as they are now, so call `fuse` again after changing one. The first result of each module is
    compared with that of its own forward (not in half precision on a CPU): where they differ it keeps its own.

    Args:
        model: with Conv3d in it: ours, torchvision's, MONAI's, your own.

    Returns:
        The model itself. `r3d_kernels.explain` tells, after a pass, which kernel each layer took.

    Raises:
        TypeError: where model is no module.
        ValueError: where there is no Conv3d in it.

    Warns:
        UserWarning: names the convolutions that stay as they are; at a first call the modules that do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    everything = {id(m): name for name, m in model.named_modules() if isinstance(m, nn.Conv3d)}
    if not everything:
        raise ValueError(f"model: expected Conv3d modules, found none in {type(model).__name__}")
    done: set[int] = set()
    for module in filter(_is_ours, model.modules()):
        module.fused = True
        done.update(map(id, _convolutions(module)))
    for module in list(_candidates(model)):
        plan = _Plan()
        plan.make(module)
        if plan.run is None:
            continue
        done.update(map(id, plan.convolutions))
        module.__dict__[_PLAN] = plan
        module.__class__ = _fused_class(_original(type(module)))
    left = [name for i, name in everything.items() if i not in done]
    if left:
        some = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        warnings.warn(
            f"fuse: {len(left)} of {len(everything)} convolutions stay as they are, because the forward that calls "
            f"them cannot be traced, or is not called as part of a module: {some}",
            stacklevel=2,
        )
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Takes back what `fuse` has done, in place; `fused` of our own modules becomes False.

    Raises:
        TypeError: where model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__dict__.pop(_PLAN, None)
            module.__class__ = _original(type(module))
        elif _is_ours(module):
            module.fused = False
    return model
