"""Problem descriptors: one generator of shapes for tests, benchmarks and tuning keys.

A problem is a 3-D convolution with the batch norm, the residual add and the activation that follow it, as
data. It prints as one token, in the manner of oneDNN's benchdnn, and the token parses back:

    n2c64d16h56w56k64f3s1p1+res+relu
    n1c3d16h112w112k64f3x7x7s1x2x2p1x3x3+relu
    n2c64d16h56w56k64f3s1p2l2g4

=====  =====================================================================================================
token  meaning
=====  =====================================================================================================
n c    batch (0 is allowed), input channels
d h w  input depth (frames), height, width
k      output channels
f      kernel: one number when all three axes agree, else DxHxW
s      stride, as f; 1 when missing
p      padding on both sides of each axis, as f; 0 when missing
l      dilation, as f; 1 is not printed
g      groups; 1 is not printed
+res   a residual of the output's shape is added before the activation
+relu  the activation; none when missing
=====  =====================================================================================================
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "LAYERS",
    "LAYER_INPUT",
    "LAYER_NETWORKS",
    "ConvProblem",
    "ProblemTensors",
    "layers_of",
    "network_problems",
    "unique",
]

Triple = tuple[int, int, int]

ACTIVATIONS = (None, "relu")

_TRIPLES = {"f": "kernel", "s": "stride", "p": "padding", "l": "dilation"}
_SCALARS = {"n": "n", "c": "c", "d": "d", "h": "h", "w": "w", "k": "k", "g": "groups"}
_REQUIRED = "ncdhwkf"
_TOKEN = re.compile(r"([a-z])([0-9]+(?:x[0-9]+)*)")


def _triple(name: str, value: int | Iterable[int]) -> Triple:
    """An int or three ints, as three ints."""
    values = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(values) != 3 or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{name}: expected one int or three, got {value!r}")
    return values


def _compact(value: Triple) -> str:
    return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))


def _taps_inside(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many (output, tap) pairs of one axis read the input and not the padding."""
    return sum(0 <= o * stride - padding + t * dilation < size for o in range(out) for t in range(kernel))


def _touched(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many input positions of one axis are read at all (a stride above the kernel skips some)."""
    read = {o * stride - padding + t * dilation for o in range(out) for t in range(kernel)}
    return sum(0 <= i < size for i in read)


@dataclass(frozen=True)
class ProblemTensors:
    """Everything one fused layer needs; the names are those of `ops.conv3d_bn_act`."""

    x: Tensor  # [N, C, D, H, W]
    weight: Tensor  # [K, C/groups, kd, kh, kw]
    gamma: Tensor  # [K]
    beta: Tensor  # [K]
    running_mean: Tensor  # [K]
    running_var: Tensor  # [K]
    eps: float
    residual: Tensor | None  # [N, K, OD, OH, OW]

    def to(self, *args: object, **kwargs: object) -> ProblemTensors:
        """All tensors through `Tensor.to`; float64 copies of rounded inputs are exact, which oracles need."""
        moved = {
            f.name: value.to(*args, **kwargs)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class ConvProblem:
    """One convolution with its epilogue; hashable, and `parse(str(p)) == p` (grammar: see the module)."""

    n: int
    c: int
    d: int
    h: int
    w: int
    k: int
    kernel: Triple
    stride: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)
    groups: int = 1
    residual: bool = False
    activation: str | None = "relu"

    def __post_init__(self) -> None:
        for name in _TRIPLES.values():
            object.__setattr__(self, name, _triple(name, getattr(self, name)))

    # ---- text ----

    def __str__(self) -> str:
        text = f"n{self.n}c{self.c}d{self.d}h{self.h}w{self.w}k{self.k}f{_compact(self.kernel)}"
        text += f"s{_compact(self.stride)}p{_compact(self.padding)}"
        if self.dilation != (1, 1, 1):
            text += f"l{_compact(self.dilation)}"
        if self.groups != 1:
            text += f"g{self.groups}"
        if self.residual:
            text += "+res"
        if self.activation is not None:
            text += f"+{self.activation}"
        return text

    @classmethod
    def parse(cls, text: str) -> ConvProblem:
        """The problem that `str` printed as `text`; ValueError names the token that cannot be read."""
        geometry, *suffixes = text.strip().split("+")
        fields: dict[str, object] = {"residual": False, "activation": None}
        seen: set[str] = set()
        position = 0
        while position < len(geometry):
            match = _TOKEN.match(geometry, position)
            if match is None:
                raise ValueError(
                    f"{text!r}: cannot read {geometry[position:]!r} (expected a letter and a number)"
                )
            letter, number = match.groups()
            values = tuple(int(v) for v in number.split("x"))
            token = match.group()
            if letter in seen:
                raise ValueError(f"{text!r}: token {token!r} repeats {letter!r}")
            if letter in _SCALARS:
                if len(values) != 1:
                    raise ValueError(f"{text!r}: token {token!r} takes one number")
                fields[_SCALARS[letter]] = values[0]
            elif letter in _TRIPLES:
                if len(values) not in (1, 3):
                    raise ValueError(f"{text!r}: token {token!r} takes one number or three (DxHxW)")
                fields[_TRIPLES[letter]] = values * 3 if len(values) == 1 else values
            else:
                raise ValueError(f"{text!r}: unknown token {token!r}")
            seen.add(letter)
            position = match.end()
        if missing := [letter for letter in _REQUIRED if letter not in seen]:
            raise ValueError(f"{text!r}: missing token {missing[0]!r}")
        for suffix in suffixes:
            if suffix in seen:
                raise ValueError(f"{text!r}: token '+{suffix}' is repeated")
            if suffix == "res":
                fields["residual"] = True
            elif suffix in ACTIVATIONS and fields["activation"] is None:
                fields["activation"] = suffix
            else:
                raise ValueError(f"{text!r}: unknown token '+{suffix}' (known: +res, +relu)")
            seen.add(suffix)
        return cls(**fields).validate()  # type: ignore[arg-type]

    # ---- geometry ----

    def validate(self) -> ConvProblem:
        """Itself; ValueError where no convolution of this geometry exists."""
        for name in ("c", "d", "h", "w", "k", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self}: {name} must be at least 1, got {getattr(self, name)}")
        if self.n < 0:
            raise ValueError(f"{self}: n must be at least 0, got {self.n}")
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            if min(getattr(self, name)) < least:
                raise ValueError(f"{self}: {name} must be at least {least}, got {getattr(self, name)}")
        for name in ("c", "k"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"{self}: groups={self.groups} does not divide {name}={getattr(self, name)}")
        for axis, size, f, p, dil in zip(
            "dhw", (self.d, self.h, self.w), self.kernel, self.padding, self.dilation, strict=True
        ):
            span, padded = dil * (f - 1) + 1, size + 2 * p
            if span > padded:
                raise ValueError(
                    f"{self}: the kernel spans {span} along {axis}, the padded input has {padded}"
                )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"{self}: activation must be one of {ACTIVATIONS}, got {self.activation!r}")
        return self

    @property
    def in_shape(self) -> tuple[int, int, int, int, int]:
        """[N, C, D, H, W]"""
        return (self.n, self.c, self.d, self.h, self.w)

    @property
    def weight_shape(self) -> tuple[int, int, int, int, int]:
        """[K, C/groups, kd, kh, kw]"""
        return (self.k, self.c // self.groups, *self.kernel)

    @property
    def out_size(self) -> Triple:
        """(OD, OH, OW)"""
        od, oh, ow = (
            (size + 2 * p - dil * (f - 1) - 1) // s + 1
            for size, f, s, p, dil in zip(
                (self.d, self.h, self.w), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return (od, oh, ow)

    @property
    def out_shape(self) -> tuple[int, int, int, int, int]:
        """[N, K, OD, OH, OW]"""
        return (self.n, self.k, *self.out_size)

    def with_batch(self, n: int) -> ConvProblem:
        """The same layer at another batch size."""
        return dataclasses.replace(self, n=n)

    def _axes(self) -> Iterable[tuple[int, int, int, int, int, int]]:
        return zip(
            (self.d, self.h, self.w),
            self.out_size,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )

    # ---- cost ----

    @property
    def macs(self) -> int:
        """Multiply-adds of a direct convolution, taps on padding included."""
        return math.prod(self.out_shape) * math.prod(self.weight_shape[1:])

    @property
    def flops(self) -> int:
        """2 * macs: what speeds are quoted in, whatever the algorithm really computes."""
        return 2 * self.macs

    @property
    def macs_inside(self) -> int:
        """Multiply-adds without the taps that fall on padding: the least that a direct convolution can do."""
        taps = math.prod(_taps_inside(*axis) for axis in self._axes())
        return self.n * self.k * (self.c // self.groups) * taps

    def bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Least memory traffic: what is read of the input, and all else, once; scale and shift in float32."""
        inputs = self.n * self.c * math.prod(_touched(*axis) for axis in self._axes())
        outputs = math.prod(self.out_shape)
        elements = inputs + math.prod(self.weight_shape) + outputs * (2 if self.residual else 1)
        return elements * dtype.itemsize + 2 * self.k * 4

    def torch_bf16_is_unsafe(self) -> bool:
        """Whether torch's own bfloat16 convolution on a CPU must not be called with this geometry.

        There it returns wrong results or writes out of bounds and corrupts the process (torch 2.13): where the output
        is one wide and the stride along it more than 1 (pytorch#169688), with dilation, and where the kernel spans more
        than the input, unless the padding is "same" and a group has at least 16 input channels. Found by isolated runs
        under a checking allocator and by tests/fuzz; wide on purpose.
        """
        if self.out_size[2] == 1 and self.stride[2] > 1:
            return True
        if max(self.dilation) > 1:
            return True
        same = self.c // self.groups >= 16 and all(
            f == 2 * p + 1 for f, p in zip(self.kernel, self.padding, strict=True)
        )
        sizes = (self.d, self.h, self.w)
        return not same and any(f > size for f, size in zip(self.kernel, sizes, strict=True))

    # ---- data ----

    def tensors(
        self,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        memory_format: torch.memory_format = torch.channels_last_3d,
        device: torch.device | str = "cpu",
        relu_like: bool = True,
        *,
        param_dtype: torch.dtype | None = None,
        eps: float = 1e-5,
    ) -> ProblemTensors:
        """Random inputs with outputs of order 1 and batch-norm statistics that are far from the identity.

        relu_like: x has the distribution of a rectified normal, as inside a network; else it is normal.
        Batch-norm parameters are `param_dtype`: by default the dtype itself, float32 for half precisions.
        Values are drawn in float32 on the CPU and rounded: every dtype and device sees the same problem.
        """
        self.validate()
        if param_dtype is None:
            param_dtype = torch.promote_types(dtype, torch.float32)
        generator = torch.Generator("cpu").manual_seed(seed)
        like = {"generator": generator, "device": "cpu", "dtype": torch.float32}  # whatever the defaults are

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, **like)

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(self.k, **like) * (high - low) + low

        def place(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype).contiguous(memory_format=memory_format)

        x = normal(*self.in_shape)
        # E[x^2] is 1, or 1/2 once rectified: the gain keeps the convolution's output at variance 1.
        gain = 2.0 if relu_like else 1.0
        weight = normal(*self.weight_shape) * math.sqrt(gain / math.prod(self.weight_shape[1:]))
        # A folded scale may be negative: a quarter of the channels flips, so that nobody relies on its sign.
        gamma = uniform(0.5, 1.5) * torch.where(uniform(0.0, 1.0) < 0.25, -1.0, 1.0)
        beta = uniform(-0.5, 0.5)
        running_mean = uniform(-0.5, 0.5)
        running_var = uniform(0.5, 2.0)
        residual = place(normal(*self.out_shape)) if self.residual else None
        return ProblemTensors(
            x=place(x.relu_() if relu_like else x),
            weight=place(weight),
            gamma=gamma.to(device, param_dtype),
            beta=beta.to(device, param_dtype),
            running_mean=running_mean.to(device, param_dtype),
            running_var=running_var.to(device, param_dtype),
            eps=eps,
            residual=residual,
        )

    def reference(self, t: ProblemTensors, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """The three stock operations on `t`, by default in float64; None keeps the dtypes of `t`."""
        if dtype is not None:
            t = t.to(dtype)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if t.x.is_cpu and t.x.dtype == torch.bfloat16 and self.torch_bf16_is_unsafe():
            y = F.conv3d(t.x.float(), t.weight.float(), None, *geometry).to(t.x.dtype)
        else:
            y = F.conv3d(t.x, t.weight, None, *geometry)
        y = F.batch_norm(y, t.running_mean, t.running_var, t.gamma, t.beta, False, 0.0, t.eps)
        if t.residual is not None:
            y = y + t.residual
        return F.relu(y) if self.activation == "relu" else y  # [N, K, OD, OH, OW]

    # ---- modules ----

    @classmethod
    def from_module(
        cls,
        conv: nn.Conv3d,
        input_shape: Iterable[int],
        residual: bool = False,
        activation: str | None = None,
    ) -> ConvProblem:
        """The problem that `conv` solves on an input of [N, C, D, H, W].

        A padding that the convolution does not apply itself (a mode other than zeros, an uneven 'same') is
        done by torch before it: the problem then is the one on the padded input.
        """
        shape = tuple(int(v) for v in input_shape)
        if len(shape) != 5:
            raise ValueError(f"input_shape: expected [N, C, D, H, W], got {list(shape)}")
        if shape[1] != conv.in_channels:
            raise ValueError(f"input_shape: expected {conv.in_channels} channels, got {shape[1]}")
        spans = [dil * (f - 1) for f, dil in zip(conv.kernel_size, conv.dilation, strict=True)]
        if conv.padding == "same":
            total = spans
        elif conv.padding == "valid":
            total = [0, 0, 0]
        else:
            total = [2 * p for p in conv.padding]
        size = list(shape[2:])
        if conv.padding_mode != "zeros" or any(t % 2 for t in total):
            size = [s + t for s, t in zip(size, total, strict=True)]
            total = [0, 0, 0]
        return cls(
            *shape[:2],
            *size,
            k=conv.out_channels,
            kernel=tuple(conv.kernel_size),
            stride=tuple(conv.stride),
            padding=tuple(t // 2 for t in total),
            dilation=tuple(conv.dilation),
            groups=conv.groups,
            residual=residual,
            activation=activation,
        ).validate()


class _Followers(TorchDispatchMode):
    """Watches what happens to each convolution's output: batch norm, then residual add, then ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, ConvProblem]] = []
        # id of a tensor -> (index of its convolution, 0: its output, 1: after batch norm, 2: after the add)
        self._open: dict[int, tuple[int, int]] = {}
        self._keep: list[Tensor] = []  # ids stay unique while the tensors live; meta tensors cost nothing

    def add(self, name: str, problem: ConvProblem, output: Tensor) -> None:
        self._follow(output, len(self.found), 0)
        self.found.append((name, problem))

    def _follow(self, output: Tensor, index: int, stage: int) -> None:
        self._open[id(output)] = (index, stage)
        self._keep.append(output)

    def _update(self, index: int, **changes: object) -> None:
        name, problem = self.found[index]
        self.found[index] = (name, dataclasses.replace(problem, **changes))  # type: ignore[arg-type]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        states = [self._open.get(id(a), (-1, 9)) if isinstance(a, Tensor) else (-1, 9) for a in args]
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if "batch_norm" in name and states[0][1] == 0:
            self._follow(out[0] if isinstance(out, (tuple, list)) else out, states[0][0], 1)
        elif name == "add" and isinstance(args[1], Tensor) and args[1].shape == args[0].shape:
            # Both sides are open where the shortcut is a convolution; `out + shortcut`: the first is meant.
            index = next((index for index, stage in states if stage < 2), None)
            if index is not None:
                self._update(index, residual=True)
                self._follow(out, index, 2)
        elif name == "relu" and states[0][0] >= 0:
            self._update(states[0][0], activation="relu")
            self._open.pop(id(out), None)  # in place: the tensor is the same, its story has ended
        return out


def network_problems(model: nn.Module, input_shape: Iterable[int]) -> list[tuple[str, ConvProblem]]:
    """(layer name, problem) for every `Conv3d` that a forward of `model` runs, in order of execution.

    Runs a copy on the meta device: no weights are copied and nothing is computed. A layer used twice is
    listed twice. Residual and activation are read off the operations that follow the convolution.
    """
    # deepcopy takes from the memo what it finds there: parameters and buffers become meta tensors on the way.
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(b): b.detach().to("meta") for b in model.buffers()}
    meta = copy.deepcopy(model, memo).eval()
    watch = _Followers()

    def record(name: str):  # type: ignore[no-untyped-def]
        def hook(conv: nn.Conv3d, args: tuple[Tensor, ...], output: Tensor) -> None:
            watch.add(name, ConvProblem.from_module(conv, args[0].shape), output)

        return hook

    for name, module in meta.named_modules():
        # Somebody else's hooks may look at values, which a meta tensor does not have.
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if isinstance(getattr(module, "fused", None), bool):
            module.fused = False  # a fused block calls an op in place of its convolution's forward
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(record(name))
    dtype = next((p.dtype for p in meta.parameters() if p.is_floating_point()), torch.float32)
    with torch.no_grad(), watch:
        meta(torch.empty(tuple(input_shape), device="meta", dtype=dtype))
    return watch.found


def unique(
    problems: Iterable[ConvProblem | tuple[str, ConvProblem]],
) -> list[tuple[ConvProblem, int]]:
    """Distinct problems with their counts, in order of first appearance."""
    counts: dict[ConvProblem, int] = {}
    for item in problems:
        problem = item if isinstance(item, ConvProblem) else item[1]
        counts[problem] = counts.get(problem, 0) + 1
    return list(counts.items())


LAYER_INPUT = (1, 3, 16, 112, 112)
"""The clip that LAYERS stands for."""

LAYER_NETWORKS = ("r3d_18", "hara_r3d_18", "hara_r3d_50", "seed_r3d_18", "r2plus1d_18", "mc3_18")
"""The networks in LAYERS, by the names that `create_model` knows."""

LAYERS: dict[str, str] = {
    "r3d_18/stem.0": "n1c3d16h112w112k64f3x7x7s1x2x2p1x3x3+relu",
    "r3d_18/layer1.0.conv1.0": "n1c64d16h56w56k64f3s1p1+relu",
    "r3d_18/layer1.0.conv2.0": "n1c64d16h56w56k64f3s1p1+res+relu",
    "r3d_18/layer2.0.conv1.0": "n1c64d16h56w56k128f3s2p1+relu",
    "r3d_18/layer2.0.conv2.0": "n1c128d8h28w28k128f3s1p1+res+relu",
    "r3d_18/layer2.0.downsample.0": "n1c64d16h56w56k128f1s2p0",
    "r3d_18/layer2.1.conv1.0": "n1c128d8h28w28k128f3s1p1+relu",
    "r3d_18/layer3.0.conv1.0": "n1c128d8h28w28k256f3s2p1+relu",
    "r3d_18/layer3.0.conv2.0": "n1c256d4h14w14k256f3s1p1+res+relu",
    "r3d_18/layer3.0.downsample.0": "n1c128d8h28w28k256f1s2p0",
    "r3d_18/layer3.1.conv1.0": "n1c256d4h14w14k256f3s1p1+relu",
    "r3d_18/layer4.0.conv1.0": "n1c256d4h14w14k512f3s2p1+relu",
    "r3d_18/layer4.0.conv2.0": "n1c512d2h7w7k512f3s1p1+res+relu",
    "r3d_18/layer4.0.downsample.0": "n1c256d4h14w14k512f1s2p0",
    "r3d_18/layer4.1.conv1.0": "n1c512d2h7w7k512f3s1p1+relu",
    "hara_r3d_18/conv1": "n1c3d16h112w112k64f7s1x2x2p3+relu",
    "hara_r3d_18/layer1.0.conv1": "n1c64d8h28w28k64f3s1p1+relu",
    "hara_r3d_18/layer1.0.conv2": "n1c64d8h28w28k64f3s1p1+res+relu",
    "hara_r3d_18/layer2.0.conv1": "n1c64d8h28w28k128f3s2p1+relu",
    "hara_r3d_18/layer2.0.conv2": "n1c128d4h14w14k128f3s1p1+res+relu",
    "hara_r3d_18/layer2.0.downsample.0": "n1c64d8h28w28k128f1s2p0",
    "hara_r3d_18/layer2.1.conv1": "n1c128d4h14w14k128f3s1p1+relu",
    "hara_r3d_18/layer3.0.conv1": "n1c128d4h14w14k256f3s2p1+relu",
    "hara_r3d_18/layer3.0.conv2": "n1c256d2h7w7k256f3s1p1+res+relu",
    "hara_r3d_18/layer3.0.downsample.0": "n1c128d4h14w14k256f1s2p0",
    "hara_r3d_18/layer3.1.conv1": "n1c256d2h7w7k256f3s1p1+relu",
    "hara_r3d_18/layer4.0.conv1": "n1c256d2h7w7k512f3s2p1+relu",
    "hara_r3d_18/layer4.0.conv2": "n1c512d1h4w4k512f3s1p1+res+relu",
    "hara_r3d_18/layer4.0.downsample.0": "n1c256d2h7w7k512f1s2p0",
    "hara_r3d_18/layer4.1.conv1": "n1c512d1h4w4k512f3s1p1+relu",
    "hara_r3d_50/conv1": "n1c3d16h112w112k64f7s1x2x2p3+relu",
    "hara_r3d_50/layer1.0.conv1": "n1c64d8h28w28k64f1s1p0+relu",
    "hara_r3d_50/layer1.0.conv2": "n1c64d8h28w28k64f3s1p1+relu",
    "hara_r3d_50/layer1.0.conv3": "n1c64d8h28w28k256f1s1p0+res+relu",
    "hara_r3d_50/layer1.0.downsample.0": "n1c64d8h28w28k256f1s1p0",
    "hara_r3d_50/layer1.1.conv1": "n1c256d8h28w28k64f1s1p0+relu",
    "hara_r3d_50/layer2.0.conv1": "n1c256d8h28w28k128f1s1p0+relu",
    "hara_r3d_50/layer2.0.conv2": "n1c128d8h28w28k128f3s2p1+relu",
    "hara_r3d_50/layer2.0.conv3": "n1c128d4h14w14k512f1s1p0+res+relu",
    "hara_r3d_50/layer2.0.downsample.0": "n1c256d8h28w28k512f1s2p0",
    "hara_r3d_50/layer2.1.conv1": "n1c512d4h14w14k128f1s1p0+relu",
    "hara_r3d_50/layer2.1.conv2": "n1c128d4h14w14k128f3s1p1+relu",
    "hara_r3d_50/layer3.0.conv1": "n1c512d4h14w14k256f1s1p0+relu",
    "hara_r3d_50/layer3.0.conv2": "n1c256d4h14w14k256f3s2p1+relu",
    "hara_r3d_50/layer3.0.conv3": "n1c256d2h7w7k1024f1s1p0+res+relu",
    "hara_r3d_50/layer3.0.downsample.0": "n1c512d4h14w14k1024f1s2p0",
    "hara_r3d_50/layer3.1.conv1": "n1c1024d2h7w7k256f1s1p0+relu",
    "hara_r3d_50/layer3.1.conv2": "n1c256d2h7w7k256f3s1p1+relu",
    "hara_r3d_50/layer4.0.conv1": "n1c1024d2h7w7k512f1s1p0+relu",
    "hara_r3d_50/layer4.0.conv2": "n1c512d2h7w7k512f3s2p1+relu",
    "hara_r3d_50/layer4.0.conv3": "n1c512d1h4w4k2048f1s1p0+res+relu",
    "hara_r3d_50/layer4.0.downsample.0": "n1c1024d2h7w7k2048f1s2p0",
    "hara_r3d_50/layer4.1.conv1": "n1c2048d1h4w4k512f1s1p0+relu",
    "hara_r3d_50/layer4.1.conv2": "n1c512d1h4w4k512f3s1p1+relu",
    "seed_r3d_18/conv1": "n1c3d16h112w112k64f7s2p3+relu",
    "seed_r3d_18/layer1.0.conv1": "n1c64d8h28w28k64f3s1p1+relu",
    "seed_r3d_18/layer1.0.conv2": "n1c64d8h28w28k64f3s1p1+res+relu",
    "seed_r3d_18/layer2.0.conv1": "n1c64d8h28w28k128f3s2p1+relu",
    "seed_r3d_18/layer2.0.conv2": "n1c128d4h14w14k128f3s1p1+res+relu",
    "seed_r3d_18/layer2.0.downsample.0": "n1c64d8h28w28k128f1s2p0",
    "seed_r3d_18/layer2.1.conv1": "n1c128d4h14w14k128f3s1p1+relu",
    "seed_r3d_18/layer3.0.conv1": "n1c128d4h14w14k256f3s2p1+relu",
    "seed_r3d_18/layer3.0.conv2": "n1c256d2h7w7k256f3s1p1+res+relu",
    "seed_r3d_18/layer3.0.downsample.0": "n1c128d4h14w14k256f1s2p0",
    "seed_r3d_18/layer3.1.conv1": "n1c256d2h7w7k256f3s1p1+relu",
    "seed_r3d_18/layer4.0.conv1": "n1c256d2h7w7k512f3s2p1+relu",
    "seed_r3d_18/layer4.0.conv2": "n1c512d1h4w4k512f3s1p1+res+relu",
    "seed_r3d_18/layer4.0.downsample.0": "n1c256d2h7w7k512f1s2p0",
    "seed_r3d_18/layer4.1.conv1": "n1c512d1h4w4k512f3s1p1+relu",
    "r2plus1d_18/stem.0": "n1c3d16h112w112k45f1x7x7s1x2x2p0x3x3+relu",
    "r2plus1d_18/stem.3": "n1c45d16h56w56k64f3x1x1s1p1x0x0+relu",
    "r2plus1d_18/layer1.0.conv1.0.0": "n1c64d16h56w56k144f1x3x3s1p0x1x1+relu",
    "r2plus1d_18/layer1.0.conv1.0.3": "n1c144d16h56w56k64f3x1x1s1p1x0x0+relu",
    "r2plus1d_18/layer1.0.conv2.0.3": "n1c144d16h56w56k64f3x1x1s1p1x0x0+res+relu",
    "r2plus1d_18/layer2.0.conv1.0.0": "n1c64d16h56w56k230f1x3x3s1x2x2p0x1x1+relu",
    "r2plus1d_18/layer2.0.conv1.0.3": "n1c230d16h28w28k128f3x1x1s2x1x1p1x0x0+relu",
    "r2plus1d_18/layer2.0.conv2.0.0": "n1c128d8h28w28k230f1x3x3s1p0x1x1+relu",
    "r2plus1d_18/layer2.0.downsample.0": "n1c64d16h56w56k128f1s2p0",
    "r2plus1d_18/layer2.0.conv2.0.3": "n1c230d8h28w28k128f3x1x1s1p1x0x0+res+relu",
    "r2plus1d_18/layer2.1.conv1.0.0": "n1c128d8h28w28k288f1x3x3s1p0x1x1+relu",
    "r2plus1d_18/layer2.1.conv1.0.3": "n1c288d8h28w28k128f3x1x1s1p1x0x0+relu",
    "r2plus1d_18/layer2.1.conv2.0.3": "n1c288d8h28w28k128f3x1x1s1p1x0x0+res+relu",
    "r2plus1d_18/layer3.0.conv1.0.0": "n1c128d8h28w28k460f1x3x3s1x2x2p0x1x1+relu",
    "r2plus1d_18/layer3.0.conv1.0.3": "n1c460d8h14w14k256f3x1x1s2x1x1p1x0x0+relu",
    "r2plus1d_18/layer3.0.conv2.0.0": "n1c256d4h14w14k460f1x3x3s1p0x1x1+relu",
    "r2plus1d_18/layer3.0.downsample.0": "n1c128d8h28w28k256f1s2p0",
    "r2plus1d_18/layer3.0.conv2.0.3": "n1c460d4h14w14k256f3x1x1s1p1x0x0+res+relu",
    "r2plus1d_18/layer3.1.conv1.0.0": "n1c256d4h14w14k576f1x3x3s1p0x1x1+relu",
    "r2plus1d_18/layer3.1.conv1.0.3": "n1c576d4h14w14k256f3x1x1s1p1x0x0+relu",
    "r2plus1d_18/layer3.1.conv2.0.3": "n1c576d4h14w14k256f3x1x1s1p1x0x0+res+relu",
    "r2plus1d_18/layer4.0.conv1.0.0": "n1c256d4h14w14k921f1x3x3s1x2x2p0x1x1+relu",
    "r2plus1d_18/layer4.0.conv1.0.3": "n1c921d4h7w7k512f3x1x1s2x1x1p1x0x0+relu",
    "r2plus1d_18/layer4.0.conv2.0.0": "n1c512d2h7w7k921f1x3x3s1p0x1x1+relu",
    "r2plus1d_18/layer4.0.downsample.0": "n1c256d4h14w14k512f1s2p0",
    "r2plus1d_18/layer4.0.conv2.0.3": "n1c921d2h7w7k512f3x1x1s1p1x0x0+res+relu",
    "r2plus1d_18/layer4.1.conv1.0.0": "n1c512d2h7w7k1152f1x3x3s1p0x1x1+relu",
    "r2plus1d_18/layer4.1.conv1.0.3": "n1c1152d2h7w7k512f3x1x1s1p1x0x0+relu",
    "r2plus1d_18/layer4.1.conv2.0.3": "n1c1152d2h7w7k512f3x1x1s1p1x0x0+res+relu",
    "mc3_18/stem.0": "n1c3d16h112w112k64f3x7x7s1x2x2p1x3x3+relu",
    "mc3_18/layer1.0.conv1.0": "n1c64d16h56w56k64f3s1p1+relu",
    "mc3_18/layer1.0.conv2.0": "n1c64d16h56w56k64f3s1p1+res+relu",
    "mc3_18/layer2.0.conv1.0": "n1c64d16h56w56k128f1x3x3s1x2x2p0x1x1+relu",
    "mc3_18/layer2.0.downsample.0": "n1c64d16h56w56k128f1s1x2x2p0",
    "mc3_18/layer2.0.conv2.0": "n1c128d16h28w28k128f1x3x3s1p0x1x1+res+relu",
    "mc3_18/layer2.1.conv1.0": "n1c128d16h28w28k128f1x3x3s1p0x1x1+relu",
    "mc3_18/layer3.0.conv1.0": "n1c128d16h28w28k256f1x3x3s1x2x2p0x1x1+relu",
    "mc3_18/layer3.0.downsample.0": "n1c128d16h28w28k256f1s1x2x2p0",
    "mc3_18/layer3.0.conv2.0": "n1c256d16h14w14k256f1x3x3s1p0x1x1+res+relu",
    "mc3_18/layer3.1.conv1.0": "n1c256d16h14w14k256f1x3x3s1p0x1x1+relu",
    "mc3_18/layer4.0.conv1.0": "n1c256d16h14w14k512f1x3x3s1x2x2p0x1x1+relu",
    "mc3_18/layer4.0.downsample.0": "n1c256d16h14w14k512f1s1x2x2p0",
    "mc3_18/layer4.0.conv2.0": "n1c512d16h7w7k512f1x3x3s1p0x1x1+res+relu",
    "mc3_18/layer4.1.conv1.0": "n1c512d16h7w7k512f1x3x3s1p0x1x1+relu",
}
""""network/layer" -> problem: every distinct layer, named after the first that has the geometry."""


def layers_of(network: str) -> dict[str, ConvProblem]:
    """The entries of LAYERS that belong to one network: {layer name: problem at batch 1}."""
    prefix = f"{network}/"
    found = {
        name.removeprefix(prefix): ConvProblem.parse(text)
        for name, text in LAYERS.items()
        if name.startswith(prefix)
    }
    if not found:
        raise ValueError(f"network: expected one of {', '.join(LAYER_NETWORKS)}, got {network!r}")
    return found
