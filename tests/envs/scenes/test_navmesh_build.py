"""Navigation meshes built from geometry: against closed forms, and against meshes that Habitat built."""

import json
import shutil

import numpy as np
import pytest
import torch

from envs.scenes import navmesh_build, voxelise
from envs.scenes.gltf import load_scene
from envs.scenes.navmesh import NavMesh
from envs.scenes.navmesh_build import build_navmesh, navmesh_for
from envs.scenes.navmesh_file import read_navmesh
from envs.scenes.navmesh_tile import NavMeshError
from envs.scenes.pathfinder import PathFinder
from envs.scenes.scene import SceneError
from envs.simulators.base import AgentSpec

RECORDED = ("apartment", "studio", "loft")
AGENT = AgentSpec(radius=0.1, height=1.5)


class Blocks:
    """Geometry of boxes and quads, in the world frame."""

    def __init__(self):
        self.vertices = np.empty((0, 3))
        self.triangles = np.empty((0, 3), dtype=int)

    def add(self, vertices, triangles):
        self.triangles = np.concatenate([self.triangles, np.asarray(triangles) + len(self.vertices)])
        self.vertices = np.concatenate([self.vertices, np.asarray(vertices, dtype=float)])
        return self

    def quad(self, a, b, c, d):
        """Counter-clockwise seen from the front."""
        return self.add([a, b, c, d], [[0, 1, 2], [0, 2, 3]])

    def floor(self, x0, z0, x1, z1, y=0.0):
        return self.quad((x0, y, z0), (x0, y, z1), (x1, y, z1), (x1, y, z0))

    def box(self, low, high):
        corners = [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
        low, high = np.array(low, dtype=float), np.array(high, dtype=float)
        faces = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3))
        triangles = [[a, b, c] for a, b, c, _ in faces] + [[a, c, d] for a, _, c, d in faces]
        return self.add(low + np.array(corners) * (high - low), triangles)

    def mesh(self, agent=AGENT, **kwargs) -> NavMesh:
        return build_navmesh(self.vertices, self.triangles, agent, **kwargs)


class Queries:
    """A path finder over one mesh that takes plain points."""

    def __init__(self, mesh):
        self.paths = PathFinder([mesh])

    def navigable(self, points):
        points = torch.as_tensor(np.asarray(points), dtype=torch.float32).reshape(-1, 3)
        return self.paths.is_navigable(torch.zeros(len(points), dtype=torch.int64), points).numpy()

    def distance(self, start, goal):
        start, goal = (
            torch.as_tensor(np.asarray(p), dtype=torch.float32).reshape(-1, 3) for p in (start, goal)
        )
        return self.paths.geodesic_distance(torch.zeros(len(start), dtype=torch.int64), start, goal).numpy()

    def snap(self, points):
        points = torch.as_tensor(np.asarray(points), dtype=torch.float32).reshape(-1, 3)
        return self.paths.snap(torch.zeros(len(points), dtype=torch.int64), points).numpy()


def signed_areas(mesh: NavMesh) -> np.ndarray:
    """Area of each polygon seen from above, positive if it goes round counter-clockwise."""
    areas = []
    for polygon in mesh.polygons:
        # Seen from above, x is to the right and -z is up.
        x, y = (mesh.vertices[polygon[polygon >= 0]] * [1, 1, -1])[:, [0, 2]].astype(float).T
        areas.append((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)
    return np.array(areas)


def check_sound(mesh: NavMesh) -> None:
    """What Detour relies on: convex counter-clockwise polygons, and neighbours that know each other."""
    assert np.isfinite(mesh.vertices).all()
    assert (signed_areas(mesh) > 0).all()
    for number, polygon in enumerate(mesh.polygons):
        size = int((polygon >= 0).sum())
        assert 3 <= size <= 6
        assert (polygon[size:] == -1).all()
        flat = mesh.vertices[polygon[:size]][:, [0, 2]].astype(float)
        ahead = np.roll(flat, -1, axis=0) - flat
        turn = ahead[:, 0] * np.roll(ahead, -1, axis=0)[:, 1] - ahead[:, 1] * np.roll(ahead, -1, axis=0)[:, 0]
        assert (turn < 1e-6).all(), f"polygon {number} is not convex"
        for edge in range(size):
            other = mesh.neighbours[number, edge]
            if other < 0:
                continue
            back = int(np.flatnonzero(mesh.neighbours[other] == number)[0])
            theirs = mesh.polygons[other]
            assert polygon[edge] == theirs[(back + 1) % int((theirs >= 0).sum())]
            assert polygon[(edge + 1) % size] == theirs[back]
    # Detail triangles tile their polygon exactly.
    corners = mesh.vertices[mesh.detail_triangles[:, :3]].astype(float)
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = np.abs(first[:, 0] * second[:, 2] - first[:, 2] * second[:, 0]) / 2
    owner = np.repeat(np.arange(len(mesh.polygons)), np.diff(mesh.detail_starts))
    np.testing.assert_allclose(np.bincount(owner, area), signed_areas(mesh), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=RECORDED)
def recorded(request, reference_dir):
    """A recorded scene: the mesh built from its geometry, Habitat's mesh, its description, the recordings."""
    name = request.param
    info = json.loads((reference_dir / f"{name}.json").read_text())
    scene = load_scene(reference_dir / f"{name}.glb")
    agent = AgentSpec(radius=info["agent_radius"], height=info["agent_height"])
    mesh = build_navmesh(scene.vertices, scene.triangles, agent)
    recordings = np.load(reference_dir / f"{name}.reference.npz")
    return mesh, read_navmesh(reference_dir / f"{name}.navmesh"), info, recordings


def test_same_points_are_navigable_as_in_habitat(recorded):
    mesh, _, _, recordings = recorded
    agree = Queries(mesh).navigable(recordings["query_point"]) == recordings["query_is_navigable"]
    assert agree.mean() >= 0.99


def test_area_is_habitats(recorded):
    mesh, theirs, info, _ = recorded
    assert mesh.navigable_area == pytest.approx(info["navigable_area"], rel=0.002)
    assert mesh.navigable_area == pytest.approx(theirs.navigable_area, rel=0.002)


def test_distances_are_habitats(recorded):
    mesh, _, _, recordings = recorded
    found = Queries(mesh).distance(recordings["geodesic_start"], recordings["geodesic_end"])
    expected = recordings["geodesic_distance"]
    finite = np.isfinite(expected)
    assert (np.isfinite(found) == finite).mean() >= 0.995
    both = finite & np.isfinite(found) & (expected > 0)
    error = np.abs(found[both] - expected[both]) / expected[both]
    assert np.median(error) <= 0.001
    assert np.quantile(error, 0.99) <= 0.03


def test_polygons_are_as_few_as_habitats(recorded):
    mesh, theirs, _, _ = recorded
    assert len(mesh.polygons) == pytest.approx(len(theirs.polygons), rel=0.1)
    assert len(mesh.detail_triangles) == pytest.approx(len(theirs.detail_triangles), rel=0.1)


def test_corners_are_habitats(recorded):
    mesh, theirs, info, _ = recorded
    cells = [
        {
            tuple(c)
            for c in np.rint((m.tiles[0].vertices - m.bounds[0]) / [0.05, 0.2, 0.05]).astype(int).tolist()
        }
        for m in (mesh, theirs)
    ]
    # The loft's walls lie between cells, and Habitat turns scenes with a rounding error that decides which.
    assert len(cells[0] & cells[1]) >= (0.75 if info["scene"] == "loft" else 1.0) * len(cells[1])


def test_bounds_and_settings_are_habitats(recorded):
    mesh, theirs, _, _ = recorded
    np.testing.assert_allclose(mesh.bounds, theirs.bounds, atol=1e-5)
    for field, value in vars(theirs.settings).items():
        assert getattr(mesh.settings, field) == pytest.approx(value, rel=1e-6), field


def test_recorded_scenes_give_sound_meshes(recorded):
    for mesh in recorded[:2]:
        check_sound(mesh)


def test_two_floors_of_the_recorded_loft_are_one_island(reference_dir):
    scene = load_scene(reference_dir / "loft.glb")
    mesh = build_navmesh(scene.vertices, scene.triangles, AgentSpec(radius=0.18, height=0.88))
    recordings = np.load(reference_dir / "loft.reference.npz")
    start, goal = recordings["geodesic_start"], recordings["geodesic_end"]
    climbs = np.isfinite(recordings["geodesic_distance"]) & (np.abs(start[:, 1] - goal[:, 1]) > 1.5)
    assert climbs.any()
    assert np.isfinite(Queries(mesh).distance(start[climbs], goal[climbs])).all()


@pytest.mark.parametrize("radius", [0.05, 0.1, 0.18, 0.3])
def test_flat_floor_shrinks_by_the_radius(radius):
    mesh = Blocks().floor(0, 0, 4, 4).box((-0.5, 0, -0.5), (0, 2, 4.5)).box((4, 0, -0.5), (4.5, 2, 4.5)) \
        .box((0, 0, -0.5), (4, 2, 0)).box((0, 0, 4), (4, 2, 4.5)).mesh(AgentSpec(radius=radius))  # fmt: skip
    floor = signed_areas(mesh)[mesh.vertices[mesh.polygons[:, 0], 1] < 1].sum()
    # A wall may fill the cell that it only touches, on either side.
    assert (4 - 2 * radius - 4 * 0.05) ** 2 < floor <= (4 - 2 * radius + 0.001) ** 2
    check_sound(mesh)


@pytest.mark.parametrize(("rise", "climb", "connected"), [
    (0.15, 0.2, True), (0.2, 0.2, True), (0.35, 0.2, False), (0.6, 0.2, False),
    (0.35, 0.4, True), (0.15, 0.1, False),
])  # fmt: skip
def test_steps_are_climbed_up_to_the_climb_in_whole_cells(rise, climb, connected):
    # A slab of half a cell keeps heights off the borders between cells.
    mesh = (
        Blocks().box((0, -0.1, 0), (3, 0, 3)).box((3, -0.1, 0), (6, rise, 3)).mesh(AgentSpec(max_climb=climb))
    )
    distance = Queries(mesh).distance([(1, 0, 1.5)], [(5, rise, 1.5)])
    assert np.isfinite(distance[0]) == connected


@pytest.mark.parametrize(
    ("slope", "walkable"), [(10, True), (30, True), (40, True), (60, False), (80, False)]
)
def test_ramps_are_walked_up_to_the_slope(slope, walkable):
    length = 3.0
    rise = length * np.tan(np.radians(slope))
    # Voxels as high as the default's are wide: a steep ramp climbs several of those in one step.
    mesh = Blocks().floor(0, 0, 3, 3).quad((3, 0, 0), (3, 0, 3), (6, rise, 3), (6, rise, 0)).mesh()
    found = Queries(mesh).navigable([(1.5, 0, 1.5), (4.5, rise / 2, 1.5)])
    assert found.tolist() == [True, walkable]


def test_slope_limit_is_the_agents():
    blocks = Blocks().floor(0, 0, 3, 3).quad((3, 0, 0), (3, 0, 3), (6, 1.2, 3), (6, 1.2, 0))
    point = [(4.5, 0.6, 1.5)]
    assert Queries(blocks.mesh(AgentSpec(max_slope_deg=45))).navigable(point)[0]
    assert not Queries(blocks.mesh(AgentSpec(max_slope_deg=15))).navigable(point)[0]


@pytest.mark.parametrize(
    ("width", "radius", "open_"), [(0.9, 0.1, True), (0.9, 0.3, True), (0.5, 0.3, False)]
)
def test_doorways_let_through_who_fits(width, radius, open_):
    middle = 2.0
    blocks = Blocks().floor(0, 0, 6, 4)
    blocks.box((2.9, 0, 0), (3.1, 2.2, middle - width / 2)).box((2.9, 0, middle + width / 2), (3.1, 2.2, 4))
    distance = Queries(blocks.mesh(AgentSpec(radius=radius))).distance([(1, 0, 2)], [(5, 0, 2)])
    assert np.isfinite(distance[0]) == open_


@pytest.mark.parametrize(
    ("underside", "height", "passable"), [(2.1, 1.5, True), (0.7, 1.5, False), (1.1, 0.5, True)]
)
def test_agents_walk_only_where_they_fit_below(underside, height, passable):
    blocks = Blocks().floor(0, 0, 6, 4).box((2, underside, 0), (4, underside + 0.1, 4))
    queries = Queries(blocks.mesh(AgentSpec(height=height)))
    assert queries.navigable([(3, 0, 2)])[0] == passable
    assert np.isfinite(queries.distance([(1, 0, 2)], [(5, 0, 2)])[0]) == passable


def test_low_ceilings_leave_nowhere_to_stand():
    blocks = Blocks().floor(0, 0, 4, 4).box((0, 1, 0), (4, 1.1, 4))
    # The ceiling's own top is open to the sky.
    assert not Queries(blocks.mesh()).navigable([(2, 0, 2)])[0]


def test_small_tables_are_obstacles_and_no_floor():
    blocks = Blocks().floor(0, 0, 4, 4).box((1.6, 0, 1.6), (2.4, 0.8, 2.4))
    mesh = blocks.mesh()
    found = Queries(mesh).navigable([(1.2, 0, 2), (1.55, 0, 2), (2, 0, 2), (2, 0.8, 2)])
    assert found.tolist() == [True, False, False, False]
    assert len(np.unique(mesh.islands)) == 1
    check_sound(mesh)


def test_ledges_are_kept_away_from():
    blocks = Blocks().floor(0, 0, 4, 4, y=0).box((4, -2, 0), (8, -1.5, 4))
    queries = Queries(blocks.mesh())
    assert queries.navigable([(3.0, 0, 2), (6, -1.5, 2)]).all()
    assert not queries.navigable([(3.95, 0, 2)])[0]
    assert not np.isfinite(queries.distance([(3, 0, 2)], [(6, -1.5, 2)])[0])


def test_stairs_join_two_storeys():
    blocks = Blocks().floor(0, 0, 8, 4)
    for step in range(13):
        blocks.box((2 + 0.3 * step, 0, 0.5), (2 + 0.3 * (step + 1), 0.2 * (step + 1), 2))
    blocks.box((5.9, 2.4, 0), (8, 2.6, 4))
    mesh = blocks.mesh()
    check_sound(mesh)
    queries = Queries(mesh)
    assert queries.navigable([(7, 2.6, 3), (7, 0, 3)]).all()
    up = queries.distance([(1, 0, 1.25)], [(7, 2.6, 1.25)])[0]
    # Along the slope of the stairs, and level before and behind them.
    assert up == pytest.approx(1 + np.hypot(3.9, 2.6) + 1.1, abs=0.4)
    # Each place of the floors above one another keeps its height.
    snapped = queries.snap([(7, 2.5, 3), (7, 0.1, 3)])
    np.testing.assert_allclose(snapped[:, 1], [2.6, 0], atol=0.21)


def test_detail_follows_stairs_and_hills():
    cells = 80
    x, z = np.meshgrid(np.linspace(0, 8, cells + 1), np.linspace(0, 8, cells + 1))
    y = 0.8 * np.sin(x * 0.9) * np.cos(z * 0.7)
    index = np.arange((cells + 1) ** 2).reshape(cells + 1, cells + 1)
    a, b, c, d = (part.ravel() for part in (index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]))
    triangles = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    mesh = build_navmesh(np.stack([x, y, z], axis=-1).reshape(-1, 3), triangles, AgentSpec(max_climb=0.4))
    check_sound(mesh)
    rng = np.random.default_rng(0)
    points = rng.uniform(0.5, 7.5, (500, 3))
    points[:, 1] = 0.8 * np.sin(points[:, 0] * 0.9) * np.cos(points[:, 2] * 0.7)
    snapped = Queries(mesh).snap(points)
    near = np.hypot(*(snapped - points)[:, [0, 2]].T) < 0.01
    assert near.mean() > 0.95
    # A cell for rounding up, one that samples are put higher, one for the allowed deviation.
    assert np.abs(snapped - points)[near, 1].max() < 0.6
    assert np.abs(snapped - points)[near, 1].mean() < 0.35


def test_bumpy_floors_give_sound_meshes():
    rng = np.random.default_rng(1)
    blocks = Blocks().floor(0, 0, 6, 6)
    for _ in range(60):
        low = rng.uniform(0, 5.5, 2)
        size = rng.uniform(0.05, 0.9, 3)
        blocks.box((low[0], 0, low[1]), (low[0] + size[0], size[1], low[1] + size[2]))
    check_sound(blocks.mesh())


def test_floor_facing_down_carries_nobody():
    upside_down = Blocks().quad((0, 0, 0), (4, 0, 0), (4, 0, 4), (0, 0, 4))
    with pytest.raises(NavMeshError, match="can stand nowhere"):
        upside_down.mesh()


def test_degenerate_triangles_change_nothing():
    blocks = Blocks().floor(0, 0, 4, 4)
    plain = blocks.mesh()
    blocks.add([(1, 0, 1), (1, 0, 1), (2, 0, 2), (9, 9, 9)], [[0, 1, 2], [0, 0, 0], [3, 3, 3]])
    with_rubbish = blocks.mesh()
    np.testing.assert_array_equal(with_rubbish.vertices, plain.vertices)
    np.testing.assert_array_equal(with_rubbish.polygons, plain.polygons)


def test_same_geometry_gives_the_same_mesh():
    blocks = Blocks().floor(0, 0, 5, 5).box((1, 0, 1), (2, 1, 3))
    first, second = blocks.mesh(), blocks.mesh()
    np.testing.assert_array_equal(first.vertices, second.vertices)
    np.testing.assert_array_equal(first.polygons, second.polygons)
    np.testing.assert_array_equal(first.detail_triangles, second.detail_triangles)


@pytest.mark.parametrize(("vertices", "triangles", "message"), [
    (np.empty((0, 3)), np.empty((0, 3)), "no triangles"),
    ([(0, 0, 0), (1, 0, 0), (2, 0, 0)], [(0, 1, 2)], "no triangle of the scene has any area"),
    ([(0, 0, 0), (0, 0, 1), (np.nan, 0, 0)], [(0, 1, 2)], "1 of 1 triangles have corners"),
    ([(0, 0, 0), (0, 0, 1), (1, 0, 0)], [(0, 1, 3)], "0 to 3 must index 3 vertices"),
    ([(0, 0, 0), (0, 0, 1), (1, 0, 0)], [(0, -1, 2)], "-1 to 2 must index 3 vertices"),
    ([(0, 0, 0), (0, 0, 1e6), (1e6, 0, 0)], [(0, 1, 2)], "too large for voxels"),
    ([(0, 0, 0), (0, 0, 1), (1e30, 0, 0)], [(0, 1, 2)], "too large for voxels"),
    ([(0, 0, 0), (0, 0, 0.01), (1e9, 0, 0)], [(0, 1, 2)], "too large for voxels"),
    ([(-3e38, 0, 0), (0, 0, 1), (3e38, 0, 0)], [(0, 1, 2)], "too large for voxels"),
    ([(0, 0, 0), (0, 0, 0.5), (0.5, 0, 0)], [(0, 1, 2)], "less than 1.0 m2"),
])  # fmt: skip
def test_bad_geometry_is_named(vertices, triangles, message):
    with pytest.raises(NavMeshError, match=message):
        build_navmesh(np.array(vertices, dtype=float), np.array(triangles, dtype=int), AGENT)


def test_large_triangles_may_not_lie_over_each_other_without_end(monkeypatch):
    blocks = Blocks().floor(0, 0, 4, 4)
    monkeypatch.setattr(voxelise, "_MAX_PIECES", 2 * 80 * 80)
    blocks.mesh()
    with pytest.raises(NavMeshError, match="too large for voxels"):
        blocks.floor(0, 0, 4, 4).floor(0, 0, 4, 4).mesh()


def test_a_scene_on_its_side_gets_a_hint():
    turned = Blocks().floor(0, 0, 4, 4)
    turned.vertices = turned.vertices[:, [1, 2, 0]]
    with pytest.raises(NavMeshError, match="is its up axis another"):
        turned.mesh()


def test_voxel_sizes_must_be_positive():
    with pytest.raises(NavMeshError, match="cell_size 0"):
        Blocks().floor(0, 0, 4, 4).mesh(cell_size=0.0)


class TestNavmeshFor:
    """Where the mesh of a scene file comes from."""

    @pytest.fixture
    def scene(self, tmp_path, reference_dir):
        for name in ("studio.glb", "studio.navmesh", "studio.stage_config.json"):
            shutil.copy(reference_dir / name, tmp_path / name)
            (tmp_path / name).chmod(0o644)
        return tmp_path / "studio.glb"

    @pytest.fixture
    def builds(self, monkeypatch):
        """Counts how often a mesh is built."""
        calls = []
        real = navmesh_build.build_navmesh
        monkeypatch.setattr(navmesh_build, "build_navmesh", lambda *a, **k: calls.append(1) or real(*a, **k))
        return calls

    def test_the_file_beside_the_scene_is_used_if_it_fits(self, scene, builds, tmp_path):
        mesh = navmesh_for(scene, AgentSpec(radius=0.1, height=1.5), tmp_path / "cache")
        assert not builds
        np.testing.assert_array_equal(mesh.polygons, read_navmesh(scene.with_suffix(".navmesh")).polygons)

    def test_another_agent_gets_its_own_with_a_warning(self, scene, builds, tmp_path):
        with pytest.warns(UserWarning, match=r"radius 0.1 m and height 1.5 m, this one has radius 0.2 m"):
            mesh = navmesh_for(scene, AgentSpec(radius=0.2, height=1.5), tmp_path / "cache")
        assert len(builds) == 1
        assert mesh.settings.agent_radius == pytest.approx(0.2)

    def test_a_built_mesh_is_kept(self, scene, builds, tmp_path):
        scene.with_suffix(".navmesh").unlink()
        first = navmesh_for(scene, AGENT, tmp_path / "cache")
        second = navmesh_for(scene, AGENT, tmp_path / "cache")
        assert len(builds) == 1
        np.testing.assert_array_equal(first.polygons, second.polygons)
        np.testing.assert_allclose(first.vertices, second.vertices, atol=1e-6)
        navmesh_for(scene, AgentSpec(radius=0.2), tmp_path / "cache")
        assert len(builds) == 2

    def test_changed_scenes_are_built_anew(self, scene, builds, tmp_path):
        scene.with_suffix(".navmesh").unlink()
        navmesh_for(scene, AGENT, tmp_path / "cache")
        config = scene.with_suffix(".stage_config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | {"scale": [1.1, 1.1, 1.1]}))
        navmesh_for(scene, AGENT, tmp_path / "cache")
        assert len(builds) == 2

    def test_a_broken_cache_entry_is_built_anew(self, scene, builds, tmp_path):
        scene.with_suffix(".navmesh").unlink()
        first = navmesh_for(scene, AGENT, tmp_path / "cache")
        (entry,) = (tmp_path / "cache").iterdir()
        entry.write_bytes(entry.read_bytes()[:100])
        with pytest.warns(UserWarning, match="anew"):
            second = navmesh_for(scene, AGENT, tmp_path / "cache")
        assert len(builds) == 2
        np.testing.assert_array_equal(first.polygons, second.polygons)

    def test_a_broken_file_beside_the_scene_is_an_error(self, scene, tmp_path):
        beside = scene.with_suffix(".navmesh")
        beside.write_bytes(beside.read_bytes()[:200])
        with pytest.raises(NavMeshError, match=r"studio\.navmesh"):
            navmesh_for(scene, AGENT, tmp_path / "cache")

    def test_a_cache_that_cannot_be_written_is_no_obstacle(self, scene, tmp_path):
        scene.with_suffix(".navmesh").unlink()
        (tmp_path / "cache").write_text("a file where the folder should be")
        with pytest.warns(UserWarning, match="cannot keep"):
            assert len(navmesh_for(scene, AGENT, tmp_path / "cache").polygons)

    def test_the_cache_folder_can_be_set(self, scene, tmp_path, monkeypatch):
        scene.with_suffix(".navmesh").unlink()
        monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path / "elsewhere"))
        navmesh_for(scene, AGENT)
        assert list((tmp_path / "elsewhere" / "navmesh").glob("*.navmesh"))

    def test_a_missing_scene_is_named(self, tmp_path):
        with pytest.raises(SceneError, match=r"nothing\.glb"):
            navmesh_for(tmp_path / "nothing.glb", AGENT, tmp_path / "cache")

    def test_a_scene_without_floor_is_named(self, scene, tmp_path):
        scene.with_suffix(".navmesh").unlink()
        with pytest.raises(NavMeshError, match=r"studio\.glb: the agent \(radius 4.0 m"):
            navmesh_for(scene, AgentSpec(radius=4.0), tmp_path / "cache")
