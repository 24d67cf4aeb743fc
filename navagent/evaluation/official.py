"""``navagent evaluate --official``: what habitat-lab itself measures, beside what this package measures.

Three evaluations of each agent, on the same episodes and with the same random numbers for the same episode:

1. habitat-lab's: ``habitat.Env`` on habitat-sim, with its own episode reader, iterator and measures. The
   agent is :class:`navagent.habitat_agent.NavagentAgent`, as Habitat's benchmark runs it.
2. The same actions here: what the agent did there is done again by the built-in simulator and measured by
   :class:`envs.task.Measures`. Pixels have no part in it, so it must agree, in every episode, to
   :data:`AGREEMENT`; where it does not, one of both moves or measures wrongly. Noise of motion cannot be
   had again: there the agents are put where they were in Habitat.
3. The built-in simulator's own: what ``navagent evaluate`` says without Habitat. Its pixels differ a little,
   a drawn action tips over now and then and leads another way, so single episodes differ, and the means
   should not.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from envs.episodes import Episode, heading_of
from envs.files import atomic_write
from envs.simulators.base import Action, Simulator
from envs.vector_env import PointNavVectorEnv
from navagent.build import Split, make_vector_env, read_split, simulator_gpus
from navagent.config import (
    ConfigError,
    EnvConfig,
    SensorsConfig,
    SimulatorConfig,
    TrainConfig,
    read_config,
)
from navagent.distributed import Ranks
from navagent.evaluation.agents import Agent, episode_name
from navagent.evaluation.command import (
    Contender,
    EvaluateOptions,
    asked_simulator,
    contender_config,
    evaluate_contenders,
    evaluation_progress,
    parse_agents,
    safe_name,
    split_source,
    turn_back,
    what_was_evaluated,
    write_evaluation,
)
from navagent.evaluation.evaluate import evaluate_agent, spread
from navagent.evaluation.habitat_settings import habitat_settings, to_hydra
from navagent.evaluation.metrics import Estimate, paired_difference, results_table, summarise, to_json
from navagent.evaluation.report import write_report
from navagent.evaluation.results import EpisodeResult
from navagent.habitat_agent import NavagentAgent
from navagent.real_habitat import HabitatMissingError, import_habitat
from navagent.runs import Run

AGREEMENT = 0.001
"""By how much success and SPL of an episode may differ between habitat-lab's and ours on the same actions."""
COMPARED = ("success", "spl")
"""What must agree."""
OTHER_RULE = (
    "  without sliding (env.allow_sliding=false), habitat-sim up to release 0.3.3 ends moves that begin at a "
    "wall otherwise than builds since February 2026 and the built-in simulator do: see docs/habitat.md"
)
"""Why tasks without sliding may disagree."""
HABITAT, REPLAYED, BUILT_IN = "habitat-lab", "the same actions here", "built-in simulator"
"""What the three evaluations are called."""


@dataclass(frozen=True)
class Walk:
    """What an agent did in one episode in Habitat, and what habitat-lab measured."""

    episode: Episode
    """The episode."""
    actions: tuple[Action, ...]
    """What the agent did: T of them."""
    positions: NDArray[np.float32]
    """Where it was before each action and at the end: (T + 1, 3) [m]."""
    yaws: NDArray[np.float32]
    """Where it looked: (T + 1,) [rad]."""
    collided: NDArray[np.bool_]
    """Which of its actions ended in a collision: (T,)."""
    start_distance: float
    """habitat-lab's distance to the goal at the start [m]."""
    measured: Mapping[str, float]
    """habitat-lab's measures at the end, by their names."""
    reward: float
    """Sum of the run's rewards, of habitat-lab's measures."""

    def result(self, agent: str) -> EpisodeResult:
        """This as a result of ``agent``."""
        moves = np.linalg.norm(np.diff(self.positions.astype(np.float64), axis=0), axis=1)
        return EpisodeResult(
            agent=agent,
            scene_id=self.episode.scene_id,
            episode_id=self.episode.episode_id,
            success=bool(self.measured["success"]),
            spl=self.measured["spl"],
            soft_spl=self.measured["soft_spl"],
            distance_to_goal=self.measured["distance_to_goal"],
            geodesic_distance=self.start_distance,
            path_length=float(moves.sum()),
            steps=len(self.actions),
            collisions=int(self.collided.sum()),
            reward=self.reward,
            start=self.episode.start_position,
            goal=self.episode.goal_position,
            positions=self.positions,
            yaws=self.yaws,
        )


def evaluate_official(options: EvaluateOptions, console: Console, ranks: Ranks) -> Path:
    """Evaluates trained agents through habitat-lab and here; returns the folder of the results.

    Writes ``summary.json``, ``episodes.jsonl`` and ``habitat.yaml`` there, settings with which habitat-lab
    itself plays the split: ``habitat.Benchmark("habitat.yaml")``. Other agents' are in ``habitat-NAME.yaml``.

    Raises:
        ConfigError: Habitat is not installed, an agent is not a trained one, or habitat-lab cannot express
            the run's task.
    """
    try:
        import_habitat()
    except HabitatMissingError as error:
        raise ConfigError(f"--official: {error}") from None
    if ranks.size > 1:
        raise ConfigError(f"--official runs in one process, not in {ranks.size}: start it without torchrun")
    run = Run(options.run)
    config = dataclasses.replace(read_config(run.config_path), device=options.device)
    asked = asked_simulator(options, config, "habitat")
    gpu = simulator_gpus(dataclasses.replace(config, simulator=asked), 1)[0]
    # What is set beside Habitat is the built-in simulator, whichever the run was trained in.
    config = dataclasses.replace(config, simulator=SimulatorConfig())
    contenders = parse_agents(options.agents, run)
    checkpoints = {c.name: _trained(c).checkpoint(options.checkpoint) for c in contenders}
    file, scenes_dir, name = split_source(options, config)
    split = read_split(file, scenes_dir, name)
    episodes = spread(split.episodes, options.episodes or len(split.episodes))
    out = Path(options.out) if options.out else run.path / "evaluation" / f"{name}-official"
    results: dict[str, dict[str, list[EpisodeResult]]] = {}
    for contender in contenders:
        settings = contender_config(_trained(contender), config)
        other = "" if contender is contenders[0] else f"-{safe_name(contender.name)}"
        written = out / f"habitat{other}.yaml"
        found = habitat_settings(settings, file, scenes_dir, options.seed, gpu)
        _write_settings(written, found, options)
        env = open_habitat(written, split, episodes, asked.scene_dataset_config)
        walks = _play_in_habitat(contender, settings, env, split, episodes, options)
        chosen = {episode.scene_id: split.scenes[episode.scene_id] for episode in episodes}
        results[contender.name] = {
            HABITAT: [walk.result(f"{contender.name}, {HABITAT}") for walk in walks],
            REPLAYED: _named(replay(walks, settings, chosen, options.seed), f"{contender.name}, {REPLAYED}"),
            BUILT_IN: _named(
                evaluate_contenders([contender], config, episodes, chosen, options)[0][contender.name],
                f"{contender.name}, {BUILT_IN}",
            ),
        }
    flat = {found[0].agent: found for own in results.values() for found in own.values()}
    summaries = {agent: summarise(found, options.seed) for agent, found in flat.items()}
    compared = {agent: compare(own, options.seed) for agent, own in results.items()}
    summary = what_was_evaluated(options, config, out.name, episodes, checkpoints) | {
        "agents": {agent: to_json(values) for agent, values in summaries.items()},
        "official": {agent: found.to_json() for agent, found in compared.items()},
    }
    write_evaluation(out, summary, [result for found in flat.values() for result in found])
    title = f"{run.path.name} on {name}: {len(episodes)} episodes in {summary['scenes']} scenes"
    console.print(results_table(summaries, title, console.width))
    for agent, comparison in compared.items():
        console.print(f"{agent}: {comparison}", highlight=False)
        if not comparison.agrees and not config.env.allow_sliding:
            console.print(OTHER_RULE, highlight=False)
    report = write_report(run)
    console.print(
        f"results  {out}\nhabitat  {out / 'habitat.yaml'}\nreport   {report}", soft_wrap=True, highlight=False
    )
    return out


def _trained(contender: Contender) -> Run:
    if contender.run is None:
        raise ConfigError(
            f"--official: {contender.name!r} is no trained agent, and knows what Habitat does not tell; name "
            "runs only: --agents run"
        )
    return contender.run


def _named(results: list[EpisodeResult], name: str) -> list[EpisodeResult]:
    return [dataclasses.replace(result, agent=name) for result in results]


# habitat-lab's -------------------------------------------------------------------------------------------


def _write_settings(path: Path, settings: Mapping[str, Any], options: EvaluateOptions) -> None:
    comment = (
        f"What {options.run} was trained for, for habitat-lab: written by `navagent evaluate --official`."
    )
    with atomic_write(path) as temporary:
        temporary.write_text(to_hydra(settings, comment), encoding="utf-8")


def _play_in_habitat(
    contender: Contender,
    config: TrainConfig,
    env: Any,
    split: Split,
    episodes: Sequence[Episode],
    options: EvaluateOptions,
) -> list[Walk]:
    agent = NavagentAgent(
        _trained(contender).path,
        checkpoint=options.checkpoint,
        device=options.device,
        deterministic=options.deterministic,
        turn_back=turn_back(options, config),
        seed=options.seed,
    )
    try:
        with evaluation_progress() as progress:
            task = progress.add_task(f"{contender.name} in Habitat", total=len(episodes))
            return play(env, agent, split, episodes, config.env, options.seed, lambda: progress.advance(task))
    finally:
        env.close()


class HabitatAgent(Protocol):
    """What acts in Habitat, as :class:`navagent.habitat_agent.NavagentAgent` does."""

    def reset(self, draws: str | None = None) -> None:
        """An episode begins, whose random choices belong to ``draws``."""

    def act(self, observations: Mapping[str, Any]) -> dict[str, str]:
        """The next action: ``{"action": NAME}``."""


def open_habitat(
    settings: Path, split: Split, episodes: Sequence[Episode], scene_dataset: str | None = None
) -> Any:
    """habitat-lab's environment over some episodes of a split, each of which it hands out once.

    Args:
        settings: The file that :func:`~navagent.evaluation.habitat_settings.to_hydra` wrote.
        split: What the same files hold as this package reads them.
        episodes: Those of the split that are played.
        scene_dataset: Habitat's description of the data set that the scenes belong to, where they need one.

    Raises:
        ConfigError: habitat-lab reads other episodes from the files.
    """
    import habitat

    import navagent.evaluation.habitat_noise  # noqa: F401

    config = habitat.get_config(str(settings.resolve()))
    data = habitat.make_dataset(config.habitat.dataset.type, config=config.habitat.dataset)
    ours, theirs = [e.episode_id for e in split.episodes], [e.episode_id for e in data.episodes]
    if ours != theirs:
        raise ConfigError(
            f"{split.name}: habitat-lab reads {len(theirs)} episodes from its files and navagent "
            f"{len(ours)}, or in another order"
        )
    wanted = {id(episode) for episode in episodes}
    chosen = []
    for own, other in zip(split.episodes, data.episodes, strict=True):
        if id(own) in wanted:
            # habitat-lab joins the id to its folder; the scene was found in other places too.
            other.scene_id = str(split.scenes[own.scene_id].resolve())
            if scene_dataset is not None:
                other.scene_dataset_config = str(Path(scene_dataset).expanduser().resolve())
            chosen.append(other)
    data.episodes = chosen
    return habitat.Env(config, data)


def play(
    env: Any,
    agent: HabitatAgent,
    split: Split,
    episodes: Sequence[Episode],
    rules: EnvConfig,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> list[Walk]:
    """Plays episodes in Habitat and returns a walk each, in their order.

    Args:
        env: habitat-lab's environment, of :func:`open_habitat`.
        agent: Who acts.
        split: What the episodes are of.
        episodes: Those that the environment hands out, in whatever order.
        rules: What is rewarded.
        seed: Of the agent's choices and of noise.
        done: Called at the end of each.
    """
    named = {(str(split.scenes[e.scene_id].resolve()), e.episode_id): e for e in episodes}
    walks: dict[int, Walk] = {}
    for _ in episodes:
        # Noise of cameras and motion is the episode's, whatever was played before. Which one is next cannot
        # be known before it begins.
        env.seed(seed)
        observations = env.reset()
        episode = named[env.current_episode.scene_id, env.current_episode.episode_id]
        draws = episode_name(seed, episode)
        env.seed(zlib.crc32(draws.encode()))
        agent.reset(draws)
        walks[id(episode)] = _walk(env, agent, observations, episode, rules)
        done()
    return [walks[id(episode)] for episode in episodes]


def _walk(
    env: Any, agent: HabitatAgent, observations: Mapping[str, Any], episode: Episode, rules: EnvConfig
) -> Walk:
    """Plays the episode that has just begun."""
    poses, actions, collided = [_pose(env)], [], []
    measured = env.get_metrics()
    start_distance, reward = float(measured["distance_to_goal"]), 0.0
    while not env.episode_over:
        action = agent.act(observations)
        observations = env.step(action)
        actions.append(Action[action["action"].upper()])
        poses.append(_pose(env))
        measured = env.get_metrics()
        collided.append(bool(measured["collisions"]["is_collision"]))
        bonus = measured["spl" if rules.success_bonus == "spl" else "success"]
        reward += rules.slack_reward + rules.success_reward * bonus
        reward += rules.progress_reward * measured["distance_to_goal_reward"]
    positions, yaws = zip(*poses, strict=True)
    return Walk(
        episode,
        tuple(actions),
        np.array(positions, np.float32),
        np.array(yaws, np.float32),
        np.array(collided, bool),
        start_distance,
        {name: float(value) for name, value in measured.items() if not isinstance(value, dict)},
        float(reward),
    )


def _pose(env: Any) -> tuple[NDArray[np.float32], float]:
    state = env.sim.get_agent_state()
    turned = state.rotation
    return state.position, heading_of((turned.x, turned.y, turned.z, turned.w))


# Ours ----------------------------------------------------------------------------------------------------


def replay(
    walks: Sequence[Walk], config: TrainConfig, scenes: dict[str, Path], seed: int = 0
) -> list[EpisodeResult]:
    """What the built-in simulator and this package's measures make of the same actions, in the walks' order.

    Args:
        walks: What was done in Habitat.
        config: Settings of the task.
        scenes: File of each scene, by its id.
        seed: Of nothing that matters; evaluations have one.
    """
    exact = dataclasses.replace(config.env, stop="called", actuation_noise=0.0)
    blind = SensorsConfig(rgb=False, depth=False)
    env = make_vector_env(
        dataclasses.replace(config, env=exact, sensors=blind),
        [walk.episode for walk in walks],
        scenes,
        min(config.evaluation.num_envs, len(walks)),
        "once",
        AutoresetMode.NEXT_STEP,
        seed=seed,
    )
    agent = Replayer(walks)
    if config.env.actuation_noise:
        env.task.actuation = agent
    try:
        return evaluate_agent(env, agent, seed)
    finally:
        env.close()


class Replayer(Agent):
    """Does what was done in Habitat; where it stands for the motion too, it is where it was in Habitat."""

    name = "replayed"

    def __init__(self, walks: Sequence[Walk]) -> None:
        self._walks = {(walk.episode.scene_id, walk.episode.episode_id): walk for walk in walks}

    def begin(self, env: PointNavVectorEnv, seed: int) -> None:
        """Rewinds."""
        super().begin(env, seed)
        self._step = torch.zeros(env.num_envs, dtype=torch.int64)

    def act(self, observations: dict[str, Any], episode_starts: Tensor) -> Tensor:
        """The actions that were taken at this step."""
        self._step = torch.where(episode_starts.cpu(), 0, self._step + 1)
        actions = [
            Action.STOP if walk is None else walk.actions[min(step, len(walk.actions) - 1)]
            for walk, step in self._now()
        ]
        return torch.tensor([int(action) for action in actions], device=self.env.simulator.device)

    def step(self, simulator: Simulator, actions: Tensor) -> Tensor:
        """Puts every agent where its action had led it in Habitat, and says who had collided: (N,) bool."""
        position, yaw = simulator.position.clone(), simulator.yaw.clone()
        collided = torch.zeros(simulator.num_agents, dtype=torch.bool, device=simulator.device)
        for index, (walk, step) in enumerate(self._now()):
            if walk is not None and step < len(walk.actions):
                position[index] = torch.from_numpy(walk.positions[step + 1])
                yaw[index] = float(walk.yaws[step + 1])
                collided[index] = bool(walk.collided[step])
        agents = torch.arange(simulator.num_agents, device=simulator.device)
        simulator.reset(agents, simulator.scene.clone(), position, yaw)
        return collided

    def _now(self) -> list[tuple[Walk | None, int]]:
        """Each agent's walk, None where it has no episode, and the step it is at."""
        episodes = self.env.sampler.episodes
        walks = [
            None if index < 0 else self._walks[episodes[index].scene_id, episodes[index].episode_id]
            for index in self.env.current_episodes()
        ]
        return list(zip(walks, self._step.tolist(), strict=True))


# Side by side --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """How one agent's three evaluations compare."""

    episodes: int
    """How many there are."""
    apart: Mapping[str, float]
    """By how much habitat-lab and ours differ at most in an episode on the same actions, by measure."""
    disagreeing: tuple[str, ...]
    """Episodes in which that is more than :data:`AGREEMENT`, as ``SCENE EPISODE``."""
    strayed: float
    """How far apart the agent was at most at any step on the same actions [m]."""
    difference: Mapping[str, Estimate]
    """habitat-lab's minus the built-in simulator's own evaluation, episode by episode, by measure."""
    within: Mapping[str, bool]
    """Whether each of these two means lies within the other's 95 % interval, by measure."""

    @property
    def agrees(self) -> bool:
        """Whether habitat-lab and ours agree on the same actions."""
        return not self.disagreeing

    def to_json(self) -> dict[str, Any]:
        """This as plain data."""
        return {
            "agrees": self.agrees,
            "allowed": AGREEMENT,
            "largest_difference": dict(self.apart),
            "disagreeing": list(self.disagreeing),
            "largest_distance": self.strayed,
            "habitat_minus_built_in": to_json(self.difference),
            "within_intervals": dict(self.within),
        }

    def __str__(self) -> str:
        apart = " and ".join(f"{value:.1g} in {name}" for name, value in self.apart.items())
        verdict = "agrees" if self.agrees else "DISAGREES"
        text = (
            f"navagent {verdict} with habitat-lab on the same actions: apart by at most {apart} in any of "
            f"{self.episodes} episodes (allowed: {AGREEMENT:g}), and by {self.strayed:.1g} m in place"
        )
        if self.disagreeing:
            shown = ", ".join(self.disagreeing[:5])
            text += f"\n  it disagrees in {len(self.disagreeing)} episodes: {shown}"
        for name, value in self.difference.items():
            inside = "each lies" if self.within[name] else "they do NOT both lie"
            text += (
                f"\n  {name}: habitat-lab minus the built-in simulator {value.mean:+.3f} ("
                f"{value.low:+.3f} to {value.high:+.3f}, episode by episode); {inside} within the other's "
                "95 % interval"
            )
        return text


def compare(results: Mapping[str, Sequence[EpisodeResult]], seed: int = 0) -> Comparison:
    """Compares an agent's three evaluations, each in the order of the same episodes."""
    theirs, again, own = results[HABITAT], results[REPLAYED], results[BUILT_IN]
    pairs = list(zip(theirs, again, strict=True))
    gaps = {name: [_gap(getattr(a, name), getattr(b, name)) for a, b in pairs] for name in COMPARED}
    disagreeing = [
        f"{a.scene_id} {a.episode_id}"
        for index, (a, _) in enumerate(pairs)
        if any(found[index] > AGREEMENT for found in gaps.values())
    ]
    strayed = 0.0
    for a, b in pairs:
        both = min(len(a.positions), len(b.positions))
        strayed = max(strayed, float(np.abs(a.positions[:both] - b.positions[:both]).max(initial=0.0)))
    first, second = summarise(theirs, seed), summarise(own, seed)
    within = {
        name: first[name].low <= second[name].mean <= first[name].high
        and second[name].low <= first[name].mean <= second[name].high
        for name in COMPARED
    }
    return Comparison(
        len(pairs),
        {name: max(found) for name, found in gaps.items()},
        tuple(disagreeing),
        strayed,
        {name: paired_difference(theirs, own, name, seed) for name in COMPARED},
        within,
    )


def _gap(theirs: float, ours: float) -> float:
    """How far two numbers are apart; not at all where both are not finite."""
    if not math.isfinite(theirs) or not math.isfinite(ours):
        return 0.0 if math.isfinite(theirs) == math.isfinite(ours) else math.inf
    return abs(theirs - ours)
