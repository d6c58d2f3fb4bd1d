"""What `demo` and `verify` compute on: clips of a video, and a network with statistics that suit them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from r3d_kernels.cli import common

if TYPE_CHECKING:
    from torch import Tensor, nn

CALIBRATION_CLIPS = 4
BRANCH_WEIGHT = 0.1


def add_arguments_of_inputs(parser: argparse.ArgumentParser) -> None:
    """Which clips go through which network."""
    parser.add_argument(
        "video", nargs="?", metavar="VIDEO", help="any video file (default: the bundled clip)"
    )
    parser.add_argument("--arch", metavar="NAME", help="network (default r3d_18, or that of the checkpoint)")
    parser.add_argument(
        "--weights", metavar="PATH", help="a checkpoint (default: random weights, calibrated)"
    )
    parser.add_argument(
        "--frames", type=common.positive, default=16, metavar="N", help="frames a clip (default 16)"
    )
    parser.add_argument(
        "--size", type=common.positive, default=112, metavar="N", help="height and width (default 112)"
    )
    parser.add_argument(
        "--batch", type=common.positive, default=1, metavar="N", help="clips at once (default 1)"
    )


def read_clips(
    video: str | None, frames: int, count: int
) -> tuple[str, Any, list[Tensor], list[tuple[str, Tensor]]]:
    """The path, what `probe` says of it, `count` clips (uint8 [T, H, W, 3]), and frames to show, labelled."""
    from r3d_kernels.video import iter_clips, probe, sample_clip

    path = str(sample_clip()) if video is None else video
    info = probe(path, scan=True)  # to the end: a truncated file is an error here too
    # Spread over the video, but at most four windows apart: nobody waits for an hour of film to be decoded.
    spare = (info.frames or frames) - frames
    step = min(max(1, spare // max(1, count - 1)), 4 * frames)
    clips = list(islice(iter_clips(path, frames, step), count))
    shown = []
    for index, clip in enumerate(clips):
        for offset in sorted({0, frames // 2}):
            number = index * step + offset
            if number < (info.frames or 1):
                shown.append((f"{number / info.fps:.1f} s" if info.fps else f"frame {number}", clip[offset]))
    return path, info, [clips[i % len(clips)] for i in range(count)], shown


def prepare_clips(clips: list[Tensor], size: int) -> Callable[[nn.Module], Tensor]:
    """What gives a network its input [clips, 3, T, size, size]: frames as its weights want them."""

    def of(model: nn.Module) -> Tensor:
        import torch

        from r3d_kernels.models import preset
        from r3d_kernels.video import Transform

        transform = Transform(preset(model), size=size)
        return torch.stack([transform(clip) for clip in clips])

    return of


def random_clips(count: int, frames: int, size: int) -> Callable[[nn.Module], Tensor]:
    """The same as noise, always the same, for a network of any number of channels."""

    def of(model: nn.Module) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(0)
        return torch.randn((count, model.in_channels, frames, size, size), generator=generator)

    return of


def prepare(
    arch: str | None,
    weights: str | None,
    inputs_of: Callable[[nn.Module], Tensor],
    batch: int,
    what: str = "clips of the video",
) -> tuple[nn.Module, Tensor, str]:
    """The stock float32 network, its input [batch, C, T, size, size], and where the weights are from.

    Args:
        arch, weights: as of `common.build_model`.
        inputs_of: gives the network's inputs, CALIBRATION_CLIPS or more; random weights are calibrated on the first.
        batch: how many of them come back.
        what: they are.
    """
    import torch

    with torch.inference_mode(False), torch.no_grad():  # so that the parameters are ordinary tensors
        model = common.build_model(arch, weights)
        common.set_fused(model, False)
        inputs = inputs_of(model)
        if weights is not None:
            origin = f"weights {weights}"
        else:
            calibrate(model, inputs[:CALIBRATION_CLIPS])
            origin = (
                f"random weights (seed 0, residual branches x {BRANCH_WEIGHT}), "
                f"batch norm calibrated on {CALIBRATION_CLIPS} {what}"
            )
    return model, inputs[:batch], origin


def network_name(arch: str | None, model: nn.Module) -> str:
    return arch or f"{type(model).__name__}-{getattr(model, 'depth', '?')}"


def video_line(path: str, info: Any) -> str:
    """What `probe` said of a video, in a line."""
    seconds = f"{info.duration:.1f} s" if info.duration else "unknown length"
    return f"video    {path} ({info.codec}, {info.width}x{info.height}, {info.frames} frames, {seconds})"


def calibrate(model: nn.Module, inputs: Tensor) -> None:
    """Sets the running statistics of every batch norm to those of `inputs` [N, 3, T, H, W], in place.

    With the initial ones (mean 0, variance 1) folding would have nothing to do, and activations would grow
    from layer to layer. The last norm of every block gets a small weight, as training gives it: in a deep random
    network whose branches weigh as much as its shortcuts, rounding errors grow from block to block (stock
    float32 is then off by 1e-4 at depth 101), which no trained network does.
    """
    import torch
    from torch import nn

    from r3d_kernels.models import BasicBlock, Bottleneck

    for block in model.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            nn.init.constant_(block.pair(block.n_convs)[1].weight, BRANCH_WEIGHT)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over the passes
    noise = torch.Generator().manual_seed(0)
    model.train()
    for clips in inputs.split(2):
        # Clips of a short video are alike; a channel whose variance is 0 would only amplify rounding errors.
        model(clips + 0.25 * torch.randn(clips.shape, generator=noise))
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
