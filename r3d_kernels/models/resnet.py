"""3-D ResNets: blocks, stems, :class:`ResNet3D` and the 2018 :class:`ResNet`.

The networks are those of

* Hara, Kataoka, Satoh: "Can Spatiotemporal 3D CNNs Retrace the History of 2D CNNs and ImageNet?", CVPR 2018;
* Tran, Wang, Torresani, Ray, LeCun, Paluri: "A Closer Look at Spatiotemporal Convolutions for Action
  Recognition", CVPR 2018 (R3D, R(2+1)D and MC3, the networks that torchvision ships).

Every parameter keeps the name it has there, so that checkpoints load as they are: a stem with
``naming="torchvision"`` gives torchvision's names, every other gives Hara's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r3d_kernels.backends import one_pass
from r3d_kernels.graphs import GraphedModel
from r3d_kernels.nn import avg_pool_linear, clip_conv_bn_act, conv_bn_act, has_hooks, max_pool3d
from r3d_kernels.ops.clip import channel_values, normalized_clip
from r3d_kernels.ops.conv3d import is_plain

__all__ = [
    "DEPTHS",
    "STEMS",
    "BasicBlock",
    "Bottleneck",
    "Pool",
    "ResNet",
    "ResNet3D",
    "ShortcutA",
    "Stem",
    "conv3x3x3",
]

Triple = tuple[int, int, int]

_NAMINGS = ("hara", "torchvision")
_SHORTCUTS = ("A", "B")
_CONVOLUTIONS = ("3d", "2d", "2+1d")


# --- arguments --------------------------------------------------------------------------------------------


def _integer(name: str, value: Any, minimum: int) -> int:
    """`value` as an int, or a TypeError / ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    return value


def _integers(name: str, value: Any, count: int, minimum: int) -> tuple[int, ...]:
    """`value` (an int for all, or `count` ints) as a tuple."""
    if isinstance(value, int):
        return (_integer(name, value, minimum),) * count
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name}: expected an integer or {count} of them, got {value!r}")
    if len(value) != count:
        raise ValueError(f"{name}: expected an integer or {count} of them, got {value!r}")
    return tuple(_integer(name, v, minimum) for v in value)


def _triple(name: str, value: Any, minimum: int) -> Triple:
    return _integers(name, value, 3, minimum)  # type: ignore[return-value]


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _window_count(size: int, kernel: int, stride: int, padding: int) -> int:
    """How many places a window of `kernel` has on an axis."""
    return (size + 2 * padding - kernel) // stride + 1


def _sizes(
    size: tuple[int, ...], stem: Stem, strides: tuple[int, ...], convolutions: tuple[str, ...]
) -> list[tuple[int, ...]]:
    """`_ResNet._map_sizes`"""
    windows = [(stem.kernel, stem.stride, stem.padding)]
    if stem.pool is not None:
        windows.append((stem.pool.kernel, stem.pool.stride, stem.pool.padding))
    for s, convolution in zip(strides, convolutions, strict=True):
        frames = (1, 0) if convolution == "2d" else (3, 1)
        windows.append(((frames[0], 3, 3), _spatial(s, convolution), (frames[1], 1, 1)))
    sizes = [size]
    for window in windows:
        sizes.append(tuple(map(_window_count, sizes[-1], *window)))
    return sizes[1:]


_remembered_sizes = lru_cache(maxsize=256)(_sizes)


# --- stems ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """The max-pool behind a stem; each field is an int for all axes or (depth, height, width)."""

    kernel: int | Triple
    stride: int | Triple
    padding: int | Triple = 0

    def __post_init__(self) -> None:
        for field, minimum in (("kernel", 1), ("stride", 1), ("padding", 0)):
            object.__setattr__(self, field, _triple(f"pool.{field}", getattr(self, field), minimum))
        if any(2 * p > k for p, k in zip(self.padding, self.kernel, strict=True)):
            raise ValueError(
                f"pool.padding: expected at most half of the kernel {self.kernel}, got {self.padding}"
            )


@dataclass(frozen=True)
class Stem:
    """The first convolution of a network, and the max-pool behind it.

    Args:
        kernel, stride: an int for all axes or (depth, height, width).
        padding: the same; ``None`` is half of the kernel ("same" at stride 1).
        pool: a :class:`Pool` (or its fields as a dict), or ``None`` for no max-pool.
        naming: whose parameter names the whole network has, ``"hara"`` or ``"torchvision"``.
        channels: output channels, before ``widen_factor``.
        midplanes: channels between the halves of a factored stem, before ``widen_factor``: a (1, height, width)
            convolution with its batch norm, then a (depth, 1, 1) one, each with its part of kernel, stride and
            padding. ``None`` is one convolution. Only with torchvision's names.

    Raises:
        TypeError, ValueError: for a field that is no integer, or out of range.
    """

    kernel: int | Triple
    stride: int | Triple
    padding: int | Triple | None = None
    pool: Pool | None = None
    naming: str = "hara"
    channels: int = 64
    midplanes: int | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "kernel", _triple("stem.kernel", self.kernel, 1))
        set_field(self, "stride", _triple("stem.stride", self.stride, 1))
        padding = tuple(k // 2 for k in self.kernel) if self.padding is None else self.padding
        set_field(self, "padding", _triple("stem.padding", padding, 0))
        if isinstance(self.pool, Mapping):
            set_field(self, "pool", _from_dict(Pool, "stem.pool", self.pool))
        if self.pool is not None and not isinstance(self.pool, Pool):
            raise TypeError(f"stem.pool: expected a Pool, a dict or None, got {self.pool!r}")
        _one_of("stem.naming", self.naming, _NAMINGS)
        _integer("stem.channels", self.channels, 1)
        if self.midplanes is not None:
            _integer("stem.midplanes", self.midplanes, 1)
            if self.naming != "torchvision":
                raise ValueError(
                    f"stem.midplanes: expected None with naming={self.naming!r}, got {self.midplanes}"
                )


#: The stems that have a name: Hara's network, the simplified R3D-18, torchvision's R3D and R(2+1)D.
STEMS: dict[str, Stem] = {
    "hara": Stem((7, 7, 7), (1, 2, 2), pool=Pool(3, 2, 1)),
    "seed18": Stem((7, 7, 7), (2, 2, 2), pool=Pool((1, 3, 3), (1, 2, 2), (0, 1, 1))),
    "torchvision": Stem((3, 7, 7), (1, 2, 2), naming="torchvision"),
    "r2plus1d": Stem((3, 7, 7), (1, 2, 2), naming="torchvision", midplanes=45),
}


def _from_dict(cls: type, name: str, fields: Mapping[str, Any]) -> Any:
    try:
        return cls(**fields)
    except TypeError as error:
        if "argument" not in str(error):  # a field of the wrong type, already explained
            raise
        raise TypeError(f"{name}: expected the fields of {cls.__name__}, got {dict(fields)!r}") from None


def _as_stem(stem: str | Stem | Mapping[str, Any]) -> Stem:
    if isinstance(stem, Stem):
        return stem
    if isinstance(stem, Mapping):
        return _from_dict(Stem, "stem", stem)
    if isinstance(stem, str):
        return STEMS[_one_of("stem", stem, tuple(STEMS))]
    raise TypeError(f"stem: expected a name ({', '.join(STEMS)}), a Stem or a dict, got {stem!r}")


# --- blocks -----------------------------------------------------------------------------------------------


def conv3x3x3(
    in_planes: int,
    out_planes: int,
    stride: int | Triple = 1,
    *,
    dilation: int = 1,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> nn.Conv3d:
    """A 3x3x3 convolution without bias, padded so that stride 1 keeps the size."""
    return nn.Conv3d(
        in_planes,
        out_planes,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        bias=False,
        device=device,
        dtype=dtype,
    )


class Conv2Plus1D(nn.Sequential):
    """A convolution in two halves: over height and width, batch norm, ReLU, then over depth (Tran et al.).

    Args:
        in_channels, out_channels: as of the one convolution that it stands for.
        midplanes: channels between the halves.
        kernel, stride, padding, dilation: (depth, height, width); each half has its part.

    Shape: as ``nn.Conv3d`` with these arguments. Its modules are 0 to 3, as torchvision names them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        midplanes: int,
        kernel: Triple,
        stride: Triple,
        padding: Triple,
        dilation: Triple = (1, 1, 1),
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}

        def half(c: int, k: int, axes: slice) -> nn.Conv3d:
            values = [[neutral] * 3 for neutral in (1, 1, 0, 1)]
            for part, whole in zip(values, (kernel, stride, padding, dilation), strict=True):
                part[axes] = whole[axes]
            return nn.Conv3d(c, k, *map(tuple, values), bias=False, **factory)

        super().__init__(
            half(in_channels, midplanes, slice(1, 3)),
            nn.BatchNorm3d(midplanes, **factory),
            nn.ReLU(inplace=True),
            half(midplanes, out_channels, slice(0, 1)),
        )
        self.out_channels = out_channels

    @property
    def weight(self) -> Tensor:
        """The last half's, for whoever asks for the dtype or the device."""
        return self[3].weight


def _spatial(stride: int, convolution: str) -> Triple:
    """A stride as it is on each axis: "2d" leaves the frames alone."""
    return (1 if convolution == "2d" else stride, stride, stride)


def _block_conv(
    convolution: str,
    in_planes: int,
    out_planes: int,
    midplanes: int,
    stride: int,
    dilation: int,
    **factory: Any,
) -> nn.Conv3d | Conv2Plus1D:
    """The convolution of a block: 3x3x3, (1, 3, 3) or both halves of 3x3x3."""
    if convolution == "3d":
        return conv3x3x3(in_planes, out_planes, stride, dilation=dilation, **factory)
    if convolution == "2d":
        return nn.Conv3d(
            in_planes,
            out_planes,
            (1, 3, 3),
            _spatial(stride, "2d"),
            (0, dilation, dilation),
            (1, dilation, dilation),
            bias=False,
            **factory,
        )
    dilations = (dilation,) * 3
    return Conv2Plus1D(
        in_planes, out_planes, midplanes, (3,) * 3, (stride,) * 3, dilations, dilations, **factory
    )


def _midplanes(in_planes: int, planes: int) -> int:
    """Channels that give the two halves as many weights as one 3x3x3 convolution has."""
    return in_planes * planes * 27 // (in_planes * 9 + planes * 3)


class ShortcutA(nn.Module):
    """The shortcut without parameters: every `stride`-th voxel, and channels of zeros up to `out_channels`.

    Hara et al. write it as ``avg_pool3d(kernel_size=1)`` and a concatenation. Slicing is the same thing, and
    has a kernel in every dtype; the padding keeps the gradient and the memory format.

    Args:
        in_channels, out_channels: channels that come in and go out; it cannot drop channels.
        stride: an int for all axes or (depth, height, width).

    Shape: ``[N, in_channels, D, H, W]`` to ``[N, out_channels, ceil(D/s), ceil(H/s), ceil(W/s)]``, any dtype.

    Raises:
        ValueError: with fewer channels out than in.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int | Triple = 1) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"shortcut_type: 'A' cannot go from {in_channels} to {out_channels} channels, use 'B'"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = _triple("stride", stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        d, h, w = self.stride
        if self.stride != (1, 1, 1):
            x = x[:, :, ::d, ::h, ::w]
        added = self.out_channels - self.in_channels
        # The pads go from the last axis to the first: W, H, D, then C.
        return F.pad(x, (0, 0, 0, 0, 0, 0, 0, added)) if added else x

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


def _halves(conv: nn.Conv3d | Conv2Plus1D, bn: nn.BatchNorm3d) -> list[tuple[nn.Conv3d, nn.BatchNorm3d]]:
    """A pair as it is, or a factored convolution as the two pairs that it consists of."""
    if isinstance(conv, Conv2Plus1D):
        first, between, _, second = conv._modules.values()
        return [(first, between), (second, bn)]
    return [(conv, bn)]


def _is_bare(module: nn.Module) -> bool:
    """Whether calling a sequence of modules does no more than calling each of them."""
    return type(module) is nn.Sequential and not has_hooks(module) and module._compiled_call_impl is None


def _is_watched(sequence: nn.Module) -> bool:
    """Whether a hook, or somebody's forward, is on a sequence of layers or on what stands between its layers.

    These are not called where the layers run fused; the layers themselves are looked after by `conv_bn_act`.
    """
    return has_hooks(sequence) or any(
        _is_watched(m) if isinstance(m, nn.Sequential) else not isinstance(m, _LAYERS) and has_hooks(m)
        for m in sequence._modules.values()
    )


_LAYERS = (nn.Conv3d, nn.BatchNorm3d)


class _Block(nn.Module):
    """What the residual blocks share: where their (conv, bn) pairs live, and how these are run."""

    expansion: ClassVar[int] = 1
    n_convs: ClassVar[int]

    downsample: nn.Module | Callable[[Tensor], Tensor] | None

    def __init__(self, stride: int, naming: str, convolution: str) -> None:
        super().__init__()
        self.stride = stride
        self.naming = _one_of("naming", naming, _NAMINGS)
        self.convolution = _one_of("convolution", convolution, _CONVOLUTIONS)
        if convolution == "2+1d" and naming != "torchvision":
            raise ValueError(f"convolution: '2+1d' needs torchvision's names, got naming={naming!r}")
        self.fused = False

    def _add(self, index: int, conv: nn.Conv3d | Conv2Plus1D) -> None:
        """Registers convolution `index` (from 1) and its batch norm under the names of the naming scheme."""
        bn = nn.BatchNorm3d(conv.out_channels, device=conv.weight.device, dtype=conv.weight.dtype)
        if self.naming == "hara":
            setattr(self, f"conv{index}", conv)
            setattr(self, f"bn{index}", bn)
        else:
            relu = [] if index == self.n_convs else [nn.ReLU(inplace=True)]
            setattr(self, f"conv{index}", nn.Sequential(conv, bn, *relu))

    def pair(self, index: int) -> tuple[nn.Conv3d | Conv2Plus1D, nn.BatchNorm3d]:
        """Convolution `index` (from 1) and the batch norm behind it."""
        # read directly, also of a sequence: forward comes here, and indices take microseconds
        modules = self._modules
        conv = modules[f"conv{index}"]
        if isinstance(conv, nn.Sequential):
            conv, bn, *_ = conv._modules.values()
            return conv, bn
        return conv, modules[f"bn{index}"]

    def _steps(self) -> list[tuple[nn.Conv3d, nn.BatchNorm3d]]:
        """Every convolution with its batch norm, in the order in which they run."""
        steps: list[tuple[nn.Conv3d, nn.BatchNorm3d]] = []
        for index in range(1, self.n_convs + 1):
            conv, bn = self.pair(index)
            if isinstance(conv, Conv2Plus1D):
                steps += _halves(conv, bn)
            else:
                steps.append((conv, bn))
        return steps

    def _shortcut(self, x: Tensor) -> Tensor:
        down = self.downsample
        if down is None:
            return x
        if isinstance(down, nn.Sequential) and len(down._modules) == 2:
            conv, bn = down._modules.values()
            if isinstance(conv, nn.Conv3d) and isinstance(bn, nn.BatchNorm3d) and not has_hooks(down):
                return conv_bn_act(x, conv, bn, activation=None, fused=self.fused)
        return down(x)

    def _is_watched(self) -> bool:
        modules = self._modules
        sequences = [modules[f"conv{index}"] for index in range(1, self.n_convs + 1)]
        return any(_is_watched(m) for m in sequences if isinstance(m, nn.Sequential))

    def _run_modules(self, x: Tensor) -> Tensor:
        """The block with a call of every module in it."""
        y = x
        for index in range(1, self.n_convs + 1):
            if index > 1 and self.naming == "hara":
                y = F.relu(y)
            y = self._modules[f"conv{index}"](y)
            if self.naming == "hara":
                y = self._modules[f"bn{index}"](y)
        return F.relu(y + self._shortcut(x))

    def forward(self, x: Tensor) -> Tensor:
        if self._is_watched():
            return self._run_modules(x)
        y, fused = x, self.fused
        *first, (conv, bn) = self._steps()
        for step in first:
            y = conv_bn_act(y, *step, fused=fused)
        # The shortcut comes late, so that its result does not live through the whole block.
        residual = self._shortcut(x)
        return conv_bn_act(y, conv, bn, residual=residual, fused=fused)


class BasicBlock(_Block):
    """Two 3x3x3 convolutions and a shortcut; the first one has the stride.

    Args:
        inplanes: channels that come in.
        planes: channels that go out (``expansion`` is 1).
        stride: stride of the first convolution.
        downsample: a module or function for the shortcut, ``None`` for the identity.
        dilation: dilation of both convolutions.
        naming: ``"hara"`` (``conv1``, ``bn1``, ...) or ``"torchvision"`` (``conv1.0``, ``conv1.1``, ...).
        convolution: ``"3d"``, ``"2d"`` ((1, 3, 3), no stride along the frames) or ``"2+1d"`` ((1, 3, 3) and (3, 1, 1);
            torchvision's names only) in place of both.

    Shape: ``[N, inplanes, D, H, W]`` to ``[N, planes, ceil(D/s), ceil(H/s), ceil(W/s)]``; float32, float64,
    bfloat16, float16. ``fused`` is an attribute, False at first.

    Source: Hara et al., CVPR 2018.
    """

    expansion = 1
    n_convs = 2

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | Callable[[Tensor], Tensor] | None = None,
        *,
        dilation: int = 1,
        naming: str = "hara",
        convolution: str = "3d",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(stride, naming, convolution)
        kwargs = {"dilation": dilation, "device": device, "dtype": dtype}
        middle = _midplanes(inplanes, planes)  # of both, as torchvision has it
        self._add(1, _block_conv(convolution, inplanes, planes, middle, stride, **kwargs))
        self._add(2, _block_conv(convolution, planes, planes, middle, 1, **kwargs))
        self.downsample = downsample


class Bottleneck(_Block):
    """1x1x1, 3x3x3 and 1x1x1 convolutions and a shortcut; the middle one has the stride.

    Args:
        inplanes: channels that come in.
        planes: channels in the middle; ``4 * planes`` go out (``expansion`` is 4).
        stride: stride of the 3x3x3 convolution.
        downsample: a module or function for the shortcut, ``None`` for the identity.
        dilation: dilation of the 3x3x3 convolution.
        naming: ``"hara"`` (``conv1``, ``bn1``, ...) or ``"torchvision"`` (``conv1.0``, ``conv1.1``, ...).
        convolution: ``"3d"``, ``"2d"`` ((1, 3, 3), no stride along the frames) or ``"2+1d"`` ((1, 3, 3) and (3, 1, 1);
            torchvision's names only) in the middle.

    Shape: ``[N, inplanes, D, H, W]`` to ``[N, 4 * planes, ceil(D/s), ceil(H/s), ceil(W/s)]``; float32,
    float64, bfloat16, float16. ``fused`` is an attribute, False at first.

    Source: Hara et al., CVPR 2018.
    """

    expansion = 4
    n_convs = 3

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | Callable[[Tensor], Tensor] | None = None,
        *,
        dilation: int = 1,
        naming: str = "hara",
        convolution: str = "3d",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(stride, naming, convolution)
        kwargs = {"device": device, "dtype": dtype}
        middle = _midplanes(inplanes, planes)
        out_planes = planes * self.expansion
        self._add(1, nn.Conv3d(inplanes, planes, kernel_size=1, bias=False, **kwargs))
        self._add(2, _block_conv(convolution, planes, planes, middle, stride, dilation, **kwargs))
        self._add(3, nn.Conv3d(planes, out_planes, kernel_size=1, bias=False, **kwargs))
        self.downsample = downsample


#: Depth to the block and the number of blocks in each of the four layers.
DEPTHS: dict[int, tuple[type[_Block], tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    200: (Bottleneck, (3, 24, 36, 3)),
}


# --- networks ---------------------------------------------------------------------------------------------


def _convolutions(value: Any, naming: str) -> tuple[str, ...]:
    """`value` as one name for each of the four layers."""
    names = (value,) * 4 if isinstance(value, str) else value
    if not isinstance(names, Sequence) or len(names) != 4 or any(n not in _CONVOLUTIONS for n in names):
        known = ", ".join(map(repr, _CONVOLUTIONS))
        raise ValueError(f"convolutions: expected one of {known}, or four of them, got {value!r}")
    if "2+1d" in names and naming != "torchvision":
        raise ValueError("convolutions: '2+1d' needs a stem with torchvision's names")
    return tuple(names)


def _write_metadata(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Puts what the weights do not tell beside them, where `load_checkpoint` finds it.

    A state dict has room for that in its `_metadata`: no key is added, so it still loads strictly anywhere.
    """
    local_metadata["r3d_kernels"] = {
        "geometry": module.geometry,
        "preset": module.preset_name,
        "clip": (module.clip_mean, module.clip_std),
    }


class _ResNet(nn.Module):
    """Stem, four layers of blocks, pool and head: all that the two public networks share."""

    #: Which transforms belong to the weights: a key of `r3d_kernels.models.PRESETS`.
    preset_name: str | None = None
    #: What `load_checkpoint` reported when it filled this network.
    loaded_from: Any = None

    _clip_mean: tuple[float, ...] | None = None
    _clip_std: tuple[float, ...] | None = None

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        stem: Stem,
        *,
        in_channels: int,
        num_classes: int,
        shortcut_type: str,
        fused: bool,
        avgpool: nn.Module,
        widen_factor: float = 1.0,
        layer_strides: Sequence[int] = (1, 2, 2, 2),
        layer_dilations: Sequence[int] = (1, 1, 1, 1),
        convolutions: str | Sequence[str] = "3d",
        zero_init_residual: bool = False,
        clip_mean: Sequence[float] | None = None,
        clip_std: Sequence[float] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _integer("num_classes", num_classes, 0)
        _integer("in_channels", in_channels, 1)
        _one_of("shortcut_type", shortcut_type, _SHORTCUTS)
        layers = _integers("layers", layers, 4, 1)
        layer_strides = _integers("layer_strides", layer_strides, 4, 1)
        layer_dilations = _integers("layer_dilations", layer_dilations, 4, 1)
        convolutions = _convolutions(convolutions, stem.naming)
        if isinstance(widen_factor, bool) or not isinstance(widen_factor, (int, float)):
            raise TypeError(f"widen_factor: expected a number, got {widen_factor!r}")
        planes = [int(p * widen_factor) for p in (64, 128, 256, 512)]
        stem_channels = int(stem.channels * widen_factor)
        if not (math.isfinite(widen_factor) and min(stem_channels, *planes) >= 1):
            raise ValueError(f"widen_factor: expected to leave at least one channel, got {widen_factor!r}")
        factory = {"device": device, "dtype": dtype}

        self._stem_spec = stem
        self._layer_strides = layer_strides
        self._layer_dilations = layer_dilations
        self._convolutions = convolutions
        self.in_channels = in_channels
        self.shortcut_type = shortcut_type
        self.clip_mean = clip_mean
        self.clip_std = clip_std

        geometry = (stem.kernel, stem.stride, stem.padding)
        if stem.midplanes is None:
            conv = nn.Conv3d(in_channels, stem_channels, *geometry, bias=False, **factory)
        else:
            middle = max(1, int(stem.midplanes * widen_factor))
            conv = Conv2Plus1D(in_channels, stem_channels, middle, *geometry, **factory)
        bn = nn.BatchNorm3d(stem_channels, **factory)
        if stem.naming == "torchvision":
            first = [conv] if stem.midplanes is None else list(conv)  # torchvision has them side by side
            self.stem = nn.Sequential(*first, bn, nn.ReLU(inplace=True))
        else:
            self.conv1 = conv
            self.bn1 = bn
        pool = stem.pool
        self.maxpool = None if pool is None else nn.MaxPool3d(pool.kernel, pool.stride, pool.padding)

        channels = stem_channels
        for i in range(4):
            blocks: list[nn.Module] = []
            for j in range(layers[i]):
                stride = layer_strides[i] if j == 0 else 1
                out = planes[i] * block.expansion
                down = self._make_downsample(channels, out, _spatial(stride, convolutions[i]), factory)
                if issubclass(block, _Block):
                    extra = {"dilation": layer_dilations[i], "naming": stem.naming, **factory}
                    extra["convolution"] = convolutions[i]
                else:  # a block of the user's own: the 2018 constructor and nothing else
                    extra = {}
                blocks.append(block(channels, planes[i], stride, down, **extra))
                channels = out
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))

        self.avgpool = avgpool
        self.num_features = channels
        self.fc = nn.Linear(channels, num_classes, **factory) if num_classes else nn.Identity()

        self._initialise(zero_init_residual)
        self.fused = fused
        self.register_state_dict_post_hook(_write_metadata)

    def _make_downsample(self, channels: int, out: int, stride: Triple, factory: dict) -> nn.Module | None:
        if stride == (1, 1, 1) and channels == out:
            return None
        if self.shortcut_type == "A":
            return ShortcutA(channels, out, stride)
        conv = nn.Conv3d(channels, out, kernel_size=1, stride=stride, bias=False, **factory)
        return nn.Sequential(conv, nn.BatchNorm3d(out, **factory))

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm3d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear) and self._stem_spec.naming == "torchvision":
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, _Block):
                    nn.init.zeros_(module.pair(module.n_convs)[1].weight)

    @property
    def fused(self) -> bool:
        """Whether the layers may run fused; can be flipped at any time, the weights stay as they are."""
        return self._fused

    @fused.setter
    def fused(self, value: bool) -> None:
        self._fused = bool(value)
        for module in self.modules():
            if isinstance(module, _Block):
                module.fused = self._fused

    @property
    def clip_mean(self) -> tuple[float, ...] | None:
        """What is subtracted from a uint8 clip, one number a channel for values of 0 to 255; None: nothing."""
        return self._clip_mean

    @clip_mean.setter
    def clip_mean(self, value: Sequence[float] | None) -> None:
        self._clip_mean = channel_values(value, "clip_mean", self.in_channels)

    @property
    def clip_std(self) -> tuple[float, ...] | None:
        """What a uint8 clip is divided by then, one number a channel for values of 0 to 255; None: 1."""
        return self._clip_std

    @clip_std.setter
    def clip_std(self, value: Sequence[float] | None) -> None:
        self._clip_std = channel_values(value, "clip_std", self.in_channels, positive=True)

    @property
    def geometry(self) -> dict[str, Any]:
        """What the shapes of the weights do not tell about the network, in plain types."""
        spec = asdict(self._stem_spec)
        return {
            "stem_stride": spec["stride"],
            "stem_padding": spec["padding"],
            "stem_pool": spec["pool"],
            "layer_strides": self._layer_strides,
            "layer_dilations": self._layer_dilations,
        }

    def _stem_pairs(self) -> list[tuple[nn.Conv3d, nn.BatchNorm3d]]:
        """The stem's convolution with its batch norm, or those of both halves."""
        if self._stem_spec.naming == "torchvision":
            layers = list(self.stem._modules.values())
            return [(layers[i], layers[i + 1]) for i in range(0, len(layers), 3)]
        return [(self.conv1, self.bn1)]

    def _map_sizes(self, size: Sequence[int]) -> list[tuple[int, ...]]:
        """[D, H, W] of the clip to that of the map behind the stem, the max-pool and each layer."""
        # Dynamo warns of caches
        plain = not torch.compiler.is_compiling() and all(type(s) is int for s in size)
        of = _remembered_sizes if plain else _sizes
        return of(tuple(size), self._stem_spec, tuple(self._layer_strides), self._convolutions)

    def _check_input(self, x: Tensor) -> None:
        """Says what is wrong with a clip before any layer runs."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 5:
            raise ValueError(f"x: expected 5 dimensions [N, C, D, H, W], got shape {tuple(x.shape)}")
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"x: expected {self.in_channels} channels [N, {self.in_channels}, D, H, W], "
                f"got {x.shape[1]} in shape {tuple(x.shape)}"
            )
        size = tuple(x.shape[2:])
        stem = self._stem_spec
        sizes = self._map_sizes(size)
        if min(size) < 1 or min(sizes[0]) < 1:
            raise ValueError(
                f"x: expected D, H, W that with padding {stem.padding} hold the stem's kernel {stem.kernel}, "
                f"got {size}"
            )
        if min(sizes[1]) < 1:
            raise ValueError(
                f"x: expected D, H, W large enough for the stem's max-pool {stem.pool}, got {size}"
            )
        self._check_pool(size, sizes[-1])

        weight = self._stem_pairs()[0][0].weight
        if x.dtype not in (weight.dtype, torch.uint8) and not (
            x.is_floating_point() and torch.is_autocast_enabled(x.device.type)
        ):
            raise TypeError(
                f"x: expected {weight.dtype}, the dtype of the parameters, or uint8 as a decoder's, got {x.dtype}"
            )
        # Parameters on "meta" belong to offloading tools, which bring them in layer by layer.
        if x.device != weight.device and not weight.is_meta:
            raise ValueError(f"x: expected device {weight.device}, where the parameters are, got {x.device}")

    def _check_pool(self, size: Sequence[int], last: Sequence[int]) -> None:
        """Whether the map behind layer4 suits the pool; global pooling takes any."""

    def _reads_planes(self, x: Tensor) -> bool:
        """Whether the stem takes a clip of one plane a channel as it is: what a GPU's kernel lays out is its own."""
        if not x.is_contiguous():
            return False
        fused = not torch.is_grad_enabled() and is_plain(x)
        return x.device.type == "cpu" or (self.in_channels <= 4 and fused)

    def _run_stem(self, x: Tensor) -> Tensor:
        self._check_input(x)
        *pairs, last = self._stem_pairs()
        raw = x.dtype == torch.uint8
        if self._stem_spec.naming == "torchvision" and _is_watched(self.stem):
            if raw:
                x = normalized_clip(x, self.clip_mean, self.clip_std, last[0].weight.dtype)
            x = self.stem(x)
            return x if self.maxpool is None else max_pool3d(x, self.maxpool, fused=self.fused)
        if self.fused and not self.training and not raw and not self._reads_planes(x):
            # Once, here: every layer behind keeps the format.
            x = x.contiguous(memory_format=torch.channels_last_3d)
        for pair, pool in (*((pair, None) for pair in pairs), (last, self.maxpool)):
            if raw:
                x = clip_conv_bn_act(x, self.clip_mean, self.clip_std, *pair, pool=pool, fused=self.fused)
            else:
                x = conv_bn_act(x, *pair, pool=pool, fused=self.fused)
            raw = False
        return x

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """The output of every stage.

        Args:
            x: clip, ``[N, C, D, H, W]``.

        Returns:
            ``{"stem", "layer1", "layer2", "layer3", "layer4"}`` in that order; "stem" is what layer1 gets,
            that is behind the max-pool where there is one.

        Raises:
            TypeError, ValueError: as :meth:`forward`.
        """
        stages = {"stem": self._run_stem(x)}
        y = stages["stem"]
        for name in ("layer1", "layer2", "layer3", "layer4"):
            y = stages[name] = getattr(self, name)(y)
        return stages

    def forward_features(self, x: Tensor) -> Tensor:
        """The map behind layer4, ``[N, num_features, D', H', W']``; arguments, errors as :meth:`forward`."""
        if torch.compiler.is_compiling():
            return self._forward_features(x)
        with one_pass():
            return self._forward_features(x)

    def _forward_features(self, x: Tensor) -> Tensor:
        x = self._run_stem(x)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            # Block by block, where nobody can tell: a call of the layer keeps its input alive to the end.
            for step in layer if _is_bare(layer) else (layer,):
                x = step(x)
        return x

    def _pools_all(self, x: Tensor) -> bool:
        """Whether the pool leaves one voxel, and so is the global average."""
        pool = self.avgpool
        if isinstance(pool, nn.AdaptiveAvgPool3d):
            return pool.output_size in (1, (1, 1, 1), [1, 1, 1])
        return isinstance(pool, nn.AvgPool3d) and tuple(x.shape[2:]) == pool.kernel_size and pool.padding == 0

    def forward_head(self, x: Tensor) -> Tensor:
        """Pool and classifier: ``[N, num_features, D', H', W']`` to ``[N, num_classes]``."""
        # The exact type: a subclass (an adapter, a quantised layer) computes something of its own.
        if type(self.fc) is nn.Linear and self._pools_all(x) and not has_hooks(self.avgpool):
            return avg_pool_linear(x, self.fc, fused=self.fused)
        if self._pools_all(x) and not has_hooks(self.avgpool):
            pooled = F.adaptive_avg_pool3d(x, 1)
        elif x.dtype in (torch.bfloat16, torch.float16) and not x.is_cuda:
            pooled = self.avgpool(x.float()).to(x.dtype)  # torch has no avg_pool3d for these on a CPU
        else:
            pooled = self.avgpool(x)
        return self.fc(pooled.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of clips.

        Args:
            x: ``[N, in_channels, D, H, W]``, on the device of the parameters. In their dtype (under autocast any
                floating one) it is taken as it is; uint8, as a decoder leaves it, is normalised here:
                ``(x - clip_mean) / clip_std``. N may be 0.

        Returns:
            ``[N, num_classes]``; with ``num_classes=0`` the pooled features ``[N, num_features]``.

        Raises:
            TypeError: x is no tensor, or of another dtype than the parameters and uint8.
            ValueError: wrong rank, channels or device, or a clip too small for the stem.
        """
        return self.forward_head(self.forward_features(x))

    def graphed(self, example: Tensor, *, max_shapes: int = 4) -> GraphedModel:
        """The forward pass as a callable that replays one CUDA graph for each input shape.

        Args:
            example: a clip on the network's CUDA device; its shape is captured at once, others when they come.
            max_shapes: graphs kept, those used last.

        Raises:
            TypeError, ValueError: as :class:`r3d_kernels.graphs.GraphedModel`: a CPU example, training mode.
        """
        return GraphedModel(self, example, max_shapes=max_shapes)

    def extra_repr(self) -> str:
        return f"shortcut_type={self.shortcut_type!r}, fused={self.fused}"


class ResNet3D(_ResNet):
    """A 3-D ResNet of any depth and stem.

    Args:
        num_classes: size of the head; 0 leaves the head away, and the network returns the pooled features.
        depth: 10, 18 or 34 (basic blocks), 50, 101, 152 or 200 (bottlenecks).
        stem: ``"hara"`` (7x7x7, stride 1, 2, 2, max-pool 3/2/1: Hara et al.), ``"seed18"`` (7x7x7, stride 2,
            max-pool (1, 3, 3) with stride (1, 2, 2): the simplified R3D-18), ``"torchvision"`` ((3, 7, 7),
            stride 1, 2, 2, no max-pool: Tran et al.), ``"r2plus1d"`` (the same in two halves), or a :class:`Stem`, or
            its fields as a dict.
        shortcut_type: ``"B"`` (1x1x1 convolution and batch norm) or ``"A"`` (no parameters, see
            :class:`ShortcutA`).
        in_channels: channels of the clip.
        fused: whether the layers may run fused. An attribute too, which can be flipped at any time.
        widen_factor: multiplies the channels of every layer.
        zero_init_residual: start the last batch norm of every block at 0, so that a block starts as identity.
        layer_strides, layer_dilations: of layer1 to layer4. MedicalNet (Chen, Ma, Zheng: "Med3D", 2019) has
            ``(1, 2, 1, 1)`` and ``(1, 1, 2, 4)``.
        convolutions: of layer1 to layer4, or one for all: ``"3d"`` (3x3x3), ``"2d"`` ((1, 3, 3), and no stride along
            the frames) or ``"2+1d"`` ((1, 3, 3) and (3, 1, 1); torchvision's names only). torchvision's mixed network
            has ``("3d", "2d", "2d", "2d")``.
        clip_mean, clip_std: one number a channel, for values of 0 to 255: a uint8 clip becomes
            ``(clip - clip_mean) / clip_std`` in the dtype of the parameters, in one pass with the stem where a GPU runs
            it fused. None is 0 and 1. Attributes too; never part of the state dict. A floating clip is taken as it is.
        device, dtype: of the parameters, as in ``torch.nn``.

    Shape: ``[N, in_channels, D, H, W]`` to ``[N, num_classes]``; float32, float64, bfloat16, float16; clips uint8 too.

    Convolutions start from Kaiming's normal distribution (fan-out), batch norms at 1 and 0; with
    torchvision's names the head starts as torchvision's (normal, 0.01), otherwise as a plain ``nn.Linear``.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or out of range, naming it.

    Source: Hara et al., CVPR 2018 (depths, shortcuts); Tran et al., CVPR 2018 (R3D, R(2+1)D, MC3).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        depth: int = 18,
        stem: str | Stem | Mapping[str, Any] = "seed18",
        shortcut_type: str = "B",
        in_channels: int = 3,
        fused: bool = False,
        widen_factor: float = 1.0,
        zero_init_residual: bool = False,
        layer_strides: Sequence[int] = (1, 2, 2, 2),
        layer_dilations: Sequence[int] = (1, 1, 1, 1),
        convolutions: str | Sequence[str] = "3d",
        clip_mean: Sequence[float] | None = None,
        clip_std: Sequence[float] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        block, layers = DEPTHS[_one_of("depth", depth, tuple(DEPTHS))]
        stem = _as_stem(stem)
        super().__init__(
            block,
            layers,
            stem,
            in_channels=in_channels,
            num_classes=num_classes,
            shortcut_type=shortcut_type,
            fused=fused,
            avgpool=nn.AdaptiveAvgPool3d(1),
            widen_factor=widen_factor,
            layer_strides=layer_strides,
            layer_dilations=layer_dilations,
            convolutions=convolutions,
            zero_init_residual=zero_init_residual,
            clip_mean=clip_mean,
            clip_std=clip_std,
            device=device,
            dtype=dtype,
        )
        self.depth = depth


class ResNet(_ResNet):
    """The 2018 network with its constructor of then.

    Stem 7x7x7 with stride (1, 2, 2) and max-pool 3/2/1, and a pool of fixed size,
    ``AvgPool3d((ceil(sample_duration / 16), ceil(sample_size / 32), ceil(sample_size / 32)), stride=1)``.

    Args:
        block: :class:`BasicBlock`, :class:`Bottleneck`, or a class with the same constructor
            ``(inplanes, planes, stride, downsample)`` and an ``expansion``.
        layers: number of blocks in each of the four layers.
        sample_size: height and width of the clips.
        sample_duration: frames of the clips.
        shortcut_type: ``"B"`` or ``"A"``.
        num_classes: size of the head; 0 leaves it away.
        fused: whether the layers may run fused. An attribute too, which can be flipped at any time.

    ``clip_mean`` and ``clip_std`` are attributes, as of :class:`ResNet3D`.

    Shape: ``[N, 3, sample_duration, sample_size, sample_size]`` to ``[N, num_classes]``; sizes that give the
    same map behind layer4 do as well, and any size after ``model.avgpool = nn.AdaptiveAvgPool3d(1)``.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or out of range, naming it.

    Source: Hara et al., CVPR 2018.
    """

    preset_name = "hara2018"

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        sample_size: int,
        sample_duration: int,
        shortcut_type: str = "B",
        num_classes: int = 8,
        *,
        fused: bool = False,
    ) -> None:
        if not (isinstance(block, type) and issubclass(block, nn.Module) and hasattr(block, "expansion")):
            raise TypeError(f"block: expected BasicBlock, Bottleneck or a class like them, got {block!r}")
        pool_size = math.ceil(_integer("sample_size", sample_size, 1) / 32)
        pool_duration = math.ceil(_integer("sample_duration", sample_duration, 1) / 16)
        super().__init__(
            block,
            layers,
            STEMS["hara"],
            in_channels=3,
            num_classes=num_classes,
            shortcut_type=shortcut_type,
            fused=fused,
            avgpool=nn.AvgPool3d((pool_duration, pool_size, pool_size), stride=1),
        )
        self.sample_size = sample_size
        self.sample_duration = sample_duration

    def _check_pool(self, size: Sequence[int], last: Sequence[int]) -> None:
        pool = self.avgpool
        if not isinstance(pool, nn.AvgPool3d):
            return
        kernel = _triple("avgpool.kernel_size", pool.kernel_size, 1)
        pooled = [m - k + 1 for m, k in zip(last, kernel, strict=True)]
        fits = min(pooled) >= 1
        if fits and isinstance(self.fc, nn.Linear):
            fits = self.num_features * math.prod(pooled) == self.fc.in_features
        if not fits:
            raise ValueError(
                f"x: expected clips of {self.sample_duration} x {self.sample_size} x {self.sample_size} "
                f"(sample_duration, sample_size), got {tuple(size)}: the map behind layer4 is {tuple(last)} "
                f"and the average pool {kernel}"
            )
