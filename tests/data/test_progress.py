"""What is told of work under way."""

import io
import logging
import sys

from data import progress as module
from data.progress import progress


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, caplog):
    clock = iter([0.0, 1.0, 5.0, 6.0, 11.0, 12.5])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    with caplog.at_level(logging.INFO), progress(total=40_000_000) as advance:
        for _ in range(4):
            advance(500, 5_000_000)
    assert [entry.message for entry in caplog.records] == [
        "10.0 of 40.0 MB, 1,000 documents, 2.0 MB/s, 15 s left",
        "20.0 of 40.0 MB, 2,000 documents, 1.8 MB/s, 11 s left",
        "20.0 MB, 2,000 documents in 12.5 s, 1.6 MB/s",
    ]


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(total=40_000_000) as advance:
        advance(500, 10_000_000)
        advance(500, 10_000_000)
    last = terminal.getvalue().rstrip().rpartition("\r")[2]
    assert "50%" in last
    assert "20.0M/40.0M, 1,000 documents, " in last
    assert "B/s" in last
    assert last.endswith("left")
