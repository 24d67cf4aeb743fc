"""What the processes of a test do when several of them learn together on the toy world."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from learning_world import LineVecEnv, LineWorld, RecurrentPolicy
from rich.console import Console
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from torch import nn

from envs.vector_env import PointNavVectorEnv
from navagent import distributed, preemption
from navagent import train as training
from navagent.build import Split
from navagent.cli import main
from navagent.config import CheckpointConfig, EvaluationConfig, TrainConfig, to_yaml
from navagent.distributed import JoinedRanks, Ranks, joined
from navagent.learning.imitation import ImitationConfig
from navagent.learning.ppo import PPO
from navagent.preemption import StopSignals
from navagent.runs import Run, read_checkpoint, write_checkpoint
from navagent.train import Trainer


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def take_place(folder, rank, size, port):
    """Makes this process a rank, as torchrun does; what it says goes to a file."""
    os.environ.update(
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    torch.set_num_threads(1)
    with (folder / f"{rank}.log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)


def take_part(folder, rank, size, port, work, settings):
    """One rank: does some work with the others, and leaves its answer in the folder, errors beside it."""
    take_place(folder, rank, size, port)
    with joined(lambda: torch.device("cpu")) as ranks:
        write_checkpoint(folder / f"{rank}.safetensors", {"answer": work(ranks, **settings)})


def type_command(folder, rank, size, port, words):
    """One rank of a command. Leaves word of the scenes that its agents have trained in, and of the episodes.

    Every line is of one step: the scenes that were there, and for each episode that ended its scene and
    whether it succeeded.
    """
    take_place(folder, rank, size, port)
    step = PointNavVectorEnv.step

    def told(env, actions):
        answer = step(env, actions)
        if env.sampler.mode == "endless":
            infos = answer[4]
            successes = infos["episode"]["success"].tolist() if infos else []
            ended = [
                (scene, success)
                for scene, success in zip(infos.get("scene_id", []), successes, strict=True)
                if scene
            ]
            lines.write(json.dumps([[scene.name for scene in env.simulator.scenes], ended]) + "\n")
        return answer

    with (folder / f"{rank}.played").open("w") as lines:
        PointNavVectorEnv.step = told
        status = main(words)
    sys.stdout.flush()
    raise SystemExit(status)


class Crew:
    """Ranks in processes of their own."""

    def __init__(self, processes, folder: Path, size, task, *arguments):
        self.folder = folder
        port = free_port()
        self.processes = [processes.start(task, folder, rank, size, port, *arguments) for rank in range(size)]

    def statuses(self, patience=200.0):
        """Exit statuses, when all have ended."""
        deadline = time.monotonic() + patience
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def answers(self):
        statuses = self.statuses()
        assert statuses == [0] * len(statuses), "\n".join(self.said(rank) for rank in range(len(statuses)))
        return [
            read_checkpoint(self.folder / f"{rank}.safetensors")["answer"] for rank in range(len(statuses))
        ]

    def said(self, rank):
        log = self.folder / f"{rank}.log"
        return log.read_text() if log.exists() else ""

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()


class NumberedWorld(LineWorld):
    """The part of a line world that one process has: an episode depends on its agent's number and on how many
    the agent had before, not on the world that the agent lives in.
    """

    def __init__(self, num_envs, first_env=0, **settings):
        self.numbers = torch.arange(num_envs) + first_env
        self.had = torch.zeros(num_envs, dtype=torch.int64)
        super().__init__(num_envs, **settings)

    def _new(self, which, first=False):
        super()._new(which, first)
        self.had = torch.zeros_like(self.had) if first else self.had + which
        distance = 1 + (5 * self.numbers + 3 * self.had) % max(1, min(self.span, int(self.max_geodesic)))
        sign = 1 - 2 * ((self.numbers + self.had) % 2)
        self.offset = torch.where(which, (distance * sign).float(), self.offset)

    def observations(self):
        seen = super().observations()
        seen["offset"][:, 1] += self.numbers[0]
        return seen

    def state_dict(self):
        return super().state_dict() | {"had": self.had}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.had = state["had"]

    # What the real environment tells of its agents' episodes.
    @property
    def sampler(self):
        episodes = [SimpleNamespace(scene_id=f"line{n}.glb", episode_id=str(n)) for n in range(100)]
        return SimpleNamespace(episodes=episodes)

    def current_episodes(self):
        return [int(number) for number in self.numbers]


class Numbers(KVWriter):
    """Keeps every logged number that does not measure time, by update."""

    def __init__(self):
        self.written = []

    def write(self, key_values, key_excluded, step=0):
        kept = {k: v for k, v in key_values.items() if not k.startswith(("time/", "rollout/cut_short"))}
        self.written.append({"frames": step, **kept})

    def close(self):
        pass


class Agent(RecurrentPolicy):
    """With a layer whose running statistics are learned too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm1d(1)

    def evaluate_sequences(self, obs, *args, **kwargs):
        self.norm(obs["offset"][..., :1].reshape(-1, 1))
        return super().evaluate_sequences(obs, *args, **kwargs)


def make(ranks, everyone=4, world=NumberedWorld, policy=RecurrentPolicy, imitation=None, **settings):
    """An algorithm with this rank's part of ``everyone``."""
    own = everyone // ranks.size
    env = LineVecEnv(world(own, first_env=own * ranks.rank, max_steps=7))
    defaults = {"n_steps": 8, "n_minibatches": 3, "n_epochs": 2, "device": "cpu", "seed": 3}
    imitation = ImitationConfig(**imitation) if imitation else None
    return PPO(policy, env, ranks=ranks, imitation=imitation, **{**defaults, **settings})


def parameters(model):
    return {name: value.detach().clone() for name, value in model.policy.named_parameters()}


def learn(ranks, frames, **settings):
    """What a training comes to, after its first update and at its end."""
    model = make(ranks, **settings)
    numbers = Numbers()
    model.set_logger(Logger(None, [numbers]))
    after = []

    class Look(BaseCallback):
        def _on_step(self):
            return True

        def on_update_end(self):
            after.append(parameters(model))
            return True

    model.learn(frames, callback=Look())
    return {
        "first": after[0],
        "last": after[-1],
        "numbers": numbers.written,
        "frames": model.num_timesteps,
        "episodes": list(model.recent_episodes),
        "steps": model.rollout_buffer.length,
        "statistics": {name: value.clone() for name, value in model.policy.named_buffers()},
        "state": model.training_state(),
    }


def go_on(ranks, state, frames, **settings):
    """What a training comes to that goes on from a saved state."""
    model = make(ranks, **settings)
    model.set_logger(Logger(None, [Numbers()]))
    model.load_training_state(read_checkpoint(state))
    model.learn(frames, reset_num_timesteps=False)
    return {"last": parameters(model), "frames": model.num_timesteps}


def refuse(ranks, state, **settings):
    """What is said of a state of another number of ranks."""
    try:
        make(ranks, **settings).load_training_state(read_checkpoint(state))
    except ValueError as error:
        return str(error)


class WaitingWorld(NumberedWorld):
    """At its nth step rank 1 waits for the other to be done, which waits at its last step for this."""

    ranks: JoinedRanks
    waits: int

    def step(self, actions):
        answer = super().step(actions)
        store = self.ranks.store
        if self.ranks.rank == 0 and self.clock == 8:
            store.wait(["behind"])
        elif self.ranks.rank == 1 and self.clock == self.waits:
            store.set("behind", "")
            while store.add("rollout/1", 0) < 1:
                time.sleep(0.01)
        return answer


def fall_behind(ranks, waits):
    """One update on rollouts of two lengths: all that it learned from, and what came of it."""
    world = type("World", (WaitingWorld,), {"ranks": ranks, "waits": waits})
    model = make(ranks, world=world, sync_frac=0.5, n_minibatches=1, n_epochs=1)
    before = parameters(model)
    numbers = Numbers()
    model.set_logger(Logger(None, [numbers]))
    model.learn(1)
    buffer = model.rollout_buffer
    names = ("actions", "log_probs", "episode_starts", "values", "rewards", "obs/offset", "obs/image")
    rollout = {name: buffer[name].clone() for name in names}
    return {
        "before": before,
        "after": parameters(model),
        "frames": model.num_timesteps,
        "rollout": rollout,
        "advantages": buffer.advantages,
        "returns": buffer.returns,
        "memory": buffer.memory,
        "following": [model._last_obs["offset"], model._memory, model._last_episode_starts],
        "numbers": numbers.written,
    }


class Blown(RecurrentPolicy):
    """Its loss is not finite at one rank, in every second minibatch."""

    ranks = Ranks()

    def penalty(self):
        self.asked = getattr(self, "asked", 0) + 1
        bad = self.ranks.rank == 1 and self.asked % 2 == 0
        return self.actor.weight.sum() * (float("nan") if bad else 0.0)


def blow(ranks, mode):
    policy = type("Policy", (Blown,), {"ranks": ranks})
    model = make(ranks, policy=policy, n_minibatches=2, nonfinite=mode)
    model.set_logger(Logger(None, [Numbers()]))
    model.learn(1)
    return {"skipped": model.guard.skipped_minibatches, "last": parameters(model)}


class HoleyWorld(NumberedWorld):
    """After its third step rank 1 sees numbers that are none."""

    def observations(self):
        seen = super().observations()
        if self.clock == 3 and self.numbers[0] > 0:
            seen["offset"][:, 0] = float("nan")
        return seen


def look_through_holes(ranks):
    model = make(ranks, world=HoleyWorld, nonfinite="skip")
    numbers = Numbers()
    model.set_logger(Logger(None, [numbers]))
    model.learn(1)
    own = model.guard.replaced_observations
    return {"own": own, "logged": numbers.written[0]["nonfinite/replaced_observations"]}


class BreakingWorld(NumberedWorld):
    """At its 20th step something happens to rank 1."""

    how: str

    def step(self, actions):
        if self.clock == 20 and self.numbers[0] > 0:
            self.happen()
        return super().step(actions)

    def happen(self):
        if self.how == "raise":
            raise IndexError("the roof came down")
        os.kill(os.getpid(), signal.SIGKILL)


def come_to_grief(ranks, how):
    world = type("World", (BreakingWorld,), {"how": how})
    model = make(ranks, world=world)
    model.set_logger(Logger(None, [Numbers()]))
    model.learn(10**9)


def be_stuck(ranks):
    """Rank 1 is killed while rank 0 is where no error reaches it."""
    distributed._GRACE = 0.5
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def die_while_meeting(folder, rank, size, port, watched):
    """Rank 1 is killed when it has told who it is, and before the others have a connection to it.

    Where it is not ``watched``, the others begin to watch when it is gone.
    """
    take_place(folder, rank, size, port)
    distributed._GRACE = 0.5
    watch = distributed._Watch

    def watch_late(store, launch, processes):
        while rank == 0 and distributed._alive(processes[1]):
            time.sleep(0.01)
        return watch(store, launch, processes)

    if not watched:
        distributed._Watch = watch_late
    if rank == 1:
        distributed.dist.init_process_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    with joined(lambda: torch.device("cpu")):
        pass


def fail_alike(ranks):
    raise ValueError(f"there is no such thing, says rank {ranks.rank}")


def add_up(ranks):
    """Every operation, on numbers that say whose they are."""
    rank = ranks.rank
    answers = {
        "share": ranks.share("abcdefg"),
        "sum": ranks.sum(torch.tensor([rank + 1.0, 10.0])),
        "largest": ranks.largest([rank, -rank, 5]),
        "gather": ranks.gather(
            {"rank": rank, "none": None, "pair": (rank, float("inf")), "x": torch.ones(rank)}
        ),
        "broadcast": [ranks.broadcast({"from": rank, "x": torch.full((2,), rank)}, s) for s in (0, 1)],
        "rows": ranks.rows(torch.arange(3 * ranks.size)),
    }
    torch.manual_seed(rank)
    values = torch.randn(5 + 4 * rank) * 3 + 100
    answers |= {
        "values": values,
        "mean_std": ranks.mean_std(values),
        "variance": ranks.variance(values),
        "of first": ranks.mean_std(values, counted=rank == 0),
        "average": ranks.average({"a": torch.tensor(2.0 + rank), "b": torch.tensor(1.0)}, 1 + 2 * rank),
        "nan": ranks.average({"a": torch.tensor(float("nan") if rank else 1.0)}, 1.0)[0]["a"],
        "nothing": ranks.average({"a": torch.tensor(7.0 + rank)}, float(rank == 0)),
    }
    parts = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(4))]
    parts[0].grad = torch.full((2, 3), rank + 1.0)
    if rank == 1:
        parts[2].grad = torch.arange(4.0)
    ranks.add_gradients(parts)
    answers["gradients"] = [part.grad for part in parts]
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval())
    ranks.copy_from_first(net)
    answers["copied"] = {name: value.clone() for name, value in net.state_dict().items()}
    for layer in net[1:]:
        layer.running_mean.fill_(rank)
        layer.running_var.fill_(2.0 + rank)
    ranks.average_statistics(net)
    answers["statistics"] = [net[1].running_mean, net[1].running_var, net[2].running_mean]
    generator = torch.Generator().manual_seed(rank)
    ranks.align_random(generator, torch.device("cpu"), 1)
    answers["drawn"] = [torch.rand(3, generator=generator), torch.rand(3)]
    return answers


def take_turns(ranks, folder):
    """Who was in the block when: the first one for a while."""
    with ranks.one_before_others():
        (folder / f"in{ranks.rank}").write_text(str(time.monotonic()))
        if ranks.rank == 0:
            time.sleep(0.5)
            (folder / "done").write_text(str(time.monotonic()))
    sys.stderr.flush()


class SlowWorld(NumberedWorld):
    """A tenth of a second a step."""

    def step(self, actions):
        time.sleep(0.1)
        return super().step(actions)


def trainer_in(ranks, folder, stop, config, kind=Trainer, **settings):
    """What trains the toy agents of all ranks in a run's folder."""
    path = ""
    if ranks.first:
        path = str(Run.create(folder / "run", to_yaml(config)).path)
    run = Run(ranks.broadcast(path))
    model = make(ranks, n_steps=16, **settings)
    return kind(config, run, model, Split("val", (), {}), Console(quiet=True), stop)


def train_slowly(ranks, folder):
    """A training whose updates take so long that a signal does not wait for their end."""
    preemption.PATIENCE_SECONDS = 0.5
    training.KEPT_FROM_SECONDS = 0.1
    config = TrainConfig(evaluation=EvaluationConfig(every_frames=0))
    config.algorithm.total_frames = 10**9
    with StopSignals(print) as stop:
        trainer = trainer_in(ranks, folder, stop, config, world=SlowWorld)
        trainer.train()
        assert trainer.given_up
        raise stop.error()


class Examiner(Trainer):
    """Its evaluations take ten minutes."""

    def _measure(self):
        (self.run.path / f"evaluating{self.ranks.rank}").touch()
        for _ in range(6000):
            time.sleep(0.1)
            self.ranks.check()
        return []


def examine(ranks, folder):
    """A training whose evaluation is waited for by nobody who gets a signal."""
    config = TrainConfig(evaluation=EvaluationConfig(every_frames=64))
    config.algorithm.total_frames = 10**9
    with StopSignals(print) as stop:
        trainer_in(ranks, folder, stop, config, Examiner).train()
        raise stop.error()


def save_on_a_full_disk(ranks, folder, refusals, minutes):
    """The disk takes nothing for some checkpoints after the first; gives up after so many minutes of that."""
    training.UNSAVED_MINUTES = minutes
    save, tried = Run.save_checkpoint, []

    def save_checkpoint(run, *arguments):
        tried.append(run)
        if 1 < len(tried) <= 1 + refusals:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(run, *arguments)

    Run.save_checkpoint = save_checkpoint
    config = TrainConfig(
        evaluation=EvaluationConfig(every_frames=0), checkpoint=CheckpointConfig(every_minutes=1e-9)
    )
    config.algorithm.total_frames = 5 * 64
    trainer = trainer_in(ranks, folder, StopSignals(print), config)
    trainer.train()
    return {"frames": trainer.model.num_timesteps, "saved": trainer.saved_frames}


def work_under_torchrun(work, folder):
    """What torchrun's processes do when a test starts them."""
    torch.set_num_threads(1)
    with joined(lambda: torch.device("cpu")) as ranks:
        if work == "train slowly":
            train_slowly(ranks, Path(folder))
        else:
            come_to_grief(ranks, how="raise")


if __name__ == "__main__":
    work_under_torchrun(*sys.argv[1:])
