"""Taskonomy's networks against those of the package visualpriors, on the same random weights.

Statistics of BatchNorm are random too. Images are small where the size does not matter.
"""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from visualpriors import taskonomy_network as published
from visualpriors import transforms

from policies.catalogue import catalogue, default_entry
from policies.encoders import ENCODERS, make_encoder
from policies.encoders.taskonomy import (
    CLASSIFICATION_TASKS,
    DECODER_CHANNELS,
    ENCODER_TASKS,
    MAX_COVERAGE,
    TaskonomyDecoder,
    TaskonomyEncoder,
    TaskonomySet,
    make_decoder,
)


def randomise(make, seed):
    """A network with random weights and statistics; drawn here, since default initialisation is slow."""
    with torch.device("meta"):
        network = make()
    network = network.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                fan = module.weight[0].numel()
                module.weight.uniform_(-((3 / fan) ** 0.5), (3 / fan) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-0.1, 0.1, generator=generator)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.2, generator=generator)
                module.bias.uniform_(-0.2, 0.2, generator=generator)
                module.running_mean.uniform_(-0.2, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.num_batches_tracked.zero_()
    return network


@pytest.fixture(scope="module")
def theirs():
    return [randomise(published.TaskonomyEncoder, seed) for seed in range(4)]


def with_weights(network, tensors):
    network.load_tensors(tensors)
    return network.eval()


def image(size, batch=1):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1


def agree(seen, expected):
    # As large as the features are, for those that are not normalised grow from block to block.
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(seen, expected, atol=1e-5 * scale, rtol=0)
    assert expected.std() > 1e-3


def test_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in TaskonomyEncoder().parameters()) == 23_655_504


@pytest.mark.parametrize("size", [300, 256, 96])
def test_preprocessing_is_the_published_one_within_pillows_roundings(size):
    picture = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=torch.manual_seed(size))
    # As published: TF.to_tensor(TF.resize(image, 256)) * 2 - 1, of a Pillow image.
    resized = Image.fromarray(picture.numpy()).resize((256, 256), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255 * 2 - 1
    with torch.device("meta"):
        encoder = TaskonomyEncoder()
    # Pillow rounds twice to whole levels, of which there are 127.5 in a unit: at most 1 level in all.
    error = (encoder.preprocess(picture[None])[0] - expected).abs().max()
    assert error <= (1.01 / 127.5 if size != 256 else 1e-6)


@torch.no_grad()
def test_encoder_is_the_published_one_at_full_size(theirs):
    ours = with_weights(TaskonomyEncoder(), theirs[0].state_dict())
    x = image(256)
    features = ours(x)
    assert features.shape == (1, 8, 16, 16)
    agree(features, theirs[0](x))


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 75])
def test_encoder_without_normalised_outputs_is_the_published_one(theirs, size, monkeypatch):
    monkeypatch.setattr(theirs[0], "normalize_outputs", False)
    ours = with_weights(TaskonomyEncoder(normalise_outputs=False), theirs[0].state_dict())
    agree(ours(image(size, 2)), theirs[0](image(size, 2)))


@torch.no_grad()
def test_outputs_scale_only_without_normalisation(theirs):
    ours = with_weights(TaskonomyEncoder(), theirs[0].state_dict())
    with pytest.raises(ValueError, match="no layer that scales its output alone"):
        ours.scale_outputs(0.5)
    ours.normalise_outputs = False
    before = ours(image(64))
    ours.scale_outputs(0.5)
    agree(ours(image(64)), before / 2)


def test_encoders_of_all_published_tasks_are_known_by_name():
    assert set(ENCODER_TASKS) == set(transforms.VisualPrior.viable_feature_tasks)
    assert len(ENCODER_TASKS) == 25
    with torch.device("meta"):
        for task in ENCODER_TASKS:
            assert isinstance(ENCODERS[f"taskonomy_{task}"](3), TaskonomyEncoder)


def test_decoders_of_all_published_tasks_are_known_with_their_channels():
    files = {
        name.removesuffix("_decoder") for name in published.TASKONOMY_PRETRAINED_URLS if "_decoder" in name
    }
    assert set(DECODER_CHANNELS) == files
    assert len(files) == 17
    for task, channels in DECODER_CHANNELS.items():
        assert published.TASKS_TO_CHANNELS[task] == channels
        assert (task in CLASSIFICATION_TASKS) == (task not in published.PIX_TO_PIX_TASKS)


def shapes(network):
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def published_decoder(task):
    return published.TaskonomyDecoder(
        out_channels=published.TASKS_TO_CHANNELS[task],
        is_decoder_mlp=task not in published.PIX_TO_PIX_TASKS,
        apply_tanh=task not in published.DONT_APPLY_TANH_TASKS,
    )


@pytest.mark.parametrize("task", DECODER_CHANNELS)
def test_decoder_has_the_published_names_and_shapes(task):
    with torch.device("meta"):
        assert shapes(TaskonomyDecoder(task)) == shapes(published_decoder(task))


@torch.no_grad()
@pytest.mark.parametrize(
    ("task", "size"), [("normal", 3), ("curvature", 16), ("segment_semantic", 3), ("class_object", 16)]
)
def test_decoder_is_the_published_one(task, size):
    expected = randomise(lambda: published_decoder(task), 5)
    ours = with_weights(TaskonomyDecoder(task), expected.state_dict())
    features = torch.rand(2, 8, size, size, generator=torch.Generator().manual_seed(1))
    seen = ours(features)
    agree(seen, expected(features))
    channels = DECODER_CHANNELS[task]
    images = (2, channels, 16 * size, 16 * size)
    assert seen.shape == ((2, channels) if task in CLASSIFICATION_TASKS else images)


def test_decoder_learns_from_images_after_features_of_its_encoder(theirs):
    encoder = with_weights(TaskonomyEncoder(normalise_outputs=False), theirs[0].state_dict())
    decoder = TaskonomyDecoder("depth_zbuffer").train()
    decoder(encoder(image(32, 2))).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_class_decoders_refuse_features_of_another_size():
    with torch.device("meta"), pytest.raises(ValueError, match=r"class_scene takes \(N, 8, 16, 16\)"):
        TaskonomyDecoder("class_scene")(torch.zeros(1, 8, 4, 4))


def test_unknown_tasks_name_the_nearest():
    with pytest.raises(ValueError, match=r"no Taskonomy decoder for task 'normals'; did you mean 'normal'"):
        TaskonomyDecoder("normals")
    with pytest.raises(ValueError, match=r"no Taskonomy decoder for task 'jigsaw'"):
        TaskonomyDecoder("jigsaw")
    with pytest.raises(
        ValueError, match=r"no Taskonomy encoder for task 'curvatur'; did you mean 'curvature'"
    ):
        TaskonomySet(["normal", "curvatur"])
    with pytest.raises(ValueError, match="set of no tasks"):
        TaskonomySet([])


def test_max_coverage_sets_are_the_published_ones():
    assert [list(tasks) for tasks in MAX_COVERAGE] == transforms.VisualPrior.max_coverate_featuresets


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_set_is_the_published_max_coverage_transform(theirs, k, monkeypatch):
    tasks = MAX_COVERAGE[k - 1]
    nets = dict(zip(tasks, theirs, strict=False))
    monkeypatch.setattr(transforms.VisualPriorRepresentation, "feature_task_to_net", nets)
    # The published function looks for its sets in the module, where they are not.
    sets = transforms.VisualPrior.max_coverate_featuresets
    monkeypatch.setattr(transforms, "max_coverate_featuresets", sets, raising=False)
    with torch.device("meta"):
        ours = ENCODERS[f"taskonomy_max_coverage_{k}"](3)
    ours = ours.to_empty(device="cpu").eval()
    ours.load_members([nets[task].state_dict() for task in tasks])
    x = image(64, 2)
    seen = ours(x)
    assert seen.shape == (2, 8 * k, 4, 4)
    agree(seen, transforms.max_coverage_featureset_transform(x, k, device="cpu"))


@torch.no_grad()
def test_blocks_of_a_set_are_those_of_its_members_side_by_side(theirs):
    ours = TaskonomySet(["normal", "curvature"]).eval()
    ours.load_members([net.state_dict() for net in theirs[:2]])
    singles = [with_weights(TaskonomyEncoder(), net.state_dict()) for net in theirs[:2]]
    x = image(32)
    together, apart = ours.stem(x), [single.stem(x) for single in singles]
    agree(together, torch.cat(apart, dim=1))
    for index, block in enumerate(itertools.islice(ours.blocks, 3)):
        together = block(together)
        apart = [single.blocks[index](y) for single, y in zip(singles, apart, strict=True)]
        agree(together, torch.cat(apart, dim=1))
    assert len(ours.blocks) == 16


def test_set_names_the_task_whose_weights_do_not_fit(theirs):
    with torch.device("meta"):
        ours = TaskonomySet(["normal", "curvature"])
    good = theirs[0].state_dict()
    bad = {name: value for name, value in good.items() if name != "compress1.weight"}
    with pytest.raises(ValueError, match=r"of curvature does not fit .*missing: compress1\.weight"):
        ours.load_members([good, bad])
    with pytest.raises(ValueError, match="weights of 1 encoders for the 2"):
        ours.load_members([good])


def test_random_members_are_drawn_as_single_networks_are():
    torch.manual_seed(0)
    network = make_encoder("taskonomy_max_coverage_2", weights="random")
    weight = network.layer2[1].conv2.weight  # 128 to 128 channels in each member
    bound = (6 / (2 * 128 * 9)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert not torch.equal(*weight.chunk(2))


@torch.no_grad()
def test_published_file_of_a_decoder_loads_unchanged(tmp_path):
    expected = randomise(lambda: published_decoder("reshading"), 6)
    # Published files have the state one level down.
    torch.save({"state_dict": expected.state_dict(), "epoch": 0}, tmp_path / "reshading.pth")
    ours = make_decoder("reshading", tmp_path / "reshading.pth").eval()
    features = torch.rand(1, 8, 2, 2)
    agree(ours(features), expected(features))
    with pytest.raises(ValueError, match=r"reshading\.pth does not fit .*wrong shape: decoder_output"):
        make_decoder("normal", tmp_path / "reshading.pth")


@torch.no_grad()
def test_published_file_of_an_encoder_loads_unchanged(theirs, tmp_path):
    torch.save({"state_dict": theirs[1].state_dict(), "epoch": 0}, tmp_path / "normal.pth")
    ours = make_encoder("taskonomy_normal", weights=tmp_path / "normal.pth").eval()
    agree(ours(image(32)), theirs[1](image(32)))


def test_default_weights_that_were_not_fetched_say_how(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="navagent weights fetch taskonomy-normal-decoder"):
        make_decoder("normal")
    with pytest.raises(ValueError, match="navagent weights fetch taskonomy-segment_unsup2d`"):
        make_encoder("taskonomy_max_coverage_2")


def test_every_published_network_has_its_entry_in_the_catalogue():
    entries = catalogue()
    assert {name for name in entries if name.startswith("taskonomy-")} == {
        *(f"taskonomy-{task}" for task in ENCODER_TASKS),
        *(f"taskonomy-{task}-decoder" for task in DECODER_CHANNELS),
    }
    for task in ENCODER_TASKS:
        assert default_entry(f"taskonomy_{task}").name == f"taskonomy-{task}"
