import json
import os
import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
import trimesh

from envs.episodes import find_scene, read_dataset
from envs.scenes.gltf import load_scene
from envs.scenes.homes import dataset, generate_home
from envs.scenes.homes.dataset import HomesError, HomesSpec, is_complete, reachable_shares, write_homes
from envs.scenes.homes.layout import INNER_WALL, Rect, draw_plan, sides
from envs.scenes.navmesh_build import build_navmesh
from envs.scenes.navmesh_file import read_navmesh
from envs.scenes.pathfinder import PathFinder
from envs.simulators.base import AgentSpec, SensorSpec
from envs.simulators.raycast.simulator import RaycastSimulator

SIZES = [(1, 1), (2, 1), (3, 1), (5, 1), (7, 1), (10, 1), (5, 2), (8, 2), (10, 2)]
SMALL = HomesSpec(num=5, seed=3, train_episodes=12, val_episodes=6)


@pytest.fixture(scope="module")
def homes():
    return {size: generate_home((11, *size), *size) for size in SIZES}


@pytest.fixture(scope="module")
def meshes(homes):
    return {size: build_navmesh(*home.geometry(), AgentSpec()) for size, home in homes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_homes(tmp_path_factory.mktemp("homes") / "set", SMALL, num_workers=1)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_seed_gives_the_same_bytes_and_another_seed_others():
    first, again, other = (generate_home(seed, 3).to_glb() for seed in (4, 4, 5))
    assert first == again
    assert first != other


@pytest.mark.parametrize("floors", [1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_rooms_tile_their_floor_without_overlap(seed, floors):
    rng = np.random.default_rng(seed)
    plan = draw_plan(int(rng.integers(5 if floors == 2 else 1, 11)), floors, rng)
    assert len(plan.floors) == floors
    for floor in plan.floors:
        rects = [room.rect for room in floor.rooms]
        assert sum(r.area for r in rects) == pytest.approx(plan.outline.area)
        for i, a in enumerate(rects):
            assert min(a.width, a.depth) >= 1.1, "no slivers"
            assert not any(a.overlaps(b) for b in rects[i + 1 :])
        names = [room.name for room in floor.rooms]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("seed", range(12))
def test_doors_join_all_rooms_and_fit_their_walls(seed):
    rng = np.random.default_rng(seed)
    plan = draw_plan(int(rng.integers(2, 11)), 1, rng)
    (floor,) = plan.floors
    group = list(range(len(floor.rooms)))
    for door in floor.openings:
        width = door.hi - door.lo
        for index in door.rooms:
            own = [s for s in sides(floor.rooms[index].rect) if (s.axis, s.line) == (door.axis, door.line)]
            assert any(s.lo + INNER_WALL / 2 < door.lo and door.hi < s.hi - INNER_WALL / 2 for s in own)
        if door.kind == "door":
            assert 0.8 <= width <= 1.1 + 1e-9
            assert 2.0 <= door.top <= 2.1 < plan.ceiling
            a, b = (group[i] for i in door.rooms)
            group = [a if g == b else g for g in group]
    assert len(set(group)) == 1
    assert sum(o.kind == "entrance" for o in floor.openings) <= 1


def test_the_number_of_rooms_is_the_one_asked_for(homes):
    for (rooms, floors), home in homes.items():
        named = [r.kind for f in home.plan.floors for r in f.rooms if r.kind != "hall"]
        assert len(named) == rooms if floors == 1 else len(named) >= rooms
    with pytest.raises(ValueError, match="rooms is 11"):
        generate_home(0, 11)
    with pytest.raises(ValueError, match="floors is 2 for 3 rooms"):
        generate_home(0, 3, 2)


def test_every_room_of_every_size_can_be_walked_into(homes, meshes):
    for size, home in homes.items():
        shares = reachable_shares(home, meshes[size])
        assert min(shares.values()) > 0.1, (size, shares)


def test_nearly_all_free_floor_is_one_connected_area(homes, meshes):
    for size, home in homes.items():
        mesh = meshes[size]
        # What is walkable higher up is furniture: beds and tables, islands as in scanned homes.
        height = np.array([mesh.vertices[p[p >= 0], 1].mean() for p in mesh.polygons])
        on_floor = np.any([np.abs(height - f.base - 0.1) < 0.21 for f in home.plan.floors], axis=0)
        areas = np.array([mesh.areas[on_floor & (mesh.islands == k)].sum() for k in np.unique(mesh.islands)])
        assert areas.max() >= 0.95 * areas.sum(), (size, areas)


def test_stairs_join_the_floors_and_are_easy_to_climb(homes, meshes):
    for size in SIZES:
        home, stairs = homes[size], homes[size].plan.stairs
        assert (stairs is not None) == (size[1] == 2)
        if stairs is None:
            continue
        assert stairs.rise <= 0.18 and stairs.rect.width >= 0.9 and 0.25 <= stairs.tread <= 0.3
        paths = PathFinder([meshes[size]])
        middle = stairs.rect.centre[0]
        foot = torch.tensor([[middle, 0.1, stairs.rect.z0 - 0.5]])
        head = torch.tensor([[middle, stairs.height + 0.1, stairs.rect.z1 + 0.5]])
        distance = float(paths.geodesic_distance(torch.zeros(1, dtype=torch.int64), foot, head))
        slope = np.hypot(stairs.rect.depth, stairs.height)
        assert slope < distance < slope + 2.5, home.plan.outline


def test_a_glb_reads_back_as_the_same_geometry(homes, tmp_path):
    for size in ((1, 1), (5, 2)):
        home = homes[size]
        data = home.to_glb()
        read = trimesh.load(BytesIO(data), file_type="glb", process=False)
        assert set(read.graph.nodes_geometry) >= set(home.objects) or len(read.geometry) >= len(home.objects)
        vertices, triangles = home.geometry()
        assert sum(len(g.faces) for g in read.geometry.values()) == len(triangles) == home.num_triangles
        np.testing.assert_allclose(read.bounds, [vertices.min(axis=0), vertices.max(axis=0)], atol=1e-6)
        path = tmp_path / "home.glb"
        path.write_bytes(data)
        (tmp_path / "home.stage_config.json").write_text('{"up": [0, 1, 0], "front": [0, 0, -1]}')
        scene = load_scene(path)
        assert scene.triangles.shape == triangles.shape
        np.testing.assert_allclose(
            np.sort(scene.vertices[scene.triangles].reshape(-1, 9), axis=0),
            np.sort(vertices[triangles].reshape(-1, 9), axis=0),
            atol=1e-5,
        )
        assert set(scene.instance_names) >= {"stairs"} if size[1] == 2 else True
        assert all(material.texture is not None for material in scene.materials)
        assert scene.colors[:, :3].min() < 0.6 < scene.colors[:, :3].max() <= 1.0


def test_the_document_is_valid_gltf(homes):
    data = homes[(3, 1)].to_glb()
    length = int.from_bytes(data[12:16], "little")
    document = json.loads(data[20 : 20 + length])
    binary = data[28 + length :]
    assert int.from_bytes(data[8:12], "little") == len(data)
    assert document["buffers"][0]["byteLength"] == len(binary)
    for view in document["bufferViews"]:
        assert view["byteOffset"] % 4 == 0
        assert view["byteOffset"] + view["byteLength"] <= len(binary)
    sizes = {5126: 4, 5125: 4, 5121: 1}
    shapes = {"VEC3": 3, "VEC2": 2, "VEC4": 4, "SCALAR": 1}
    for accessor in document["accessors"]:
        view = document["bufferViews"][accessor["bufferView"]]
        item = sizes[accessor["componentType"]] * shapes[accessor["type"]]
        assert accessor["byteOffset"] % 4 == 0
        assert accessor["byteOffset"] + item * accessor["count"] <= view["byteLength"]
        assert view.get("byteStride", item) == item
    for mesh in document["meshes"]:
        for primitive in mesh["primitives"]:
            entries = [document["accessors"][k] for k in primitive["attributes"].values()]
            assert len({entry["count"] for entry in entries}) == 1
            position = document["accessors"][primitive["attributes"]["POSITION"]]
            view = document["bufferViews"][0]
            start = view["byteOffset"] + position["byteOffset"]
            points = np.frombuffer(binary, np.float32, position["count"] * 3, start).reshape(-1, 3)
            assert points.min(axis=0).tolist() == position["min"]
            assert points.max(axis=0).tolist() == position["max"]


def test_homes_are_closed_so_that_every_ray_from_inside_hits(folder):
    names = sorted(folder.glob("scenes/*/*.glb"))
    per_scene = 6
    sensors = [
        SensorSpec(f"depth{pitch}", "depth", 48, 48, hfov_deg=100.0, pitch_deg=pitch)
        for pitch in (-60, 0, 60)
    ]
    simulator = RaycastSimulator(names, per_scene * len(names), sensors)
    generator = torch.Generator().manual_seed(0)
    scene = torch.arange(len(names)).repeat_interleave(per_scene)
    position = simulator.paths.sample(scene, generator)
    yaw = 6.28 * torch.rand(len(scene), generator=generator)
    simulator.reset(torch.arange(len(scene)), scene, position, yaw)
    for name, depth in simulator.render().items():
        assert (depth > 0).all(), name
        assert depth.max() < 20
    simulator.close()


def test_rectangles_without_a_hole_keep_their_area():
    whole, hole = Rect(0, 0, 4, 3), Rect(1, 1, 2, 5)
    parts = whole.minus(hole)
    assert sum(p.area for p in parts) == pytest.approx(12 - 2)
    assert not any(p.overlaps(hole) for p in parts)
    assert whole.minus(Rect(9, 9, 10, 10)) == [whole]


def test_a_data_set_is_complete_and_its_splits_share_no_scene(folder):
    train, val = (read_dataset(folder / f"episodes/{s}/{s}.json.gz") for s in ("train", "val"))
    assert len(train) == 4 * 12 and len(val) == 6
    assert not {e.scene_id for e in train} & {e.scene_id for e in val}
    scenes = {find_scene(e.scene_id, folder) for e in train + val}
    assert len(scenes) == 5
    assert len({path.read_bytes() for path in scenes}) == 5
    config = json.loads((folder / "homes.scene_dataset_config.json").read_text())
    assert all((folder / path).is_file() for path in config["navmesh_instances"].values())
    for path in scenes:
        stage = json.loads(path.with_suffix(".stage_config.json").read_text())
        assert (path.parent / stage["render_asset"]).is_file() and (
            path.parent / stage["nav_asset"]
        ).is_file()


def test_episodes_agree_with_the_mesh_that_is_written(folder):
    episodes = read_dataset(folder / "episodes/train/train.json.gz")
    names = sorted({e.scene_id for e in episodes})
    paths = PathFinder([read_navmesh(find_scene(n, folder).with_suffix(".navmesh")) for n in names])
    scene = torch.tensor([names.index(e.scene_id) for e in episodes])
    start = torch.tensor([e.start_position for e in episodes])
    goal = torch.tensor([e.goal_position for e in episodes])
    stated = torch.tensor([e.geodesic_distance for e in episodes])
    torch.testing.assert_close(paths.geodesic_distance(scene, start, goal), stated, atol=1e-3, rtol=1e-4)
    assert paths.is_navigable(scene, start).all() and paths.is_navigable(scene, goal).all()
    assert (paths.island_radius(scene, start) >= 1.5).all()
    assert ((stated >= 1.0) & (stated <= 30.0)).all()
    assert ((start[:, 1] - goal[:, 1]).abs() <= 0.5).all()


def test_an_interrupted_call_is_taken_up_and_gives_the_same_files(folder, tmp_path, monkeypatch):
    made = []

    def interrupted(partial, spec, index):
        if index == 2:
            raise KeyboardInterrupt
        made.append(index)
        original(partial, spec, index)

    original = dataset.write_home
    monkeypatch.setattr(dataset, "write_home", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_homes(tmp_path / "set", SMALL, num_workers=1)
    assert not (tmp_path / "set").exists(), "half a data set must not be taken for one"
    monkeypatch.setattr(dataset, "write_home", lambda p, s, k: (made.append(k), original(p, s, k)))
    write_homes(tmp_path / "set", SMALL, num_workers=1)
    assert made == [0, 1, 2, 3, 4], "what was done is not done again"
    assert files(tmp_path / "set") == files(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_the_same_data_set_is_reused_and_anything_else_refused(folder, tmp_path):
    before = {p: os.stat(p).st_mtime_ns for p in folder.rglob("*")}
    assert write_homes(folder, SMALL) == folder
    assert {p: os.stat(p).st_mtime_ns for p in folder.rglob("*")} == before
    with pytest.raises(HomesError, match="seed 3 instead of 4"):
        write_homes(folder, HomesSpec(5, 4, 12, 6))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(HomesError, match="holds no data set"):
        write_homes(tmp_path / "mine", SMALL)
    with pytest.raises(HomesError, match="is a file"):
        write_homes(tmp_path / "mine/thesis.tex", SMALL)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/dataset.json").unlink()
    assert not is_complete(tmp_path / "copy", SMALL)
    with pytest.raises(HomesError, match="holds no data set"):
        write_homes(tmp_path / "copy", SMALL)


def test_worker_processes_write_the_same_files(folder, tmp_path):
    spec = HomesSpec(num=6, seed=3, train_episodes=12, val_episodes=6)
    seen = []
    out = write_homes(tmp_path / "set", spec, num_workers=2, on_home=lambda done, of: seen.append((done, of)))
    assert seen == [(k, 6) for k in range(1, 7)]
    one, two = files(folder), files(out)
    same = [name for name in one if name != "dataset.json" and "config" not in name]
    assert len(same) > 15
    assert all(one[name] == two[name] for name in same)


def test_more_homes_begin_with_the_same_ones():
    few, many = HomesSpec(num=10), HomesSpec(num=40)
    assert [few.size(k) for k in range(10)] == [many.size(k) for k in range(10)]
    assert [few.split(k) for k in range(10)] == [many.split(k) for k in range(10)]
    sizes = [many.size(k) for k in range(40)]
    assert {rooms for rooms, _ in sizes} >= {1, 2, 5, 10}
    assert sum(floors == 2 for _, floors in sizes) == 6
    assert sum(many.split(k) == "val" for k in range(40)) == 8


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"num": 1}, "num is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"train_episodes": 0}, "train_episodes is 0"),
        ({"val_episodes": 0}, "val_episodes is 0"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, fault):
    with pytest.raises(HomesError, match=fault):
        HomesSpec(**settings)
