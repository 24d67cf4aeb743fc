"""What a comparison of learners found: numbers, a table on the screen, Markdown and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from envs.files import atomic_write
from navagent.bench.networks import NETWORKS
from navagent.bench.runner import Measurement

STAGES = ("simulate", "policy", "update", "rest")
"""Columns of the time's shares; what an expert takes is part of "simulate"."""


@dataclass(frozen=True)
class Summary:
    """One row of the table."""

    rate: float
    """Median frames/s."""
    lowest: float
    """Frames/s of the slowest update."""
    highest: float
    """Frames/s of the fastest update."""
    shares: dict[str, float]
    """Median share of each stage, of 1."""


def summarise(measurement: Measurement) -> Summary:
    """Medians over the updates of one entry, which has some."""
    rates = [measurement.frames / seconds for seconds in measurement.seconds]
    shares = [
        _shares(total, stages) for total, stages in zip(measurement.seconds, measurement.stages, strict=True)
    ]
    return Summary(
        statistics.median(rates),
        min(rates),
        max(rates),
        {stage: statistics.median(share[stage] for share in shares) for stage in STAGES},
    )


def _shares(total: float, stages: dict[str, float]) -> dict[str, float]:
    """Shares of one update by stage; stages that overlap may be more than the whole, and nothing is left."""
    seconds = {
        "simulate": stages.get("simulate", 0.0) + stages.get("expert", 0.0),
        "policy": stages.get("policy", 0.0),
        "update": stages.get("update", 0.0),
    }
    seconds["rest"] = max(0.0, total - sum(seconds.values()))
    return {stage: value / max(total, sum(seconds.values())) for stage, value in seconds.items()}


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one learner is as another."""

    median: float
    """Over the rounds, in each of which both took a turn."""
    lowest: float
    highest: float


def ratio(fast: Measurement, slow: Measurement) -> Ratio:
    """Compares two learners round by round; both have been measured for as many."""
    each = [
        (fast.frames / ours) / (slow.frames / theirs)
        for ours, theirs in zip(fast.seconds, slow.seconds, strict=True)
    ]
    return Ratio(statistics.median(each), min(each), max(each))


@dataclass(frozen=True)
class Bar:
    """A speed that this package is to reach on two CPU cores, with depth of 64x64 pixels."""

    title: str
    network: str
    contestant: str
    least: float
    """Frames/s, or times as fast as ``than``."""
    than: str | None = None
    """The learner compared with; None where the bar is frames/s."""


BARS = (
    Bar("frames/s with SimpleCNN and GRU 512", "simple_cnn_gru", "navagent", 1100.0),
    Bar("frames/s with ResNet-18 and two-layer LSTM 512", "resnet18_lstm", "navagent", 280.0),
    Bar("times sb3_contrib.RecurrentPPO, SimpleCNN and LSTM 512", "simple_cnn_lstm", "navagent", 3.0, "sb3"),
    Bar("times sb3_contrib.RecurrentPPO, ResNet-18 and LSTM 512", "resnet18_lstm", "navagent", 3.0, "sb3"),
    Bar(
        "times the same without stored features, ResNet-44 and FCN4",
        "sidetune_resnet44",
        "navagent",
        1.8,
        "uncached",
    ),
    Bar(
        "times the same without stored features, small ResNet and FCN5",
        "sidetune_small",
        "navagent",
        1.8,
        "uncached",
    ),
)
"""What is to be reached on ``apartment.glb``, whatever else is measured beside it."""


def measured(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Those with a result."""
    return [each for each in measurements if each.problem is None and each.seconds]


def bar_rows(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Each bar with what was reached for every number of agents that was measured."""
    found = measured(measurements)
    rows = []
    for bar in BARS:
        for own in found:
            if (own.network, own.contestant) != (bar.network, bar.contestant):
                continue
            if bar.than == "uncached" and own.label != own.contestant:
                # A variant would differ from it by more than the stored features.
                continue
            if bar.than is None:
                summary = summarise(own)
                reached = Ratio(summary.rate, summary.lowest, summary.highest)
            else:
                others = [
                    each
                    for each in found
                    if (each.network, each.agents, each.label) == (own.network, own.agents, bar.than)
                ]
                if not others:
                    continue
                reached = ratio(own, others[0])
            rows.append(
                {
                    "bar": bar.title,
                    "least": bar.least,
                    "learner": own.label,
                    "agents": own.agents,
                    **asdict(reached),
                    "reached": reached.median >= bar.least,
                }
            )
    return rows


def rows(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """One record for each entry, with what it is times the slowest way of ``sb3``, where there is one."""
    found = measured(measurements)
    records = []
    for each in measurements:
        record: dict[str, Any] = {
            "network": each.network,
            "agents": each.agents,
            "steps": each.steps,
            "learner": each.label,
            "parameters": each.parameters,
        }
        if each.problem is not None or not each.seconds:
            records.append(record | {"problem": each.problem or "no update was measured"})
            continue
        summary = summarise(each)
        record |= {
            "frames_per_second": summary.rate,
            "lowest": summary.lowest,
            "highest": summary.highest,
            "shares": summary.shares,
            "peak_bytes": each.peak_bytes,
            "peak_gpu_bytes": each.peak_gpu_bytes,
            "seconds": each.seconds,
            "stages": each.stages,
        }
        for other in found:
            same = (other.network, other.agents) == (each.network, each.agents)
            if same and other is not each and len(other.seconds) == len(each.seconds):
                record.setdefault("times", {})[other.label] = asdict(ratio(each, other))
        records.append(record)
    return records


COLUMNS = (
    "learner",
    "frames/s",
    "range",
    *STAGES,
    "MB",
    "x sb3",
    "x plain",
)
"""Of each table."""


def cells(record: dict[str, Any]) -> list[str]:
    """One row of a table; of an entry that has no result, the reason."""
    if "problem" in record:
        return [record["learner"], *[""] * (len(COLUMNS) - 1)]
    memory = f"{record['peak_bytes'] / 2**20:,.0f}"
    if record["peak_gpu_bytes"]:
        memory += f" + {record['peak_gpu_bytes'] / 2**20:,.0f}"
    times = record.get("times", {})
    return [
        record["learner"],
        f"{record['frames_per_second']:,.0f}",
        f"{record['lowest']:,.0f}-{record['highest']:,.0f}",
        *(f"{100 * record['shares'][stage]:.0f}" for stage in STAGES),
        memory,
        *(f"{times[name]['median']:.2f}" if name in times else "" for name in ("sb3", "plain")),
    ]


def groups(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records by the title of their table: network, agents and steps."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        network = NETWORKS[record["network"]].title
        learning = max(
            each["parameters"]
            for each in records
            if (each["network"], each["agents"]) == (record["network"], record["agents"])
        )
        title = (
            f"{record['network']} ({network}; {learning:,} parameters learn): {record['agents']} agents x "
            f"{record['steps']} steps"
        )
        tables.setdefault(title, []).append(record)
    return tables


def show(measurements: Sequence[Measurement], console: Console) -> None:
    """Prints a table for each network and number of agents."""
    for title, records in groups(rows(measurements)).items():
        console.print(f"\n[bold]{title}")
        _print(COLUMNS, [cells(record) for record in records], console)
        for line in remarks(records):
            console.print(line, markup=False, highlight=False)


def show_bars(measurements: Sequence[Measurement], console: Console) -> None:
    """Prints what was reached of the bars, if any was measured."""
    reached = bar_rows(measurements)
    if not reached:
        return
    console.print(f"\n[bold]{_BARS_TITLE}")
    _print(_BAR_COLUMNS, [_bar_cells(row) for row in reached], console)


def _print(header: Sequence[str], body: Sequence[Sequence[str]], console: Console) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in body:
        table.add_row(*row)
    console.print(table)


def remarks(records: Sequence[dict[str, Any]]) -> list[str]:
    """What should be known of a table: who is not in it, and whose network is not the others'."""
    lines = [
        f"{record['learner']}: {record['problem'].strip().splitlines()[-1]}"
        for record in records
        if "problem" in record
    ]
    sizes = {record["learner"]: record["parameters"] for record in records if "problem" not in record}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{label} {count:,}" for label, count in sizes.items())
        lines.append(f"the networks are not of one size; parameters that learn: {counts}")
    return lines


_BARS_TITLE = "bars, meant for two CPU cores and apartment.glb"
_BAR_COLUMNS = ("bar", "learner", "agents", "at least", "reached", "range", "")


def _bar_cells(row: dict[str, Any]) -> list[str]:
    digits = ",.0f" if row["least"] >= 100 else ".2f"
    return [
        row["bar"],
        row["learner"],
        str(row["agents"]),
        format(row["least"], digits),
        format(row["median"], digits),
        f"{row['lowest']:{digits}}-{row['highest']:{digits}}",
        "met" if row["reached"] else "missed",
    ]


def write(measurements: Sequence[Measurement], facts: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Writes ``results.json`` and ``results.md`` into ``folder``, and answers their paths.

    ``facts`` say how it was measured: command, scene, settings, machine.
    """
    records = rows(measurements)
    as_json, as_markdown = folder / "results.json", folder / "results.md"
    content = {**facts, "rows": records, "bars": bar_rows(measurements)}
    with atomic_write(as_json) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with atomic_write(as_markdown) as temporary:
        temporary.write_text(markdown(measurements, facts), encoding="utf-8")
    return as_json, as_markdown


def markdown(measurements: Sequence[Measurement], facts: dict[str, Any]) -> str:
    """The tables as Markdown, with how they were measured above them."""
    records = rows(measurements)
    versions = facts["versions"]
    lines = [
        "# Training speed, side by side",
        "",
        f"`{facts['command']}`",
        "",
        f"{facts['scene']}; {versions['cpu']}, {versions['cpu_cores']} cores, {facts['threads']} threads, "
        f"{facts['device']}; torch {versions['torch']}, Python {versions['python']}, commit "
        f"{versions['commit']}; {facts['date']}, load average {facts['load']} before it began.",
        "",
        f"An update is a rollout and {facts['epochs']}. Frames per second count "
        f"everything from one rollout to the next: medians and range of {facts['updates']} updates after "
        f"{facts['warm_up']} that do not count. Stages are in percent of the time. "
        "Learners take turns, an update each, in processes of their "
        "own; "
        '"x" is the median over rounds of how many times as fast it is. MB are the most memory that the '
        "process had at once, libraries included, and on a GPU its tensors.",
    ]
    for title, group in groups(records).items():
        lines += ["", f"## {title}", ""]
        lines += _markdown_table(COLUMNS, [cells(record) for record in group])
        lines += [item for remark in remarks(group) for item in ("", remark)]
    reached = bar_rows(measurements)
    if reached:
        lines += ["", f"## {_BARS_TITLE[0].upper()}{_BARS_TITLE[1:]}", ""]
        lines += _markdown_table(_BAR_COLUMNS, [_bar_cells(row) for row in reached])
    return "\n".join(lines) + "\n"


def _markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    # A bar in a message would begin a new cell.
    return lines + ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in body]
