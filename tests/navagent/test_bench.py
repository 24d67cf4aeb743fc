"""``navagent bench train``: the learners do the same work, and the numbers are what was measured."""

import copy
import json
import multiprocessing
import re

import pytest
import torch
from learning_world import LineVecEnv, LineWorld
from one_room import write_one_room
from rich.console import Console

from navagent.arguments import UsageError
from navagent.bench.contestants import CONTESTANTS, CannotTakePartError, Clock, make_uncached
from navagent.bench.networks import NETWORKS
from navagent.bench.plain_loop import PlainAgent, Rollout
from navagent.bench.report import BARS, bar_rows, markdown, ratio, rows, show, show_bars, summarise, write
from navagent.bench.runner import Entry, Measurement, measure, peak_bytes
from navagent.bench.training import BenchConfig, entries, make_split, train_config
from navagent.bench_command import QUICK
from navagent.cli import main
from navagent.config import AlgorithmConfig, load_config
from navagent.learning.ppo import PPO
from navagent.train import make_model
from policies.actor_critic import NavigationPolicy

SMALL = ("sensors.height=36", "sensors.width=36", "memory.hidden_size=16", "encoder.image_features=8")


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return write_one_room(tmp_path_factory.mktemp("room"))


@pytest.fixture(scope="module")
def small(room):
    """Settings of a tiny training in one room, and its episodes."""
    made = {}

    def make(network, *settings):
        where = f"scenes.dataset={room}"
        bench = BenchConfig(room / "out", (*SMALL, where, "num_threads=1", *settings), agents=(2,), steps=4)
        config = train_config(bench, network, 2)
        if not made:
            made["split"] = make_split(bench, config)
        return config, made["split"]

    return make


# The plain loop --------------------------------------------------------------------------------------------


def learner(memory, **settings):
    torch.manual_seed(0)
    return PPO(
        NavigationPolicy,
        LineVecEnv(LineWorld(num_envs=4, max_steps=5)),
        n_steps=16,
        n_minibatches=1,
        n_epochs=3,
        learning_rate=1e-3,
        policy_kwargs={"adaptation": "blind", "memory": memory, "hidden_size": 12, **settings},
        seed=0,
        device="cpu",
    )


def options(model, **changes):
    return AlgorithmConfig(
        num_steps=model.n_steps,
        num_minibatches=model.n_minibatches,
        epochs=model.n_epochs,
        gamma=model.gamma,
        gae_lambda=model.gae_lambda,
        ent_coef=model.ent_coef,
        vf_coef=model.vf_coef,
        max_grad_norm=model.max_grad_norm,
        **changes,
    )


@pytest.mark.parametrize(("memory", "layers"), [("lstm", 1), ("lstm", 2), ("gru", 1), ("none", 1)])
def test_the_plain_loops_update_is_ours(memory, layers):
    model = learner(memory, layers=layers)
    begun = {}
    update = model.train

    def train():
        begun["policy"] = copy.deepcopy(model.policy)
        update()

    model.train = train
    model.learn(64)
    buffer = model.rollout_buffer
    assert buffer["episode_starts"][1:].any()
    plain = PlainAgent(begun["policy"], options(model))
    state = plain.initial_state(4)
    rollout = Rollout(
        {"offset": buffer["obs/offset"], "image": buffer["obs/image"]},
        buffer["actions"],
        buffer["log_probs"],
        buffer["values"],
        buffer["episode_starts"].float(),
        buffer.advantages,
        state,
    )
    before = [parameter.detach().clone() for parameter in plain.policy.parameters()]
    plain.update(rollout)
    for ours, theirs in zip(model.policy.parameters(), plain.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    moved = [(a - b).abs().max() for a, b in zip(before, plain.policy.parameters(), strict=True)]
    assert max(moved) > 1e-3


def test_the_plain_loops_advantages_are_ours():
    model = learner("lstm")
    model.learn(64)
    buffer = model.rollout_buffer
    with torch.inference_mode():
        last = model.policy.act(model._last_obs, model._memory, model._last_episode_starts, True)[1]
    # Those of the policy before its update are what the advantages were computed with.
    expected = buffer.advantages
    again = PlainAgent(model.policy, options(model)).advantages(
        buffer["rewards"],
        buffer["values"],
        buffer["episode_starts"].float(),
        last,
        model._last_episode_starts.float(),
    )
    ended = model._last_episode_starts
    buffer.finish(last, ended, model.gamma, model.gae_lambda)
    torch.testing.assert_close(again, buffer.advantages)
    assert not torch.equal(expected, buffer.advantages)


def test_the_plain_loop_acts_as_the_policy_does():
    model = learner("lstm", layers=2)
    plain = PlainAgent(model.policy, options(model))
    state, memory = plain.initial_state(4), model.policy.initial_memory(4)
    for number in range(3):
        seen = {"offset": torch.randn(4, 2), "image": torch.zeros(4, 4, 4, 3, dtype=torch.uint8)}
        starts = torch.tensor([number == 0, False, number == 1, False])
        with torch.no_grad():
            distribution, values, state = plain.step(seen, state, starts.float())
            _, expected, _, memory, _, logits = model.policy.act(seen, memory, starts)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(distribution.logits, torch.log_softmax(logits, 1))


def test_the_plain_loop_refuses_a_memory_that_it_does_not_know():
    with pytest.raises(ValueError, match="gru, lstm and none"):
        PlainAgent(learner("frame_stack").policy, AlgorithmConfig())


# Learners ---------------------------------------------------------------------------------------------------


def take_turns(contestant, config, split, count=2):
    """What a learner reports in so many updates."""
    told = []

    def turn(stages, parameters):
        told.append((stages, parameters))
        return len(told) <= count

    CONTESTANTS[contestant].train(config, split, turn)
    return told


@pytest.mark.parametrize("network", ["simple_cnn", "simple_cnn_lstm"])
def test_learners_train_networks_of_one_size_and_tell_their_stages(small, network):
    sizes = set()
    for contestant in ("navagent", "sb3", "plain"):
        told = take_turns(contestant, *small(network))
        assert len(told) == 3
        for stages, parameters in told[1:]:
            assert {"simulate", "policy", "update"} <= set(stages)
            assert min(stages.values()) > 0
            sizes.add(parameters)
    assert len(sizes) == 1


def test_stable_baselines3_cannot_take_part_with_a_gru(small):
    with pytest.raises(CannotTakePartError, match="no policy with the memory 'gru'"):
        take_turns("sb3", *small("simple_cnn_gru"))


def test_without_stored_features_the_update_is_the_same(small):
    config, split = small("sidetune_small")
    cached, uncached = make_model(config, split), make_uncached(config, split)
    for model in (cached, uncached):
        torch.manual_seed(1)
        model.learn(8)
    assert any(name.startswith("frozen/") for name in cached.rollout_buffer._blocks)
    assert not any(name.startswith("frozen/") for name in uncached.rollout_buffer._blocks)
    for one, other in zip(cached.policy.parameters(), uncached.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_processes_take_turns_and_faults_are_told_by_name(small, processes, monkeypatch):
    # Started from one that has imported everything, they are there in no time.
    forkserver = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forkserver)
    config, split = small("simple_cnn_gru")
    order = []
    found = measure(
        [
            Entry("plain", "plain", "simple_cnn_gru", config),
            Entry("sb3", "sb3", "simple_cnn_gru", config),
            Entry("nobody", "dies", "simple_cnn_gru", config),
        ],
        split,
        updates=2,
        warm_up=1,
        progress=order.append,
    )
    plain, sb3, dies = found
    assert order == ["plain", "sb3", "dies", "plain", "plain", "plain"]
    assert (plain.problem, len(plain.seconds), len(plain.stages)) == (None, 2, 2)
    assert plain.frames == 8 and plain.parameters > 1000
    # A process with torch in it, and no more than a few networks of this size.
    assert 100e6 < plain.peak_bytes < 3e9
    assert "'gru'" in sb3.problem and not sb3.broken
    assert "KeyError: 'nobody'" in dies.problem and dies.broken


def test_a_process_remembers_its_peak():
    # More than this process is likely to have had by now.
    size = peak_bytes() + (64 << 20)
    block = torch.ones(size // 4)
    del block
    assert size < peak_bytes() < size + (1 << 30)


def test_a_clock_adds_up_what_runs_within_it():
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock.stage("policy"):
            pass
    with clock.stage("simulate"):
        pass
    assert set(clock.seconds) == {"policy", "simulate"}
    assert all(seconds >= 0 for seconds in clock.seconds.values())


# Settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_are_settings_that_training_takes(network):
    config = load_config(NETWORKS[network].settings)
    assert NETWORKS[network].frozen == (config.adaptation.name == "sidetune" and network != "settings")


def test_rollouts_of_many_agents_are_shorter(tmp_path):
    bench = BenchConfig(tmp_path)
    chosen = {n: train_config(bench, "simple_cnn_gru", n).algorithm for n in (1, 4, 64, 256, 1024)}
    assert {n: algorithm.num_steps for n, algorithm in chosen.items()} == {
        1: 128,
        4: 128,
        64: 128,
        256: 32,
        1024: 16,
    }
    assert {n: algorithm.num_minibatches for n, algorithm in chosen.items()}[1] == 1
    told = BenchConfig(tmp_path, steps=8)
    assert train_config(told, "simple_cnn_gru", 1024).algorithm.num_steps == 8


def test_variants_are_this_packages_learner_with_settings_of_their_own(tmp_path):
    bench = BenchConfig(
        tmp_path,
        ("num_threads=2",),
        variants=(("one thread", ("num_threads=1",)),),
        contestants=("navagent",),
    )
    everybody, variant = entries(bench, "simple_cnn_gru", 4)
    assert (everybody.label, everybody.config.num_threads) == ("navagent", 2)
    assert (variant.contestant, variant.label, variant.config.num_threads) == ("navagent", "one thread", 1)


def test_only_networks_with_a_frozen_part_are_measured_without_stored_features(tmp_path):
    bench = BenchConfig(tmp_path)
    assert "uncached" not in [entry.label for entry in entries(bench, "simple_cnn_lstm", 4)]
    assert "uncached" in [entry.label for entry in entries(bench, "sidetune_resnet44", 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "simple_cn"], "no network 'simple_cn'; did you mean 'simple_cnn'?"),
        (["--contestants", "sb4"], "no contestant 'sb4'; did you mean 'sb3'?"),
        (["--contestants", ","], "',' holds no name"),
        (["--agents", "4,many"], "'4,many' is not whole numbers"),
        (["--agents", "0"], "agents 0: expected numbers of at least 1"),
        (["--updates", "0"], "updates 0: expected at least 1"),
        (["--steps", "1"], "steps 1: expected at least 2"),
        (["--scene", "nowhere.glb"], "scene nowhere.glb: no such file"),
        (["--variant", "fast"], "'fast' is not a name, a colon and settings"),
        (["--variant", "sb3: num_threads=1"], "'sb3' is taken"),
        (["--quik"], "did you mean --quick?"),
        (["simple_cnn"], "'simple_cnn' is not of the form NAME=VALUE"),
        (["sensor=depth"], "there is no setting sensor"),
        (["--variant", "fast: algorithm.epoch=1"], "there is no setting algorithm.epoch"),
    ],
)
def test_wrong_arguments_are_answered_with_what_is_right(arguments, message, capsys):
    assert main(["bench", "train", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_names_learners_and_networks(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "train", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in (*CONTESTANTS, *NETWORKS):
        assert re.search(rf"^  {name} ", text, re.MULTILINE)
    assert main(["bench", "--help"]) == 0
    assert main(["bench", "tran"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_quick_settings_exist(tmp_path):
    assert BenchConfig(tmp_path, **QUICK).networks


def test_interrupted_measurements_keep_what_was_done(tmp_path, monkeypatch, small):
    from navagent.bench import training

    def one_then_stop(cell, split, updates, warm_up, progress):
        if cell[0].network == "simple_cnn_lstm":
            raise KeyboardInterrupt
        return [result("navagent", [1.0], network=cell[0].network)]

    monkeypatch.setattr(training, "measure", one_then_stop)
    _, split = small("simple_cnn_gru")
    monkeypatch.setattr(training, "make_split", lambda bench, config: split)
    bench = BenchConfig(tmp_path / "out", networks=("simple_cnn_gru", "simple_cnn_lstm"), agents=(4,))
    with pytest.raises(KeyboardInterrupt):
        training.run(bench, "navagent bench train", Console(quiet=True))
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["network"] for row in kept["rows"]] == ["simple_cnn_gru"]


# Numbers ----------------------------------------------------------------------------------------------------


def result(label, seconds, network="simple_cnn_lstm", frames=100, stages=None, **changes):
    stages = stages or [{"simulate": 0.25 * s, "policy": 0.25 * s, "update": 0.4 * s} for s in seconds]
    contestant = label if label in CONTESTANTS else "navagent"
    return Measurement(contestant, label, network, 4, 25, frames, seconds, stages, 7, 2**20, **changes)


def test_rates_are_medians_and_shares_sum_to_one():
    summary = summarise(result("navagent", [1.0, 2.0, 4.0]))
    assert (summary.rate, summary.lowest, summary.highest) == (50.0, 25.0, 100.0)
    assert summary.shares == pytest.approx({"simulate": 0.25, "policy": 0.25, "update": 0.4, "rest": 0.1})


def test_stages_that_overlap_leave_no_rest_and_no_more_than_the_whole():
    stages = [{"simulate": 0.75, "expert": 0.15, "policy": 0.5, "update": 0.1}]
    shares = summarise(result("navagent", [1.0], stages=stages)).shares
    assert shares == pytest.approx({"simulate": 0.6, "policy": 1 / 3, "update": 1 / 15, "rest": 0.0})


def test_a_ratio_is_taken_round_by_round():
    # Both were slow in the second round, when the machine was busy.
    found = ratio(result("navagent", [1.0, 10.0, 1.0]), result("sb3", [3.0, 20.0, 4.0], frames=100))
    assert (found.median, found.lowest, found.highest) == (3.0, 2.0, 4.0)


def test_bars_are_held_against_what_was_measured():
    own = result("navagent", [1.0, 1.0, 1.0], frames=3000)
    found = bar_rows(
        [
            own,
            result("sb3", [3.5, 3.5, 3.5], frames=3000),
            result("navagent", [1.0], network="resnet18_lstm", frames=279),
            result("navagent", [1.0], network="sidetune_resnet44"),
            result("uncached", [1.9], network="sidetune_resnet44"),
            result("fast", [1.0, 0.5, 1.0], frames=3000),
            result("fast", [0.1], network="sidetune_resnet44"),
            result("navagent", [], network="simple_cnn_gru", problem="out of memory"),
        ]
    )
    assert [(row["least"], row["learner"], row["median"], row["reached"]) for row in found] == [
        (280.0, "navagent", 279.0, False),
        (3.0, "navagent", 3.5, True),
        (3.0, "fast", 3.5, True),
        (1.8, "navagent", 1.9, True),
    ]
    assert {bar.least for bar in BARS} == {1100.0, 280.0, 3.0, 1.8}


def test_tables_show_every_entry_and_why_one_is_missing(tmp_path):
    everything = [
        result("navagent", [1.0, 2.0]),
        result("sb3", [4.0, 4.0]),
        result("plain", [], problem="Traceback\nMemoryError: no | more", broken=True),
    ]
    facts = {
        "command": "navagent bench train",
        "scene": "room.glb, 64x64 pixels",
        "device": "cpu",
        "threads": 2,
        "epochs": "2 passes",
        "updates": 2,
        "warm_up": 1,
        "date": "2026-01-01",
        "load": 0.1,
        "versions": {"cpu": "x", "cpu_cores": 2, "torch": "2", "python": "3", "commit": "abc"},
    }
    text = markdown(everything, facts)
    assert "| navagent | 75 | 50-100 | 25 | 25 | 40 | 10 | 1 | 3.00 |  |" in text
    assert "| sb3 | 25 | 25-25 | 25 | 25 | 40 | 10 | 1 |  |  |" in text
    assert "plain: MemoryError: no | more" in text
    bar = "times sb3_contrib.RecurrentPPO, SimpleCNN and LSTM 512"
    assert f"| {bar} | navagent | 4 | 3.00 | 3.00 | 2.00-4.00 | met |" in text
    as_json, as_markdown = write(everything, facts, tmp_path)
    assert as_markdown.read_text() == text
    stored = json.loads(as_json.read_text())
    assert stored["rows"][0]["times"]["sb3"]["median"] == 3.0
    assert stored["rows"][2]["problem"].startswith("Traceback")
    console = Console(width=80, record=True, file=(tmp_path / "screen").open("w"))
    show(everything, console)
    show_bars(everything, console)
    shown = console.export_text()
    assert "plain: MemoryError: no | more" in shown
    assert re.search(r"navagent +75 +50-100 +25 +25 +40 +10 +1 +3\.00", shown)
    assert "…" not in shown


def test_networks_of_different_sizes_are_remarked_on():
    one, other = result("navagent", [1.0]), result("sb3", [1.0])
    other.parameters = 8
    from navagent.bench.report import remarks

    assert remarks(rows([one])) == []
    (line,) = remarks(rows([one, other]))
    assert "not of one size" in line and "navagent 7, sb3 8" in line


def test_an_unknown_name_in_settings_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(UsageError, match="there is no network 'x'"):
        BenchConfig(tmp_path, networks=("x",))
