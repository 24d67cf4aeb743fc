import json
import shlex
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from navagent.config import PPO_ALONE, flatten, load_config, to_yaml, write_config
from navagent.evaluation.departures import departures
from navagent.evaluation.metrics import paired_difference, summarise, to_json
from navagent.evaluation.report import read_evaluations, reproduce_command, write_report
from navagent.evaluation.video import write_video
from navagent.runs import RunError


class Page(HTMLParser):
    """What a page refers to, its text, and whether its tags close."""

    VOID = ("meta", "img", "source", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def evaluated(run, make_result):
    """The run with an evaluation on val: pictures, video and another agent."""
    results = {
        "run": [make_result(n, success=n % 4 != 0, scene=f"homes/home_{n % 6}.glb") for n in range(24)],
        "ex<pert": [make_result(n, "ex<pert", spl=0.9, scene=f"homes/home_{n % 6}.glb") for n in range(24)],
    }
    out = run.path / "evaluation" / "val"
    for name in ("maps", "views", "videos"):
        (out / name).mkdir(parents=True)
    for name in ("maps", "views"):
        cv2.imwrite(str(out / name / "0.png"), np.zeros((8, 8, 3), np.uint8))
    write_video([np.zeros((32, 32, 3), np.uint8)] * 3, out / "videos" / "0.mp4")
    summary = {
        "split": "val",
        "dataset": "generated",
        "task": "habitat-2019",
        "episodes": 24,
        "scenes": 6,
        "seed": 0,
        "deterministic": False,
        "checkpoints": {"run": "best.safetensors"},
        "when": "2026-11-21T00:00:00+00:00",
        "agents": {name: to_json(summarise(found)) for name, found in results.items()},
        "difference": {
            "ex<pert": to_json({"spl": paired_difference(results["run"], results["ex<pert"], "spl")})
        },
        "pictures": [
            {
                "result": results["run"][0].to_json(),
                "map": "maps/0.png",
                "view": "views/0.png",
                "video": "videos/0.mp4",
            },
        ],
        "command": "navagent evaluate somewhere --episodes 24",
    }
    (out / "summary.json").write_text(json.dumps(summary))
    return run


def test_the_report_loads_nothing_from_anywhere(evaluated):
    page = write_report(evaluated).read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert page.count("data:video/mp4;base64,") == 1
    assert all(address.startswith("data:") for address in Page(page).addresses)
    assert "http" not in page.replace("http-equiv", "")
    assert "script" not in Page(page).tags
    assert "@import" not in page
    assert "url(" not in page


def test_the_report_tells_the_result_with_its_interval_and_how_to_repeat_it(evaluated):
    text = Page(write_report(evaluated).read_text()).text
    success = summarise_of(evaluated)["success"]
    assert "75%" in text
    assert f"{success.low:.2f} – {success.high:.2f}" in text
    assert "navagent train seed=7" in text
    assert "navagent evaluate somewhere --episodes 24" in text
    assert evaluated.versions["torch"] in text
    assert "ex<pert: SPL -0.4" in text


def test_the_report_tells_where_the_agent_leaves_the_expert(evaluated, make_result):
    assert "leaves the expert" not in write_report(evaluated).read_text()
    folder = evaluated.path / "evaluation" / "val"
    choices = np.array([[1, 1]] * 6 + [[2, 1]] * 2 + [[3, 3]] * 2)
    left = departures([make_result(0, choices=choices), make_result(1, success=False, choices=choices)])
    homes = [
        {"scene_id": "homes/a<b.glb", "share": 0.2, "episodes": 2, "map": "maps/0.png"},
        {"scene_id": "homes/c.glb", "share": 0.2, "episodes": 2, "map": "../../config.yaml"},
    ]
    file = folder / "summary.json"
    told = {**left.to_json(), "homes": homes}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"departures": told}))
    before = Page(write_report(evaluated).read_text())
    assert "At 20.0% of its steps the agent did something else than the expert" in before.text
    assert "20.0% in episodes that reached their goal, 20.0% in episodes that missed" in before.text
    assert "move forward (16 steps) 0.0% 75.0% 25.0% 0.0%" in before.text
    assert "a<b: 20.0% of its steps, 2 episodes" in before.text
    assert "c: 20.0%" not in before.text
    assert not before.open


def test_only_the_runs_own_val_split_is_called_unseen(evaluated):
    assert "In homes it had never seen" in Page(write_report(evaluated).read_text()).text
    file = evaluated.path / "evaluation" / "val" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"split": "train"}))
    text = Page(write_report(evaluated).read_text()).text
    assert "In homes of train it reached" in text
    assert "never seen" not in text
    assert "unseen" not in text


def summarise_of(run):
    return read_evaluations(run)[0].agents["run"]


def test_names_from_elsewhere_are_text_and_never_markup(evaluated):
    page = write_report(evaluated).read_text()
    assert "run &lt;b&gt;&amp;" in page
    assert "ex<pert" not in page
    assert not Page(page).open, "every tag is closed"


def test_a_run_without_evaluation_has_a_report_with_its_curves(run):
    text = Page(write_report(run).read_text()).text
    assert "has not been evaluated yet" in text
    assert (run.path / "curves.png").is_file()
    assert not list(run.path.glob(".*"))


def test_pictures_outside_the_evaluations_folder_stay_outside(evaluated, tmp_path):
    file = evaluated.path / "evaluation" / "val" / "summary.json"
    summary = json.loads(file.read_text())
    cv2.imwrite(str(tmp_path / "secret.png"), np.zeros((8, 8, 3), np.uint8))
    for place in ("../../../secret.png", str(tmp_path / "secret.png"), "summary.json", "maps", "gone.png"):
        summary["pictures"][0] |= {"map": place, "video": place}
        file.write_text(json.dumps(summary))
        page = write_report(evaluated).read_text()
        assert "Where it went" not in page
        assert "Watch it" not in page


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"agents": {}}', '{"agents": {"run": {"spl": 3}}}', "\x00"]
)
def test_a_broken_summary_is_named(evaluated, text):
    file = evaluated.path / "evaluation" / "val" / "summary.json"
    file.write_text(text)
    with pytest.raises(RunError, match=r"summary\.json"):
        write_report(evaluated)


def test_evaluations_on_other_episodes_come_after_the_runs_own(evaluated):
    own = evaluated.path / "evaluation" / "val"
    other = evaluated.path / "evaluation" / "a-other"
    other.mkdir()
    (other / "summary.json").write_text((own / "summary.json").read_text())
    assert [evaluation.folder.name for evaluation in read_evaluations(evaluated)] == ["val", "a-other"]
    assert "Also evaluated: a-other" in write_report(evaluated).read_text()


def test_the_command_to_repeat_a_run_gives_its_settings_back(tmp_path):
    config = load_config(
        [
            "experiment=quick",
            "sensors=depth",
            "seed=3",
            "run_dir=x y",
            "env.allow_sliding=false",
            "algorithm.learning_rate=1e-4",
            "algorithm.target_kl=0.01",
        ]
    )
    words = shlex.split(reproduce_command(config))
    assert words[:2] == ["navagent", "train"]
    again = load_config([*words[2:], "run_dir=x y"])
    assert again == config
    write_config(again, tmp_path / "config.yaml")


@pytest.mark.parametrize("experiment", ["quick", "side_tuning_paper", "large_batch"])
def test_an_imitated_run_is_repeated_without_what_it_does_not_look_at(experiment):
    config = load_config([f"experiment={experiment}"], "imitate")
    words = shlex.split(reproduce_command(config))
    assert words[:2] == ["navagent", "imitate"]
    again, own = flatten(load_config(words[2:], "imitate")), flatten(config)
    different = {name for name in own if again[name] != own[name]}
    assert "imitation.frames" in different and different <= set(PPO_ALONE)


@pytest.mark.parametrize(
    ("options", "own"),
    [
        (["adaptation=hst", "encoder=vit_mini"], []),
        (["adaptation=spottune", "encoder=resnet_small", "adaptation.noise=false"], ["noise=false"]),
        # Side-tuning's default, which is another setting of the same name.
        (["adaptation=lora", "adaptation.alpha=0.5"], ["alpha=0.5"]),
    ],
)
def test_a_methods_own_settings_are_repeated_and_reported(evaluated, options, own):
    config = load_config(options)
    words = shlex.split(reproduce_command(config))
    expected = [f"adaptation.name={config.adaptation.name}", *(f"adaptation.{setting}" for setting in own)]
    assert [word for word in words if word.startswith("adaptation.")] == expected
    assert load_config(words[2:]) == config
    evaluated.write_config(to_yaml(config))
    text = Page(write_report(evaluated).read_text()).text
    assert all(word.replace("=", " = ") in text for word in expected)
