"""``navagent adapt``: what adaptation methods cost, side networks to start them with, how they compare.

Nothing heavy is imported before an action needs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from navagent.arguments import (
    BAD_INPUT,
    UsageError,
    add_options,
    command_parser,
    name_list,
    number_list,
    training_command,
)
from policies.names import nearest

HELP = """\
usage: navagent adapt list [--bases NAMES] [--methods NAMES] [--size HxW] [--batch-size N] [--json]
       navagent adapt distil OUT [--base NAME] [--student NAME] [--mode features|perceptual] ...
       navagent adapt compare OUT [--task NAME] [--images N,N] [--methods NAMES] [--quick] ...

list      what every method costs on a base: parameters, bytes, operations, memory
distil    train a small side network to give the features of a base
compare   transfer a base to another perception task by every method, with few and many images

examples:
  navagent adapt list
  navagent adapt distil runs/student
  navagent adapt compare runs/comparison

`navagent adapt distil --help` and so on tell more."""

DISTIL_OPTIONS: tuple[tuple[str, type, Any, str], ...] = (
    ("base", str, "resnet_small", "encoder to learn from"),
    ("base_weights", str, "default", "its weights: default, a name in the catalogue, or a file"),
    ("student", str, "fcn5_small", "encoder that learns; its features have the shape of the base's"),
    ("mode", str, "features", "what is compared: features, or what a decoder makes of them (perceptual)"),
    (
        "decoder",
        str,
        None,
        "decoder of the base's task: default (beside the base's weights), a file, or a name",
    ),
    ("sensor", str, "rgb", "what both look at: rgb or depth"),
    ("steps", int, 3000, "optimiser steps"),
    ("batch_size", int, 32, "frames a step"),
    ("train_frames", int, 10000, "frames rendered in train homes"),
    ("val_frames", int, 1000, "frames rendered in unseen homes"),
    ("learning_rate", float, 1e-3, "learning rate at the start"),
    ("weight_decay", float, 2e-6, "weight decay"),
    ("patience", int, 5, "epochs without a better loss before the learning rate falls to a tenth"),
    ("height", int, 64, "image rows"),
    ("width", int, 64, "image columns"),
    ("hfov_deg", float, 90.0, "horizontal field of view [deg]"),
    ("sensor_height", float, 1.25, "height of the camera above the floor [m]"),
    ("seed", int, 0, "seed of viewpoints, initial weights and batches"),
    ("device", str, "cpu", "cpu, cuda, or auto: CUDA where there is one"),
)
"""Options of ``adapt distil``: field of its settings, type, default, and what it is for."""

COMPARISON_HOMES = (40, 1)
"""Number and seed of the generated homes that are compared in; no base that ships has seen them."""
QUICK_HOMES = (5, 1)
"""The same for ``--quick``."""
QUICK = {"images": (8, 16), "seeds": 2, "steps": 4, "batch_size": 4, "test_frames": 16}
"""Settings of ``--quick``, where others are not given."""


def adapt(arguments: Sequence[str]) -> int:
    """Runs an action, and returns the exit status."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print(HELP)
        return 0 if arguments else BAD_INPUT
    if arguments[0] not in ACTIONS:
        raise UsageError(
            f"adapt: there is no action {arguments[0]!r}{nearest(arguments[0], list(ACTIONS))} "
            f"(actions: {', '.join(ACTIONS)}; see `navagent adapt --help`)"
        )
    return ACTIONS[arguments[0]](arguments[1:])


def _list(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "adapt list",
        "Counts what every method costs on a base: parameters that learn, bytes stored for a task, "
        "operations and memory. Nothing is timed.",
        """
        navagent adapt list
        navagent adapt list --bases vit_base,resnet44 --methods lora,ladder
        """,
    )
    parser.add_argument(
        "--bases", metavar="NAMES", type=name_list, default=("resnet_small", "vit_mini"), help="encoders"
    )
    parser.add_argument(
        "--methods", metavar="NAMES", type=name_list, default=(), help="methods (default: all)"
    )
    parser.add_argument(
        "--size",
        metavar="HxW",
        type=_size,
        help="image rows and columns (default: what each base is made for)",
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=32, help="images whose memory is counted (default: 32)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(arguments)
    from navagent.adapt_costs import show
    from policies.adaptation import ADAPTATIONS
    from policies.encoders import ENCODERS

    for kind, names, known in (
        ("method", options.methods, ADAPTATIONS),
        ("encoder", options.bases, ENCODERS),
    ):
        for name in names:
            if name not in known:
                raise UsageError(
                    f"there is no {kind} {name!r}{nearest(name, list(known))} (known: {', '.join(known)})"
                )
    if options.batch_size < 1:
        raise UsageError(f"--batch-size {options.batch_size}: expected at least 1 image")
    show(options.bases, options.methods, options.size, options.batch_size, options.json)
    return 0


def _distil(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "adapt distil",
        "Trains a student network to give the features of a base, and says how near it is in homes it has "
        "not seen. Ctrl-C saves; the same command goes on.",
        """
        navagent adapt distil runs/student
        navagent adapt distil runs/student --mode perceptual --decoder default
        navagent train encoder=resnet_small adaptation.side_encoder=fcn5_small \\
            adaptation.side_init=distilled adaptation.side_weights=runs/student/student.safetensors
        """,
    )
    parser.add_argument("out", metavar="OUT", help="folder for the student and its card")
    parser.add_argument("--dataset", metavar="DIR", help="data set of homes (default: 40 generated ones)")
    for name, kind, default, line in DISTIL_OPTIONS:
        shown = "none" if default is None else default
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{line} (default: {shown})"
        )
    values = vars(parser.parse_args(arguments))
    out, dataset = Path(values.pop("out")), values.pop("dataset")
    from rich.console import Console

    from navagent.build import dataset_dir, training_device
    from navagent.config import TrainConfig
    from navagent.learning.distil import DistilConfig, check, distil

    values["device"] = str(training_device(values["device"]))
    config = DistilConfig(dataset=Path(dataset or "."), out=out, **values)
    check(config)
    if dataset is None:
        config = replace(config, dataset=dataset_dir(TrainConfig()))
    weights = distil(config, console=Console())
    print(
        f"student  {weights}\nuse it with\n  "
        f"{training_command(config.sensor, config.base, config.base_weights)} "
        f"adaptation.side_encoder={config.student} adaptation.side_init=distilled "
        f"adaptation.side_weights={weights}"
    )
    return 0


def _compare(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "adapt compare",
        "Transfers bases that know surface normals to another perception task by every adaptation method, "
        "with few and many images, and tells the errors in unseen homes with intervals: a table, a plot and "
        "the numbers. In less than half an hour on two cores. Ctrl-C stops; the same command goes on.",
        """
        navagent adapt compare runs/comparison
        navagent adapt compare runs/comparison --quick
        navagent adapt compare runs/curvature --task curvature --methods features,sidetune,lora
        """,
    )
    parser.add_argument("out", metavar="OUT", help="folder for the results")
    parser.add_argument(
        "--dataset",
        metavar="DIR",
        help="data set of homes (default: 40 generated ones that no base has seen)",
    )
    add_options(
        parser,
        ("task", "NAME", str, "what is learned: reshading (default), curvature, edge_occlusion or depth"),
        ("images", "N,N", number_list, "numbers of training images (default: 50,500,5000)"),
        ("seeds", "N", int, "how often each is done (default: 3)"),
        ("methods", "NAMES", name_list, "rows of the table, with commas (default: all)"),
        ("bases", "NAMES", name_list, "encoders with their weights, or NAME=FOLDER of a pre-training"),
        ("steps", "N", int, "optimiser steps of each training (default: 240)"),
        ("workers", "N", int, "processes with one thread each (default: one a core)"),
    )
    parser.add_argument("--quick", action="store_true", help="a minute's try with next to no training")
    values = vars(parser.parse_args(arguments))
    out, dataset, quick = Path(values.pop("out")), values.pop("dataset", None), values.pop("quick")
    from rich.console import Console

    from navagent.learning.comparison import ComparisonConfig, compare
    from navagent.learning.transfer import Base

    console = Console()
    if quick:
        values = {**QUICK, **values}
    config = ComparisonConfig(dataset=Path(dataset or "."), out=out, **values)
    for base in config.bases:
        Base.find(base)
    if dataset is None:
        from envs.files import cache_dir
        from navagent.scenes import generated_dataset

        num, seed = QUICK_HOMES if quick else COMPARISON_HOMES
        config = replace(config, dataset=generated_dataset(num, seed, cache_dir(), console))
    table = compare(config, console=console)
    print(f"table  {table}\nplot   {table.with_name('plot.png')}")
    return 0


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {"list": _list, "distil": _distil, "compare": _compare}
"""Each action of ``navagent adapt`` with what runs it."""


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not rows and columns, such as 64x64")
    return int(height), int(width)
