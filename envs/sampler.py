"""Which episode each agent gets next, and which scenes need to be resident for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from envs.episodes import Episode

_KEPT_ORDERS = 8  # shuffles of different epochs that agents can be in at once without computing one twice


class EpisodeSampler:
    """Hands out episodes to N agents: endless streams for training, or each exactly once for evaluation.

    Endless streams all follow one shuffle per epoch, every agent from its own starting point, so that
    an agent meets all episodes and no two agents walk in step. What an agent gets depends on the seed and on
    how many it has had, not on the others, except where scenes rotate.

    Args:
        episodes: what to draw from.
        num_agents: number of agents N.
        scenes: file of each scene id that the episodes name.
        seed: of the shuffles.
        mode: ``"endless"``, or ``"once"``: in the order given, scene by scene, until none is left.
        shuffle: shuffle the endless streams; otherwise they follow the order given.
        max_geodesic: leave out longer episodes, for a curriculum [m]; endless streams only.
        episodes_per_scene: an endless stream takes this many episodes of a scene in a row. Habitat stays in a
            scene for some 10,000 steps; 1 mixes scenes fully, which learns better where all are resident.
        max_resident_scenes: keep at most this many scenes resident and rotate through the others; all when
            None.
        scene_steps: with endless streams, steps of the batch after which the oldest resident scene is
            exchanged.
        first_agent: number of the first agent among ``total_agents``: those of several processes follow the
            same streams as if one process had them all.
        total_agents: how many agents follow the streams; ``num_agents`` when None.

    Raises:
        ValueError: there are no episodes, or a setting does not fit.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        num_agents: int,
        scenes: Mapping[str, Path],
        seed: int = 0,
        mode: Literal["endless", "once"] = "endless",
        shuffle: bool = True,
        max_geodesic: float = math.inf,
        episodes_per_scene: int = 1,
        max_resident_scenes: int | None = None,
        scene_steps: int = 10_000,
        first_agent: int = 0,
        total_agents: int | None = None,
    ) -> None:
        if not episodes:
            raise ValueError("there are no episodes to draw from")
        if mode not in ("endless", "once"):
            raise ValueError(f"mode {mode!r} is not one of endless, once")
        if episodes_per_scene < 1:
            raise ValueError(f"episodes_per_scene {episodes_per_scene} must be at least 1")
        self.episodes = tuple(episodes)
        self.num_agents = num_agents
        self.first_agent = first_agent
        self.total_agents = num_agents if total_agents is None else total_agents
        if not 0 <= first_agent <= self.total_agents - num_agents:
            raise ValueError(
                f"agents {first_agent} to {first_agent + num_agents - 1} are not among {self.total_agents}"
            )
        self.mode = mode
        self.shuffle = shuffle
        self.episodes_per_scene = episodes_per_scene
        self.scene_steps = scene_steps
        self.scene_ids = tuple(dict.fromkeys(episode.scene_id for episode in self.episodes))
        """Every scene that an episode takes place in, in order of first mention."""
        if missing := [scene for scene in self.scene_ids if scene not in scenes]:
            raise ValueError(f"no file is given for scene {', '.join(missing[:5])}; pass it in scenes")
        self._files = tuple(Path(scenes[scene]) for scene in self.scene_ids)
        self.rotates = max_resident_scenes is not None and max_resident_scenes < len(self.scene_ids)
        if self.rotates and max_resident_scenes is not None and max_resident_scenes < 2:
            raise ValueError(
                f"max_resident_scenes {max_resident_scenes} must be at least 2: agents still move in the "
                "scene that leaves while others start in the next"
            )
        self._num_resident = (
            max_resident_scenes if self.rotates and max_resident_scenes else len(self.scene_ids)
        )
        number = {scene: index for index, scene in enumerate(self.scene_ids)}
        self._scene_of = np.array([number[episode.scene_id] for episode in self.episodes], dtype=np.int32)
        geodesic = np.array([episode.geodesic_distance for episode in self.episodes], dtype=np.float64)
        self._geodesic = np.where(np.isnan(geodesic), math.inf, geodesic)  # not stated: counts as long
        self._by_scene = [np.flatnonzero(self._scene_of == index) for index in range(len(self.scene_ids))]
        self.max_geodesic = math.inf
        self.restart(seed)
        if max_geodesic != math.inf:
            self.set_max_geodesic(max_geodesic)

    def restart(self, seed: int | None = None) -> None:
        """Starts every stream anew, with another seed where one is given; the curriculum stays."""
        if seed is not None:
            self.seed = seed
        self._generation = 0  # counts changes of what may be drawn; each has shuffles of its own
        self._drawn = [0] * self.num_agents  # episodes each agent has had in this generation
        self._clock = 0  # batch steps since a scene was last exchanged
        self._retiring: int | None = None  # slot of the resident scene that no new episode starts in
        self._rotation = self._num_resident  # position in the rotation of the next scene to load
        self._resident = [self._in_rotation(index) for index in range(self._num_resident)]
        self._taken = [0] * len(self.scene_ids)  # "once": episodes of each scene that were handed out
        self._find_eligible()

    @property
    def resident_scenes(self) -> tuple[Path, ...]:
        """Files of the scenes that must be resident, in order of :meth:`scene_slot`."""
        return tuple(self._files[scene] for scene in self._resident)

    def scene_slot(self, episode: int) -> int:
        """Index of an episode's scene among the resident ones."""
        return self._resident.index(int(self._scene_of[episode]))

    @property
    def exhausted(self) -> bool:
        """Whether no episode is left to hand out; never with endless streams."""
        return self.mode == "once" and sum(self._taken) == len(self.episodes)

    def next(self, agents: Iterable[int]) -> list[int]:
        """Index into :attr:`episodes` of the next episode of each agent; -1 where there is none for now."""
        if self.mode == "once":
            return [self._next_once() for _ in agents]
        return [self._next_endless(agent) for agent in agents]

    def set_max_geodesic(self, max_geodesic: float) -> None:
        """Leaves out longer episodes from now on [m].

        Raises:
            ValueError: that would leave none.
        """
        if self.mode == "once":
            raise ValueError(
                "max_geodesic is for endless streams; with mode 'once' every episode is handed out"
            )
        shortest = float(self._geodesic.min())
        if not max_geodesic >= shortest:
            raise ValueError(
                f"no episode is as short as max_geodesic {max_geodesic:g} m; the shortest is {shortest:g} m"
            )
        self.max_geodesic = max_geodesic
        before = self._eligible
        self._find_eligible()
        if len(before) != len(self._eligible):
            self._new_generation()

    def advance(self, occupied: set[int]) -> bool:
        """Counts one step of the batch and exchanges a scene when it is time and nobody is in it.

        Args:
            occupied: slots of the resident scenes that agents' episodes are in.

        Returns:
            Whether :attr:`resident_scenes` changed, so that the simulator must load them.
        """
        if not self.rotates:
            return False
        if self.mode == "once":
            changed = False
            for slot, scene in enumerate(self._resident):
                used_up = self._taken[scene] == len(self._by_scene[scene])
                if used_up and slot not in occupied and self._rotation < len(self.scene_ids):
                    self._exchange(slot)
                    changed = True
            return changed
        self._clock += 1
        if self._retiring is None and self._clock >= self.scene_steps:
            # Slots are filled in turn, so the next one in turn holds the scene that came first.
            self._retiring = self._rotation % self._num_resident
            self._find_eligible()
            self._new_generation()
        if self._retiring is None or self._retiring in occupied:
            return False
        slot, self._retiring = self._retiring, None
        self._exchange(slot)
        self._clock = 0
        self._find_eligible()
        self._new_generation()
        return True

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly: numbers and lists that JSON can hold."""
        return {
            "num_episodes": len(self.episodes),
            "seed": self.seed,
            "max_geodesic": None if math.isinf(self.max_geodesic) else self.max_geodesic,
            "generation": self._generation,
            "drawn": list(self._drawn),
            "clock": self._clock,
            "retiring": self._retiring,
            "rotation": self._rotation,
            "resident": list(self._resident),
            "taken": list(self._taken),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict` of a sampler with the same episodes and agents.

        Raises:
            ValueError: the episodes or agents differ in number.
        """
        for what, saved, here in (
            ("episodes", state["num_episodes"], len(self.episodes)),
            ("agents", len(state["drawn"]), self.num_agents),
            ("resident scenes", len(state["resident"]), self._num_resident),
        ):
            if saved != here:
                raise ValueError(f"the saved state has {saved} {what} and this sampler {here}")
        self.seed = state["seed"]
        self.max_geodesic = math.inf if state["max_geodesic"] is None else state["max_geodesic"]
        self._generation = state["generation"]
        self._drawn = list(state["drawn"])
        self._clock = state["clock"]
        self._retiring = state["retiring"]
        self._rotation = state["rotation"]
        self._resident = list(state["resident"])
        self._taken = list(state["taken"])
        self._find_eligible()

    def _next_once(self) -> int:
        for scene in self._resident:
            taken = self._taken[scene]
            if taken < len(self._by_scene[scene]):
                self._taken[scene] += 1
                return int(self._by_scene[scene][taken])
        return -1

    def _next_endless(self, agent: int) -> int:
        count = len(self._eligible)
        place = (self.first_agent + agent) * count // self.total_agents + self._drawn[agent]
        self._drawn[agent] += 1
        return int(self._order(place // count)[place % count])

    def _order(self, epoch: int) -> np.ndarray:
        """The eligible episodes in the order of one pass over them."""
        if epoch not in self._orders:
            if len(self._orders) >= _KEPT_ORDERS:
                del self._orders[min(self._orders)]
            self._orders[epoch] = self._shuffled(np.random.default_rng([self.seed, self._generation, epoch]))
        return self._orders[epoch]

    def _shuffled(self, rng: np.random.Generator) -> np.ndarray:
        if not self.shuffle:
            return self._eligible
        order = rng.permutation(self._eligible)
        if self.episodes_per_scene == 1:
            return order
        # Within the shuffle, cut every scene's episodes into runs, and shuffle the runs.
        scenes = self._scene_of[order]
        runs = []
        for scene in np.unique(scenes):
            own = order[scenes == scene]
            runs += np.split(own, range(self.episodes_per_scene, len(own), self.episodes_per_scene))
        return np.concatenate([runs[index] for index in rng.permutation(len(runs))])

    def _find_eligible(self) -> None:
        """Finds the episodes that endless streams may hand out now."""
        here = np.zeros(len(self.scene_ids), dtype=bool)
        here[[scene for slot, scene in enumerate(self._resident) if slot != self._retiring]] = True
        resident = here[self._scene_of]
        near = resident
        if not math.isinf(self.max_geodesic):
            near = resident & (self._geodesic <= self.max_geodesic)
        if not near.any():
            # Only scenes with longer paths are resident just now: take their shortest episode meanwhile.
            near = resident & (self._geodesic == self._geodesic[resident].min())
        self._eligible = np.flatnonzero(near).astype(np.int32)
        self._orders: dict[int, np.ndarray] = {}

    def _new_generation(self) -> None:
        self._generation += 1
        self._drawn = [0] * self.num_agents
        self._orders = {}

    def _in_rotation(self, index: int) -> int:
        """The scene at a place of the endless rotation through all scenes, the same in every cycle."""
        place = index % len(self.scene_ids)
        if self.mode == "once" or not self.rotates:
            return place
        return int(np.random.default_rng([self.seed, 0x5CE]).permutation(len(self.scene_ids))[place])

    def _exchange(self, slot: int) -> None:
        self._resident[slot] = self._in_rotation(self._rotation)
        self._rotation += 1
