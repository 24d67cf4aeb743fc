"""``navagent adapt``: its options reach the settings, and its commands do what they say."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from envs.episodes import read_dataset, write_dataset
from navagent.adapt_command import ACTIONS, DISTIL_OPTIONS, QUICK, adapt
from navagent.arguments import BAD_INPUT, UsageError
from navagent.cli import main
from navagent.config import load_config
from navagent.learning import comparison
from navagent.learning.comparison import ComparisonConfig
from navagent.learning.distil import DistilConfig
from policies.encoders import make_encoder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def studio(reference_dir, tmp_path_factory):
    """A data set of one scene, in both splits."""
    homes = tmp_path_factory.mktemp("homes")
    for suffix in ("glb", "navmesh", "stage_config.json"):
        shutil.copy(reference_dir / f"studio.{suffix}", homes)
    recorded = read_dataset(reference_dir / "pointnav" / "val" / "val.json.gz")
    start = next(e for e in recorded if Path(e.scene_id).stem == "studio" and e.start_position[1] < 1.0)
    for split in ("train", "val"):
        episodes = [dataclasses.replace(start, scene_id="studio.glb")]
        write_dataset(episodes, homes / "episodes" / split / f"{split}.json.gz")
    return homes


@pytest.fixture
def given(monkeypatch, tmp_path):
    """Settings that ``compare`` was called with."""
    configs = []

    def compare(config, console):
        configs.append(config)
        return tmp_path / "table.md"

    monkeypatch.setattr(comparison, "compare", compare)
    return configs


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from navagent.adapt_command import adapt; adapt(['--help']);"
        "print([name for name in ('torch', 'warp', 'numpy') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout.endswith("[]\n")
    for action in ACTIONS:
        assert f"navagent adapt {action}" in answer.stdout


def test_distil_s_options_are_its_settings():
    fields = {f.name: f.default for f in dataclasses.fields(DistilConfig) if f.name not in ("dataset", "out")}
    assert {name: default for name, _, default, _ in DISTIL_OPTIONS} == fields


def test_compare_s_options_reach_its_settings(given, tmp_path):
    words = "--task curvature --images 5,7 --seeds 2 --methods lora,ewc --bases vit_mini --steps 3"
    out = str(tmp_path / "out")
    assert adapt(["compare", out, "--dataset", "homes", *words.split(), "--workers", "4"]) == 0
    expected = ComparisonConfig(
        dataset=Path("homes"),
        out=tmp_path / "out",
        task="curvature",
        images=(5, 7),
        seeds=2,
        methods=("lora", "ewc"),
        bases=("vit_mini",),
        steps=3,
        workers=4,
    )
    assert given == [expected]


def test_compare_without_options_is_the_whole_comparison(given, tmp_path):
    adapt(["compare", "out", "--dataset", "homes"])
    assert given == [ComparisonConfig(Path("homes"), Path("out"))]
    assert given[0].images == (50, 500, 5000)
    assert given[0].seeds == 3


def test_quick_gives_way_to_what_is_asked_for(given):
    adapt(["compare", "out", "--dataset", "homes", "--quick", "--steps", "9"])
    assert given[0].steps == 9
    assert given[0].images == QUICK["images"]


def test_a_comparison_of_rendered_homes(studio, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--quick", "--methods", "features,lora", "--bases", "resnet_small", "--workers", "1"]
    assert adapt(["compare", str(out), "--dataset", str(studio), *words]) == 0
    assert str(out / "table.md") in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    # The base is nowhere as good here as in the homes it is from, yet far better than one that never looks.
    normals = results["baselines"]["normals"]
    assert normals["resnet_small"]["mean_deg"] < normals["constant"]["mean_deg"]
    assert {cell["row"] for cell in results["cells"]} == {"features", "lora"}


def test_a_distillation_in_rendered_homes(studio, tmp_path, capsys):
    out = tmp_path / "out"
    words = "--decoder default --mode perceptual --steps 2 --train-frames 8 --val-frames 4 --batch-size 4"
    assert adapt(["distil", str(out), "--dataset", str(studio), *words.split()]) == 0
    printed = capsys.readouterr().out
    assert f"adaptation.side_weights={out / 'student.safetensors'}" in printed
    assert "sensors=rgb encoder.name=resnet_small encoder.weights=default" in printed
    make_encoder("fcn5_small", 3, out / "student.safetensors")


def test_a_pretraining_says_how_to_use_what_it_gave(studio, tmp_path, capsys):
    out = tmp_path / "out"
    words = "--encoder resnet_small --sensor depth --steps 2 --train-frames 8 --val-frames 4 --batch-size 4"
    assert main(["pretrain", str(out), "--dataset", str(studio), *words.split()]) == 0
    program, verb, *settings = capsys.readouterr().out.splitlines()[-1].split()
    assert (program, verb) == ("navagent", "train")
    config = load_config(settings)
    assert config.sensors.depth and not config.sensors.rgb
    make_encoder(config.encoder.name, 1, config.encoder.weights)


def test_list_prints_what_methods_cost(capsys):
    assert adapt(["list", "--bases", "fcn5_small", "--methods", "features,spottune", "--json"]) == 0
    features, spottune = json.loads(capsys.readouterr().out)
    assert features["cost"]["trainable"] == 0
    assert "fcn5_small" in spottune["refusal"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill"], "there is no action 'distill'; did you mean 'distil'?"),
        (["list", "--methods", "lorra"], "did you mean 'lora'?"),
        (
            ["list", "--bases", "resnet_smal"],
            "there is no encoder 'resnet_smal'; did you mean 'resnet_small'?",
        ),
        (["list", "--size", "64"], "'64' is not rows and columns"),
        (["list", "--size", "0x64"], "'0x64' is not rows and columns"),
        (
            ["compare", "out", "--bases", ","],
            "argument --bases: ',' holds no name; expected one, or several with commas (see",
        ),
        (["list", "--batch-size", "0"], "--batch-size 0: expected at least 1"),
        (["compare"], "required: OUT"),
        (["compare", "out", "--image", "5"], "did you mean --images?"),
        (["compare", "out", "--images", "5,many"], "not whole numbers with commas, such as 4,16 (see"),
        (["distil", "out", "--steps", "few"], "invalid int value: 'few'"),
    ],
)
def test_command_lines_that_do_not_parse(words, message):
    with pytest.raises(UsageError) as error:
        adapt(words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distil", "out", "--base", "resnet_smal"], "did you mean 'resnet_small'"),
        (["distil", "out", "--student", "vit_mini"], "choose a student whose features have the base's shape"),
        (["distil", "out", "--decoder", "none.safetensors"], "none.safetensors: no such weights file"),
        (["compare", "out", "--bases", "resnet44"], "weights 'side-tuning-resnet44-cifar' are not on this"),
        (["compare", "out", "--bases", "mine=nowhere"], "there is no file nowhere"),
        (["compare", "out", "--methods", "lorra"], "did you mean 'lora'"),
    ],
)
def test_what_does_not_fit_is_refused_before_homes_are_made(words, message, tmp_path, monkeypatch):
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        adapt(words)
    assert not list(tmp_path.iterdir())


def test_no_action_shows_help_as_an_error(capsys):
    assert adapt([]) == BAD_INPUT
    assert "navagent adapt compare OUT" in capsys.readouterr().out
