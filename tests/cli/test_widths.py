"""Tables lose nothing, however narrow the terminal is."""

from __future__ import annotations

import io
from itertools import takewhile

import pytest
import torch
from rich.console import Console
from torch import nn

import rgap
from rgap.analysis import audit
from rgap.report.results import print_recovery
from rgap.report.tables import HeadedTable, audit_table

LONG = "the_first_of_many_blocks.with_a_convolution"


def shown(item: object, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(item)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return lines


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("columns", [1, 3, 9])
def test_every_cell_is_whole(width: int, columns: int) -> None:
    table = HeadedTable("Heading")
    table.add_column("layer")
    for number in range(columns):
        table.add_column(f"joint rank {number}", justify="right")
    table.add_column("route")
    cells = [f"{10**6 + number:,}" for number in range(columns)]
    table.add_row(LONG, *cells, "measured, behind mean")
    lines = shown(table, width)
    text = "\n".join(lines)
    assert all(cell in text for cell in cells) and "…" not in text, text
    letters = "".join(text.split())
    if letters.count(LONG) == 0:  # folded: its parts stand below each other
        start = text.index(LONG[:9])
        column = start - text.rindex("\n", 0, start) - 1
        rows = lines[text[:start].count("\n") :]
        rows = list(takewhile(str.strip, rows))  # of the first table
        width = max(len(line[column:].split("  ")[0]) for line in rows)
        assert "".join(line[column : column + width].strip() for line in rows) == LONG, text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_an_audit_is_a_table_at_every_usual_width(width: int) -> None:
    """Numbers of one kind stand below each other, beside the layer that they are of."""
    model = rgap.models.lenet(seed=0)
    table = audit_table(audit(model, (3, 32, 32), (1, 2), method="formula"))
    lines = shown(table, width)
    for layer, number in (("conv2", "4,992"), ("conv3", "1,536"), ("head", "1,536")):
        assert any(layer in line and number in line for line in lines), lines
    assert not any("unknowns 3,072" in line for line in lines)
    assert sum("layer" in line for line in lines) <= 2 + (width < 80)


def test_an_audit_and_a_recovery_on_a_narrow_terminal() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first_convolution_of_the_network", nn.Conv2d(1, 4, 3))
    model.add_module("pool", nn.MaxPool2d(2))
    model.add_module("flatten", nn.Flatten())
    model.add_module("last", nn.Linear(36, 5))
    model.eval()
    lines = shown(audit_table(audit(model, (1, 8, 8), (1,))), 50)
    for part in (" first_ ", " convolution_of_ ", " the_network "):  # folded, not within a word
        assert any(part in line for line in lines), lines
    sent = rgap.capture(model, torch.rand(1, 1, 8, 8), torch.tensor([2]))
    console = Console(width=60, file=io.StringIO())
    print_recovery(console, rgap.invert(model, sent), explain=True)
    text = console.file.getvalue()
    assert "Certified: the input of 'last'" in text and "recovery." not in text, text
    assert max(map(len, text.splitlines())) <= 60
