"""``navagent adapt list``: what every method costs on a base."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from policies.adaptation import ADAPTATIONS, make_adaptation
from policies.adaptation.costs import Cost, measure
from policies.encoders import Encoder, make_encoder


@dataclass(frozen=True)
class Row:
    """One method on one base."""

    base: str
    method: str
    cost: Cost | None
    """None where the method does not take the base."""
    refusal: str = ""
    """Why it does not."""


def costs(
    bases: Sequence[str],
    methods: Sequence[str],
    size: tuple[int, int] | None,
    batch_size: int,
    console: Console,
) -> list[Row]:
    """Counts the costs of methods on bases, with random weights: no figure depends on them.

    Args:
        bases: names of encoders.
        methods: names of methods.
        size: rows and columns of the images; None for those that each base was made for, or 64 x 64.
        batch_size: images in the batch whose memory is counted.
        console: where to show progress.
    """
    pairs = [(base, method) for base in bases for method in methods]
    made: dict[str, Encoder] = {}
    rows = []
    for base, method in track(pairs, "counting", console=console, transient=True):
        if base not in made:
            made = {base: make_encoder(base, 3, "random")}
        encoder = made[base]
        shape = size or encoder.input_spec.size or (64, 64)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapted = make_adaptation(method, encoder)
                rows.append(Row(base, method, measure(adapted, *shape, batch_size=batch_size)))
        except ValueError as error:
            rows.append(Row(base, method, None, str(error)))
    return rows


def table(rows: Sequence[Row], base: str, batch_size: int) -> Table:
    """The costs on one base, for people."""
    shown = Table(
        title=base,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption="learned: parameters; a task: what is stored for one; act, forward, backward: MFLOP an "
        f"image; memory: MB that learning on {batch_size} images keeps, with Adam; stored: whether base "
        "features are computed once and kept",
    )
    shown.add_column("method", no_wrap=True)
    for name in ("learned", "a task", "act", "forward", "backward", "memory", "stored"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.base != base:
            continue
        cost = row.cost
        if cost is None:
            shown.add_row(row.method, *["-"] * 7, style="dim")
            continue
        shown.add_row(
            row.method,
            f"{cost.trainable:,}",
            _bytes(cost.stored_bytes),
            *(
                _millions(v)
                for v in (cost.act_flops, cost.learn_flops, cost.backward_flops, cost.learn_bytes)
            ),
            "yes" if cost.cached else "no",
        )
    return shown


def show(
    bases: Sequence[str],
    methods: Sequence[str],
    size: tuple[int, int] | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Prints a table a base, or all figures as JSON."""
    rows = costs(bases, methods or list(ADAPTATIONS), size, batch_size, Console(file=sys.stderr))
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return
    console = Console()
    for base in bases:
        console.print(table(rows, base, batch_size))
        for row in rows:
            if row.base == base and row.cost is None:
                console.print(f"[dim]{row.method}: {row.refusal}[/dim]", soft_wrap=True)


def _millions(value: float) -> str:
    return f"{value / 1e6:,.1f}"


def _bytes(value: float) -> str:
    for prefix in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.3g} {prefix}B"
        value /= 1000
    return f"{value:.3g} GB"
