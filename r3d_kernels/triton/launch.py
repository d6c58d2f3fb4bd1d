"""How the convolution kernels are called: arguments and grids are worked out once for each geometry.

Tensors here are channels-last in memory whatever their strides say; nothing is checked (`conv3d.py` does).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from r3d_kernels.ops.conv3d import is_plain
from r3d_kernels.problems import ConvProblem
from r3d_kernels.triton import ahead, kernels
from r3d_kernels.triton import config as configs
from r3d_kernels.triton.backend import interpreted
from r3d_kernels.triton.config import Config

__all__ = [
    "Forward",
    "InputGrad",
    "Launch",
    "WeightGrad",
    "channels_last",
    "check_operand",
    "is_bare",
    "on_device",
]

_INT32 = 2**31


def check_operand(x: Tensor, argument: str) -> None:
    """A dtype that the kernels have, in a place where they can run."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{argument}: expected float32, bfloat16 or float16, got {x.dtype}")
    if not x.is_cuda and not (x.is_cpu and interpreted()):
        raise ValueError(f"{argument}: expected a CUDA tensor, got one on {x.device}")


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


_HERE = contextlib.nullcontext()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, in its current stream: makes it the tensor's."""
    index = x.get_device()
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def is_bare(*tensors: Tensor | None) -> bool:
    """Whether nobody wants to see an operation: neither Dynamo nor a transform, a mode or a kind of tensor.

    Then it need not be one. On its way to a Python operation and its gradient the dispatcher passes through more Python
    than there is in the launches.
    """
    if torch.compiler.is_compiling():
        return False
    return is_plain(*tensors) and torch._C._len_torch_dispatch_stack() == 0


def capturing(x: Tensor) -> bool:
    """Whether what is launched for x now goes into a CUDA graph; its device has to be the current one."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Launch:
    """A kernel with its grid, sizes and constants, called with its tensors.

    At every launch Triton binds, specialises and looks up all arguments of a kernel, 40 and more here. Of ours only the
    tensors change, and of those it sees the dtype and whether the address is a multiple of 16: what was compiled for
    these is kept for each device and launched directly. Debugging switches of Triton's have to be set before the first
    launch; its hooks around a launch are called as ever.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], sizes: tuple[int | float, ...], meta: dict[str, Any]
    ) -> None:
        self._kernel, self._through_triton = kernel, kernel[grid]
        self._grid = (*grid, 1, 1)[:3]
        self.sizes, self.meta = sizes, meta
        self._rest: tuple[Any, ...] = ()
        self._ready: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(self, *tensors: Tensor, descriptors: tuple[TensorDescriptor, ...] = ()) -> None:
        """Launches on the current device, which has to be the tensors' (`on_device`). Descriptors come first.

        Tensors without data (`ahead.like`) are noted, and nothing is launched.
        """
        key: list[Any] = [tensors[0].get_device()]
        for t in tensors:
            key += (t.dtype, t.data_ptr() % 16 == 0)
        place = tuple(key)
        run = self._ready.get(place)
        if run is not None:
            run(*descriptors, *tensors, *self._rest)
            return
        if tensors[0].is_meta:
            ahead.note(self._job(place, tensors, descriptors))
            return
        if capturing(tensors[0]):
            self._check_loaded(tensors, descriptors)
        compiled = self._through_triton(*descriptors, *tensors, *self.sizes, **self.meta)
        # Nothing is compiled in the interpreter; on AMD more is seen of a tensor.
        if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            constants = self._kernel.arg_names[len(descriptors) + len(tensors) + len(self.sizes) :]
            self._rest = (*self.sizes, *(self.meta[name] for name in constants))
            self._ready[place] = compiled[self._grid]

    def _check_loaded(self, tensors: tuple[Tensor, ...], descriptors: tuple[TensorDescriptor, ...]) -> None:
        """Raises where a launch would load the kernel: the driver forbids it now, and would end the capture."""
        compiled = self._kernel.warmup(*descriptors, *tensors, *self.sizes, grid=self._grid, **self.meta)
        if getattr(compiled, "module", None) is None:
            raise RuntimeError(
                f"Triton kernel {self._kernel.__name__}: expected it loaded before a CUDA graph is captured, got a "
                "first call inside the capture; call the same function once before it, with these shapes and dtypes"
            )

    def _job(
        self, place: tuple[Any, ...], tensors: tuple[Tensor, ...], descriptors: tuple[TensorDescriptor, ...]
    ) -> ahead.Job:
        """Its key has what Triton sees of the arguments."""
        fixed = set(self._kernel.do_not_specialize or ())
        sizes = [
            (abs(size) >= _INT32, name not in fixed and (size == 1, size % 16 == 0))
            for name, size in zip(
                self._kernel.arg_names[len(descriptors) + len(tensors) :], self.sizes, strict=False
            )
        ]
        boxes = [(d.base.dtype, tuple(d.block_shape)) for d in descriptors]
        constants = tuple(self.meta.items())

        def compile() -> object:
            return self._kernel.warmup(*descriptors, *tensors, *self.sizes, grid=self._grid, **self.meta)

        def ready() -> None:
            # Triton makes a kernel's cache for a device at its first use: one of two threads would lose its work.
            caches = getattr(self._kernel, "device_caches", None)
            if caches is not None:
                caches[triton.runtime.driver.active.get_current_device()]

        return ahead.Job((self._kernel, place, *boxes, *sizes, *constants), compile, ready)


def _wide(*shapes: tuple[int, ...]) -> bool:
    """Whether offsets need 64 bits; two samples of slack, because some are formed of pixels that are never read."""
    return any(math.prod(s) + 2 * math.prod(s[1:]) >= _INT32 for s in shapes)


class _Pad:
    """Pixels of a few channels with zeros behind each, rounded if they are to be multiplied as TF32."""

    def __init__(self, c: int, padded: int, pixels: int, precision: str) -> None:
        self.size = pixels * padded
        meta = {"C": c, "PADDED": padded, "PRECISION": precision, "BLOCK": 1024, "num_warps": 4}
        self.launch = Launch(
            kernels.pad_channels, (triton.cdiv(max(self.size, 1), 1024),), (self.size,), meta
        )

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.empty(self.size, dtype=x.dtype, device=x.device)
        self.launch(x, y)
        return y


class _Round:
    """A float32 weight rounded to TF32, once: left to themselves, tensor cores drop what does not fit."""

    def __init__(self, size: int) -> None:
        grid = (triton.cdiv(max(size, 1), 1024),)
        self.launch = Launch(kernels.round_to_tf32, grid, (size,), {"BLOCK": 1024, "num_warps": 4})

    def __call__(self, weight: Tensor) -> Tensor:
        y = torch.empty_like(weight, memory_format=torch.channels_last_3d)
        self.launch(weight, y)
        return y


# Since Triton 3.7 the copies of a tensor descriptor can round to TF32.
_ROUNDING_COPIES = "round_f32_to_tf32" in TensorDescriptor.__dataclass_fields__


class Forward:
    """y = act(conv(x, weight) * scale + bias + residual) for one geometry, dtype and configuration.

    Called with x, weight, scale, bias and residual (None where the constructor was told so). [N, C, D, H, W] and
    [K, C / groups, T, R, S], both channels-last in memory; scale and bias float32 [K]. `run` takes the weight as `pack`
    returned it, which may be kept for as long as the weight stays what it is.
    """

    def __init__(
        self, problem: ConvProblem, config: Config, precision: str, *, has_scale: bool, has_bias: bool
    ) -> None:
        p, config = problem, config.fitted(problem)
        self.problem, self.config = problem, config
        self.out_shape = p.out_shape
        c, k = p.c // p.groups, p.k // p.groups
        taps = math.prod(p.kernel)
        m = p.n * math.prod(p.out_size)
        meta: dict[str, Any] = {
            "HAS_SCALE": has_scale,
            "HAS_BIAS": has_bias,
            "HAS_RES": p.residual,
            "RELU": p.activation == "relu",
        }
        common = {
            "WIDE": _wide(p.in_shape, p.out_shape),
            "PRECISION": "ieee" if precision == "half" else precision,
            "BN": config.bn,
            "BK": config.bk,
            "GROUP": config.group,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }
        geometry = (p.d, p.h, p.w, *p.out_size, *p.stride, *p.padding, *p.dilation)
        tiles_n = triton.cdiv(k, config.bn)
        self.parts = 1
        self.pad: _Pad | None = None  # of x
        self.packing: tuple[object, ...] | None = (
            None  # what tells one form of the weight from another; None: as it is
        )
        self.box: tuple[int, int, int] | None = None
        self._rounds = False  # the copies of its descriptors round to TF32
        self._checked: tuple[dict[str, Any], ...] | None = None  # descriptors, less their tensors
        t, r, s = p.kernel
        if config.kernel == "packed":
            grid: tuple[int, ...] = (triton.cdiv(m, config.bm) * tiles_n, p.groups)
            sizes: tuple[int, ...] = (m, k, p.c, p.k, *geometry, taps * c, k * taps * c)
            self.meta = dict(meta, **common, BM=config.bm, C=c, T=t, R=r, S=s)
            kernel = kernels.conv3d_packed
        elif config.kernel == "rows":
            if (why_not := configs.why_no_rows(p)) is not None:
                raise ValueError(f"config: {config} {why_not}")
            padded = configs.padded_channels(c)
            if config.bk < s * padded:
                raise ValueError(
                    f"config: {config} takes rows of at most {config.bk} values, got {s * padded}"
                )
            grid = (triton.cdiv(m, config.bm) * tiles_n,)
            sizes = (m, k, p.k, *geometry)
            common["WIDE"] = _wide((p.n, p.d, p.h, p.w, padded), p.out_shape)
            self.meta = dict(meta, **common, BM=config.bm, C=padded, T=t, R=r, S=s)
            kernel = kernels.conv3d_rows
            if padded != c:
                self.pad = _Pad(c, padded, p.n * p.d * p.h * p.w, "ieee")  # rounded like any other x
                self.packing = ("padded", padded, precision)
                self._pack = _Pad(c, padded, k * taps, precision)
        elif config.kernel == "tiled":
            if max(p.kernel) > configs.MAX_TAPS:
                raise ValueError(
                    f"config: {config} takes kernels of at most {configs.MAX_TAPS} taps an axis, got {p.kernel}"
                )
            steps = taps * triton.cdiv(c, config.bk)
            per_part = triton.cdiv(steps, config.split)
            self.parts = triton.cdiv(steps, per_part)  # no part is empty
            grid = (triton.cdiv(m, config.bm) * tiles_n, p.groups, self.parts)
            od, oh, ow = p.out_size
            places = (od * oh * ow * p.k, oh * ow * p.k, ow * p.k, p.k, 0)
            sizes = (
                *(m, c, k, p.c, p.k, *geometry),
                *(taps * c, c, k * taps * c, r * s, s, 1, 0, *places, per_part),
            )
            self.meta = dict(
                meta,
                **common,
                T=t,
                R=r,
                S=s,
                POINTWISE=configs.is_pointwise(p),
                ROWS_SUM=False,
                EVEN_C=c % config.bk == 0,
                DENSE=True,
                SPLIT=self.parts > 1,
                BM=config.bm,
            )
            kernel = kernels.conv3d_tiled
        else:
            self.box = configs.boxes_of(config, p)
            if self.box is None:
                raise ValueError(
                    f"config: no box of {config.bm} outputs fits {p.out_size} without too much waste"
                )
            bd, bh, bw = self.box
            self._flat = f = configs.flat(p)
            boxes = [triton.cdiv(o, b) for o, b in zip(f.out_size, self.box, strict=True)]
            grid = (f.n * math.prod(boxes) * tiles_n,)
            sizes = (f.n, c, k, p.k, *f.out_size, *p.padding, *p.dilation)
            self._rounds = precision == "tf32" and _ROUNDING_COPIES
            self.meta = dict(meta, **common, T=t, R=r, S=s, BD=bd, BH=bh, BW=bw, ROUNDED=self._rounds)
            kernel = kernels.conv3d_boxes
        self.launch = Launch(kernel, grid, sizes, self.meta)
        if precision == "tf32" and self.packing is None and not self._rounds:
            self.packing = ("rounded",)
            self._pack = _Round(math.prod(p.weight_shape))
        if self.parts > 1:
            grid = (triton.cdiv(m, 32), triton.cdiv(p.k, 64))
            reduction = dict(meta, BM=32, BN=64, num_warps=4)
            self.reduce = Launch(kernels.reduce_parts, grid, (m, p.k, self.parts), reduction)
            self.part_shape = (self.parts, m, p.k)

    def __call__(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        return self.run(x, self.pack(weight), scale, bias, residual)

    def pack(self, weight: Tensor) -> Tensor:
        """The weight as the kernel wants it; itself where it is so already."""
        if self.packing is None:
            return weight
        with on_device(weight):
            return self._pack(weight)

    def run(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """As a call, with a packed weight."""
        y = empty(self.out_shape, x)
        if self.out_shape[0] == 0:
            return y
        # What is None is not read; any pointer will do.
        tail = (
            y if scale is None else scale,
            y if bias is None else bias,
            y if residual is None else residual,
            y,
        )
        with on_device(x):
            if self.box is not None:
                self.launch(*tail, descriptors=self._descriptors(x, weight))
            elif self.config.kernel in ("packed", "rows"):
                if self.pad is not None:
                    x = self.pad(x)
                self.launch(x, weight, *tail)
            elif self.parts == 1:
                self.launch(x, weight, *tail, y)
            else:
                part = torch.empty(self.part_shape, dtype=torch.float32, device=x.device)
                self.launch(x, weight, *tail, part)
                self.reduce(part, *tail)
        return y

    def _descriptors(self, x: Tensor, weight: Tensor) -> tuple[TensorDescriptor, ...]:
        # the TMA unit wants 16-byte addresses: a slice of a larger tensor may lie elsewhere
        if x.data_ptr() % 16:
            x = x.clone(memory_format=torch.channels_last_3d)
        if weight.data_ptr() % 16:
            weight = weight.clone(memory_format=torch.channels_last_3d)
        if self._checked is None:
            self._checked = tuple(d.__dict__ | {"base": None} for d in self._new_descriptors(x, weight))
        # Its constructor would check the same shapes again.
        descriptors = (TensorDescriptor.__new__(TensorDescriptor), TensorDescriptor.__new__(TensorDescriptor))
        for descriptor, checked, base in zip(descriptors, self._checked, (x, weight), strict=True):
            descriptor.__dict__.update(checked)
            descriptor.base = base
        return descriptors

    def _new_descriptors(self, x: Tensor, weight: Tensor) -> tuple[TensorDescriptor, ...]:
        p, c, bk = self._flat, self.config, self.config.bk
        assert self.box is not None
        taps = math.prod(p.kernel)
        rows, planes = p.w * p.c, p.h * p.w * p.c
        how = {"round_f32_to_tf32": True} if self._rounds else {}
        return (
            TensorDescriptor(
                x,
                [p.n, p.d, p.h, p.w, p.c],
                [p.d * planes, planes, rows, p.c, 1],
                [1, *self.box, bk],
                **how,
            ),
            TensorDescriptor(weight, [p.k, taps, p.c], [taps * p.c, p.c, 1], [c.bn, 1, bk], **how),
        )


@dataclasses.dataclass(frozen=True)
class _Axis:
    """The inputs of one remainder of the stride, along one axis: a convolution of dy with every step-th tap."""

    first: int  # input position of its first output
    count: int
    taps: int
    first_tap: int
    step: int  # between taps
    padding: int
    dilation: int


def _axes(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[_Axis]:
    """dx at position q reads dy at (q + padding - tap * dilation) / stride, where that is whole."""
    step = stride // math.gcd(stride, dilation)
    found = []
    for remainder in range(min(stride, size)):
        taps = [t for t in range(kernel) if (remainder + padding - t * dilation) % stride == 0]
        first = taps[0] if taps else 0
        found.append(
            _Axis(
                remainder,
                -(-(size - remainder) // stride),
                len(taps),
                first,
                step,
                -((remainder + padding - first * dilation) // stride),
                -(step * dilation // stride),
            )
        )
    return found


class InputGrad:
    """dx of a convolution for one geometry, dtype and configuration: one launch for each remainder of the stride.

    Called with dy [N, K, D', H', W'] and weight [K, C / groups, T, R, S], channels-last in memory.
    """

    def __init__(self, problem: ConvProblem, config: Config, precision: str) -> None:
        p = problem
        self.shape = p.in_shape
        c, k = p.c // p.groups, p.k // p.groups
        taps = math.prod(p.kernel)
        _, r, s = p.kernel
        plane = p.h * p.w * p.c
        # dy's channels are summed over and x's are the outputs
        config = config.fitted(dataclasses.replace(p, c=p.k, k=p.c))
        self.config = config
        dense = p.stride == (1, 1, 1)
        if config.split > 1 and not dense:
            raise ValueError(f"config: the sum of {config} is split, which stride {p.stride} does not allow")
        self.parts = 1
        self._round = _Round(math.prod(p.weight_shape)) if precision == "tf32" else None
        parts = itertools.product(
            *(
                _axes(*axis)
                for axis in zip((p.d, p.h, p.w), p.kernel, p.stride, p.padding, p.dilation, strict=True)
            )
        )
        self.launches: list[Launch] = []
        self.holes = False  # some positions are read by no tap
        for d, h, w in parts:
            if 0 in (d.taps, h.taps, w.taps):
                self.holes = True
                continue
            if max(d.taps, h.taps, w.taps) > configs.MAX_TAPS:
                raise ValueError(
                    f"kernel_size: expected at most {configs.MAX_TAPS} taps an axis, got {list(p.kernel)}"
                )
            m = p.n * d.count * h.count * w.count
            steps = d.taps * h.taps * w.taps * triton.cdiv(k, config.bk)
            per_part = triton.cdiv(steps, config.split)
            self.parts = triton.cdiv(steps, per_part)  # no part is empty
            first = (d.first * p.h * p.w + h.first * p.w + w.first) * p.c
            sizes = (
                *(m, k, c, p.k, p.c, *p.out_size, d.count, h.count, w.count, 1, 1, 1),
                *(d.padding, h.padding, w.padding, d.dilation, h.dilation, w.dilation),
                *(taps * c, c, k * taps * c, d.step * r * s, h.step * s, w.step),
                (d.first_tap * r + h.first_tap) * s + w.first_tap,
                *(p.d * plane, p.stride[0] * plane, p.stride[1] * p.w * p.c, p.stride[2] * p.c, first),
                per_part,
            )
            meta = {
                "T": d.taps,
                "R": h.taps,
                "S": w.taps,
                "POINTWISE": taps == 1 and dense and p.padding == (0, 0, 0),
                "ROWS_SUM": True,
                "EVEN_C": k % config.bk == 0,
                "DENSE": dense,
                "SPLIT": self.parts > 1,
                "HAS_SCALE": False,
                "HAS_BIAS": False,
                "HAS_RES": False,
                "RELU": False,
                "WIDE": _wide(p.in_shape, p.out_shape),
                "PRECISION": "ieee" if precision == "half" else precision,
                "BM": config.bm,
                "BN": config.bn,
                "BK": config.bk,
                "GROUP": config.group,
                "num_warps": config.warps,
                "num_stages": config.stages,
            }
            grid = (triton.cdiv(m, config.bm) * triton.cdiv(c, config.bn), p.groups, self.parts)
            self.launches.append(Launch(kernels.conv3d_tiled, grid, sizes, meta))
        if self.parts > 1:
            m = p.n * p.d * p.h * p.w
            self.part_shape = (self.parts, m, p.c)
            none = dict.fromkeys(("HAS_SCALE", "HAS_BIAS", "HAS_RES", "RELU"), False)
            grid = (triton.cdiv(m, 32), triton.cdiv(p.c, 64))
            reduction = {**none, "BM": 32, "BN": 64, "num_warps": 4}
            self.reduce = Launch(kernels.reduce_parts, grid, (m, p.c, self.parts), reduction)

    def __call__(self, dy: Tensor, weight: Tensor) -> Tensor:
        dx = empty(self.shape, dy)
        if self.holes:
            dx.zero_()
        if self.shape[0]:
            with on_device(dy):
                if self._round is not None:
                    weight = self._round(weight)
                if self.parts > 1:
                    part = torch.empty(self.part_shape, dtype=torch.float32, device=dy.device)
                    self.launches[0](dy, weight, dx, dx, dx, dx, part)
                    self.reduce(part, dx, dx, dx, dx)
                else:
                    for launch in self.launches:
                        launch(dy, weight, dx, dx, dx, dx, dx)
        return dx


class WeightGrad:
    """dw of a convolution for one geometry, dtype and configuration: float32 sums over parts of the pixels, in order.

    Called with x and dy, channels-last in memory; returns [K, C / groups, T, R, S], channels-last in memory.
    """

    def __init__(self, problem: ConvProblem, config: Config, precision: str) -> None:
        p, config = problem, config.fitted(problem)
        self.config = config
        c, k = p.c // p.groups, p.k // p.groups
        bm, bn, bk = config.bm, config.bn, config.bk
        t, r, s = p.kernel
        m = p.n * math.prod(p.out_size)
        if m >= _INT32 - bm * config.split:  # the last part may end as far beyond
            raise ValueError(f"x: expected fewer than 2^31 output pixels for a weight gradient, got {m}")
        columns, pitch, self.pad = "tap", p.c, None
        if config.kernel == "strips":
            if (why_not := configs.why_no_rows(p)) is not None:
                raise ValueError(f"config: {config} {why_not}")
            columns, pitch = "row", configs.padded_channels(c)
            if bn < s * pitch:
                raise ValueError(f"config: {config} takes rows of at most {bn} values, got {s * pitch}")
            if pitch != c:
                self.pad = _Pad(c, pitch, p.n * p.d * p.h * p.w, "ieee")
        elif c < configs.PACKED_BELOW:
            columns = "pairs"
        tiles = triton.cdiv(k, bk) * configs.column_tiles(config, p)
        per_part = triton.cdiv(triton.cdiv(max(m, 1), config.split), bm) * bm
        self.parts = max(1, triton.cdiv(m, per_part))
        self.shape = p.weight_shape
        self.size = math.prod(p.weight_shape)
        self.empty = m == 0
        geometry = (p.d, p.h, p.w, *p.out_size, *p.stride, *p.padding, *p.dilation)
        sizes = (m, c, k, pitch, p.k, *geometry, self.size, per_part)
        meta = {
            "T": t,
            "R": r,
            "S": s,
            "COLUMNS": columns,
            "PITCH": pitch if columns == "row" else 1,
            "WIDE": _wide((p.n, p.d, p.h, p.w, pitch), p.out_shape),
            "PRECISION": "ieee" if precision == "half" else precision,
            "BM": bm,
            "BN": bn,
            "BK": bk,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }
        self.launch = Launch(kernels.conv3d_weight_grad, (tiles, p.groups, self.parts), sizes, meta)
        self.sum = Launch(
            kernels.sum_parts,
            (triton.cdiv(self.size, 1024),),
            (self.size, self.parts),
            {"BLOCK": 1024, "num_warps": 4},
        )

    def __call__(self, x: Tensor, dy: Tensor) -> Tensor:
        dw = empty(self.shape, x)
        if self.empty:
            return dw.zero_()
        with on_device(x):
            if self.pad is not None:
                x = self.pad(x)
            if self.parts == 1:
                self.launch(x, dy, dw)
            else:
                part = torch.empty((self.parts, self.size), dtype=torch.float32, device=x.device)
                self.launch(x, dy, part)
                self.sum(part, dw)
        return dw
