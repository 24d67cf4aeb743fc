"""The ``navagent`` command, one verb each.

Nothing heavy is imported before a verb needs it: ``navagent --help`` takes a moment, not seconds.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from navagent.arguments import BAD_INPUT, UsageError, command_parser, training_command
from navagent.installation import ShadowedPackageError, check_packages

if TYPE_CHECKING:
    from navagent.config import Command

FAILED = 1
"""Exit status where training broke down."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

OVERVIEW = """\
navagent: visual navigation agents whose frozen perception encoders are adapted by small
trainable networks, in Habitat PointGoal navigation.

usage: navagent VERB [ARGUMENTS]      navagent VERB --help      navagent --version

{verbs}

Start here:
  navagent train                          make homes, train, evaluate, report: on two CPU cores
                                          in at most 45 minutes
  navagent train experiment=quick         the same in about two minutes, to see that it works
  navagent imitate                        learn from an expert that knows the shortest path, alone
  navagent evaluate RUN                   measure a trained agent; RUN is its folder under runs/
  open RUN/report.html                    what came of it, on one page
"""


LEARNING_HELP = {
    "train": (
        "Makes (or reads) homes; trains an agent in them, first taught by an expert that knows the shortest "
        "path, then by reward with PPO; evaluates it on homes it has never seen; and leaves a folder that "
        "explains itself under runs/. With start_from=RUN it begins as another run's agent: the critic "
        "learns first, then the policy near what it was (experiment=reinforce).",
        """
        navagent train
        navagent train experiment=quick
        navagent train adaptation=finetune sensors=depth algorithm.total_frames=2e6
        navagent train scenes=dataset scenes.dataset=DATA scenes.scenes_dir=SCENES
        navagent train start_from=runs/IMITATED
        navagent train resume=runs/RUN
        """,
    ),
    "imitate": (
        "Trains an agent from an expert that knows the shortest path, and from nothing else: by DAgger, "
        "which labels every state that the agent comes to, or by behaviour cloning from a fixed set of "
        "demonstrations. Homes, agents, evaluation and the run's folder are as of `navagent train`, and so "
        "are all settings; some have other defaults.",
        """
        navagent imitate
        navagent imitate experiment=quick
        navagent imitate imitation.schedule=exponential imitation.decay=0.98 imitation.final_share=0
        navagent imitate algorithm.replay_epochs=1 algorithm.replay_steps=1024
        navagent imitate imitation=behaviour_cloning imitation.num_demos=500
        navagent imitate imitation=behaviour_cloning imitation.demos=DEMOS
        navagent imitate ladder runs/ladder
        navagent train start_from=runs/IMITATED
        """,
    ),
}
"""What the verbs that train do, and examples."""


def _learning_help(command: Command) -> str:
    """Every group, option and setting of ``navagent train`` or ``imitate``, with its default and its use."""
    from navagent.config import (
        GROUPS,
        as_typed,
        default_options,
        flatten,
        load_config,
        option_help,
        options,
        settings,
    )

    width = max(100, min(shutil.get_terminal_size().columns, 120))
    what, examples = LEARNING_HELP[command]
    lines = [
        f"usage: navagent {command} [GROUP=OPTION ...] [NAME=VALUE ...] [--show-config]",
        "",
        *textwrap.wrap(
            f"{what} Ctrl-C saves and stops; the same command with resume=RUN goes on. So do SIGTERM, with "
            "exit status 143, and SIGUSR1, with 75, which asks the cluster to queue the job again.",
            width,
        ),
        "",
        "examples:",
        textwrap.indent(textwrap.dedent(examples).strip(), "  "),
        "",
        "options:",
        "  --show-config   print the settings that the command line asks for, as YAML, and stop",
        "  --help          show this and stop",
        "",
        "groups, each with its options (files configs/GROUP/OPTION.yaml of the package; * is the default):",
    ]
    for group in GROUPS:
        for option in options(group):
            mark = "*" if option == default_options(command)[group] else " "
            head = f"{mark} {group}={option}"
            lines += textwrap.wrap(
                f"{head:32}  {option_help(group, option)}", width, subsequent_indent=" " * 34
            )
    lines += ["", "settings, with their defaults:"]
    defaults = flatten(load_config([], command))
    leaves = [replace(leaf, default=defaults.get(leaf.name, leaf.default)) for leaf in settings()]
    column = 2 + min(44, max(len(f"{leaf.name}={as_typed(leaf.default)}") for leaf in leaves))
    section = ""
    for leaf in leaves:
        if leaf.name.partition(".")[0] != section and "." in leaf.name:
            lines.append("")
            section = leaf.name.partition(".")[0]
        head = f"  {leaf.name}={as_typed(leaf.default)}"
        help_text = leaf.help + (f": {' | '.join(leaf.choices)}" if leaf.choices else "")
        if len(head) > column:
            lines.append(head)
            head = ""
        pad = " " * (column + 2)
        lines += textwrap.wrap(help_text, width, initial_indent=f"{head:{column + 2}}", subsequent_indent=pad)
    return "\n".join(lines)


def _train(arguments: Sequence[str]) -> int:
    return _learn("train", arguments)


def _imitate(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["ladder"]:
        from navagent.ladder_command import ladder

        return ladder(arguments[1:])
    return _learn("imitate", arguments)


def _learn(command: Command, arguments: Sequence[str]) -> int:
    from policies.names import nearest

    flags = [word for word in arguments if word.startswith("-")]
    if {"--help", "-h"} & set(flags):
        print(_learning_help(command))
        return 0
    for flag in flags:
        if flag != "--show-config":
            hint = nearest(flag, ["--show-config", "--help"])
            if not hint and "=" in flag:
                hint = f"; settings are written without dashes: {flag.lstrip('-')}"
            raise UsageError(f"unknown option {flag}{hint} (see `navagent {command} --help`)")
    from navagent.config import load_config, to_yaml

    config = load_config([word for word in arguments if not word.startswith("-")], command)
    if flags:
        print(to_yaml(config), end="")
        return 0
    from navagent.train import train

    train(config)
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "evaluate",
        "Measures a trained agent on a split of PointNav episodes: a table with 95 % intervals, one JSON "
        "line an episode, maps with its paths, videos, and other agents beside it. With --official, "
        "habitat-lab's own environment and measures are asked as well, and both are shown side by side.",
        """
        navagent evaluate runs/RUN
        navagent evaluate runs/RUN --agents run,random,expert --episodes 500 --videos 4
        navagent evaluate runs/RUN --dataset gibson/v1/val/val.json.gz --scenes scene_datasets
        navagent evaluate runs/RUN --simulator habitat
        navagent evaluate runs/RUN --simulator habitat simulator.gpu_ids=0 simulator.workers=4
        navagent evaluate runs/RUN --official --episodes 100
        navagent evaluate runs/RUN --official --agents run,other=runs/OTHER
        """,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a training run")
    parser.add_argument(
        "settings",
        metavar="simulator.NAME=VALUE",
        nargs="*",
        help="settings of habitat-sim that are not the run's own: see `navagent train --help`",
    )
    parser.add_argument(
        "--official",
        action="store_true",
        help="evaluate through habitat-lab too: its numbers, ours for the same actions, and ours of the "
        "built-in simulator; draws nothing, and needs habitat-sim and habitat-lab",
    )
    where = parser.add_argument_group("episodes")
    where.add_argument(
        "--split", metavar="NAME", help="split of the run's own data set (default: its val split)"
    )
    where.add_argument("--dataset", metavar="FILE", help="another PointNav-v1 file, .json.gz")
    where.add_argument("--scenes", metavar="DIR", help="folder that the file's scene ids start from")
    where.add_argument(
        "--episodes", metavar="N", type=int, help="at most so many episodes, evenly over scenes"
    )
    where.add_argument(
        "--simulator",
        metavar="NAME",
        help="raycast, which is built in, or habitat: habitat-sim (default: what the run was trained in)",
    )
    who = parser.add_argument_group("agents")
    who.add_argument(
        "--agents",
        metavar="NAMES",
        help="with commas: run, random, forward, goal, expert, or the folder of another run "
        "(default: run,random,expert; with --official run, as that takes trained agents only)",
    )
    who.add_argument(
        "--checkpoint", metavar="WHICH", default="best", help="best, latest or a number of frames"
    )
    sampling = who.add_mutually_exclusive_group()
    sampling.add_argument(
        "--sampled", dest="deterministic", action="store_false", help="draw actions (default)"
    )
    sampling.add_argument("--deterministic", action="store_true", help="take the most probable action")
    parser.set_defaults(deterministic=False)
    who.add_argument(
        "--turn-back",
        metavar="P",
        type=float,
        help="turn back right after a turn only with a probability of at least P "
        "(default: the run's evaluation.turn_back)",
    )
    who.add_argument("--seed", metavar="N", type=int, default=0, help="seed of drawn actions and intervals")
    what = parser.add_argument_group("output")
    what.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the results (default: RUN/evaluation/SPLIT, or SPLIT-official)",
    )
    what.add_argument("--maps", metavar="K", type=int, default=8, help="maps with the path (default: 8)")
    what.add_argument("--videos", metavar="K", type=int, default=2, help="videos (default: 2)")
    what.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    values = vars(parser.parse_intermixed_args(arguments))
    values["settings"] = tuple(values["settings"])
    if values["agents"] is None:
        values["agents"] = "run" if values["official"] else "run,random,expert"
    from navagent.evaluation.command import EvaluateOptions, evaluate_run

    evaluate_run(EvaluateOptions(**values))
    return 0


def _compare(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "compare",
        "Holds the first of several finished runs against the others: success and SPL on the same unseen "
        "episodes in a table with 95 % intervals and differences, and a plot against all frames that were "
        "trained, those of the run that one began as (start_from) included. Runs that were evaluated on "
        "different episodes are refused.",
        """
        navagent compare runs/REINFORCED runs/IMITATED runs/PPO
        navagent compare both=runs/REINFORCED imitation=runs/IMITATED ppo=runs/PPO --out runs/comparison
        """,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, or NAME=FOLDER")
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="comparison",
        help="folder for table.md, plot.png and results.json (default: %(default)s)",
    )
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="evaluation to compare, a folder under RUN/evaluation (default: the run's val split)",
    )
    options = parser.parse_args(arguments)
    from navagent.evaluation.compare import CompareOptions, compare_runs

    compare_runs(CompareOptions(tuple(options.runs), options.out, options.split))
    return 0


def _pretrain(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "pretrain",
        "Trains a perception encoder, with its decoder, on ground truth of the simulator, and says how good "
        "it is in homes it has not seen. Ctrl-C saves; the same command goes on.",
        """
        navagent pretrain runs/normals
        navagent pretrain runs/depth-normals --sensor depth --steps 8000
        navagent train encoder.weights=runs/normals/encoder.safetensors
        """,
    )
    parser.add_argument("out", metavar="OUT", help="folder for the weights, their card and a picture")
    parser.add_argument("--dataset", metavar="DIR", help="data set of homes (default: 40 generated ones)")
    for name, kind, default, line in PRETRAIN_OPTIONS:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{line} (default: {default})"
        )
    values = vars(parser.parse_args(arguments))
    out, dataset = Path(values.pop("out")), values.pop("dataset")
    from rich.console import Console

    from navagent.build import dataset_dir, training_device
    from navagent.config import TrainConfig
    from navagent.learning.pretrain import PretrainConfig, pretrain

    values["device"] = str(training_device(values["device"]))
    config = PretrainConfig(dataset=Path(dataset or "."), out=out, **values)
    if dataset is None:
        config = replace(config, dataset=dataset_dir(TrainConfig()))
    weights = pretrain(config, console=Console())
    command = training_command(config.sensor, config.encoder, str(weights))
    print(f"weights  {weights}\nuse them with\n  {command}")
    return 0


PRETRAIN_OPTIONS: tuple[tuple[str, type, Any, str], ...] = (
    ("encoder", str, "fcn5_small", "network family"),
    ("sensor", str, "rgb", "what it looks at: rgb or depth"),
    ("task", str, "normals", "what it predicts: normals, depth, reshading, curvature or edge_occlusion"),
    ("steps", int, 4000, "optimiser steps"),
    ("batch_size", int, 64, "frames a step"),
    ("train_frames", int, 10000, "frames rendered in train homes"),
    ("val_frames", int, 2000, "frames rendered in unseen homes"),
    ("learning_rate", float, 2e-3, "peak learning rate"),
    ("weight_decay", float, 2e-6, "weight decay"),
    ("height", int, 64, "image rows"),
    ("width", int, 64, "image columns"),
    ("hfov_deg", float, 90.0, "horizontal field of view [deg]"),
    ("sensor_height", float, 1.25, "height of the camera above the floor [m]"),
    ("seed", int, 0, "seed of viewpoints, initial weights and batches"),
    ("device", str, "cpu", "cpu, cuda, or auto: CUDA where there is one"),
)
"""Options of ``pretrain``: field of its settings, type, default, and what it is for."""


def _scenes(arguments: Sequence[str]) -> int:
    actions = {"generate": _scenes_generate, "show": _scenes_show}
    if not arguments or arguments[0] in ("--help", "-h"):
        print(SCENES_HELP)
        return 0 if arguments else BAD_INPUT
    if arguments[0] not in actions:
        from policies.names import nearest

        raise UsageError(
            f"scenes: there is no action {arguments[0]!r}{nearest(arguments[0], list(actions))} "
            f"(actions: {', '.join(actions)}; see `navagent scenes --help`)"
        )
    return actions[arguments[0]](arguments[1:])


SCENES_HELP = """\
usage: navagent scenes generate OUT [--num N] [--seed N]
       navagent scenes show SCENE [--out FILE.png]

generate   write procedural homes with train and val episodes, in Habitat's format
show       draw a scene's map and a few views to PNG; any .glb or .gltf that Habitat reads

examples:
  navagent scenes generate --num 40 --seed 0 homes
  navagent scenes show homes/scenes/home_004/home_004.glb --out home.png

`navagent scenes generate --help` and `navagent scenes show --help` tell more."""


def _scenes_generate(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "scenes generate",
        "Writes procedural homes with train and val episodes, no scene shared between them, in a folder that "
        "Habitat opens too. The same seed gives the same bytes.",
        """
        navagent scenes generate --num 40 --seed 0 homes
        navagent train scenes=dataset scenes.dataset=homes
        """,
    )
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument(
        "--num", metavar="N", type=int, default=40, help="homes, every fifth for val (default: 40)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed (default: 0)")
    parser.add_argument(
        "--train-episodes", metavar="N", type=int, default=500, help="in each train home (default: 500)"
    )
    parser.add_argument(
        "--val-episodes", metavar="N", type=int, default=25, help="in each val home (default: 25)"
    )
    options = parser.parse_args(arguments)
    from rich.console import Console

    from navagent.scenes import generate

    generate(
        options.out,
        options.num,
        options.seed,
        train_episodes=options.train_episodes,
        val_episodes=options.val_episodes,
        console=Console(file=sys.stderr),
    )
    print(options.out)
    return 0


def _scenes_show(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "scenes show",
        "Draws a scene's map, a floor each, and views from a few places to one PNG.",
        """
        navagent scenes show homes/scenes/home_004/home_004.glb
        navagent scenes show skokloster-castle.glb --out castle.png --views 8
        """,
    )
    parser.add_argument("scene", metavar="SCENE", help="a .glb or .gltf file")
    parser.add_argument(
        "--out", metavar="FILE", help="picture to write (default: SCENE's name with .png, here)"
    )
    parser.add_argument("--views", metavar="N", type=int, default=6, help="places to look from (default: 6)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the places (default: 0)")
    options = parser.parse_args(arguments)
    from navagent.scenes import show

    print(
        show(
            options.scene,
            options.out or f"{Path(options.scene).stem}.png",
            num_views=options.views,
            seed=options.seed,
        )
    )
    return 0


def _weights(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(WEIGHTS_HELP)
        return 0 if arguments else BAD_INPUT
    action, rest = arguments[0], arguments[1:]
    if action not in WEIGHTS_ACTIONS:
        from policies.names import nearest

        raise UsageError(
            f"weights: there is no action {action!r}{nearest(action, list(WEIGHTS_ACTIONS))} "
            f"(actions: {', '.join(WEIGHTS_ACTIONS)}; see `navagent weights --help`)"
        )
    parser = command_parser(f"weights {action}", *WEIGHTS_ACTIONS[action])
    if action == "list":
        parser.add_argument(
            "words", metavar="WORD", nargs="*", help="show only what these words are found in"
        )
    elif action == "show":
        parser.add_argument("name", metavar="NAME", help="a name that `navagent weights list` shows")
    elif action == "fetch":
        parser.add_argument(
            "names", metavar="NAME", nargs="+", help="names that `navagent weights list` shows"
        )
        parser.add_argument(
            "--offline", action="store_true", help="open no connection: check what was put in place by hand"
        )
    else:
        parser.add_argument("file", metavar="FILE", help="a file" + " or a name" * (action == "verify"))
    if action == "import":
        parser.add_argument("--out", metavar="FILE", help="file to write (default: FILE with .safetensors)")
    options = parser.parse_args(rest)
    from rich.console import Console

    from navagent import weights_command

    console = Console()
    if action == "list":
        weights_command.list_weights(console, options.words)
    elif action == "show":
        weights_command.show(console, options.name)
    elif action == "fetch":
        progress = Console(stderr=True)
        complete = weights_command.fetch_weights(progress, options.names, offline=options.offline)
        return 0 if complete else BAD_INPUT
    elif action == "import":
        weights_command.import_weights(console, options.file, options.out)
    else:
        found = weights_command.verify(options.file)
        weights_command.print_findings(console, found)
        return FAILED if found.faults else 0
    return 0


WEIGHTS_ACTIONS = {
    "list": (
        "Shows the published weights that navagent knows: what they are for, their size and licence, and "
        "which are on this machine.",
        """
        navagent weights list
        navagent weights list taskonomy normals
        """,
    ),
    "show": (
        "Tells all about some weights: address, hash, licence, what to cite, and the command that uses them.",
        "navagent weights show dinov2-base",
    ),
    "fetch": (
        "Downloads weights into the cache, checks them, and says where they are. An interrupted download "
        "goes on where it stopped.",
        """
        navagent weights fetch taskonomy-curvature taskonomy-normal
        navagent weights fetch --offline dinov2-base
        """,
    ),
    "import": (
        "Rewrites an old pickled weights file (.pth, .dat, .bin) as safetensors. Nothing in it is run, and a "
        "file that asks for more than tensors is refused.",
        """
        navagent weights import curvature_encoder.dat
        navagent weights import model.pth --out encoder.safetensors
        """,
    ),
    "verify": (
        "Looks at a weights file: whether it is a published one, readable, finite and trained, and whether "
        "other names hold the same weights. Exit status 1 where it must not be used.",
        """
        navagent weights verify curvature-distilled.pth
        navagent weights verify taskonomy-normal
        """,
    ),
}
"""Each action of ``navagent weights`` with what it does and examples."""

WEIGHTS_HELP = """\
usage: navagent weights list [WORD ...]
       navagent weights show NAME
       navagent weights fetch NAME [NAME ...] [--offline]
       navagent weights import FILE [--out FILE]
       navagent weights verify FILE

list     the published weights there are, and which are on this machine
show     all about some weights: address, hash, licence, what to cite
fetch    download weights into the cache, and check them
import   rewrite an old pickled file as safetensors, without running what is in it
verify   look at a file: published, readable, finite, trained, the same as another?

examples:
  navagent weights fetch taskonomy-curvature
  navagent train encoder.name=taskonomy_curvature

`navagent weights fetch --help` and so on tell more."""


def _adapt(arguments: Sequence[str]) -> int:
    from navagent.adapt_command import adapt

    return adapt(arguments)


def _bench(arguments: Sequence[str]) -> int:
    from navagent.bench_command import bench

    return bench(arguments)


def _demos(arguments: Sequence[str]) -> int:
    from navagent.demonstrations.command import demos

    return demos(arguments)


def _reference(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["record"]:
        from navagent.habitat_recorder.command import record_command

        return record_command(arguments[1:])
    parser = command_parser(
        "reference",
        "Holds the built-in simulator and the task against a folder of recordings of real Habitat, and "
        "prints every figure with its bar. Exit status 1 where one is missed. `navagent reference record` "
        "makes such a folder (see `navagent reference record --help`).",
        """
        navagent reference recordings
        navagent reference recordings --json
        navagent reference record data/scene_datasets/gibson recordings
        """,
    )
    parser.add_argument("folder", metavar="DIR", help="folder of recordings; one named record is ./record")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    from navagent.reference import run

    return run(options.folder, options.json)


def _export(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "export",
        "Writes a trained policy as ONNX, with a JSON card of its sensors, actions and preprocessing, for "
        "robots that have neither navagent nor PyTorch. What is written is compared with PyTorch over 200 "
        "steps first. Needs: pip install 'navagent[onnx]'",
        """
        navagent export runs/RUN
        navagent export runs/RUN --out robot
        navagent export runs/RUN --out robot --check
        """,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a training run")
    parser.add_argument("--out", metavar="DIR", help="folder of the two files (default: RUN/export)")
    parser.add_argument(
        "--checkpoint", metavar="WHICH", default="best", help="best (default), latest or a number of frames"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing: compare what was exported before with the run"
    )
    options = parser.parse_args(arguments)
    from navagent.export import check_export, export_run

    work = check_export if options.check else export_run
    folder, agreement = work(options.run, options.out, options.checkpoint)
    print(
        f"{folder}: as in PyTorch over {agreement.steps} steps, largest difference "
        f"{agreement.largest_difference:.1e}, the same action in {agreement.same_actions}"
    )
    return 0


def _doctor(arguments: Sequence[str]) -> int:
    from navagent.doctor.command import doctor

    return doctor(arguments)


VERBS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (_train, "train an agent: homes, imitation, PPO, evaluation, report"),
    "imitate": (_imitate, "train an agent from an expert alone: DAgger or behaviour cloning"),
    "evaluate": (_evaluate, "measure a trained agent, with maps, videos and other agents beside it"),
    "compare": (_compare, "hold finished runs against each other, on one plot and in one table"),
    "pretrain": (_pretrain, "train a perception encoder on the simulator's ground truth"),
    "demos": (_demos, "record, replay and exchange demonstrations of the expert, an agent or a person"),
    "scenes": (_scenes, "generate homes to navigate; draw scenes"),
    "weights": (_weights, "list, fetch, import and check published weights"),
    "adapt": (_adapt, "list what adaptation methods cost; distil side networks; compare all methods"),
    "bench": (_bench, "measure how fast training is, beside other learners"),
    "reference": (_reference, "hold the simulator against recordings of real Habitat; make them"),
    "export": (_export, "write a policy as ONNX, with a card, for robots without navagent"),
    "doctor": (_doctor, "check the installation, and say what is wrong and how to mend it"),
}
"""Each verb with what runs it and one line on what it is for."""


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        width = max(len(verb) for verb in VERBS)
        print(
            OVERVIEW.format(
                verbs="\n".join(f"  {verb:{width}}   {line}" for verb, (_, line) in VERBS.items())
            )
        )
        return 0 if arguments else BAD_INPUT
    if arguments[0] == "--version":
        import navagent

        print(f"navagent {navagent.__version__}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        from policies.names import nearest

        raise UsageError(
            f"there is no verb {verb!r}{nearest(verb, list(VERBS))} (verbs: {', '.join(VERBS)}; "
            f"see `navagent --help`)"
        )
    return VERBS[verb][0](arguments[1:])


class _Warnings:
    """Shows a warning as one line, and each only once."""

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        if text not in self._shown:
            self._shown.add(text)
            print(f"navagent: warning: {text}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    An error is one message on standard error; the environment variable ``NAVAGENT_DEBUG=1`` shows where it
    came from.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = _Warnings()
    try:
        if arguments[:1] != ["doctor"]:  # who tells more of what is wrong
            check_packages()
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has gone; Python's own flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError, ShadowedPackageError) as error:
        # An error that tells where the agents were has broken a training off: no input was wrong.
        if os.environ.get("NAVAGENT_DEBUG", "0") not in ("", "0") or getattr(error, "__notes__", None):
            raise
        print(f"navagent: {error}", file=sys.stderr)
        # The latter: processes of the simulator died too often.
        return FAILED if isinstance(error, (FloatingPointError, ChildProcessError)) else BAD_INPUT
