"""Rows: every setting is one that its method takes, and the row it is compared with stands above it."""

import pytest

from experiments.rows import ABOVE, EXTRA, TABLES, config_of


@pytest.mark.parametrize("number", TABLES)
def test_every_setting_is_valid_and_differs_from_the_others(number):
    settings = [row.setting for row in TABLES[number]]
    configs = [str(config_of(s, 10)) + str([s.get(k) for k in EXTRA]) for s in settings]
    assert len(set(configs)) == len(configs) >= 2


def test_every_counterpart_comes_before_its_row():
    for rows in TABLES.values():
        labels = [row.label for row in rows]
        assert len(set(labels)) == len(labels)
        for i, row in enumerate(rows):
            assert row.against in (ABOVE, None, *labels[:i])
