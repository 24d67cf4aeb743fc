"""PointNav as a batched Gymnasium environment: many agents, one simulator, one call a step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from envs.expert import Advice, ShortestPathFollower
from envs.noise import ActuationNoise, NoiseConfig, gaussian_rgb, redwood_depth
from envs.sampler import EpisodeSampler
from envs.sensors import TASK_SENSORS
from envs.simulators.base import SensorSpec, Simulator
from envs.task import PointNavConfig, PointNavTask

PREVIOUS_ACTION = "previous_action"
NO_EPISODE = -1

Observations = dict[str, Any]


class PointNavVectorEnv(VectorEnv[Observations, Any, Any]):
    """N agents that navigate to points, stepped, rendered and judged in one batch.

    Example::

        env = PointNavVectorEnv(simulator, PointNavConfig(), sampler, ["rgb", "pointgoal_with_gps_compass"])
        observations, _ = env.reset(seed=0)
        while True:
            observations, rewards, terminations, truncations, infos = env.step(env.expert_actions())
            if "_episode" in infos:
                print(infos["episode"]["spl"][infos["_episode"]])

    Observations are a dictionary of batched arrays: a colour camera gives ``(N, height, width, 3)`` uint8,
    a depth camera ``(N, height, width, 1)`` float32 in 0..1 over ``depth_range``, surface normals
    ``(N, height, width, 3)`` float32, instance ids ``(N, height, width, 1)`` int32; the goal sensors of
    :data:`envs.sensors.TASK_SENSORS` ``(N, size)`` float32; ``previous_action`` ``(N,)`` int64, 0 at the
    start of an episode and the action plus 1 after that.

    When episodes end, infos holds, with Gymnasium's masks under ``_name``: ``episode``, the measures of
    :meth:`measures` and ``r`` and ``l`` (return and length), (N,) each and 0 for agents whose episode goes
    on; ``episode_id`` and ``scene_id``, lists of N with None for those; ``final_info`` with the same again;
    and, with same-step autoreset, ``final_obs``, a full batch that holds the last observations of the ended
    episodes and the current ones of all others.

    Where a process of the simulator died and was started again
    (:meth:`envs.simulators.base.Simulator.take_deaths`), the episodes of its agents begin again. For such an
    agent the step is a truncation, with its last observation where the autoreset mode has that of others, and
    its next reset leads to the start of the same episode. What it had done of it is no result and is not in
    ``_episode``; infos then hold ``interrupted``, (N,) bool, and :attr:`interruptions` counts. An episode
    that ended by itself in this step has ended, and one at its start has nothing to begin again.

    Agents that get no further episode (a sampler that hands each out once) stand still and earn nothing:
    see :attr:`active`.

    Args:
        simulator: where the agents live; closed with this environment.
        config: rules of the task.
        sampler: episodes; its scenes are loaded where the simulator does not hold exactly these.
        observations: names of cameras of the simulator, of goal sensors, or ``previous_action``.
        output: torch tensors on the simulator's device, or numpy arrays. Actions may always be either.
        autoreset_mode: as Gymnasium defines it. ``DISABLED`` resets ended episodes by
            ``reset(options={"reset_mask": mask})``.
        noise: of cameras and motion.
        depth_range: depths that map to 0 and 1 [m].
        render_mode: ``"rgb_array"``, or None.
        final_observations: with same-step autoreset, whose last observations are wanted: those of all
            ``"ended"`` episodes, or only of ``"truncated"`` ones, for learners that need no others. The rest
            of ``final_obs`` is then the next episode's.

    Raises:
        ValueError: an observation is unknown, or the parts do not fit each other.
    """

    def __init__(
        self,
        simulator: Simulator,
        config: PointNavConfig,
        sampler: EpisodeSampler,
        observations: Sequence[str],
        output: Literal["torch", "numpy"] = "torch",
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
        noise: NoiseConfig | None = None,
        depth_range: tuple[float, float] = (0.0, 10.0),
        render_mode: str | None = None,
        final_observations: Literal["ended", "truncated"] = "ended",
    ) -> None:
        if output not in ("torch", "numpy"):
            raise ValueError(f"output {output!r} is not one of torch, numpy")
        if sampler.num_agents != simulator.num_agents:
            raise ValueError(f"the sampler serves {sampler.num_agents} agents, not {simulator.num_agents}")
        if final_observations not in ("ended", "truncated"):
            raise ValueError(f"final_observations {final_observations!r} is not one of ended, truncated")
        if not 0.0 <= depth_range[0] < depth_range[1]:
            raise ValueError(f"depth_range {depth_range} must be (near, far) with 0 <= near < far")
        self.simulator = simulator
        self.config = config
        self.sampler = sampler
        self.output = output
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.noise = noise or NoiseConfig()
        self.depth_range = depth_range
        self.final_observations = final_observations
        self.num_envs = simulator.num_agents
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": 10,
            "autoreset_mode": self.autoreset_mode,
        }
        device = simulator.device
        self._cameras = {sensor.name: sensor for sensor in simulator.sensors if sensor.name in observations}
        self._observations = tuple(dict.fromkeys(observations))
        self._shown = self._camera_to_show()
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r} is not one of None, 'rgb_array'")
        if render_mode is not None and self._shown is None:
            raise ValueError("render_mode 'rgb_array' needs a colour or depth camera in the simulator")
        self.render_mode = render_mode

        self.single_observation_space = spaces.Dict({name: self._space(name) for name in self._observations})
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.single_action_space = spaces.Discrete(config.num_actions)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

        self._sensor_generator = torch.Generator(device)
        self._motion_generator = torch.Generator(device)
        self._seed_noise(sampler.seed)
        self._noise_before = self._sensor_generator.get_state()
        actuation = ActuationNoise(self.noise, self._motion_generator) if self.noise.actuation else None
        self.task = PointNavTask(simulator, config, actuation)
        self.expert = ShortestPathFollower(simulator.paths, simulator.agent, config.success_distance)
        self._previous_action = torch.zeros(self.num_envs, dtype=torch.int64, device=device)
        self._episode = np.full(self.num_envs, NO_EPISODE, dtype=np.int64)
        self._ended = np.zeros(self.num_envs, dtype=bool)  # ended and not yet reset (next-step, disabled)
        self._again = np.zeros(self.num_envs, dtype=bool)  # whose next episode is the one that they had
        self.interruptions = 0
        """How many episodes began again because a process of the simulator died."""
        episodes = sampler.episodes
        values = partial(torch.tensor, dtype=torch.float32, device=device)
        self._starts = values([episode.start_position for episode in episodes])
        self._yaws = values([episode.start_yaw for episode in episodes])
        self._goals = values([episode.goal_position for episode in episodes])
        self._load_scenes()

    # Gymnasium's interface ------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Starts the next episode of every agent, or of those in ``options["reset_mask"]`` (N,) bool.

        With a seed, or where the sampler hands out each episode once, the episodes start from the first
        again. Otherwise the next episode of an agent that was interrupted is the one that it had.
        """
        super().reset(seed=seed)
        mask = np.ones(self.num_envs, dtype=bool)
        if options and "reset_mask" in options:
            mask = np.asarray(options["reset_mask"], dtype=bool)
            if mask.shape != (self.num_envs,):
                raise ValueError(f"reset_mask has shape {mask.shape}, expected ({self.num_envs},)")
        elif seed is not None or self.sampler.mode == "once":
            self.sampler.restart(seed)
            self._again[:] = False
            self._load_scenes()
        if seed is not None:
            self._seed_noise(seed)
        self._start_episodes(np.flatnonzero(mask))
        if self.sampler.mode == "once":
            # The resident scenes may be used up, and with one agent nobody else's step would load the next.
            self._rotate_scenes()
        return self._out(self._observe()), {}

    def step(self, actions: Any) -> tuple[Observations, Any, Any, Any, dict[str, Any]]:
        """Takes an action of every agent, (N,) integers; those of agents without an episode are ignored.

        Raises:
            ValueError: actions of a wrong shape or out of range; with autoreset disabled, an agent whose
                episode has ended was not reset.
        """
        actions = self._checked(actions)
        if self.autoreset_mode == AutoresetMode.DISABLED and self._ended.any():
            raise ValueError(
                f"the episodes of agents {np.flatnonzero(self._ended).tolist()} have ended; with autoreset "
                'disabled, call reset(options={"reset_mask": mask}) for them first'
            )
        # Processes may also have died since the last step, for whoever asked what the expert would do.
        deserted = self._deserted()
        self._previous_action = torch.where(self.task.active, actions + 1, 0)
        reward, terminated, truncated = self.task.step(actions)
        done = (terminated | truncated).cpu().numpy()
        infos = self._end_infos(done) if done.any() else {}
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            wanted = done
            if self.final_observations == "truncated":
                wanted = (truncated & ~terminated).cpu().numpy()
            observations, interrupted = self._restart_same_step(done, wanted, deserted, infos)
        else:
            # With next-step autoreset, agents whose last step ended their episode start the next one now.
            self._start_episodes(np.flatnonzero(self._ended))
            self._rotate_scenes()
            observations = self._observe()
            interrupted = self._deserted(deserted)
            if interrupted.any():
                self._again |= interrupted
                self.task.active[self._indices(interrupted)] = False
            self._ended = done | interrupted
        if interrupted.any():
            self.interruptions += int(interrupted.sum())
            mask = torch.from_numpy(interrupted).to(self.simulator.device)
            truncated = truncated | mask
            infos |= {"interrupted": self._out(mask), "_interrupted": self._out(mask.clone())}
        return (
            self._out(observations),
            self._out(reward),
            self._out(terminated),
            self._out(truncated),
            infos,
        )

    def render(self) -> tuple[np.ndarray, ...] | None:
        """What every agent's first colour camera sees, else its depth in grey: N times (height, width, 3)."""
        if self._shown is None or self.render_mode is None:
            return None
        image = self.simulator.render()[self._shown.name]
        if self._shown.kind == "depth":
            grey = (image / self.depth_range[1]).clamp(0.0, 1.0) * 255.0
            image = grey.to(torch.uint8)[..., None].expand(*image.shape, 3)
        return tuple(image.cpu().numpy().copy())

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the simulator."""
        self.simulator.close()

    # Beyond Gymnasium's ---------------------------------------------------------------------------------

    @property
    def active(self) -> Tensor:
        """Agents with an episode in progress: (N,) bool."""
        return self.task.active.clone()

    def measures(self) -> dict[str, Tensor]:
        """Measures of the episodes so far, (N,) each: see :meth:`envs.task.PointNavTask.measures`."""
        return self.task.measures()

    def current_episodes(self) -> list[int]:
        """Index into ``sampler.episodes`` of each agent's episode, -1 where it has none."""
        return [int(index) for index in self._episode]

    def expert_actions(self) -> Tensor:
        """What the shortest-path follower would do now, as actions of this environment: (N,) int64."""
        return self.expert_advice().actions

    def expert_advice(self) -> Advice:
        """The same, and how many turns it would make before its next move forward."""
        simulator = self.simulator
        advice = self.expert.advice(
            simulator.scene, simulator.position, simulator.yaw, self.task.goal, self.task.active
        )
        return advice._replace(actions=self.task.policy_actions(advice.actions))

    def set_max_geodesic(self, max_geodesic: float) -> None:
        """Gives out no longer episodes from now on [m]; episodes in progress go on."""
        self.sampler.set_max_geodesic(max_geodesic)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly: nested dictionaries of tensors and what JSON can hold."""
        return {
            "task": self.task.state_dict(),
            "sampler": self.sampler.state_dict(),
            "previous_action": self._previous_action.clone(),
            "episode": self._episode.tolist(),
            "ended": self._ended.tolist(),
            "again": self._again.tolist(),
            "sensor_noise": self._noise_before.clone(),
            "motion_noise": self._motion_generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Observations:
        """Goes on from a :meth:`state_dict` and returns the observations that its last step had returned.

        Raises:
            ValueError: it was saved with other numbers of agents or episodes.
        """
        self.sampler.load_state_dict(state["sampler"])
        self._load_scenes()
        self.task.load_state_dict(state["task"])
        self._previous_action = state["previous_action"].to(self.simulator.device).clone()
        self._episode = np.array(state["episode"], dtype=np.int64)
        self._ended = np.array(state["ended"], dtype=bool)
        # States of earlier versions have none.
        self._again = np.array(state.get("again", [False] * self.num_envs), dtype=bool)
        for generator, saved in (
            (self._sensor_generator, state["sensor_noise"]),
            (self._motion_generator, state["motion_noise"]),
        ):
            # A generator on another kind of device cannot take the state: there its noise starts anew.
            if saved.shape == generator.get_state().shape:
                generator.set_state(saved.cpu())
        observations: Observations = self._out(self._observe())
        return observations

    # Episodes -------------------------------------------------------------------------------------------

    def _load_scenes(self) -> None:
        wanted = self.sampler.resident_scenes
        if tuple(self.simulator.scenes) != wanted:
            self.simulator.load_scenes(wanted)

    def _start_episodes(self, agents: np.ndarray) -> None:
        """Gives agents (M,) their next episodes, or again their own; those that get none stand still."""
        if not agents.size:
            return
        others = agents[~self._again[agents]]
        self._episode[others] = np.array(self.sampler.next(others.tolist()), dtype=np.int64)
        drawn = self._episode[agents]
        self._ended[agents] = self._again[agents] = False
        device = self.simulator.device
        indices = torch.from_numpy(agents).to(device)
        self._previous_action[indices] = 0
        self.task.active[indices] = False
        if (starting := drawn != NO_EPISODE).any():
            slots = [self.sampler.scene_slot(int(episode)) for episode in drawn[starting]]
            episodes = torch.from_numpy(drawn[starting]).to(device)
            self.task.reset(
                indices[torch.from_numpy(starting).to(device)],
                torch.tensor(slots, dtype=torch.int64, device=device),
                self._starts[episodes],
                self._yaws[episodes],
                self._goals[episodes],
            )

    def _restart_same_step(
        self, done: np.ndarray, wanted: np.ndarray, deserted: np.ndarray, infos: dict[str, Any]
    ) -> tuple[Observations, np.ndarray]:
        """Starts the next episodes of agents that are done, and again those of agents that are deserted.

        Adds the last observations of those episodes that are ``wanted``, and of the deserted, to infos.
        Returns the new observations, and whose episode began again: (N,) bool.
        """
        interrupted = np.zeros_like(done)
        last: list[tuple[Tensor, Observations]] = []
        if wanted.any():
            indices = self._indices(wanted)
            last.append((indices, self._observe(indices)))
        self._start_episodes(np.flatnonzero(done))
        self._rotate_scenes()
        observations = self._observe()
        # Drawing, and starting episodes, can cost further processes.
        while (deserted := self._deserted(deserted)).any():
            indices = self._indices(deserted)
            last.append((indices, {name: value[indices] for name, value in observations.items()}))
            self._again |= deserted
            self._start_episodes(np.flatnonzero(deserted))
            observations = self._observe()
            interrupted |= deserted
        if last:
            final = observations
            for indices, seen in last:
                final = {name: value.index_copy(0, indices, seen[name]) for name, value in final.items()}
            infos["final_obs"] = self._out(final)
            infos["_final_obs"] = self._out(torch.from_numpy(wanted | interrupted))
        return observations, interrupted

    def _deserted(self, known: np.ndarray | None = None) -> np.ndarray:
        """Agents in the midst of an episode whose process died, now or as is ``known``: (N,) bool."""
        died = self.simulator.take_deaths()
        if known is not None:
            died = died | known
        if died.any():
            # An episode at its start has lost nothing.
            died &= (self.task.active & (self.task.measured.steps > 0)).cpu().numpy()
        return died

    def _rotate_scenes(self) -> None:
        """Lets the sampler exchange scenes, and serves agents that waited for one."""
        if not self.sampler.rotates:
            return
        in_progress = self._episode[self._episode != NO_EPISODE]
        if self.sampler.advance({self.sampler.scene_slot(int(episode)) for episode in in_progress}):
            self._load_scenes()
            self._start_episodes(np.flatnonzero(self._episode == NO_EPISODE))

    def _end_infos(self, done: np.ndarray) -> dict[str, Any]:
        """Infos about the episodes that ended, in Gymnasium's form."""
        mask = torch.from_numpy(done).to(self.simulator.device)
        measures = self.measures()
        measures |= {"r": measures["reward_sum"], "l": measures["steps"]}
        episodes = [
            self.sampler.episodes[index] if ended else None
            for index, ended in zip(self._episode, done, strict=True)
        ]

        def info() -> dict[str, Any]:
            return {
                "episode": {name: self._out(torch.where(mask, value, 0)) for name, value in measures.items()},
                "_episode": self._out(mask.clone()),
                "episode_id": [episode and episode.episode_id for episode in episodes],
                "_episode_id": self._out(mask.clone()),
                "scene_id": [episode and episode.scene_id for episode in episodes],
                "_scene_id": self._out(mask.clone()),
            }

        return info() | {"final_info": info(), "_final_info": self._out(mask.clone())}

    # Observations ---------------------------------------------------------------------------------------

    def _space(self, name: str) -> gym.Space[Any]:
        if name in self._cameras:
            return camera_space(self._cameras[name])
        if name in TASK_SENSORS:
            return TASK_SENSORS[name][0]
        if name == PREVIOUS_ACTION:
            return spaces.Discrete(self.config.num_actions + 1)
        known = [sensor.name for sensor in self.simulator.sensors] + [*TASK_SENSORS, PREVIOUS_ACTION]
        raise ValueError(f"observation {name!r} is not one of {', '.join(known)}")

    def _camera_to_show(self) -> SensorSpec | None:
        for kind in ("rgb", "depth"):
            for sensor in self.simulator.sensors:
                if sensor.kind == kind:
                    return sensor
        return None

    def _observe(self, agents: Tensor | None = None) -> dict[str, Tensor]:
        """Observations of all agents, or of those of indices (M,); fresh tensors."""
        noisy = self.noise.rgb > 0 or self.noise.depth > 0
        if noisy:
            self._noise_before = self._sensor_generator.get_state()
        images = self.simulator.render(agents) if self._cameras else {}
        observations = {}
        for name in self._observations:
            if name in images:
                value = self._image(self._cameras[name], images[name])
            else:
                value = (
                    self._previous_action.clone()
                    if name == PREVIOUS_ACTION
                    else TASK_SENSORS[name][1](self.task)
                )
                value = value if agents is None else value[agents]
            observations[name] = value
        return observations

    def _image(self, sensor: SensorSpec, image: Tensor) -> Tensor:
        if sensor.kind == "rgb":
            return gaussian_rgb(image, self.noise.rgb, self._sensor_generator) if self.noise.rgb else image
        if sensor.kind == "depth":
            if self.noise.depth:
                image = redwood_depth(image, self.noise.depth, self._sensor_generator)
            return _to_unit_range(image, *self.depth_range)[..., None]
        return image if sensor.kind == "normals" else image[..., None]

    # Small things ---------------------------------------------------------------------------------------

    def _checked(self, actions: Any) -> Tensor:
        tensor = torch.as_tensor(actions)
        if tensor.shape != (self.num_envs,) or tensor.is_floating_point():
            raise ValueError(
                f"actions have shape {tuple(tensor.shape)} and type {tensor.dtype}, "
                f"expected ({self.num_envs},) integers"
            )
        # On an accelerator the check would stall the step; there the policy is trusted.
        if (
            tensor.device.type == "cpu"
            and not 0 <= int(tensor.min()) <= int(tensor.max()) < self.config.num_actions
        ):
            raise ValueError(
                f"actions {tensor.tolist()} must lie between 0 and {self.config.num_actions - 1}"
            )
        return tensor.to(self.simulator.device, torch.int64)

    def _indices(self, mask: np.ndarray) -> Tensor:
        """Agents of a mask (N,) as indices on the simulator's device."""
        return torch.from_numpy(np.flatnonzero(mask)).to(self.simulator.device)

    def _seed_noise(self, seed: int) -> None:
        # Agents of another process must not see the same noise.
        seed += self.sampler.first_agent << 32
        self._sensor_generator.manual_seed(2 * seed)
        self._motion_generator.manual_seed(2 * seed + 1)

    def _out(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._out(item) for name, item in value.items()}
        return value.cpu().numpy() if self.output == "numpy" else value.to(self.simulator.device)


def camera_space(sensor: SensorSpec) -> spaces.Box:
    """What a camera's observations look like."""
    shape = (sensor.height, sensor.width)
    if sensor.kind == "rgb":
        return spaces.Box(0, 255, (*shape, 3), np.uint8)
    if sensor.kind == "depth":
        return spaces.Box(0.0, 1.0, (*shape, 1), np.float32)
    if sensor.kind == "normals":
        return spaces.Box(-1.0, 1.0, (*shape, 3), np.float32)
    return spaces.Box(0, np.iinfo(np.int32).max, (*shape, 1), np.int32)


def _to_unit_range(depth: Tensor, near: float, far: float) -> Tensor:
    """Maps near..far to 0..1 and cuts off what lies outside, in place."""
    if depth.device.type != "cpu":
        return depth.sub_(near).mul_(1.0 / (far - near)).clamp_(0.0, 1.0)
    # NumPy, because torch would hand half of this little work to another thread, and on a busy machine
    # waiting for that thread takes longer than drawing the images.
    values = depth.numpy()
    if near:
        values -= near
    values *= 1.0 / (far - near)
    np.clip(values, 0.0, 1.0, out=values)
    return depth
