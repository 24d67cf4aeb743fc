"""Training in several processes: decentralised PPO (DD-PPO, Wijmans et al. 2020, arXiv:1911.00357).

``torchrun`` starts the same command several times. Each process, a *rank*, has agents, simulator and policy
of its own; all compute the gradient of their part of one minibatch, add it up, and take the same step, so
that there is no server and the policies never differ. :class:`Ranks` is what a process knows of the others.
A process that was started alone has a :class:`Ranks` too: there nothing is sent and no number changes, and
code that learns need not know the difference.

When one rank ends before its time, the others must not wait for it: they end too, in seconds, and say why.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from navagent.runs import pack, unpack

FAILED = 1
"""Exit status of a rank that ends because another one did."""
SHORTEST_ROLLOUT = 0.25
"""Share of its steps that a rank collects before it may be told to stop: habitat-baselines' threshold."""
_PATIENCE = timedelta(hours=1)
"""How long a rank waits for the others; those that have died are noticed long before."""
_LOOK_EVERY = 0.5
"""Seconds between two looks at the other ranks."""
_GRACE = 8.0
"""Seconds that a rank has to end by itself after another was lost."""
_PR_SET_PDEATHSIG = 1

T = TypeVar("T")


class RankLostError(RuntimeError):
    """Another rank has ended before its time; the message says which one, and why where that is known."""


@dataclass(frozen=True)
class Launch:
    """This process's place among the others, from the variables that ``torchrun`` sets."""

    rank: int
    """Number of this process, from 0."""
    size: int
    """How many there are."""
    local_rank: int
    """Number of this process on its machine."""
    local_size: int
    """How many are on this machine."""
    address: str
    """Where the ranks meet."""
    port: int
    """The port there."""
    hosted: bool
    """Whether the meeting place is there already, as under ``torchrun``; else rank 0 opens it."""

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Launch | None:
        """The place that the environment variables name; None for a process by itself.

        Raises:
            ValueError: a variable is missing or no number.
        """
        found = os.environ if environment is None else environment
        if int(found.get("WORLD_SIZE", "1") or 1) < 2 or "RANK" not in found:
            return None
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not found.get(name)]
        if missing:
            raise ValueError(
                f"WORLD_SIZE={found['WORLD_SIZE']} asks for several processes, but {' and '.join(missing)} "
                "is not set: start them with torchrun, or unset WORLD_SIZE to train in one process"
            )
        size = int(found["WORLD_SIZE"])
        return cls(
            rank=int(found["RANK"]),
            size=size,
            local_rank=int(found.get("LOCAL_RANK", found["RANK"])),
            local_size=int(found.get("LOCAL_WORLD_SIZE", size)),
            address=found["MASTER_ADDR"],
            port=int(found["MASTER_PORT"]),
            hosted=found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


class Ranks:
    """The processes that train together, as one of them sees them; this class is a process by itself."""

    rank = 0
    """Number of this process, from 0."""
    size = 1
    """How many processes there are."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes: run folder, logs and console."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of ``items``: neighbours stay together, and all parts in order are the whole."""
        begin, end = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return list(items[begin:end])

    def check(self) -> None:
        """Raises :class:`RankLostError` if another rank has ended; costs next to nothing."""

    def barrier(self) -> None:
        """Waits for all ranks."""

    @contextmanager
    def one_before_others(self) -> Iterator[None]:
        """In this block one process of each machine is first, and the others follow when it is done."""
        yield

    def hand_on(self, number: int) -> None:
        """Sends a signal that came to this process to the others too."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's ``values``, of the same shape."""
        return values

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """The largest of every rank's numbers, place by place: how ranks decide together."""
        return list(numbers)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order, at rank 0, and an empty list at the others.

        Takes what a checkpoint can hold, see :func:`navagent.runs.pack`.
        """
        return [value]

    def broadcast(self, value: T, source: int = 0) -> T:
        """The value that rank ``source`` has, at every rank; what a checkpoint can hold."""
        return value

    def rows(self, everyone: Tensor) -> Tensor:
        """This rank's rows of a tensor with a row for each agent of all ranks.

        All ranks draw random numbers for all agents, from generators in the same state, and take their rows:
        so an agent's numbers do not depend on how many processes its fellows are spread over.
        """
        return everyone

    def mean_std(self, values: Tensor, counted: bool = True) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (with Bessel's correction) of all ranks' values together.

        Values of a rank that are not ``counted`` are left out.
        """
        return values.mean(), values.std()

    def variance(self, values: Tensor) -> Tensor:
        """Variance (with Bessel's correction) of all ranks' values together."""
        return values.var()

    def average(self, record: Mapping[str, Tensor], weight: float) -> tuple[dict[str, Tensor], float]:
        """The mean over ranks of each number (), weighted: what one process would have found on all data.

        A number that is not finite on one rank is so on all, which lets them decide alike. The second answer
        is this rank's share of the weight.
        """
        return dict(record), 1.0

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replaces every gradient by the sum over ranks; a parameter that has none anywhere keeps none."""

    def average_statistics(self, module: torch.nn.Module) -> None:
        """Makes the running statistics of BatchNorm layers that train the mean over ranks."""

    def copy_from_first(self, module: torch.nn.Module) -> None:
        """Makes parameters and buffers those of rank 0: machines may differ in how they begin."""

    def align_random(self, generator: torch.Generator, device: torch.device, source: int) -> None:
        """Gives ``generator`` and torch's own generators the state that they have at rank ``source``."""

    def tell(self, whereabouts: str) -> None:
        """Leaves word of what this rank is about to do, for the others to say if it dies."""


class JoinedRanks(Ranks):
    """Several processes: joins them when it is made, and watches over them until :meth:`leave`."""

    def __init__(self, launch: Launch, device: torch.device) -> None:
        """``device`` is where this rank computes. Blocks until all ranks are there."""
        self.launch = launch
        self.rank, self.size = launch.rank, launch.size
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        _die_with_parent()
        self.store = self._client(listening=launch.rank == 0 and not launch.hosted)
        self.store.set(f"process/{self.rank}", json.dumps(_identity(device)))
        with self._together():
            processes = [json.loads(self.store.get(f"process/{rank}")) for rank in range(launch.size)]
        # A connection of its own: the first one may be waiting. Before all are joined, since that waits too.
        self._watch = _Watch(self._client(), launch, processes)
        self._watch.start()
        with self._together():
            dist.init_process_group(
                _backend(processes),
                store=dist.PrefixStore("group", self.store),
                rank=launch.rank,
                world_size=launch.size,
                timeout=_PATIENCE,
            )
        self.barrier()

    def _client(self, listening: bool = False) -> dist.TCPStore:
        launch = self.launch
        return dist.TCPStore(
            launch.address,
            launch.port,
            launch.size,
            is_master=listening,
            timeout=_PATIENCE,
            wait_for_workers=False,
        )

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What all ranks do at once: it fails where one of them has gone."""
        try:
            yield
        except RuntimeError as error:
            watch = getattr(self, "_watch", None)
            raise RankLostError(watch.explain() if watch else str(error)) from error

    def check(self) -> None:
        """See :meth:`Ranks.check`."""
        if self._watch.lost is not None:
            raise RankLostError(self._watch.lost)

    def barrier(self) -> None:
        """See :meth:`Ranks.barrier`."""
        self.sum(torch.zeros(1))

    @contextmanager
    def one_before_others(self) -> Iterator[None]:
        """See :meth:`Ranks.one_before_others`."""
        if self.launch.local_rank != 0:
            self.barrier()
        yield
        if self.launch.local_rank == 0:
            self.barrier()

    def hand_on(self, number: int) -> None:
        """See :meth:`Ranks.hand_on`."""
        if self._watch.stop_signal is None:
            self._watch.stop_signal = number
            with suppress(RuntimeError):
                self.store.set("stop", str(number))

    def sum(self, values: Tensor) -> Tensor:
        """See :meth:`Ranks.sum`."""
        total = values.clone()
        with self._together():
            dist.all_reduce(total)
        return total

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """See :meth:`Ranks.largest`."""
        values = torch.tensor(numbers, dtype=torch.float64)
        with self._together():
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """See :meth:`Ranks.gather`."""
        if not self.first:
            self._send(_to_bytes(value))
            return []
        return [value, *(_from_bytes(self._receive(rank)) for rank in range(1, self.size))]

    def _send(self, data: Tensor) -> None:
        with self._together():
            dist.send(torch.tensor([len(data)]), 0)
            dist.send(data, 0)

    def _receive(self, source: int) -> Tensor:
        length = torch.zeros(1, dtype=torch.int64)
        with self._together():
            dist.recv(length, source)
            data = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(data, source)
        return data

    def broadcast(self, value: T, source: int = 0) -> T:
        """See :meth:`Ranks.broadcast`."""
        mine = self.rank == source
        data = _to_bytes(value) if mine else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(data)])
        with self._together():
            dist.broadcast(length, source)
            if not mine:
                data = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(data, source)
        return value if mine else _from_bytes(data)

    def rows(self, everyone: Tensor) -> Tensor:
        """See :meth:`Ranks.rows`."""
        return everyone.chunk(self.size)[self.rank]

    def _moments(self, values: Tensor, counted: bool) -> tuple[Tensor, Tensor]:
        """Mean and variance, float64."""
        exact = values.double() if counted else values.double()[:0]
        count, total = self.sum(torch.stack((exact.new_tensor(float(exact.numel())), exact.sum())))
        mean = total / count
        return mean, self.sum((exact - mean).square().sum()) / (count - 1)

    def mean_std(self, values: Tensor, counted: bool = True) -> tuple[Tensor, Tensor]:
        """See :meth:`Ranks.mean_std`."""
        mean, variance = self._moments(values, counted)
        return mean.to(values.dtype), variance.sqrt().to(values.dtype)

    def variance(self, values: Tensor) -> Tensor:
        """See :meth:`Ranks.variance`."""
        return self._moments(values, True)[1].to(values.dtype)

    def average(self, record: Mapping[str, Tensor], weight: float) -> tuple[dict[str, Tensor], float]:
        """See :meth:`Ranks.average`."""
        numbers = torch.stack([value.detach().double() for value in record.values()])
        *totals, whole = self.sum(torch.cat((numbers * weight, numbers.new_tensor([weight]))))
        means = {
            name: (total / whole).to(value.dtype)
            for (name, value), total in zip(record.items(), totals, strict=True)
        }
        return means, weight / whole.item()

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """See :meth:`Ranks.add_gradients`."""
        pieces = [
            torch.zeros(p.numel(), device=p.device) if p.grad is None else p.grad.reshape(-1).float()
            for p in parameters
        ]
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=pieces[0].device)
        *sums, somewhere = self.sum(torch.cat((*pieces, present))).split(
            [*(len(piece) for piece in pieces), len(present)]
        )
        for parameter, gradient, has in zip(parameters, sums, somewhere.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if has else None

    def average_statistics(self, module: torch.nn.Module) -> None:
        """See :meth:`Ranks.average_statistics`."""
        statistics = [
            statistic
            for layer in module.modules()
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) and layer.training
            for statistic in (layer.running_mean, layer.running_var)
            if statistic is not None
        ]
        if not statistics:
            return
        total = self.sum(torch.cat(statistics)) / self.size
        for statistic, mean in zip(statistics, total.split([len(s) for s in statistics]), strict=True):
            statistic.copy_(mean)

    def copy_from_first(self, module: torch.nn.Module) -> None:
        """See :meth:`Ranks.copy_from_first`."""
        with torch.no_grad(), self._together():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    first = tensor.detach().contiguous()
                    dist.broadcast(first, 0)
                    tensor.copy_(first)

    def align_random(self, generator: torch.Generator, device: torch.device, source: int) -> None:
        """See :meth:`Ranks.align_random`."""
        states = [generator.get_state(), torch.get_rng_state()]
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        for state in states:
            with self._together():
                dist.broadcast(state, source)
        generator.set_state(states[0])
        torch.set_rng_state(states[1])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[2], device)

    def tell(self, whereabouts: str) -> None:
        """See :meth:`Ranks.tell`."""
        with suppress(RuntimeError):
            self.store.set(f"whereabouts/{self.rank}", whereabouts)

    def accuse(self, error: BaseException) -> bool:
        """Tells the others why this rank ends; False where another rank has said the same before."""
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        said = [self.rank, f"{type(error).__name__}: {error}", where]
        try:
            first = json.loads(self.store.compare_set("failed", "", json.dumps(said)))
        except RuntimeError:
            return True
        return bool(first[0] == self.rank or first[2] != where)

    def leave(self) -> None:
        """Ends the watch over the others, which are about to end too."""
        self._watch.stop()

    def part(self) -> None:
        """Leaves when all ranks are done."""
        self.barrier()
        self.leave()
        dist.destroy_process_group()


class Stragglers:
    """Says when to end a rollout early because the others are done with theirs (Wijmans et al. 2020).

    As soon as ``sync_frac`` of the ranks have all their steps, the others stop too, if they have at least a
    quarter of theirs. With a fraction that all ranks are needed for, such as 1, or 0.6 of two ranks, nobody
    is stopped, and what a run computes does not depend on the clock.
    """

    def __init__(self, ranks: Ranks, sync_frac: float, num_steps: int) -> None:
        """``num_steps`` is the length of a whole rollout."""
        if not 0.0 < sync_frac <= 1.0:
            raise ValueError(f"sync_frac {sync_frac} must be greater than 0 and at most 1")
        self.ranks = ranks
        self.fewest_steps = math.ceil(SHORTEST_ROLLOUT * num_steps)
        # Rounding must not ask for one rank more than 0.6 of 5.
        self.needed = math.ceil(sync_frac * ranks.size - 1e-9)
        self._rollout = 0

    @property
    def _key(self) -> str:
        return f"rollout/{self._rollout}"

    def begin(self) -> None:
        """A rollout begins."""
        if self.needed >= self.ranks.size:
            return
        assert isinstance(self.ranks, JoinedRanks)
        if self.ranks.first and self._rollout:
            with suppress(RuntimeError):
                self.ranks.store.delete_key(self._key)
        self._rollout += 1

    def done(self) -> None:
        """This rank has all its steps."""
        self._add(1)

    def must_stop(self, steps: int) -> bool:
        """Whether a rank that has ``steps`` steps should leave it at that."""
        self.ranks.check()
        return steps >= self.fewest_steps and self._add(0) >= self.needed

    def _add(self, amount: int) -> int:
        if self.needed >= self.ranks.size:
            return 0
        assert isinstance(self.ranks, JoinedRanks)
        try:
            return self.ranks.store.add(self._key, amount)
        except RuntimeError:
            # Without a place to meet, as when torchrun was killed, everyone collects all steps.
            return 0


@contextmanager
def joined(device: Callable[[], torch.device]) -> Iterator[Ranks]:
    """The ranks that this process was started with; on leaving, waits for all of them.

    An error in the block is told to the others, which then end too. Where it is the others' error, this
    process says so in one line and exits.

    Args:
        device: finds out where this rank computes.
    """
    launch = Launch.read()
    if launch is None:
        yield Ranks()
        return
    try:
        ranks = JoinedRanks(launch, device())
    except RankLostError as lost:
        raise _give_up(launch, lost) from None
    try:
        yield ranks
        ranks.part()
    except RankLostError as lost:
        raise _give_up(launch, lost) from None
    except Exception as error:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        # torchrun's summary then shows this rank's traceback as the cause.
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):
            get_error_handler().record_exception(error)
        alone = ranks.accuse(error)
        if launch.rank == 0 and not launch.hosted:
            # What was said is gone with this process: let the others read it.
            time.sleep(2 * _LOOK_EVERY)
        if alone:
            raise
        # Where all fail alike, as over a setting, it is said once.
        raise SystemExit(FAILED) from None
    finally:
        ranks.leave()


def _give_up(launch: Launch, lost: RankLostError) -> SystemExit:
    print(f"navagent: rank {launch.rank} of {launch.size} ends: {lost}", file=sys.stderr, flush=True)
    return SystemExit(FAILED)


class _Watch(threading.Thread):
    """Notices that another rank has ended before its time, and ends this process if nobody listens."""

    def __init__(self, store: dist.TCPStore, launch: Launch, processes: Sequence[dict[str, Any]]) -> None:
        """``processes`` are those of all ranks, as :func:`_identity` tells of them."""
        super().__init__(name="watch over other ranks", daemon=True)
        self.lost: str | None = None
        """Why this rank should end; None while all are well."""
        self.stop_signal: int | None = None
        """The signal that one rank has handed on to all."""
        self._store = store
        self._launch = launch
        self._stopped = threading.Event()
        here = processes[launch.rank]["system"]
        # Of processes elsewhere, or behind another container's walls, the system knows nothing.
        self._neighbours = {
            rank: process
            for rank, process in enumerate(processes)
            if rank != launch.rank and process["system"] == here
        }

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()

    def explain(self) -> str:
        """Why a rank was lost; waits a moment for the one who knows."""
        for _ in range(10):
            if self.lost is None:
                self._look()
            if self.lost is not None:
                return self.lost
            time.sleep(0.1)
        return "the connection to another rank has broken; look for that rank's own words"

    def run(self) -> None:
        """Looks at the others until :meth:`stop`, or until one is lost."""
        while self.lost is None and not self._stopped.wait(_LOOK_EVERY):
            self._look()
        if self.lost is not None and not self._stopped.wait(_GRACE):
            # The main thread is somewhere without a way out, such as waiting for the one that is lost.
            _give_up(self._launch, RankLostError(self.lost))
            os._exit(FAILED)

    def _look(self) -> None:
        with suppress(RuntimeError):
            if self.stop_signal is None and self._store.check(["stop"]):
                self.stop_signal = int(self._store.get("stop"))
                os.kill(os.getpid(), self.stop_signal)
            if self._store.check(["failed"]):
                rank, said, _ = json.loads(self._store.get("failed"))
                self.lost = f"rank {rank} failed: {said}"
                return
        for rank, process in self._neighbours.items():
            if not _alive(process):
                # Its last words may be on their way.
                with suppress(RuntimeError):
                    if self._store.check(["failed"]):
                        continue
                self.lost = (
                    f"rank {rank} (process {process['pid']}) is gone without a word: killed, or out of "
                    f"memory{self._last_seen(rank)}"
                )

    def _last_seen(self, rank: int) -> str:
        with suppress(RuntimeError):
            if self._store.check([f"whereabouts/{rank}"]):
                return f"; {self._store.get(f'whereabouts/{rank}').decode()}"
        return ""


def _to_bytes(value: Any) -> Tensor:
    """Nested state as bytes: (length,) uint8."""
    from safetensors.torch import save

    tensors, structure = pack({"value": value})
    return torch.frombuffer(bytearray(save(tensors, {"state": json.dumps(structure)})), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    """The inverse of :func:`_to_bytes`."""
    from safetensors.torch import load

    raw = data.numpy().tobytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return unpack(load(raw), json.loads(header["__metadata__"]["state"]))["value"]


def _backend(processes: Sequence[Mapping[str, Any]]) -> str:
    """gloo, or NCCL for what is on GPUs where every rank has one of its own.

    All ranks must choose alike, so they look at what all have told of themselves.
    """
    gpus = [process["gpu"] for process in processes]
    if None in gpus or len(set(gpus)) < len(gpus) or not dist.is_nccl_available():
        return "gloo"
    return "cpu:gloo,cuda:nccl"


def _identity(device: torch.device) -> dict[str, Any]:
    """This process, as its neighbours can look for it, and the GPU that it computes on."""
    pid = os.getpid()
    host = socket.gethostname()
    gpu = None
    if device.type == "cuda":
        # Its number is no name: processes may see other GPUs under the same numbers.
        gpu = f"{host} {torch.cuda.get_device_properties(device).uuid}"
    return {"system": _system(host), "pid": pid, "started": _started(pid), "gpu": gpu}


def _system(host: str) -> str:
    """A name for the list of processes that this one is on; containers of a machine have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{host} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return host


def _alive(process: Mapping[str, Any]) -> bool:
    """Whether a process of this machine runs; one that has ended and was not yet waited for does not."""
    if process["started"] is not None:
        return _started(process["pid"]) == process["started"]
    try:
        os.kill(process["pid"], 0)
    except OSError:
        return False
    return True


def _started(pid: int) -> int | None:
    """When a process started, in the system's ticks; None if it has ended, or where nobody can tell."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else int(words[19])


def _die_with_parent() -> None:
    """Asks the system for a SIGTERM when torchrun dies: a rank that it cannot end must end by itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
