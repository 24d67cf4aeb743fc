import gzip
import json
import math
from dataclasses import replace

import pytest
import torch

from envs import files
from envs.episodes import (
    Episode,
    EpisodeError,
    find_scene,
    find_scenes,
    generate_episodes,
    read_dataset,
    scene_name,
    write_dataset,
    write_index,
)


def episode(identity="0", scene="scenes/a/a.glb", **changes):
    base = Episode(
        episode_id=identity,
        scene_id=scene,
        start_position=(1.0, 0.1, -2.5),
        start_rotation=(0.0, math.sin(0.4), 0.0, math.cos(0.4)),
        goal_position=(3.25, 0.1, 0.0),
        goal_radius=0.2,
        geodesic_distance=4.5,
    )
    return replace(base, **changes)


def entry(**changes):
    value = {
        "episode_id": "7",
        "scene_id": "a.glb",
        "start_position": [0, 0, 0],
        "start_rotation": [0, 0, 0, 1],
        "goals": [{"position": [1, 0, 0], "radius": None}],
        "info": {"geodesic_distance": 1.0},
    }
    value.update(changes)
    return value


def write_raw(path, value):
    path.write_bytes(gzip.compress(value if isinstance(value, bytes) else json.dumps(value).encode()))
    return path


@pytest.mark.parametrize("per_scene", [True, False])
def test_what_is_written_is_read(tmp_path, per_scene):
    episodes = [episode("0"), episode("1", geodesic_distance=math.pi), episode("0", "scenes/b/b.glb")]
    write_dataset(episodes, tmp_path / "val" / "val.json.gz", per_scene=per_scene)
    assert read_dataset(tmp_path / "val" / "val.json.gz") == episodes
    content = tmp_path / "val" / "content"
    names = sorted(p.name for p in content.iterdir()) if per_scene else []
    assert names == (["a.json.gz", "b.json.gz"] if per_scene else [])


def test_same_episodes_give_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_dataset([episode()], tmp_path / name / "val.json.gz", per_scene=False)
    assert (tmp_path / "one/val.json.gz").read_bytes() == (tmp_path / "two/val.json.gz").read_bytes()


def test_an_absent_distance_and_radius_survive(tmp_path):
    write_dataset([episode(goal_radius=None, geodesic_distance=math.nan)], tmp_path / "val.json.gz")
    (read,) = read_dataset(tmp_path / "val.json.gz")
    assert read.goal_radius is None
    assert math.isnan(read.geodesic_distance)


def test_habitats_own_episodes_are_read(reference_dir):
    episodes = read_dataset(reference_dir / "pointnav/val/val.json.gz")
    assert len(episodes) == 60
    assert {e.scene_id for e in episodes} == {"apartment.glb", "loft.glb", "studio.glb"}
    assert all(find_scene(e.scene_id, reference_dir).is_file() for e in episodes)
    some = read_dataset(reference_dir / "pointnav/val/val.json.gz", scenes=["loft"])
    assert [e for e in episodes if e.scene_id == "loft.glb"] == some


def test_start_yaw_is_the_heading_of_the_rotation():
    for yaw in (-3.0, -1.2, 0.0, 0.8, 3.1):
        rotation = (0.0, math.sin(yaw / 2), 0.0, math.cos(yaw / 2))
        assert episode(start_rotation=rotation).start_yaw == pytest.approx(yaw)
        negated = tuple(-v for v in rotation)
        assert episode(start_rotation=negated).start_yaw == pytest.approx(yaw)


def test_content_scenes_path_is_followed_and_not_formatted(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_raw(tmp_path / "elsewhere/a.gz.json.gz", {"episodes": [entry()]})
    header = {"episodes": [], "content_scenes_path": "{data_path}/elsewhere/{scene}.gz.json.gz"}
    assert len(read_dataset(write_raw(tmp_path / "val.json.gz", header))) == 1
    header["content_scenes_path"] = "{data_path.__class__}/{scene}.json.gz"
    with pytest.raises(EpisodeError, match="no episodes"):
        read_dataset(write_raw(tmp_path / "val.json.gz", header))
    header["content_scenes_path"] = 3
    with pytest.raises(EpisodeError, match=r"content_scenes_path is 3"):
        read_dataset(write_raw(tmp_path / "val.json.gz", header))


def test_ids_may_repeat_across_scenes_but_not_within(tmp_path):
    path = write_raw(tmp_path / "a.json.gz", {"episodes": [entry(), entry(scene_id="b.glb")]})
    assert len(read_dataset(path)) == 2
    write_raw(path, {"episodes": [entry(), entry()]})
    with pytest.raises(EpisodeError, match="occurs twice"):
        read_dataset(path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"goals": []}, "at least one goal"),
        ({"goals": [3]}, "at least one goal"),
        ({"goals": [{}]}, "goal position is None"),
        ({"goals": [{"position": [0, 0, 0], "radius": -1}]}, "goal radius is -1"),
        ({"start_position": [0, 0]}, "expected 3 numbers"),
        ({"start_position": [0, "x", 0]}, "expected a number"),
        ({"start_position": [0, True, 0]}, "expected a number"),
        ({"start_position": [0, math.nan, 0]}, "expected a finite number"),
        ({"start_position": [0, 10**400, 0]}, "expected a finite number"),
        ({"start_rotation": [0, 0, 0, 0]}, "expected a unit quaternion"),
        ({"start_rotation": [0, 0, 1, 1]}, "expected a unit quaternion"),
        ({"start_rotation": None}, "expected 4 numbers"),
        ({"scene_id": 4}, "expected the path of a scene"),
        ({"scene_id": "a\0.glb"}, "expected the path of a scene"),
        ({"episode_id": {}}, "episode_id is"),
        ({"info": 3}, "info is 3"),
        ({"info": {"geodesic_distance": math.inf}}, "expected a finite number"),
        ({"info": {"geodesic_distance": -1}}, "expected at least 0"),
    ],
)
def test_a_bad_episode_is_named_with_its_fault(tmp_path, change, fault):
    path = write_raw(tmp_path / "bad.json.gz", {"episodes": [entry(episode_id="6"), entry(**change)]})
    with pytest.raises(EpisodeError, match=fault) as error:
        read_dataset(path)
    assert "bad.json.gz: episode 1" in str(error.value)


@pytest.mark.parametrize("missing", ["episode_id", "scene_id", "start_position", "start_rotation", "goals"])
def test_a_missing_field_is_named(tmp_path, missing):
    bad = entry()
    del bad[missing]
    with pytest.raises(EpisodeError, match=f"episode 0: has no '{missing}'"):
        read_dataset(write_raw(tmp_path / "bad.json.gz", {"episodes": [bad]}))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"[" * 100_000, "nested too deeply|not valid JSON"),
        (b'{"episodes": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "holds a JSON list"),
        (b"{}", "'episodes' is None"),
        (b'{"episodes": {}}', "expected a list"),
        (b'{"episodes": [1]}', "episode 0: is 1"),
        (b'{"episodes": []}', "no episodes"),
    ],
)
def test_a_hostile_file_gives_an_error_that_names_it(tmp_path, data, fault):
    with pytest.raises(EpisodeError, match=fault) as error:
        read_dataset(write_raw(tmp_path / "bad.json.gz", data))
    assert "bad.json.gz" in str(error.value)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_ALWAYS_ALLOWED", 1000)
    path = write_raw(tmp_path / "bomb.json.gz", b'{"episodes": []}' + b" " * 10**6)
    with pytest.raises(EpisodeError, match=r"bomb\.json\.gz: its \d+ bytes unpack to more than"):
        read_dataset(path)
    many = [episode(str(number)) for number in range(500)]
    write_dataset(many, tmp_path / "val.json.gz", per_scene=False)
    assert read_dataset(tmp_path / "val.json.gz") == many


def test_names_longer_than_any_file_has_are_not_found(tmp_path):
    with pytest.raises(EpisodeError, match="not found") as error:
        find_scene("a" * 10**6, tmp_path)
    assert len(str(error.value)) < 3000
    header = {"episodes": [entry()], "content_scenes_path": "a" * 5000 + "/{scene}.json.gz"}
    assert len(read_dataset(write_raw(tmp_path / "val.json.gz", header))) == 1


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(EpisodeError, match=r"none\.json\.gz: no such episode file"):
        read_dataset(tmp_path / "none.json.gz")
    whole = gzip.compress(json.dumps({"episodes": [entry() for _ in range(50)]}).encode())
    path = tmp_path / "cut.json.gz"
    for size in (3, 12, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(EpisodeError, match=r"cut\.json\.gz"):
            read_dataset(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(EpisodeError, match=r"cut\.json\.gz"):
        read_dataset(path)
    with pytest.raises(EpisodeError, match="cannot be read"):
        read_dataset(tmp_path)


def test_a_split_is_not_mixed_with_other_scenes(tmp_path):
    write_dataset([episode()], tmp_path / "val.json.gz")
    with pytest.raises(EpisodeError, match=r"a\.json\.gz"):
        write_dataset([episode(scene="b.glb")], tmp_path / "val.json.gz")
    with pytest.raises(EpisodeError, match="remove the folder"):
        write_dataset([episode()], tmp_path / "val.json.gz", per_scene=False)
    with pytest.raises(EpisodeError, match="no episodes to write"):
        write_dataset([], tmp_path / "val.json.gz")


def test_asking_for_an_unknown_scene_lists_those_there_are(tmp_path):
    write_dataset([episode()], tmp_path / "val.json.gz")
    with pytest.raises(EpisodeError, match="no episodes for scene z; there are a"):
        read_dataset(tmp_path / "val.json.gz", scenes=["z"])


def test_an_index_alone_holds_no_episodes(tmp_path):
    write_index(tmp_path / "val.json.gz")
    with pytest.raises(EpisodeError, match="no episodes"):
        read_dataset(tmp_path / "val.json.gz")


def test_scene_names_are_those_of_content_files():
    assert scene_name("data/scene_datasets/hm3d/val/00800-TEEs/TEEs.basis.glb") == "TEEs"
    assert scene_name("gibson/Adrian.glb") == "Adrian"


def test_scenes_are_found_with_and_without_habitats_prefix(tmp_path):
    (tmp_path / "gibson").mkdir()
    scene = tmp_path / "gibson/Adrian.glb"
    scene.touch()
    assert find_scene("gibson/Adrian.glb", tmp_path) == scene
    assert find_scene("data/scene_datasets/gibson/Adrian.glb", tmp_path) == scene
    assert find_scene("data/scene_datasets/gibson/Adrian.glb", tmp_path / "gibson") == scene
    assert find_scene(str(scene), tmp_path / "nowhere") == scene
    with pytest.raises(EpisodeError, match=r"tried .*gibson/Other\.glb"):
        find_scene("gibson/Other.glb", tmp_path)


def test_every_scene_that_episodes_name_is_found_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.glb").touch()
    episodes = [episode(str(k), scene) for k, scene in enumerate(("b.glb", "a.glb", "b.glb"))]
    assert find_scenes(episodes, tmp_path) == {"b.glb": tmp_path / "b.glb", "a.glb": tmp_path / "a.glb"}
    with pytest.raises(EpisodeError, match=r"c\.glb"):
        find_scenes([*episodes, episode(scene="c.glb")], tmp_path)


class Corridors:
    """Two parallel corridors, 10 m apart and joined at x = 0, and a small island at x < -5."""

    device = torch.device("cpu")

    def __init__(self, height_step=0.0):
        self.height_step = height_step

    def sample(self, scene, generator):
        u = torch.rand(len(scene), 4, generator=generator)
        x = 20.0 * u[:, 0]
        z = torch.where(u[:, 1] < 0.5, 0.0, 10.0) + u[:, 2]
        points = torch.stack([x, torch.where(z > 5, self.height_step, 0.0), z], dim=1)
        points[u[:, 3] < 0.2, 0] = -6.0
        return points

    def island_radius(self, scene, points):
        return torch.where(points[:, 0] < -5, 1.0, 12.0)

    def geodesic_distance(self, scene, start, goal):
        same = (start[:, 2] > 5) == (goal[:, 2] > 5)
        around = start[:, 0] + goal[:, 0] + (start[:, 2] - goal[:, 2]).abs()
        distance = torch.where(same, (start - goal).norm(dim=1), around)
        apart = (start[:, 0] < -5) != (goal[:, 0] < -5)
        return torch.where(apart, torch.inf, distance)


def test_generated_episodes_keep_habitats_rules():
    episodes = generate_episodes(Corridors(), 0, "a.glb", 400, seed=3)
    assert [e.episode_id for e in episodes] == [str(k) for k in range(400)]
    straight = 0
    for e in episodes:
        assert 1.0 <= e.geodesic_distance <= 30.0
        assert e.start_position[0] >= 0 and e.goal_position[0] >= 0, "the small island"
        assert math.hypot(*e.start_rotation) == pytest.approx(1.0)
        assert e.goal_radius == 0.2
        ratio = e.geodesic_distance / math.dist(e.start_position, e.goal_position)
        straight += ratio < 1.1
    # A straight start is kept with probability 20 (1 - 0.98)^2 = 0.8 %, so few of them are left.
    assert straight < 0.05 * len(episodes)
    headings = torch.tensor([e.start_yaw for e in episodes])
    assert headings.cos().mean().abs() < 0.15 and headings.sin().mean().abs() < 0.15


def test_starts_and_goals_share_a_floor():
    episodes = generate_episodes(Corridors(height_step=3.0), 0, "a.glb", 20, seed=0)
    assert all(abs(e.start_position[1] - e.goal_position[1]) <= 0.5 for e in episodes)


def test_a_seed_gives_the_same_episodes_and_another_seed_others():
    paths = Corridors()
    first, again, other = (generate_episodes(paths, 0, "a.glb", 30, seed) for seed in (5, 5, 6))
    assert first == again
    assert not {e.start_position for e in first} & {e.start_position for e in other}


def test_a_world_without_room_for_episodes_is_an_error():
    class Closet(Corridors):
        def island_radius(self, scene, points):
            return torch.full((len(points),), 0.4)

    with pytest.raises(EpisodeError, match="only 0 of 5 episodes"):
        generate_episodes(Closet(), 0, "a.glb", 5, seed=0)
    with pytest.raises(EpisodeError, match="at least 1"):
        generate_episodes(Corridors(), 0, "a.glb", 0, seed=0)
