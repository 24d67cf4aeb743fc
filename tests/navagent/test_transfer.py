"""One training of a comparison: the same for every method, repeatable, and blind to the test homes."""

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from torch import nn
from transfer_world import tilted_walls

from navagent.learning import transfer as module
from navagent.learning.decoder import Decoder
from navagent.learning.frames import View
from navagent.learning.transfer import FISHER_FRAMES, Base, Bench, Job, Row, TransferConfig, batches, rows
from policies.adaptation import ADAPTATIONS, Adaptation, FeatureExtraction
from policies.encoders import default_weights, make_encoder
from policies.weights import save_safetensors


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    save_safetensors(folder / "encoder.safetensors", make_encoder("fcn5_small").state_dict())
    torch.manual_seed(0)
    save_safetensors(folder / "decoder.safetensors", Decoder(8, 3, 3).state_dict())
    view = View(folder, height=32, width=32)
    base = Base.find(f"fcn5_small={folder}")
    made = TransferConfig(view, "reshading", folder / "frames", (base,), (20, 40), 2, 12, 8, 30)
    made.render(tilted_walls, lambda text: None)
    return made


def job(method="features", phase="final", **settings):
    defaults = {"images": 20, "seed": 0, "learning_rate": 3e-3}
    return Job("fcn5_small", Row(method, method), phase=phase, **{**defaults, **settings})


def test_every_method_there_is_has_a_row():
    assert {row.method for row in rows()} == set(ADAPTATIONS)
    assert len({row.name for row in rows()}) == len(rows())
    for method in ADAPTATIONS:
        assert any(row.name == method for row in rows())


def test_a_new_method_is_compared_without_further_code(monkeypatch):
    monkeypatch.setitem(ADAPTATIONS, "brand_new", FeatureExtraction)
    assert Row("brand_new", "brand_new") in rows()


def test_no_image_comes_again_before_all_came():
    seen = torch.cat(list(batches(10, 4, 5, seed=0)))
    assert seen[:10].sort().values.tolist() == list(range(10))
    assert seen[10:].sort().values.tolist() == list(range(10))
    assert torch.equal(seen, torch.cat(list(batches(10, 4, 5, seed=0))))
    assert not torch.equal(seen, torch.cat(list(batches(10, 4, 5, seed=1))))


def test_few_images_are_the_first_of_many_and_no_two_seeds_share_them(config):
    bench = Bench(config)
    first, second = (bench._frames(config.train_file(seed)).image for seed in (0, 1))
    assert len(first) == max(config.images)
    assert not torch.equal(first, second)


def test_the_same_job_gives_the_same_and_another_seed_something_else(config):
    bench, again = Bench(config), Bench(config)
    first = bench.run(job("finetune"))
    assert again.run(job("finetune")).measures == first.measures
    assert bench.run(job("finetune", seed=1)).measures != first.measures
    assert bench.run(job("finetune", images=40)).measures != first.measures


def test_the_decoder_learns_at_one_rate_whatever_the_method_s(config):
    bench = Bench(config)
    slow, fast = (bench.run(job(learning_rate=rate)).measures for rate in (1e-6, 1.0))
    assert slow == fast


def test_jobs_leave_the_base_as_it_was(config):
    bench = Bench(config)
    before = {k: v.clone() for k, v in bench._encoder("fcn5_small").state_dict().items()}
    for method in ("finetune", "sidetune", "scratch"):
        bench.run(job(method))
    after = bench._encoder("fcn5_small").state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_more_steps_learn_more(config):
    errors = [
        Bench(dataclasses.replace(config, steps=steps)).run(job("finetune", images=40)).error("reshading")
        for steps in (1, 60)
    ]
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < Bench(config).baselines()["reshading"]["mean image"]["mean_error"]


@pytest.mark.parametrize("method", ["features", "sidetune"])
def test_stored_base_features_change_nothing(method, config, monkeypatch):
    stored = Bench(config).run(job(method))
    monkeypatch.setattr(module, "_stored", lambda adaptation, frames: None)
    computed = Bench(config).run(job(method))
    assert stored.measures == pytest.approx(computed.measures, rel=1e-3)


def test_learning_rates_are_judged_without_the_test_homes(config, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    (frames / "train-0.safetensors").symlink_to(config.train_file(0))
    outcome = Bench(dataclasses.replace(config, frames=frames)).run(job(phase="choose"))
    assert outcome.error("reshading") > 0


def test_images_that_judge_a_learning_rate_are_not_learned_from(config, monkeypatch):
    bench = Bench(config)
    seen = []
    train = bench._train
    monkeypatch.setattr(bench, "_train", lambda *a: (seen.append((len(a[2]), a[3])), train(*a)))
    judged = []
    monkeypatch.setattr(
        module, "measure", lambda p, t, frames, n: judged.append(len(frames)) or {"mean_error": 1.0}
    )
    bench.run(job(phase="choose"))
    bench.run(job())
    assert seen == [(16, 6), (20, 12)]
    assert judged == [4, 30]


class Shared(Adaptation):
    """One scalar that all tasks train, and a record of what is asked of the method."""

    calls: ClassVar[list] = []

    def __init__(self, config, base=None):
        super().__init__(config)
        self.encoder = base
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.start_task("task")

    def make_adapter(self):
        return nn.Module()

    def forward(self, image, base_features=None):
        return self.scale * self.encoder(self.encoder.preprocess(image)).detach()

    def output_shape(self, height, width):
        return self.encoder.output_shape(height, width)

    def start_task(self, task):
        self.calls.append(("start", task))
        super().start_task(task)

    def finish_task(self, losses):
        for loss in losses:
            (gradient,) = torch.autograd.grad(loss, self.scale)
            self.calls.append(("loss", float(gradient)))

    def set_progress(self, samples, total):
        self.calls.append(("progress", samples, total))

    def penalty(self):
        return 1e6 * (self.scale - 3.0).square()

    def trainable_parameters(self):
        return iter([self.scale])


def test_a_method_whose_tasks_share_weights_is_told_of_the_base_task_first(config, monkeypatch):
    monkeypatch.setitem(ADAPTATIONS, "shared", Shared)
    monkeypatch.setattr(Shared, "calls", [])
    bench = Bench(config)
    bench.run(job("shared", learning_rate=0.2))
    calls = Shared.calls
    assert calls[0] == ("start", "task")
    losses = calls[1 : 1 + FISHER_FRAMES]
    assert all(call[0] == "loss" for call in losses)
    assert any(call[1] != 0 for call in losses)
    assert calls[1 + FISHER_FRAMES] == ("start", "target")
    assert calls[2 + FISHER_FRAMES :] == [("progress", 8 * step, 96) for step in range(12)]


def test_the_penalty_is_part_of_the_loss(config, monkeypatch):
    monkeypatch.setitem(ADAPTATIONS, "shared", Shared)
    made = []
    bench = Bench(config)
    start = bench.start
    monkeypatch.setattr(bench, "start", lambda *a: made.append(start(*a)) or made[-1])
    bench.run(job("shared", learning_rate=0.2))
    assert made[0].scale.item() > 1.5


def test_a_method_with_a_frozen_base_learns_the_target_as_its_first_task(config):
    adaptation = Bench(config).start("fcn5_small", Row("sidetune", "sidetune"))
    assert adaptation.tasks == ("task",)


def test_methods_that_do_not_take_a_base_say_so(config):
    bench = Bench(config)
    assert "fcn5_small" in bench.refusal("fcn5_small", Row("spottune", "spottune"))
    assert bench.refusal("fcn5_small", Row("features", "features")) is None


def test_without_the_base_s_decoder_methods_that_need_it_are_left_out(config):
    bare = dataclasses.replace(config, bases=(dataclasses.replace(config.bases[0], decoder=None),))
    bench = Bench(bare)
    assert "--bases fcn5_small=FOLDER" in bench.refusal("fcn5_small", Row("ewc", "ewc"))
    assert bench.refusal("fcn5_small", Row("finetune", "finetune")) is None
    assert set(bench.baselines()["normals"]) == {"mean image", "constant"}
    assert set(Bench(config).baselines()["normals"]) == {"mean image", "constant", "fcn5_small"}


def test_a_training_that_diverged_has_no_measures_and_an_infinite_error(config, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda *a: {"mean_error": math.nan, "rmse": math.inf})
    outcome = Bench(config).run(job())
    assert outcome.measures == {"mean_error": None, "rmse": None}
    assert outcome.error("reshading") == math.inf


def test_parameters_that_learn_are_counted_without_the_decoder(config):
    assert Bench(config).run(job()).trainable == 0
    encoder = make_encoder("fcn5_small")
    assert Bench(config).run(job("finetune")).trainable == sum(p.numel() for p in encoder.parameters())


def test_bases_are_found_by_name_or_folder(config, tmp_path):
    shipped = Base.find("resnet_small")
    assert shipped.weights == str(default_weights("resnet_small"))
    assert shipped.decoder.endswith("resnet_small-normals-rgb-decoder.safetensors")
    assert Base.find("fcn5_small").decoder is None
    with pytest.raises(ValueError, match="there is no file"):
        Base.find(f"fcn5_small={tmp_path}")
