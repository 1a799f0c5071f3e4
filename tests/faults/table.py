"""A pytest plugin: after `pytest -m fault`, or a run of tests/faults, the table of faults with the result of each."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from rows import ROWS

HERE = Path(__file__).parent


class FaultTable:
    """What became of the tests of each row."""

    def __init__(self) -> None:
        self.wanted = False
        self.rows_of: dict[str, list[int]] = {}  # by test, those that are not selected included
        self.results: dict[str, str] = {}  # by test
        self.reasons: dict[int, str] = {}  # why a test of a row was skipped

    @pytest.hookimpl(tryfirst=True)  # before those that are not selected are taken out
    def pytest_collection_modifyitems(self, config, items):
        asked = [(config.invocation_params.dir / arg.split("::")[0]).resolve() for arg in config.args]
        self.wanted = "fault" in config.option.markexpr or any(HERE in (path, *path.parents) for path in asked)
        for item in items:
            rows = sorted({number for mark in item.iter_markers("fault") for number in mark.args})
            if rows:
                self.rows_of[item.nodeid] = rows

    def pytest_runtest_logreport(self, report):
        rows = self.rows_of.get(report.nodeid, [])
        if report.failed:
            self.results[report.nodeid] = "failed"
        elif report.skipped:
            self.results.setdefault(report.nodeid, "skipped")
            if isinstance(report.longrepr, tuple):
                self.reasons |= dict.fromkeys(rows, report.longrepr[2].removeprefix("Skipped: "))
        elif report.when == "call":
            self.results.setdefault(report.nodeid, "passed")

    def pytest_terminal_summary(self, terminalreporter):
        if not self.wanted:
            return
        terminalreporter.section("faults")
        for line in self.lines():
            terminalreporter.write_line(line)

    def lines(self) -> list[str]:
        counts: dict[int, Counter[str]] = defaultdict(Counter)
        for test, rows in self.rows_of.items():
            for number in rows:
                counts[number][self.results.get(test, "not run")] += 1
        width = max(len(row.fault) for row in ROWS.values())
        return [
            f"{number:3}  {row.fault:{width}}  {self._result(counts[number], number)}" for number, row in ROWS.items()
        ]

    def _result(self, counts: Counter[str], number: int) -> str:
        if not counts:
            return f"no test: {ROWS[number].why_not}" if ROWS[number].why_not else "no test collected"
        texts = [f"{counts['failed']} FAILED"] * bool(counts["failed"])
        texts += [f"{counts[key]} {key}" for key in ("passed", "skipped", "not run") if counts[key]]
        return ", ".join(texts) + (f" ({self.reasons[number]})" if counts["skipped"] and number in self.reasons else "")


def pytest_configure(config):
    config.pluginmanager.register(FaultTable(), "fault-table")
