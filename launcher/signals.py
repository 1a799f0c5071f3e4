"""Being asked to stop: a signal sets a flag, the train loop serves it at the next step boundary."""

import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by SIGINT, SIGTERM or SIGUSR1, however many times they come; the handlers do nothing else."""

    def __init__(self) -> None:
        self.signal_number = 0
        for number in _SIGNALS:
            signal.signal(number, self._set)

    def request(self, number: int) -> None:
        """As if the signal had come."""
        self.signal_number = self.signal_number or number

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.request(number)


def signal_name(number: int) -> str:
    return signal.Signals(number).name
