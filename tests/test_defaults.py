"""Every default of every Config is the one of the table, and the table says where it is from."""

import importlib

import defaults
import pytest

from core.config import flat
from results.methods import METHODS


def expected(method) -> dict[str, tuple[str, str]]:
    """A method's own lines over its parent's over those of all."""
    above = (
        expected(next(m for m in METHODS if m.name == method.parent)) if method.parent else defaults.read(defaults.RUN)
    )
    return above | defaults.read(defaults.METHODS[method.name])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_defaults(method):
    """Value by value; a field without a line in the table, or a line without a source, fails."""
    mine, table = flat(importlib.import_module(method.name).Config()), expected(method)
    assert {field: repr(value) for field, value in mine.items()} == {f: table[f][0] for f in mine if f in table}
    assert set(defaults.read(defaults.METHODS[method.name])) <= set(mine) and all(
        source.strip() for _, source in table.values()
    )


def test_the_table_has_every_method():
    assert list(defaults.METHODS) == [method.name for method in METHODS]
