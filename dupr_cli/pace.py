"""How fast counted work goes now, and one line about it that fits the terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

_WINDOW_SECONDS = 30.0
# Shorter updates are joined: work that arrives in bursts would otherwise look like pauses.
_SHORTEST_SECONDS = 1.0
# An interval this many times longer than its units usually take has been spent on something else.
_PAUSE = 3.0


class Pace:
    """Units per second over the last half minute of work.

    The time up to the first update is left out, because it is spent on starting, and so is a pause:
    an interval in which the work stood still for a check or a checkpoint. Two such intervals in a
    row are not pauses; the work has become slower.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: the time in seconds, like `time.monotonic`."""
        self._clock = clock
        self._since: float | None = None
        self._units = 0
        self._intervals: deque[tuple[float, int]] = deque()
        self._paused = False
        # Units per second, None until it can be said. Kept, because a display reads it in a thread
        # of its own.
        self.rate: float | None = None

    def advance(self, count: int) -> None:
        now = self._clock()
        if self._since is None:
            if count:
                self._since = now
            return
        self._units += count
        seconds = now - self._since
        if seconds < _SHORTEST_SECONDS or not self._units:
            return
        slow = self.rate is not None and seconds * self.rate > _PAUSE * self._units
        if slow and not self._paused:
            self._paused = True
        else:
            if slow:
                self._intervals.clear()
            self._paused = False
            self._intervals.append((seconds, self._units))
            while sum(s for s, _ in self._intervals) - self._intervals[0][0] > _WINDOW_SECONDS:
                self._intervals.popleft()
            working = sum(s for s, _ in self._intervals)
            self.rate = sum(units for _, units in self._intervals) / working
        self._since, self._units = now, 0


def duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def fitted(parts: Sequence[tuple[int, str]], width: int) -> list[int]:
    """Positions of the parts that fit a line, two columns apart.

    parts: of the line from left to right, each with its rank. Parts are taken by rank, up to the
    first that does not fit; those of rank 0 always are, and may need to be cut.
    """
    taken: list[int] = []
    left = width
    for place in sorted(range(len(parts)), key=lambda place: parts[place][0]):
        rank, text = parts[place]
        left -= len(text) + 2 * bool(taken)
        if rank and left < 0:
            break
        taken.append(place)
    return sorted(taken)
