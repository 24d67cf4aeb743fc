import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from killed_training import UPDATE, HeavyPolicy, live, numbers, toy_trainer

from navagent import preemption, train
from navagent.preemption import REQUEUE_STATUS, Stopped, StopSignals
from navagent.runs import Run


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "error", "status"),
    [
        (signal.SIGTERM, Stopped, 143),
        (signal.SIGUSR1, Stopped, REQUEUE_STATUS),
        (signal.SIGINT, KeyboardInterrupt, 130),
    ],
)
def test_a_signal_ends_the_program_with_its_status(number, error, status):
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(error) as caught, StopSignals(print) as stop:
        send(number)
    assert stop.status == status
    assert getattr(caught.value, "code", status) == status
    assert {each: signal.getsignal(each) for each in before} == before
    assert "stop-signals" not in [thread.name for thread in threading.enumerate()]


def test_in_a_deferred_block_a_signal_is_noted_and_told():
    told = []
    with StopSignals(told.append) as stop:
        with stop.deferred():
            send(signal.SIGTERM)
            assert stop.number == signal.SIGTERM
            send(signal.SIGUSR1)
            deadline = time.monotonic() + 20
            while not told and time.monotonic() < deadline:
                time.sleep(0.01)
        assert told == ["SIGTERM: saving and stopping"]
        # The first one says what is to become of the job.
        assert stop.status == 143
        assert isinstance(stop.error(), Stopped)


def test_within_a_deferred_block_what_may_be_dropped_is_dropped():
    with StopSignals(lambda text: None) as stop, stop.deferred():
        with pytest.raises(Stopped), stop.at_once():
            send(signal.SIGUSR1)
            raise AssertionError
        # Nor is it begun after a signal.
        with pytest.raises(Stopped), stop.at_once():
            raise AssertionError
        send(signal.SIGTERM)


def test_a_second_interrupt_ends_at_once():
    with StopSignals(lambda text: None) as stop, stop.deferred():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_work_is_pressing_a_while_after_the_signals_of_clusters_only(monkeypatch):
    monkeypatch.setattr(preemption, "PATIENCE_SECONDS", 0.0)
    for number, pressing in ((signal.SIGINT, False), (signal.SIGUSR1, True)):
        with StopSignals(lambda text: None) as stop, stop.deferred():
            assert not stop.pressing
            send(number)
            assert stop.pressing == pressing


def test_outside_of_the_main_thread_nothing_is_taken():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopSignals(print) as stop:
            seen.extend([signal.getsignal(signal.SIGTERM), stop.number])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, None]


def hang():
    """Never returns from a call into a library, which no signal interrupts."""
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def hurry():
    preemption.GRACE_SECONDS, preemption.LAST_SECONDS = 0.2, 0.4


def hang_with(folder, resort):
    """Hangs, after leaving word in ``folder``, with one of several ways to save from outside."""
    hurry()
    with StopSignals(lambda text: None) as stop, stop.deferred():
        if resort == "saves":
            stop.last_resort = lambda: bool((folder / "saved").write_text("all"))
        elif resort == "fails":
            stop.last_resort = lambda: 1 // 0
        elif resort == "cannot yet":
            stop.last_resort = lambda: False
        (folder / "ready").touch()
        if resort == "is saving":
            with stop.saving:
                time.sleep(1.5)
                (folder / "saved").write_text("all")
        hang()


@pytest.mark.parametrize("resort", ["saves", "fails", "cannot yet", "is saving", "needs nothing"])
def test_a_process_stuck_in_a_library_is_ended_in_time_and_saved_as_far_as_can_be(
    tmp_path, processes, resort
):
    process = processes.start(hang_with, tmp_path, resort)
    send_when(process, tmp_path / "ready", signal.SIGUSR1)
    assert process.exitcode == REQUEUE_STATUS
    assert (tmp_path / "saved").exists() == (resort in ("saves", "is saving"))


def send_when(process, file, number):
    """Sends a signal once ``file`` is there; returns how long the process took to end [s]."""
    while not file.exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, number)
    begun = time.monotonic()
    process.join(60)
    return time.monotonic() - begun


def live_and_hang(folder):
    """A life in which the fifth update hangs in a library, halfway through its minibatches."""
    hurry()
    train.KEPT_FROM_SECONDS = 0.0
    with StopSignals(lambda text: None) as stop:
        trainer = toy_trainer(folder, stop)
        evaluate = HeavyPolicy.evaluate_sequences
        seen = []

        def hang_there(policy, *arguments):
            seen.append(arguments)
            if trainer.model.num_timesteps == 5 * UPDATE and len(seen) % 2 == 0:
                Path(folder, "ready").touch()
                hang()
            return evaluate(policy, *arguments)

        HeavyPolicy.evaluate_sequences = hang_there
        # Checkpoints are rare, as in real life.
        trainer.config.checkpoint.every_minutes = 60
        trainer.train()


def test_a_training_stuck_in_an_update_is_saved_as_of_before_it_and_goes_on_exactly(tmp_path, processes):
    process = processes.start(live_and_hang, tmp_path / "stuck")
    assert send_when(process, tmp_path / "stuck" / "ready", signal.SIGUSR1) < 20
    assert process.exitcode == REQUEUE_STATUS
    run = Run(tmp_path / "stuck")
    assert run.load_checkpoint("latest")["frames"] == 4 * UPDATE
    for folder in ("stuck", "whole"):
        processes.finish(live, tmp_path / folder, 9 * UPDATE)
    assert numbers(run) == numbers(Run(tmp_path / "whole"))
