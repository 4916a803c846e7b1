"""Being asked to stop, and stopping when it is convenient."""

import signal
import threading
from types import FrameType


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag; the second one acts as usual. For a ``with`` block.

    Only the main thread may set handlers; elsewhere, whoever owns the process decides, and nothing is done.

    Attributes:
        requested: Whether there was one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._previous[number])
