"""`torch.ops.r3d_kernels.conv3d_sm90`, the Hopper convolution: its fake for torch.compile, and whether it works here.

It is called through `backends`; nothing here is for users.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from r3d_kernels import _extension, tuning
from r3d_kernels._sm90 import TILES
from r3d_kernels.ops._flops import flop_formula

__all__ = [
    "TILES",
    "in_rows",
    "own_counters",
    "proven",
    "proven_tiles",
    "refused",
    "trial_error",
    "tried",
]

_TRIAL = {"stride": (1, 2, 1), "padding": (0, 2, 1), "dilation": (1, 1, 2)}


def in_rows(t: Tensor, fill: float = 0.0) -> Tensor:
    """t [N, C, D, H, W] as our tensor-core kernels take it: channels-last, pixels at whole multiples of 16 bytes.

    Args:
        fill: what lies between the pixels where C makes no multiple of 16 bytes.
    """
    n, c, d, h, w = t.shape
    rows = t.new_full((n, d, h, w, c + -c % (16 // t.element_size())), fill)
    rows[..., :c] = t.permute(0, 2, 3, 4, 1)
    return rows.permute(0, 4, 1, 2, 3)[:, :c]


@cache
def _trial(dtype: torch.dtype, padded: bool = False) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(x, weight, scale, bias, residual), the exact answer, and what rounding allows; channels for the widest tile."""
    g = torch.Generator("cpu").manual_seed(0)
    k, c = max(channels for _, channels, _ in TILES) + (5 if padded else 8), 77 if padded else 72

    def normal(*shape: int) -> Tensor:
        # neither on the default device nor of the default dtype: a user may have set both
        return torch.randn(shape, generator=g, device="cpu", dtype=torch.float32)

    x, weight = normal(2, c, 4, 9, 21).to(dtype), (normal(k, c, 2, 3, 3) / (c * 18) ** 0.5).to(dtype)
    scale, bias = normal(k), normal(k)

    def conv(a: Tensor, b: Tensor) -> Tensor:
        return F.conv3d(a, b, None, _TRIAL["stride"], _TRIAL["padding"], _TRIAL["dilation"])

    wide = (1, -1, 1, 1, 1)
    want = conv(x.double(), weight.double()) * scale.double().view(wide) + bias.double().view(wide)
    size = conv(x.double().abs(), weight.double().abs()) * scale.double().abs().view(wide) + 10
    residual = normal(*want.shape).to(dtype)
    want = (want + residual.double()).relu()
    return (x, weight, scale, bias, residual), want, 3e-6 * size + torch.finfo(dtype).eps / 2 * 1.001 * want


def trial_error(
    dtype: torch.dtype,
    tile: int,
    split: int,
    device: torch.device | str = "cuda",
    op=None,
    padded: bool = False,
) -> float:
    """The largest error of one tile, relative to what rounding allows, on a small convolution against float64.

    Three different paddings, a stride, a dilation, tails of pixels and channels, two samples, residual and ReLU. At
    most 1 where the kernel works; NaN is infinity here.

    Args:
        padded: with channels that are no multiple of 8, and NaN between the pixels, of which nothing may be read.
    """
    op = op or torch.ops.r3d_kernels.conv3d_sm90
    (x, weight, scale, bias, residual), want, allowed = _trial(dtype, padded)
    k = TILES[tile][1] + (5 if padded else 8)

    def place(t: Tensor) -> Tensor:
        return in_rows(t.to(device), float("nan"))

    tensors = (place(x), place(weight[:k]), scale[:k].to(device), bias[:k].to(device), place(residual[:, :k]))
    y = op(*tensors, *_TRIAL.values(), "relu", 1 << tile, split).cpu().double()
    return ((y - want[:, :k]).abs() / allowed[:, :k]).nan_to_num(float("inf")).max().item()


proven: dict[tuple[int, bool], int] = {}
"""Index of a GPU, padded -> what `proven_tiles` found."""

refused: dict[int, str] = {}
"""Index of a GPU -> why no tile is tried on it."""


def proven_tiles(index: int, padded: bool = False) -> int:
    """Bits of the tiles that compute what they should on this GPU: each is tried once in a process.

    The kernels lean on how the hardware reads its descriptors. A GPU, driver or compiler that sees one of them in
    another way costs speed here, and not the user's results. A trial that hangs or that breaks the GPU's context costs
    one process: later ones find its trace beside the tuning cache, warn, and do without.

    Args:
        index: of the GPU.
        padded: for channels that are no multiple of 8, which are tried apart.
    """
    if (index, padded) in proven:
        return proven[index, padded]
    device = torch.device("cuda", index)

    def every_tile() -> int:
        try:
            return sum(_works(tile, device, padded) << tile for tile in range(len(TILES)))
        finally:
            _trial.cache_clear()

    good = tried(device, every_tile)
    if good is None:
        return 0
    proven[index, padded] = good
    return good


def tried(device: torch.device, trial: Callable[[], int]) -> int | None:
    """What a trial of Hopper kernels finds, 0 where an earlier process did not survive one, None without memory."""
    with tuning.Attempt(f"wgmma kernels on {tuning.machine_key(device, '')}") as attempt:
        if attempt.earlier is not None:
            refused[device.index] = f"an earlier process did not survive its trial here: {attempt.earlier}"
            warnings.warn(
                f"r3d_kernels does without its Hopper kernels: an earlier process did not survive their trial; remove "
                f"{attempt.earlier} to have them tried again",
                stacklevel=3,
            )
            return 0
        try:
            good = trial()
        except torch.OutOfMemoryError:  # tells nothing of the kernels: tried again next time
            return None
        attempt.lost = not good and _lost(device)
    return good


def _works(tile: int, device: torch.device, padded: bool) -> bool:
    try:
        return all(
            trial_error(dtype, tile, split, device, padded=padded) <= 1
            for dtype in (torch.bfloat16, torch.float16)
            for split in (1, 2)
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False


def _lost(device: torch.device) -> bool:
    """Whether nothing works on the device any more, in this process."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


_COUNTERS = 1 << 15  # of all split sums of a pass; what finds none left clears its own


@contextlib.contextmanager
def own_counters(device: torch.device) -> Iterator[Tensor | None]:
    """What this thread captures inside takes the counters of its split sums from the tensor given.

    Whoever keeps the graph keeps it. Kernels leave counters as zero as they found them, and a graph does not run beside
    itself, so they are cleared once and not, by another node, before every kernel. None where nothing needs them.
    """
    if not _extension.has_cuda or torch.cuda.get_device_capability(device)[0] != 9:
        yield None
        return
    counters = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    torch.ops.r3d_kernels.conv3d_sm90_lend(counters)
    try:
        yield counters
    finally:
        torch.ops.r3d_kernels.conv3d_sm90_lend(None)


if _extension.error is None:

    @torch.library.register_fake("r3d_kernels::conv3d_sm90")
    def _(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        activation: str,
        tiles: int = -1,
        split: int = 0,
    ) -> Tensor:
        torch._check(x.dim() == 5, lambda: f"x: expected 5 dimensions [N, C, D, H, W], got shape {x.shape}")
        size = [
            (i + 2 * p - d * (f - 1) - 1) // s + 1
            for i, f, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        ]
        k = weight.shape[0]
        shape = (x.shape[0], k + -k % 8, *size)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        return y.narrow(1, 0, k)

    @flop_formula(torch.ops.r3d_kernels.conv3d_sm90)
    def _flops(x, weight, *args, out_shape=None, **kwargs) -> int:
        macs = weight[1] * weight[2] * weight[3] * weight[4]
        for size in out_shape:
            macs *= size
        return 2 * macs
