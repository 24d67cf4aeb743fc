"""Exported policies, by ONNX Runtime beside PyTorch, and by a robot that has neither PyTorch nor navagent."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from navagent.agent_spaces import action_space, observation_space
from navagent.build import policy_settings
from navagent.cli import main
from navagent.config import load_config, to_yaml
from navagent.evaluation.command import restore_policy
from navagent.export import ExportError, check_export, compare, export_run, write_onnx
from navagent.runs import Run
from policies.actor_critic import NavigationPolicy

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "drive_onnx.py"


def policy_of(*overrides):
    """A small policy with random weights everywhere: biases that start at 0 would hide mistakes."""
    config = load_config(
        ["memory.hidden_size=16", "encoder.image_features=16", "encoder.weights=random", *overrides]
    )
    torch.manual_seed(0)
    policy = NavigationPolicy(
        observation_space(config),
        action_space(config),
        lambda _: 0.0,
        **policy_settings(config, restored=True),
    )
    for name, parameter in policy.named_parameters():
        if name.startswith(("memory.", "action_net.", "value_net.")):
            torch.nn.init.normal_(parameter, std=0.3)
    return config, policy


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    def make(*overrides):
        config, policy = policy_of(*overrides)
        run = Run.create(tmp_path_factory.mktemp("runs") / "run", to_yaml(config))
        run.save_checkpoint(1000, {"policy": policy.state_dict(), "frames": 1000})
        return run

    return make


@pytest.fixture(scope="module")
def exported(make_run, tmp_path_factory):
    """A run with both cameras and a GRU, and its export."""
    run = make_run("sensors=rgbd", "memory=gru", "sensors.gps=true", "sensors.compass=true")
    folder, agreement = export_run(run.path, tmp_path_factory.mktemp("robot"))
    return run, folder, agreement


def test_two_hundred_steps_agree_with_pytorch(exported):
    _, _, agreement = exported
    assert agreement.steps == agreement.same_actions == 200
    assert 0 < agreement.largest_difference < 2e-5


@pytest.mark.parametrize(
    "overrides",
    [
        ("memory=lstm", "memory.num_layers=2", "sensors=depth"),
        ("memory=frame_stack", "adaptation=piggyback", "encoder=fcn5_small"),
        ("memory=none", "adaptation=spottune", "encoder=resnet_small", "env=side-tuning"),
        ("memory=gru", "adaptation=midtune", "adaptation.unfreeze_at=0.5", "sensors=blind"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_memory_agrees_with_pytorch(overrides, tmp_path):
    _, policy = policy_of(*overrides)
    write_onnx(policy, tmp_path / "policy.onnx", "this policy")
    agreement = compare(policy, tmp_path / "policy.onnx")
    assert agreement.largest_difference < 5e-5
    assert agreement.same_actions == 200


def test_a_file_that_computes_something_else_is_noticed(exported):
    run, folder, _ = exported
    space = restore_policy(run, *_spaces(run))
    with torch.no_grad():
        space.memory.rnn.bias_hh_l0[-1] += 0.01  # one recurrent bias of the candidate state
    assert compare(space, folder / "policy.onnx", 20).largest_difference > 1e-4


def _spaces(run):
    from navagent.config import read_config

    config = read_config(run.config_path)
    return observation_space(config), action_space(config)


def test_the_card_says_all_that_a_robot_needs(exported):
    run, folder, agreement = exported
    card = json.loads((folder / "policy.json").read_text())
    model = onnx.load(folder / "policy.onnx")
    onnx.checker.check_model(model)
    assert set(card["inputs"]) == {value.name for value in model.graph.input}
    assert list(card["outputs"]) == [value.name for value in model.graph.output]
    for value in [*model.graph.input, *model.graph.output]:
        shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        described = card["inputs"].get(value.name) or card["outputs"][value.name]
        assert described["shape"] == shape
        assert described["meaning"]
    assert card["inputs"]["rgb"]["dtype"] == "uint8"
    assert card["inputs"]["depth"]["depth_range_m"] == [0.0, 10.0]
    assert card["inputs"]["rgb"]["camera"] == {
        "hfov_deg": 90.0,
        "height_above_feet_m": 1.25,
        "pitch_deg": 0.0,
    }
    assert [action["name"] for action in card["actions"]] == [
        "stop",
        "move_forward",
        "turn_left",
        "turn_right",
    ]
    assert card["actions"][1]["meaning"] == "move forward by 0.25 m"
    assert card["actions"][2]["meaning"] == "turn left by 10 degrees"
    assert card["run"] == {"name": run.path.name, "checkpoint": "000000001000.safetensors"}
    assert card["checked"] == {"steps": 200, "largest_difference": agreement.largest_difference}


def test_without_a_stop_action_the_card_lists_the_other_three(make_run):
    run = make_run("env=side-tuning", "sensors=blind", "memory=none")
    folder, _ = export_run(run.path)
    assert folder == run.path / "export"
    card = json.loads((folder / "policy.json").read_text())
    assert [action["name"] for action in card["actions"]] == ["move_forward", "turn_left", "turn_right"]
    assert "memory" not in card["inputs"]
    assert card["inputs"]["previous_action"]["values"] == 4


def test_a_robot_without_navagent_and_pytorch_does_what_the_policy_does(exported):
    run, folder, _ = exported
    # Whatever is installed here, that process finds none of it.
    code = (
        "import sys, runpy\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('navagent', 'policies', 'envs', 'configs', 'torch'):\n"
        "            raise ImportError(name + ' is not on this robot')\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"sys.argv = ['drive_onnx.py', {str(folder)!r}]\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    answer = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == driven_by_pytorch(run, folder)


def driven_by_pytorch(run, folder):
    """The actions of the policy itself on the example's robot."""
    spec = importlib.util.spec_from_file_location("drive_onnx", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    card = json.loads((folder / "policy.json").read_text())
    robot, policy, taken = example.Robot(card), restore_policy(run, *_spaces(run)), []
    policy.set_training_mode(False)
    memory, previous = policy.initial_memory(1), 0
    names = [action["name"] for action in card["actions"]]
    while len(taken) < 50 and "stop" not in taken:
        sensed = {"gps": np.zeros((1, 2)), "compass": np.zeros((1, 1)), **robot.sense()}
        observed = {
            name: torch.from_numpy(np.asarray(value).astype(card["inputs"][name]["dtype"]))
            for name, value in {**sensed, "previous_action": [previous]}.items()
        }
        with torch.no_grad():
            action, _, _, memory, _, _ = policy.act(observed, memory, torch.tensor([not taken]), True)
        previous = int(action) + 1
        taken.append(names[int(action)])
        robot.move(taken[-1])
    return taken


def test_the_example_is_short_enough_to_read():
    assert len([line for line in EXAMPLE.read_text().splitlines() if line.strip()]) <= 40


def test_the_command_exports_and_checks(exported, capsys, monkeypatch):
    run, folder, _ = exported
    monkeypatch.setenv("NAVAGENT_DEBUG", "0")
    assert main(["export", str(run.path), "--out", str(folder), "--check"]) == 0
    assert "as in PyTorch over 200 steps" in capsys.readouterr().out
    assert main(["export", str(run.path), "--out", str(folder / "empty"), "--check"]) == 2
    assert "export it first" in capsys.readouterr().err
    assert main(["export", str(run.path), "--checkpoint", "77"]) == 2
    assert "no checkpoint '77'" in capsys.readouterr().err


def test_a_changed_file_is_not_what_the_card_describes(exported, tmp_path):
    run, folder, _ = exported
    for name in ("policy.onnx", "policy.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with (tmp_path / "policy.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ExportError, match="was changed"):
        check_export(run.path, tmp_path)


def test_what_cannot_be_exported_is_refused_by_name_and_leaves_nothing(make_run, tmp_path):
    settings = ("adaptation=spottune", "encoder=resnet_small", "memory=none")
    run = make_run(*settings, "adaptation.evaluation=sample")
    with pytest.raises(ExportError, match=r"SpotTune of 'rgb' draws its routes at random .*use argmax"):
        export_run(run.path, tmp_path)
    run = make_run(*settings, "adaptation.global_k=2")
    with pytest.raises(ExportError, match=r"adaptation=spottune encoder=resnet_small memory=none cannot be"):
        export_run(run.path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_libraries_are_named_with_the_command_that_brings_them(exported, monkeypatch):
    run, _, _ = exported
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r'pip install "navagent\[onnx\]"'):
        export_run(run.path)
