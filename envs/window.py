"""Showing frames on the screen, where there is one."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from rewards.base import Images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RENDER_MODES = ("rgb_array", "human")


class Window:
    """A matplotlib window that is opened by its first frame; without a display nothing is shown and nothing fails."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._figure: Figure | None = None

    def show(self, frame: Images) -> None:
        """Show a frame, uint8 [H, W, 3]."""
        from matplotlib import pyplot

        if self._figure is None:
            self._figure = pyplot.figure(self._title)
        self._figure.clear()
        axes = self._figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.imshow(frame)
        self._figure.canvas.draw()
        # Matplotlib falls back to a backend without windows where there is no display; showing would only warn.
        if type(self._figure.canvas).required_interactive_framework is not None:
            self._figure.show()
            self._figure.canvas.flush_events()

    def close(self) -> None:
        """Close the window, if it was opened."""
        if self._figure is not None:
            from matplotlib import pyplot

            pyplot.close(self._figure)
            self._figure = None


def check_render_mode(value: str | None) -> str | None:
    """The render mode, or a ValueError where it is none of ``RENDER_MODES``."""
    if value is not None and value not in RENDER_MODES:
        nearest = get_close_matches(str(value), RENDER_MODES, 1, cutoff=0)[0]
        raise ValueError(
            f"render_mode: expected {', '.join(RENDER_MODES)} or None, got {value!r}; did you mean {nearest!r}?"
        )
    return value
