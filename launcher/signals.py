"""Being asked to stop: a signal sets a flag, the train loop serves it at the next step boundary."""

import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAUNCHER_ENDED = 1000  # no signal: the launcher has ended; above all of them, so that ranks that agree agree on it


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
    """What stopped a run, as people and the ledger read it."""
    return "the end of its launcher" if number == LAUNCHER_ENDED else signal.Signals(number).name
