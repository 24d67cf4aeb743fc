"""The table of costs, as a user reads it."""

import json

import pytest
from rich.console import Console

from navagent.adapt_costs import _bytes, costs, show, table
from policies.adaptation import ADAPTATIONS


def rows(bases, methods, size=(32, 32)):
    return costs(bases, methods, size, 4, Console(quiet=True))


def test_every_method_has_costs_or_a_reason():
    found = rows(["resnet_small"], list(ADAPTATIONS))
    assert [row.method for row in found] == list(ADAPTATIONS)
    for row in found:
        assert (row.cost is None) == bool(row.refusal)
    by_method = {row.method: row.cost for row in found if row.cost}
    assert by_method["features"].trainable == 0
    # One bit a weight, beside four bytes a parameter.
    assert by_method["piggyback"].stored_bytes == pytest.approx(by_method["piggyback"].trainable / 8, abs=64)
    assert by_method["sidetune"].act_flops == pytest.approx(2 * by_method["features"].act_flops)
    assert not by_method["midtune"].cached


def test_a_method_that_refuses_the_base_says_why():
    (row,) = rows(["fcn5_small"], ["spottune"])
    assert row.cost is None
    assert "fcn5_small" in row.refusal


def test_a_table_holds_a_line_a_method():
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(rows(["fcn5_small"], ["sidetune", "hst"]), "fcn5_small", 4))
    text = captured.get()
    assert "87,217" in text
    assert "hst" in text


def test_json_holds_all_figures(capsys):
    show(["fcn5_small"], ["features"], (32, 32), 4, as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert row["method"] == "features"
    assert row["cost"]["cached"] is True


@pytest.mark.parametrize(
    ("value", "text"), [(16, "16 B"), (999, "999 B"), (1000, "1 kB"), (2_780_000, "2.78 MB"), (5e9, "5 GB")]
)
def test_bytes_in_words(value, text):
    assert _bytes(value) == text
