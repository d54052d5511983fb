"""Losses, advantages, schedules and gates against the numbers that the published code gave."""

import contextlib
import io

import official
import oracles
import pytest
from conftest import ROOT

CASES = {f"{method} {case['case']}": (method, case, rows) for method, case, rows in official.cases()}


@pytest.mark.parametrize("name", CASES)
def test_parity(name):
    """Equal up to rounding; what is known to differ does differ, else its reason is out of date."""
    method, case, rows = CASES[name]
    with oracles.float64():
        gap = official.compare(method, case, rows)
    assert (gap <= case["tolerance"]) == (case["expected"] == "equal"), f"{case['mapping']}: off by {gap:.1e}"


def test_the_table_is_current():
    """The table of tests/README.md is what the script prints."""
    with oracles.float64(), contextlib.redirect_stdout(io.StringIO()) as printed:
        official.print_table()
    assert printed.getvalue() in (ROOT / "tests/README.md").read_text(), "run: python tests/official.py"
    assert len(CASES) == 81 and sum(case["expected"] == "equal" for _, case, _ in CASES.values()) == 61
