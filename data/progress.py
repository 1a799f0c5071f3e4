"""How far a long piece of work is: a bar on a terminal, elsewhere a line every few seconds."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_EVERY_S = 5.0  # where there is no terminal to draw a bar on


@contextmanager
def progress(total: int, things: str = "documents") -> Iterator[Callable[[int, int], None]]:
    """A function to be told (things, bytes) done, of total bytes."""
    done = Counter[str]()
    began = shown = time.perf_counter()
    shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {postfix[0]:,} {postfix[1]}, {rate_fmt}, {remaining} left"
    quiet = not sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, bar_format=shape, postfix=[0, things], disable=quiet) as bar:

        def advance(n_things: int, n_bytes: int) -> None:
            nonlocal shown
            done.update(things=n_things, bytes=n_bytes)
            if not quiet:
                bar.postfix[0] = done["things"]
                bar.update(n_bytes)
            elif (now := time.perf_counter()) - shown >= LINE_EVERY_S:
                shown = now
                log.info(_line(done["things"], things, done["bytes"], total, now - began))

        yield advance
    if done:
        seconds = time.perf_counter() - began
        log.info("%.1f MB, %s %s in %.1f s, %.1f MB/s",
                 done["bytes"] / 1e6, f"{done['things']:,}", things, seconds, done["bytes"] / 1e6 / seconds)  # fmt: skip


def _line(n_things: int, things: str, n_bytes: int, total: int, seconds: float) -> str:
    rate = n_bytes / seconds
    left_s = max(total - n_bytes, 0) / rate if rate else float("inf")
    return (
        f"{n_bytes / 1e6:.1f} of {total / 1e6:.1f} MB, {n_things:,} {things}, {rate / 1e6:.1f} MB/s, "
        f"{left_s:.0f} s left"
    )
