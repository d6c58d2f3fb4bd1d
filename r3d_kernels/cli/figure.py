"""The picture that `demo` writes: frames of the clip on top, times as bars below."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_INK, _MUTED, _GRID = "#1f2933", "#616e7c", "#e4e7eb"
_STOCK, _FUSED = "#9aa5b1", "#0b7285"
_WIDTH = 10.0  # inches
_MARGIN = 0.35
_SHOWN = 5
_TIMES = "\N{MULTIPLICATION SIGN}"


def draw(
    *,
    title: str,
    subtitle: str,
    footer: str,
    frames: Sequence[tuple[str, Tensor]],
    bars: Sequence[tuple[str, float]],
) -> bytes:
    """A PNG (1500 pixels wide).

    frames: (label, uint8 [H, W, 3]) pairs, of which up to five are shown; bars: (name, seconds), the first is
    the measure for the speed-up and the last the one to see.
    """
    # The object interface with an explicit Agg canvas: no display, no global state of pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [frames[i] for i in _spread(len(frames), _SHOWN)]
    gap = 0.08
    frame_w = (_WIDTH - 2 * _MARGIN - gap * (_SHOWN - 1)) / _SHOWN
    frame_h = min(
        frame_w * shown[0][1].shape[0] / shown[0][1].shape[1], 2.6
    )  # portrait clips are letterboxed
    head, below, bars_h, foot = 0.95, 0.25, 0.52 * len(bars) + 0.15, 0.68
    height = head + frame_h + below + bars_h + foot

    figure = Figure(figsize=(_WIDTH, height), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def inches(left: float, top: float, width: float, tall: float) -> tuple[float, float, float, float]:
        """A rectangle measured from the top left corner, in the fractions that matplotlib wants."""
        return left / _WIDTH, 1 - (top + tall) / height, width / _WIDTH, tall / height

    first, last = bars[0][1], bars[-1][1]
    title = title if len(title) <= 48 else title[:47] + "…"  # the right half belongs to the result
    figure.text(_MARGIN / _WIDTH, 1 - 0.42 / height, title, size=15, weight="bold", color=_INK)
    figure.text(
        1 - _MARGIN / _WIDTH,
        1 - 0.42 / height,
        f"{bars[-1][0]}: {first / last:.2f}{_TIMES} as fast as {bars[0][0]}",
        size=13,
        weight="bold",
        color=_FUSED,
        ha="right",
    )
    figure.text(_MARGIN / _WIDTH, 1 - 0.70 / height, subtitle, size=9, color=_MUTED)

    left = _MARGIN
    for label, frame in shown:
        axes = figure.add_axes(inches(left, head, frame_w, frame_h))
        axes.imshow(frame.numpy(), interpolation="antialiased")
        axes.set_axis_off()
        axes.text(
            0.03,
            0.06,
            label,
            transform=axes.transAxes,
            size=7,
            color="white",
            bbox={"facecolor": "black", "alpha": 0.55, "pad": 2, "edgecolor": "none"},
        )
        left += frame_w + gap

    names_w = 1.75
    axes = figure.add_axes(
        inches(_MARGIN + names_w, head + frame_h + below, _WIDTH - 2 * _MARGIN - names_w, bars_h)
    )
    longest = max(seconds for _, seconds in bars)
    for row, (name, seconds) in enumerate(bars):
        is_last = row == len(bars) - 1
        axes.barh(row, seconds * 1e3, height=0.62, color=_FUSED if is_last else _STOCK)
        weight = "bold" if is_last else "normal"
        axes.text(
            seconds * 1e3 + longest * 8,  # 0.8 % of the longest bar, in milliseconds
            row,
            f"{_milliseconds(seconds)}  ({first / seconds:.2f}{_TIMES})",
            va="center",
            size=10,
            weight=weight,
            color=_INK,
        )
        axes.text(-longest * 15, row, name, va="center", ha="right", size=10, weight=weight, color=_INK)
    axes.set_xlim(0, longest * 1e3 * 1.23)  # room for the label of the longest bar
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_yticks([])
    # No grid line behind the labels at the end of the bars.
    axes.set_xticks([t for t in axes.get_xticks() if 0 <= t <= longest * 1e3])
    axes.tick_params(axis="x", colors=_MUTED, labelsize=8, length=0)
    axes.set_xlabel("milliseconds a batch (shorter is better)", size=8, color=_MUTED, loc="left")
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.text(1 - _MARGIN / _WIDTH, 0.13 / height, footer, size=8, color=_MUTED, ha="right")

    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _spread(total: int, count: int) -> list[int]:
    """Up to `count` indices, evenly from the first to the last of `total`."""
    if total <= count:
        return list(range(total))
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.3f} ms"
