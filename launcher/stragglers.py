"""A rank that is slower than the others, step after step, is named: all wait for it.

What is compared is each rank's time of a step until it has to wait for another: fetching its data, and the forward pass
(parallel/own_time.py). The ranks tell each other at every logged step.
"""

import logging
from statistics import median_low

from launcher.run_dir import Ledger
from parallel.engine import Engine

log = logging.getLogger("longhaul")

STEPS, WINDOWS = 100, 5  # in a row, before a rank is said to be slow, or not to be any more: both


class Stragglers:
    """Made, and called, on all ranks alike."""

    def __init__(self, share: float, engine: Engine, hosts: list[str], ledger: Ledger) -> None:
        """share: of the median above which a rank is slow, 0: none is looked for.    hosts: by rank."""
        self._share, self._engine, self._hosts, self._ledger = share, engine, hosts, ledger
        self._steps, self._own_s = 0, [0.0, 0.0]
        self._slow = [False] * len(hosts)  # as it has been told
        self._otherwise = [0] * len(hosts)  # steps in a row in which it was not as told
        engine.own_time.take_s()

    def add(self, data_s: float) -> None:
        """A step is over; data_s: seconds that this rank waited for its data."""
        self._steps += 1
        self._own_s[0] += data_s
        self._own_s[1] += self._engine.own_time.take_s()

    def look(self, step: int) -> dict[str, float]:
        """Compare the steps since the last look; tells of a rank that begins or ends to be slow. Returns metrics."""
        steps, mesh = self._steps, self._engine.mesh
        mine, self._steps, self._own_s = [s / max(steps, 1) for s in self._own_s], 0, [0.0, 0.0]
        if not self._share or not steps or mesh.world_size == 1:
            return {}
        row = [0.0] * (2 * mesh.world_size)
        row[2 * mesh.rank : 2 * mesh.rank + 2] = mine
        row = mesh.sum(row)
        data_s, own_s = row[::2], [a + b for a, b in zip(row[::2], row[1::2], strict=True)]
        middle = median_low(own_s)  # of two ranks the faster one
        changed = self._judge(own_s, middle, steps)
        if mesh.rank == 0:
            for ranks in self._by_host([rank for rank in changed if self._slow[rank]]):
                self._tell(step, ranks, steps, own_s, data_s, middle)
            for ranks in self._by_host([rank for rank in changed if not self._slow[rank]]):
                self._tell_end(step, ranks, own_s, middle)
        slowest = max(range(mesh.world_size), key=lambda rank: own_s[rank])
        return {
            "speed/slowest_rank": slowest,
            "speed/slowest_rank_excess": own_s[slowest] / middle - 1 if middle else 0.0,
            "speed/stragglers": sum(self._slow),
        }

    def _judge(self, own_s: list[float], middle: float, steps: int) -> list[int]:
        """The ranks that are to be told of now."""
        changed = []
        for rank, seconds in enumerate(own_s):
            as_told = (seconds > (1 + self._share) * middle) == self._slow[rank]
            self._otherwise[rank] = 0 if as_told else self._otherwise[rank] + steps
            if self._otherwise[rank] >= max(STEPS, WINDOWS * steps):
                self._slow[rank], self._otherwise[rank] = not self._slow[rank], 0
                changed.append(rank)
        return changed

    def _by_host(self, ranks: list[int]) -> list[list[int]]:
        """One group for each host all of whose ranks, of several, are there; the others are groups of one."""
        groups: list[list[int]] = []
        for host in dict.fromkeys(self._hosts[rank] for rank in ranks):
            here = [rank for rank in ranks if self._hosts[rank] == host]
            groups += [here] if len(here) == self._hosts.count(host) else [[rank] for rank in here]
        return groups

    def _tell(
        self, step: int, ranks: list[int], steps: int, own_s: list[float], data_s: list[float], middle: float
    ) -> None:
        mean, data = _mean(own_s, ranks), _mean(data_s, ranks)
        log.warning(
            "step %d  %s slower than the others, which wait: %.3g s of a step until it waits itself (data %.3g s, forward "
            "%.3g s), where the median rank takes %.3g s; above log.straggler_share=%g for %d steps",
            step,
            self._name(ranks),
            mean,
            data,
            mean - data,
            middle,
            self._share,
            max(STEPS, WINDOWS * steps),
        )
        self._note("straggler", step, ranks, mean, middle, data_s=round(data, 6))

    def _tell_end(self, step: int, ranks: list[int], own_s: list[float], middle: float) -> None:
        mean = _mean(own_s, ranks)
        log.warning("step %d  %s no longer slower than the others: %.3g s, where the median rank takes %.3g s", step,
                    self._name(ranks), mean, middle)  # fmt: skip
        self._note("straggler_ended", step, ranks, mean, middle)

    def _note(self, event: str, step: int, ranks: list[int], own_s: float, middle: float, **more: float) -> None:
        self._ledger.add(event, step=step, ranks=ranks, host=self._hosts[ranks[0]], own_s=round(own_s, 6),
                         median_s=round(middle, 6), **more)  # fmt: skip

    def _name(self, ranks: list[int]) -> str:
        host = self._hosts[ranks[0]]
        return f"rank {ranks[0]} on {host} is" if len(ranks) == 1 else f"all {len(ranks)} ranks on {host} are"


def _mean(values: list[float], ranks: list[int]) -> float:
    return sum(values[rank] for rank in ranks) / len(ranks)
