"""`fuse`: the blocks of anyone's model through fused layers, in place.

Every module that holds convolutions is traced once with torch.fx, alone: what its forward does with them, their batch
norms, additions, ReLUs and max-pools becomes calls of `nn.conv_bn_act`. The module keeps its place, parameters, names,
methods and hooks; its class becomes a subclass of itself that runs the traced graph in evaluation mode, and the
module's own forward in every other case. Modules that cannot be traced (their forward branches on data) stay as they
are; those inside them are fused on their own.

A graph is what a forward did once. So the trace is watched: plain values that the forward read (attributes of modules,
globals, configurations) are compared at every call and the graph is made again where one has changed; a forward that
reads or does what cannot be compared (random numbers, the clock, torch's modes, context managers) is refused.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import copyreg
import dis
import enum
import functools
import gc
import inspect
import math
import operator
import random
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _hooks_of_all
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves

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


# --------------------------------------------------------------------------------------------- what a trace depends on

_MISSING, _TENSOR = object(), object()  # no value; some tensor, which nodes look up at each call
_Read = tuple[Mapping[str, Any], str, Any]  # where a value was read, by which name, and what it was


class _CanChangeError(Exception):
    """A value that cannot be compared with what it was."""


_CONSTANT = (
    *(
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        type(None),
        type(...),
        range,
        slice,
        re.Pattern,
        enum.Enum,
        type,
    ),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, nn.Module),
    *(types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial),
)


def _snapshot(value: Any) -> Any:
    """What a value is compared with later: itself where it never changes, a copy of a container."""
    if isinstance(value, tuple):
        parts = [_snapshot(v) for v in value]
        if type(value) is tuple:
            return tuple(parts)
        if hasattr(value, "_make"):  # a named tuple
            return value._make(parts)
        if all(map(operator.is_, parts, value)):
            return value
        raise _CanChangeError
    if isinstance(value, _CONSTANT) or type(value).__module__ in ("typing", "torch._ops"):
        return value
    if type(value) is list:
        return [_snapshot(v) for v in value]
    if type(value) in (dict, collections.OrderedDict, collections.defaultdict):
        copied = value.copy()
        copied.update((k, _snapshot(v)) for k, v in value.items())
        return copied
    if type(value) in (set, frozenset) and all(isinstance(v, _CONSTANT) for v in value):
        return value.copy()
    raise _CanChangeError


def _unchanged(reads: list[_Read]) -> bool:
    for where, name, was in reads:  # a loop, not all(): this runs at every call
        now = where.get(name, _MISSING)
        if now is was:
            continue
        if was is _TENSOR:
            if now is None or now is _MISSING:
                return False
        elif type(now) is not type(was) or now != was:
            return False
    return True


class _Variable(Mapping[str, Any]):
    """That of a function, by its name."""

    def __init__(self, cell: types.CellType) -> None:
        self._cell = cell

    def get(self, name: str, default: Any = None) -> Any:
        return self._cell.cell_contents

    def __getitem__(self, name: str) -> Any:
        return self._cell.cell_contents

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _present(members: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name, value in members.items() if value is not None)


class _Names(_Variable):
    """Those of a module's parameters, or buffers."""

    def __init__(self, of: dict[str, Any]) -> None:
        self._of = of

    def get(self, name: str, default: Any = None) -> Any:
        return _present(self._of)

    def __getitem__(self, name: str) -> Any:
        return _present(self._of)


_OPAQUE = {*sys.stdlib_module_names, "torch", "functorch", "numpy", "r3d_kernels"} - {"__main__"}
# What a forward may call there: it depends on its arguments alone, and torch's operators become nodes of the graph.
_PURE = (
    *(
        "torch.fx",
        "torch.nn.functional",
        "torch.nn.modules",
        "torch.nn.parameter",
        "torch.functional",
        "torch._tensor",
    ),
    *(
        "torch.overrides",
        "torch._VF",
        "torch._ops",
        "torch.jit",
        "torch._jit_internal",
        "torch.onnx",
        "r3d_kernels",
    ),
    *(
        "typing",
        "functools",
        "operator",
        "collections",
        "_collections_abc",
        "abc",
        "enum",
        "dataclasses",
        "types",
    ),
    *(
        "copy",
        "itertools",
        "math",
        "_operator",
        "_functools",
        "numbers",
        "re",
        "inspect",
        "importlib",
        "numpy",
    ),
)
_PURE_BUILTINS = (
    set(dir(builtins))
    - {
        "__import__",
        "breakpoint",
        "compile",
        "delattr",
        "dir",
        "eval",
        "exec",
        "exit",
        "globals",
        "help",
        "id",
    }
    - {"input", "locals", "memoryview", "open", "print", "quit", "vars"}
)
_PURE_FUNCTIONS = {("torch", "_assert"), ("torch", "is_tensor")}
_PLAIN_TYPES = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset, Tensor)
# Whoever calls these, a decorator of torch's too: the graph would not.
_CONTEXTS = (
    "torch.utils._contextlib",
    "torch.autograd.grad_mode",
    "torch.amp",
    "torch._dynamo",
    "torch.utils.checkpoint",
)
_WRAPPERS = (fx._symbolic_trace.__name__,)  # where `torch.fx.wrap` comes from
_CONTEXT = "enters a context manager"


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in packages)


def _is_pure(module: str, name: str) -> bool:
    pure = _is_in(module, _PURE) and not _is_in(module, ("numpy.random",))
    return pure or (module, name) in _PURE_FUNCTIONS


def _said(module: str, name: str) -> str:
    """Of a call that no graph repeats."""
    if _is_in(module, (*_CONTEXTS, "contextlib")):
        return _CONTEXT
    full = f"{module}.{name}"
    if _is_in(module, ("random", "secrets", "uuid", "numpy.random", "torch.random")):
        return f"reads random numbers ({full})"
    return f"calls {full}, which may depend on more than its arguments"


@functools.lru_cache(1024)
def _marks(code: types.CodeType) -> dict[int, tuple[str, str, tuple[str, ...]]]:
    """Instructions that reach for what is no argument: offset -> what is done to which name, and its attributes."""
    found: dict[int, tuple[str, str, tuple[str, ...]]] = {}
    instructions = list(dis.get_instructions(code))
    for i, instruction in enumerate(instructions):
        what, name = instruction.opname, instruction.argval
        path: list[str] = []
        if what in ("BEFORE_WITH", "BEFORE_ASYNC_WITH", "SETUP_WITH", "SETUP_ASYNC_WITH", "LOAD_SPECIAL"):
            mark = ("with", "", ())
        elif what in ("LOAD_GLOBAL", "LOAD_NAME"):
            for following in instructions[i + 1 :]:
                if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                    break
                path.append(following.argval)
            mark = ("global", name, tuple(path))
        elif what in ("LOAD_ATTR", "LOAD_DEREF") and name == "__class__":
            mark = ("class", name, ())
        elif what in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            mark = ("store", name, ())
        elif what in ("LOAD_DEREF", "STORE_DEREF", "DELETE_DEREF") and name in code.co_freevars:
            mark = ("free" if what == "LOAD_DEREF" else "store free", name, ())
        else:
            continue
        found[instruction.offset] = mark
        while i and instructions[i - 1].opname == "EXTENDED_ARG":  # some versions tell its offset only
            i -= 1
            found[instructions[i].offset] = mark
    return found


class _Operators(TorchFunctionMode):
    """Sees torch compute while a forward is traced: with values that are none of its inputs, it would only once."""

    def __init__(self, refuse: Callable[[str], None]) -> None:
        super().__init__()
        self._refuse = refuse

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            name = getattr(func, "__name__", str(func))
            self._refuse(f"computes with tensors that are not its inputs ({name})")
        return func(*args, **kwargs)


_MEMBERS = ("_modules", "_parameters", "_buffers")
_INTERNAL = {*vars(nn.Module()), "__class__", "__call__"} - {"training"}


class _Watch:
    """What a forward reads and does besides its tensors while it is traced.

    Attributes of modules are seen as they are read, Python's calls and instructions by `sys.settrace`, those into C
    by `sys.setprofile`, torch's operators by a mode. Code of torch and of the standard library is believed or refused
    as a whole, everything else is looked at.
    """

    def __init__(self) -> None:
        self.refused: str | None = None  # the first reason
        self.reads: dict[tuple[int, str], _Read] = {}
        self.flags: dict[int, dict[str, Any]] = {}  # modules whose training flag was read
        self.holders: dict[int, nn.Module] = {}  # modules whose children were looked through
        self._thread = threading.get_ident()
        self._variables: dict[int, _Variable] = {}
        self._known: dict[types.CodeType, tuple[str, bool]] = {}
        self._nested: set[types.CodeType] = set()  # functions that were made in the forward
        self._mode = _Operators(self.refuse)

    def __enter__(self) -> _Watch:
        watch = self

        def read(self: nn.Module, name: str) -> Any:
            mine = threading.get_ident() == watch._thread
            try:
                value = object.__getattribute__(self, name)
            except AttributeError:
                if mine and name not in _INTERNAL:
                    watch._member(self, name, sys._getframe(1))
                raise
            if mine and name in _MEMBERS:
                watch._members(self, name, value, sys._getframe(1))
            elif mine and name not in _INTERNAL:
                watch._attribute(self, name, value, sys._getframe(1))
            return value

        nn.Module.__getattribute__ = read
        self._mode.__enter__()
        self._before = sys.gettrace(), sys.getprofile()
        frame = sys._getframe()
        frame.f_trace_opcodes = True  # before settrace, or Python 3.12 would not tell of any
        sys.settrace(self._called)
        frame.f_trace_opcodes = False
        sys.setprofile(self._c_called)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(self._before[1])
        sys.settrace(self._before[0])
        self._mode.__exit__(None, None, None)
        del nn.Module.__getattribute__
        if not _unchanged([*self.reads.values()]):
            self.refuse("changes what it reads")

    def refuse(self, why: str) -> None:
        self.refused = self.refused or why

    # ---- code

    def _module(self, frame: types.FrameType | None) -> tuple[str, bool]:
        """Whose code it is, and whether that is to be looked at."""
        if frame is None:
            return "", False
        known = self._known.get(frame.f_code)
        if known is None:
            name = str(frame.f_globals.get("__name__", ""))
            package = name.partition(".")[0]
            known = name, package not in _OPAQUE and not package.startswith("namedtuple_")
            self._known[frame.f_code] = known
        return known

    def _called(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        module, is_user = self._module(frame)
        if is_user:
            self._method(frame)
            self._nested.update(c for c in frame.f_code.co_consts if isinstance(c, types.CodeType))
            frame.f_trace = self._instruction  # first, or Python 3.13 would not tell of instructions
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return self._instruction
        caller, by_user = self._module(frame.f_back)
        if by_user and not _is_pure(module, frame.f_code.co_name):
            self.refuse(_said(module, frame.f_code.co_name))
        elif _is_in(module, _CONTEXTS) and not _is_in(caller, (*_CONTEXTS, "r3d_kernels")):
            self.refuse(_CONTEXT)  # and not we ourselves: Dynamo wraps the tracer, too
        return None

    def _method(self, frame: types.FrameType) -> None:
        """Notes the method that runs: `super()` finds it where no attribute of the module is read."""
        code = frame.f_code
        module = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(module, nn.Module):
            for base in type(module).__mro__:
                if getattr(vars(base).get(code.co_name), "__code__", None) is code:
                    self._keep(vars(base), code.co_name, vars(base)[code.co_name])

    def _c_called(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "c_call" and self._module(frame)[1]:
            self._check_c(arg)

    def _check_c(self, function: Any) -> None:
        """Functions in C: of builtin types, of torch's operators (the mode sees these), or pure ones."""
        owner, name = getattr(function, "__self__", None), function.__name__
        module = getattr(function, "__module__", None) or type(owner).__module__
        if owner is builtins:
            pure = name in _PURE_BUILTINS
        elif isinstance(owner, types.ModuleType) or owner is None:
            # torch itself: operators have no owner, its settings have torch._C
            operators = owner is None or owner.__name__.startswith("torch._C._")
            pure = operators if _is_in(module, ("torch",)) else _is_pure(module, name)
        elif isinstance(owner, type):
            pure = owner.__module__ in ("builtins", "collections") or issubclass(owner, (tuple, Tensor))
        else:
            pure = isinstance(owner, _PLAIN_TYPES)
            pure |= isinstance(owner, (nn.Module, types.FunctionType, types.GeneratorType))
            pure |= type(owner).__module__ in ("builtins", "collections", "itertools", "re", "functools")
        if not pure:
            self.refuse(_said(str(module), name))

    def _instruction(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        mark = _marks(frame.f_code).get(frame.f_lasti) if event == "opcode" else None
        if mark is not None:
            what, name, path = mark
            if what == "with":
                self.refuse(_CONTEXT)
            elif what == "global":
                self._global(frame.f_globals, name, path)
                if name == "type":
                    self._class_attributes(frame)
            elif what == "class":
                self._class_attributes(frame)
            elif what == "store":
                self.refuse(f"changes the global {name}")
            elif frame.f_code not in self._nested:
                self._free(what, name, frame)
        return self._instruction

    # ---- values

    def _keep(self, where: Mapping[str, Any], name: str, value: Any) -> None:
        self.reads.setdefault((id(where), name), (where, name, value))

    def _value(self, where: Mapping[str, Any], name: str, value: Any, depth: int = 0) -> None:
        if isinstance(value, (Tensor, fx.Proxy)):
            return  # an argument of nodes, which look it up at each call
        if isinstance(value, functools.partial) and isinstance(value.func, types.BuiltinFunctionType):
            self._check_c(value.func)  # called from C, where no profiler looks
        try:
            self._keep(where, name, _snapshot(value))
        except _CanChangeError:
            self._keep(where, name, value)
            theirs = type(value).__module__.partition(".")[0] not in _OPAQUE and not isinstance(
                value, (dict, list, set)
            )
            plain = theirs or type(value) in (types.SimpleNamespace, argparse.Namespace)
            if not plain or not hasattr(value, "__dict__") or depth > 3:
                self.refuse(f"reads {name}, which can change (a {type(value).__name__})")
                return
            own = vars(value)  # of a configuration, whose class may have defaults
            for key, part in list(own.items()):
                self._value(own, key, part, depth + 1)
            for base in type(value).__mro__[:-1]:
                for key, part in list(vars(base).items()):
                    if key.startswith("__") or hasattr(type(part), "__get__"):
                        continue
                    self._value(vars(base), key, part, depth + 1)
                    if key not in own:
                        self._keep(own, key, _MISSING)

    def _attribute(self, module: nn.Module, name: str, value: Any, reader: types.FrameType) -> None:
        if name == "__dict__" and self._module(reader)[1]:
            self.refuse("reads the __dict__ of a module")
        by = str(reader.f_globals.get("__name__", ""))
        if name == "__dict__" or _is_in(by, ("torch.fx",)):
            return
        own = object.__getattribute__(module, "__dict__")
        if name == "training":
            self.flags[id(own)] = own
        elif name in own:
            self._value(own, name, value)
        elif self.of_class(_original(type(module)), name) or not _is_in(by, ("torch", "r3d_kernels")):
            self._keep(own, name, _MISSING)

    def _member(self, module: nn.Module, name: str, reader: types.FrameType) -> None:
        """One that torch looks up, or that is not there: whether there is one decides branches."""
        if _is_in(str(reader.f_globals.get("__name__", "")), ("torch.fx", "r3d_kernels")):
            return
        own = object.__getattribute__(module, "__dict__")
        groups = [own[group] for group in _MEMBERS if group in own]
        for group in groups:
            if name in group:
                value = group[name]
                self._keep(group, name, _TENSOR if isinstance(value, Tensor) else value)
                return
        for where in (own, *groups):
            self._keep(where, name, _MISSING)

    def _members(self, module: nn.Module, name: str, value: Any, reader: types.FrameType) -> None:
        """All of a kind: a loop over a list of modules, `parameters()`."""
        frame: types.FrameType | None = reader
        while frame is not None and _is_in(self._module(frame)[0], ("torch.nn",)):
            frame = frame.f_back
        if not self._module(frame)[1]:
            return  # fx, which looks through everything
        if name == "_modules":
            self.holders[id(module)] = module
        elif id(value) not in self._variables:
            names = self._variables[id(value)] = _Names(value)
            self._keep(names, name, _present(value))

    def of_class(self, cls: type, name: str) -> bool:
        """Notes an attribute that comes from a class; whether it is none of torch's."""
        for base in cls.__mro__:
            if name in vars(base):
                raw = vars(base)[name]
                if _is_in(base.__module__, ("torch", "builtins")):
                    return False
                plain = isinstance(raw, (staticmethod, classmethod)) or hasattr(type(raw), "__get__")
                (self._keep if plain else self._value)(vars(base), name, raw)
                return True
        return False

    def _global(self, names: dict[str, Any], name: str, path: tuple[str, ...]) -> None:
        if name not in names:
            return  # a builtin
        where: Mapping[str, Any] = names
        value, full = names[name], name
        for attribute in path:
            if isinstance(value, type) and not _is_in(value.__module__, tuple(_OPAQUE)):
                self.of_class(value, attribute)
                return
            if not isinstance(value, types.ModuleType) or value is torch.ops:
                break
            where, full = vars(value), f"{full}.{attribute}"
            value, owner = getattr(value, attribute, None), value
            if attribute not in where and not isinstance(value, (type, types.ModuleType, types.FunctionType)):
                self.refuse(f"reads {owner.__name__}.{attribute}")  # a setting that is computed
                return
            name = attribute
        if isinstance(value, (types.ModuleType, type)):
            return
        if isinstance(value, types.FunctionType) and value.__globals__.get("__name__") in _WRAPPERS:
            value = getattr(value, "__wrapped__", value)  # while fx traces: the graph calls it
        if isinstance(value, types.BuiltinFunctionType):
            self._check_c(value)  # whoever calls it: `map` and `functools.partial` are C too
        if callable(value) and not isinstance(
            value, (types.FunctionType, types.BuiltinFunctionType, nn.Module)
        ):
            module = str(getattr(value, "__module__", ""))
            if _is_in(module, ("numpy.random",)) or ".random." in f"{full}.":
                self.refuse(
                    f"reads random numbers ({full})"
                )  # compiled by Cython: no profiler sees its calls
        if callable(value) and str(where.get("__name__")).partition(".")[0] in _OPAQUE:
            return  # torch's, numpy's
        self._value(where, name, value)

    def _class_attributes(self, frame: types.FrameType) -> None:
        """Of a method that asks for its class: whatever it may look up there."""
        code = frame.f_code
        module = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(module, nn.Module):
            for name in code.co_names:
                if name not in _INTERNAL:
                    self.of_class(_original(type(module)), name)

    def _free(self, what: str, name: str, frame: types.FrameType) -> None:
        """A variable of a function around the forward."""
        value = frame.f_locals.get(name)
        if what == "store free":
            self.refuse(f"changes {name} outside of itself")
            return
        if isinstance(value, (types.ModuleType, types.FunctionType, type, nn.Module, Tensor, fx.Proxy)):
            return  # a decorator's, mostly
        code = frame.f_code
        for function in gc.get_referrers(code):
            if isinstance(function, types.FunctionType) and function.__closure__ is not None:
                cell = function.__closure__[code.co_freevars.index(name)]
                if cell.cell_contents is value:
                    variable = self._variables.setdefault(id(cell), _Variable(cell))
                    self._value(variable, name, value)


# ---------------------------------------------------------------------------------------------------------- tracing


def _convolutions(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Conv3d)]


def _is_replaced(module: nn.Module) -> bool:
    """Whether somebody has put another forward on this one module."""
    return "forward" in module.__dict__


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
        leaf = _is_replaced(m) or _is_ours(m) or isinstance(m, _NEVER_TRACED)
        return leaf or not (_is_container(m) or wrapper)

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


class _Trace(NamedTuple):
    graph: fx.Graph
    inlined: list[nn.Module]  # modules that are part of it and not called
    reads: list[_Read]
    flags: list[dict[str, Any]]  # of modules whose training flag was read
    holders: list[nn.Module]  # modules whose children were looked through


_tracing = threading.RLock()  # fx, and the watch, patch torch while they trace


def _traced(module: nn.Module) -> _Trace | str:
    """The graph of the module's forward in evaluation, or why there is none."""
    with _tracing:
        cls, training = type(module), [m for m in module.modules() if m.training]
        try:
            for m in training:
                m.training = False  # train() may do more
            module.__class__ = _original(cls)  # whose signature is its own
            if not _takes_tensors_only(module):
                return "its forward takes more than tensors"
            found: _Trace | str = ""
            for inlines in (True, False):
                found = _trace_once(module, inlines)
                if not isinstance(found, str):
                    break
            return found
        finally:
            module.__class__ = cls
            for m in training:
                m.training = True


def _trace_once(module: nn.Module, inlines: bool) -> _Trace | str:
    tracer, attributes, watch = _Tracer(inlines), _Attributes(module), _Watch()
    failed = graph = None
    try:
        with torch.no_grad(), watch:
            watch.of_class(type(module), "forward")  # fx reads it where nobody watches
            graph = tracer.trace(module)
    except Exception as e:  # whatever a forward does with values that are none
        failed = f"its forward cannot be traced: {type(e).__name__}"
    changed = attributes.put_back()
    if watch.refused:
        return f"its forward {watch.refused}"
    if changed:
        return "its forward keeps something in the module"
    if graph is None:
        return failed or ""
    flags = {**watch.flags, **{id(vars(m)): vars(m) for m in tracer.inlined}}
    return _Trace(
        graph, tracer.inlined, [*watch.reads.values()], [*flags.values()], [*watch.holders.values()]
    )


_IN_PLACE = {operator.setitem, *(getattr(operator, name) for name in _ASSIGNMENTS)}


class _Matcher:
    """Chains of a convolution and what follows it, replaced by one call each."""

    def __init__(self, module: nn.Module, graph: fx.Graph, inlined: list[nn.Module]) -> None:
        self.graph = graph
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.absorbed = list(inlined)  # not called any more: their hooks would not be either
        self.convolutions: list[nn.Module] = []
        self.called: list[nn.Module] = []  # by `layer` and `max_pool`, which look at their hooks
        self.changes = 0

    def module_of(self, node: Any) -> nn.Module | None:
        """Of a call that does what the module's class says."""
        known = isinstance(node, fx.Node) and node.op == "call_module"
        module = self.modules.get(str(node.target)) if known else None
        return None if module is None or _is_replaced(module) else module

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
            return bool(getattr(self.modules.get(str(node.target)), "inplace", False))
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
        self.called.append(self.modules[str(node.target)])
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


_MOST_TRACES = 8  # of a module whose values keep changing: a trace takes as long as many calls


def _global_hooks() -> bool:
    h = _hooks_of_all
    return bool(
        h._global_forward_hooks
        or h._global_forward_pre_hooks
        or h._global_backward_hooks
        or h._global_backward_pre_hooks
    )


class _Plan:
    """What a module's forward has become. Copies and pickles of it are empty: it is made again where it is needed."""

    def __init__(self) -> None:
        self.run: Callable[..., Any] | None = None
        self.why: str | None = None  # there is no `run`
        self.convolutions: list[nn.Module] = []
        self._absorbed: list[nn.Module] = []
        self._inlined: list[nn.Module] = []
        self._compared = False  # with the module's own forward
        self._traces = 0
        # the parts of the module, and of what is part of its graph, as they were
        self._parts: list[tuple[dict[str, nn.Module | None], list[nn.Module | None]]] | None = None
        self._reads: list[_Read] = []
        self._cells = False  # whether variables of functions are among them
        self._flags: list[dict[str, Any]] = []  # of modules that have to be in evaluation mode
        self._owns: list[dict[str, Any]] = []  # of modules that are not called, or by `layer`

    def __deepcopy__(self, memo: object) -> _Plan:
        return _Plan()

    def __copy__(self) -> _Plan:
        return _Plan()

    def __reduce__(self) -> tuple[type[_Plan], tuple[()]]:
        return _Plan, ()

    def current(self) -> bool:
        """Whether it was made, of the modules that are there now, and of the values that the forward would read."""
        parts = self._parts
        return (
            parts is not None
            and all([*now.values()] == were for now, were in parts)
            and _unchanged(self._reads)
        )

    def make(self, module: nn.Module) -> None:
        self.run, self.why, self._compared = None, None, False
        self._inlined, self._reads, self._flags, self._owns, self._cells = [], [], [], [], False
        holders: list[nn.Module] = []
        traced = _traced(module) if self._traces < _MOST_TRACES else "its forward reads what keeps changing"
        self._traces += 1
        if isinstance(traced, str):
            self.why = traced
        else:
            matcher = _Matcher(module, traced.graph, traced.inlined)
            if matcher.run():
                code = traced.graph.python_code("self")
                names: dict[str, Any] = {"__builtins__": builtins, **code.globals}
                exec(compile(code.src, f"<{type(module).__name__}, fused>", "exec"), names)
                self._absorbed, self.convolutions = matcher.absorbed, matcher.convolutions
                self._reads, self._flags = traced.reads, traced.flags
                self._cells = any(isinstance(where, _Variable) for where, _, _ in traced.reads)
                self._owns = [*{id(m): vars(m) for m in (*matcher.absorbed, *matcher.called)}.values()]
                self.run = names["forward"]
            self._inlined, holders = traced.inlined, traced.holders
        # one entry each: a container may be looked through and inlined
        looked_at = {id(m): m for m in (module, *self._inlined, *holders)}.values()
        self._parts = [(m._modules, [*m._modules.values()]) for m in looked_at]
        compared = {id(now) for now, _ in self._parts}
        self._reads = [read for read in self._reads if id(read[0]) not in compared]

    def runs(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether this call takes the fused way."""
        tensors = bool(args) and all(type(a) in TENSORS for a in args)
        if module.training or not tensors or torch.jit.is_tracing():
            return False
        if not torch.compiler.is_compiling() and id(module) in _left_alone.get():
            return False
        if not is_plain(*args):  # fx, export, vmap, tensors of other kinds
            return False
        if (
            forward_ad._current_level >= 0 or _global_hooks()
        ):  # tangents, and those who listen to every module
            return False
        if self._cells and torch.compiler.is_compiling():
            return False  # Dynamo cannot look into cells
        if not self.current():
            if torch.compiler.is_compiling():
                return False
            fused = self.run is not None
            self.make(module)
            if fused and self.why is not None:
                self._say(module, self.why, 5)
        if self.run is None:
            return False
        for own in self._flags:
            if own["training"]:
                return False
        for own in self._owns:
            if (
                "forward" in own
                or "_conv_forward" in own
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
            ):
                return False
        return "forward" not in module.__dict__ and not any(map(has_hooks, self._absorbed))

    @staticmethod
    def _say(module: nn.Module, why: str, level: int) -> None:
        warnings.warn(f"fuse: a {type(module).__name__} keeps its own forward: {why}", stacklevel=level + 1)

    def __call__(self, module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The module's result; the first one is compared with that of its `own` forward.

        A trace cannot tell a forward that asks for the type of what it gets from one that does not.
        """
        if self._compared or torch.compiler.is_compiling() or backends.capturing(args[0].device):
            return self.run(module, *args)
        # Torch's half precision on a CPU is wrong or worse for some shapes, and whoever listens would see two calls.
        half = args[0].is_cpu and (
            args[0].dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu")
        )
        compares = not half and not any(has_hooks(m) or _is_replaced(m) for m in module.modules())
        given = [a.clone() for a in args] if compares else args  # a forward may write to what it gets
        randomness = _Randomness(args[0]) if compares else None
        try:
            y = self.run(module, *args)
        except Exception as e:
            want = own(
                module, *given
            )  # fails as well where the input is wrong, which tells nothing of the graph
            why = f"its graph fails: {type(e).__name__}: {next(iter(str(e).splitlines()), '')}"
        else:
            if randomness is None or randomness.used():
                return y  # something random is on: two results have nothing to do with each other, later ones may
            want = self._own_result(module, own, given)
            if _close(y, want):
                self._compared = True
                return y
            if not _close(self._own_result(module, own, given), want, 1e-3):
                return y  # nor are two of its own equal
            why = "its graph computes something else"
        self.run, self.why = None, why
        self._reads = []  # it would be made again
        self._say(module, why, 4)
        return want

    def _own_result(self, module: nn.Module, own: Callable[..., Any], given: Any) -> Any:
        """Of the module's own forward, without what is part of the graph and fused on its own too."""
        token = _left_alone.set(_left_alone.get() | {id(m) for m in self._inlined})
        try:
            with observed_by(None):
                return own(module, *given)
        finally:
            _left_alone.reset(token)


class _Randomness:
    """The generators that random operators on x's device, and Python, take their numbers from."""

    def __init__(self, x: Tensor) -> None:
        self._generator = (
            torch.cuda.default_generators[x.get_device()] if x.is_cuda else torch.default_generator
        )
        self._was = self._generator.get_state(), random.getstate()

    def used(self) -> bool:
        return not torch.equal(self._generator.get_state(), self._was[0]) or random.getstate() != self._was[1]


@torch.no_grad()
def _close(y: Any, want: Any, limit: float = 0.05) -> bool:
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
            if math.isfinite(size) and not distance <= limit * size + 1e-6:
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
    worth_it = any(isinstance(m, (nn.Conv3d, nn.MaxPool3d)) for m in model.modules())
    if worth_it and not _is_replaced(model) and not _is_library(model):
        yield model
    for child in model.children():
        yield from _candidates(child)


def fuse(model: nn.Module) -> nn.Module:
    """Runs the convolutions of any model fused: Conv3d + BatchNorm3d + residual + ReLU (+ max-pool) in one pass each.

    In place: the model keeps its parameters, names, class hierarchy and hooks, trains as before, and its `state_dict`,
    copies and pickles stay as they were (a pickle needs this package where it is read). Fused where the module that
    holds a convolution is in evaluation mode; layers themselves then fall back to their modules wherever
    `nn.conv_bn_act` does: where a gradient is needed, a hook listens to a layer, under `torch.export`. A module's own
    forward runs where a part of it is in training mode, has hooks or a forward of its own, where torch's global hooks
    are set, and in forward-mode differentiation.

    Plain values that a forward reads (attributes, configurations, globals) may change: it is traced again then. A
    forward that depends on values of tensors, keeps something in the module, enters a context manager, or reads
    anything else that can change (random numbers, the clock, the environment, torch's modes and settings) stays as it
    is. Default arguments count as they are now, and so do functions of torch that somebody replaces: call `fuse` again
    after changing one. The first result of each module in which nothing is random is
    compared with that of its own forward (not in half precision on a CPU): where they differ it keeps its own.

    Args:
        model: with Conv3d in it: ours, torchvision's, MONAI's, your own.

    Returns:
        The model itself. `r3d_kernels.explain` tells, after a pass, which kernel each layer took.

    Raises:
        TypeError: where model is no module.
        ValueError: where there is no Conv3d in it.

    Warns:
        UserWarning: names the convolutions that stay as they are, and why; at a later call the modules that do.
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
    reasons: dict[int, str] = {}  # of convolutions, by the innermost module that says one
    for module in list(_candidates(model)):
        plan = _Plan()
        plan.make(module)
        if plan.why:
            reasons.update((id(m), plan.why) for m in _convolutions(module))
        if plan.run is None:
            continue
        done.update(map(id, plan.convolutions))
        module.__dict__[_PLAN] = plan
        module.__class__ = _fused_class(_original(type(module)))
    left = {name: reasons.get(i) for i, name in everything.items() if i not in done}
    if left:
        some = [f"{name} ({why})" if why else name for name, why in left.items()]
        warnings.warn(
            f"fuse: {len(left)} of {len(everything)} convolutions stay as they are, because the forward that calls "
            f"them cannot be traced, or is not called as part of a module: "
            f"{', '.join(some[:5])}{', ...' if len(some) > 5 else ''}",
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
