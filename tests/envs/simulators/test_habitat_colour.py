"""Colour from workers of habitat-sim, to the bit what habitat-sim and habitat-lab themselves give.

Runs where habitat_sim imports; habitat-sim takes 12 s to load a scene with colour as it comes.
"""

import json
import math
import time

import numpy as np
import pytest
import torch
import trimesh

from envs.simulators.base import AgentSpec, SensorSpec
from envs.simulators.habitat import HabitatSimulator, habitat_body

habitat_sim = pytest.importorskip("habitat_sim", reason="habitat_sim is not installed", exc_type=ImportError)

from envs.simulators.habitat.body import configuration, simulator_of, without_environment  # noqa: E402

pytestmark = pytest.mark.timeout(900)

CAMERAS = [SensorSpec("rgb", "rgb", 48, 64), SensorSpec("depth", "depth", 48, 64)]


def views(paths, count=10):
    """Poses to look from: (count, 3) [m] and (count,) [rad]."""
    paths.seed(3)
    places = [paths.get_random_navigable_point() for _ in range(count)]
    return np.array(places, np.float32), np.linspace(-3, 3, count, dtype=np.float32)


def seen(simulator, positions, yaws):
    """What an ordinary simulator of habitat-sim sees."""
    images = {"rgb": [], "depth": []}
    for position, half in zip(positions, yaws.astype(np.float64) / 2, strict=True):
        rotation = np.array([0.0, math.sin(half), 0.0, math.cos(half)])
        simulator.get_agent(0).set_state(habitat_sim.AgentState(position, rotation))
        observed = simulator.get_sensor_observations()
        images["rgb"].append(observed["rgb"][..., :3].copy())
        images["depth"].append(observed["depth"].copy())
    return {name: np.stack(found) for name, found in images.items()}


def seen_by_workers(scene, positions, yaws, dataset=None):
    """What our workers see."""
    simulator = HabitatSimulator([scene], len(yaws), CAMERAS, scene_dataset_config=dataset)
    try:
        everyone = torch.arange(len(yaws))
        where = torch.from_numpy(positions)
        simulator.reset(everyone, torch.zeros_like(everyone), where, torch.from_numpy(yaws))
        return {name: image.numpy() for name, image in simulator.render().items()}
    finally:
        simulator.close()


@pytest.mark.parametrize("name", ["apartment", "studio"])
def test_colour_of_a_scan_is_that_of_habitat_labs_simulator(reference_dir, name):
    habitat = pytest.importorskip("habitat", reason="habitat-lab is not installed", exc_type=ImportError)
    from habitat.sims import make_sim

    config = habitat.get_config("benchmark/nav/pointnav/pointnav_gibson.yaml")
    with habitat.config.read_write(config):
        wanted = config.habitat.simulator
        wanted.scene = str(reference_dir / f"{name}.glb")
        wanted.habitat_sim_v0.gpu_device_id = -1
        for sensor in wanted.agents.main_agent.sim_sensors.values():
            sensor.height, sensor.width, sensor.hfov = 48, 64, 90
            sensor.position = [0.0, 1.25, 0.0]
    theirs = make_sim(wanted.type, config=wanted)
    assert set(theirs.get_sensor_observations()) == {"rgb", "depth"}
    poses = views(theirs.pathfinder)
    expected = seen(theirs, *poses)
    theirs.close()
    found = seen_by_workers(reference_dir / f"{name}.glb", *poses)
    assert found["rgb"].std() > 10
    for sensor, images in expected.items():
        np.testing.assert_array_equal(found[sensor], images, err_msg=sensor)


@pytest.fixture(scope="module")
def lit(reference_dir, tmp_path_factory):
    """A data set whose scenes are a room with a lamp, the same with a red box in it, and with neither."""
    folder = tmp_path_factory.mktemp("lit")
    for suffix in (".glb", ".navmesh"):
        (folder / f"apartment{suffix}").write_bytes((reference_dir / f"apartment{suffix}").read_bytes())
    box = trimesh.creation.box((0.6, 0.6, 0.6))
    material = trimesh.visual.material.PBRMaterial(
        baseColorFactor=[200, 40, 40, 255], metallicFactor=0.6, roughnessFactor=0.3
    )
    box.visual = trimesh.visual.TextureVisuals(material=material)
    box.export(folder / "box.glb")
    lamp = {"type": "point", "position": [0, 2, 0], "intensity": 3, "color": [1, 1, 1]}
    stage = {"stage_instance": {"template_name": "apartment"}, "navmesh_instance": "apartment"}
    boxes = [{"template_name": "box", "translation": [x, 0.8, z]} for x in range(-6, 7) for z in range(-6, 7)]
    files = {
        "set.scene_dataset_config.json": {
            "stages": {"paths": {".glb": ["apartment.glb"]}},
            "objects": {"paths": {".json": ["box.object_config.json"]}},
            "light_setups": {"paths": {".json": ["lamp.lighting_config.json"]}},
            "scene_instances": {"paths": {".json": ["*.scene_instance.json"]}},
            "navmesh_instances": {"apartment": "apartment.navmesh"},
        },
        "lamp.lighting_config.json": {"lights": {"lamp": lamp}},
        "box.object_config.json": {"render_asset": "box.glb"},
        "bright.scene_instance.json": stage | {"default_lighting": "lamp"},
        "furnished.scene_instance.json": stage | {"object_instances": boxes},
        "bare.scene_instance.json": stage,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("scene", ["bright", "furnished"])
def test_scenes_with_lamps_or_objects_get_their_environment(lit, scene):
    """Its light is in the picture: a simulator without it would give another one."""
    dataset = lit / "set.scene_dataset_config.json"
    settings = dict(habitat_body(CAMERAS, AgentSpec(), 1, scene_dataset_config=dataset).settings[0])
    path = str(lit / f"{scene}.scene_instance.json")
    plain = habitat_sim.Simulator(configuration(path, settings))
    poses = views(plain.pathfinder)
    expected = seen(plain, *poses)
    plain.close()
    without = configuration(path, settings)
    without.metadata_mediator = without_environment(without.sim_cfg, settings["no_map"])
    dark = habitat_sim.Simulator(without)
    assert np.any(seen(dark, *poses)["rgb"] != expected["rgb"])
    dark.close()
    found = seen_by_workers(path, *poses, dataset)
    for sensor, images in expected.items():
        np.testing.assert_array_equal(found[sensor], images, err_msg=sensor)


def test_scenes_that_need_no_environment_load_without_it(lit, reference_dir, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    dataset = str(lit / "set.scene_dataset_config.json")
    shared = dict(habitat_body(CAMERAS, AgentSpec(), 1).settings[0])
    for scene, settings in (
        (reference_dir / "apartment.glb", shared),
        (lit / "bare.scene_instance.json", shared | {"scene_dataset_config": dataset}),
    ):
        began = time.process_time()
        simulator_of(str(scene), settings).close()
        # 0.2 s, where the environment takes 12.
        assert time.process_time() - began < 4
    assert list(tmp_path.iterdir()) == []
