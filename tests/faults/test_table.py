"""Every row of the table has a test that injects it or a reason, and says what became of it."""

import ast
from pathlib import Path

import pytest

from rows import ROWS, Row
from table import FaultTable

TESTS = Path(__file__).parents[1]


def marked() -> dict[int, list[str]]:
    """Row -> the files with marks of it, read from the source: whichever tests are selected, all count."""
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                for argument in node.args:
                    found.setdefault(ast.literal_eval(argument), []).append(path.name)
    return found


def test_every_row_has_a_test_or_a_reason():
    by_row = marked()
    assert by_row.keys() <= ROWS.keys(), f"marks of rows that are not in the table: {by_row.keys() - ROWS.keys()}"
    for number, row in ROWS.items():
        assert bool(row.why_not) != (number in by_row), (
            f"row {number} ({row.fault}): " + (f"{row.why_not!r}, yet marked in {by_row.get(number)}" if row.why_not
                                               else "neither a marked test nor a reason")
        )  # fmt: skip


class Report:
    def __init__(self, nodeid, outcome, when="call", longrepr=None):
        self.nodeid, self.when, self.longrepr = nodeid, when, longrepr
        self.passed, self.failed, self.skipped = (outcome == name for name in ("passed", "failed", "skipped"))


@pytest.mark.parametrize(
    ("reports", "result"),
    [
        ([], "2 not run"),
        ([("a", "passed")], "1 passed, 1 not run"),
        ([("a", "passed"), ("a", "failed", "teardown"), ("b", "passed")], "1 FAILED, 1 passed"),
        ([("a", "failed", "setup"), ("b", "failed")], "2 FAILED"),
        ([("a", "skipped", "setup", ("f", 1, "Skipped: needs root")), ("b", "passed")], "1 passed, 1 skipped (needs root)"),
    ],
)  # fmt: skip
def test_what_a_line_of_the_table_says(reports, result, monkeypatch):
    monkeypatch.setitem(ROWS, 2, Row("killed"))
    monkeypatch.setitem(ROWS, 7, Row("hidden", "not built yet"))
    table = FaultTable()
    table.rows_of = {"a": [2], "b": [2, 3]}
    for report in reports:
        table.pytest_runtest_logreport(Report(*report))
    assert table.lines()[1].startswith("  2  killed ")
    assert table.lines()[1].endswith(f"  {result}")
    assert table.lines()[6].endswith("  no test: not built yet")
