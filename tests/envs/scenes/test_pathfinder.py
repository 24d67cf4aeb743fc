import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from envs.scenes.navmesh import NavMesh, NavMeshSettings
from envs.scenes.navmesh_file import read_navmesh
from envs.scenes.pathfinder import PathFinder

SCENES = ("apartment", "studio", "loft")


@pytest.fixture(scope="module")
def recordings(reference_dir):
    """Path finder of every recorded scene at once, and the scenes' recordings."""
    finder = PathFinder([read_navmesh(reference_dir / f"{scene}.navmesh") for scene in SCENES])
    files = [reference_dir / f"{scene}.reference.npz" for scene in SCENES]
    return finder, [np.load(file) for file in files]


def rows(points, scene=0):
    return torch.full((len(points),), scene, dtype=torch.int64)


def at(*points):
    return torch.tensor(points, dtype=torch.float32)


def off_by(got, recorded):
    """Distance of each answered point from the recorded one; equal where neither is a point."""
    difference = np.linalg.norm(got.numpy() - recorded, axis=1)
    both = np.isnan(recorded).any(1) & np.isnan(got.numpy()).any(1)
    return np.where(both, 0.0, np.nan_to_num(difference, nan=np.inf))


@pytest.mark.parametrize("number", range(3), ids=SCENES)
class TestAgreementWithHabitat:
    @pytest.fixture
    def case(self, recordings, number):
        finder, files = recordings

        def ask(method, *keys, **options):
            points = [torch.from_numpy(files[number][key].astype(np.float32)) for key in keys]
            return getattr(finder, method)(rows(points[0], number), *points, **options)

        return ask, files[number]

    def test_geodesic_distance(self, case):
        ask, recorded = case
        distance = ask("geodesic_distance", "geodesic_start", "geodesic_end").numpy()
        expected = recorded["geodesic_distance"]
        both = np.isfinite(distance) & np.isfinite(expected)
        error = np.abs(distance[both] - expected[both]) / np.maximum(expected[both], 1e-3)
        assert (np.isfinite(distance) == np.isfinite(expected)).mean() >= 0.995
        assert np.median(error) <= 0.003
        assert np.percentile(error, 99) <= 0.03

    @pytest.mark.parametrize(("key", "sliding"), [("step_slide", True), ("step_no_slide", False)])
    def test_single_moves(self, case, key, sliding):
        ask, recorded = case
        end = ask("try_step", "step_start", "step_target", allow_sliding=sliding)
        assert (off_by(end, recorded[key]) <= 0.01).mean() >= 0.99

    @pytest.mark.parametrize(("rollout", "sliding"), [("slide", True), ("stop", False)])
    def test_forward_moves_of_rollouts_and_their_collisions(self, recordings, number, rollout, sliding):
        finder, files = recordings
        kind = f"rollout_{rollout}"
        forward = files[number][f"{kind}_actions"] == 0
        position = files[number][f"{kind}_position"].astype(np.float32)
        rotation = files[number][f"{kind}_rotation_xyzw"][:, :-1][forward]
        yaw = 2 * np.arctan2(rotation[:, 1], rotation[:, 3])
        step = 0.25 * np.stack([-np.sin(yaw), np.zeros_like(yaw), -np.cos(yaw)], 1)
        start = torch.from_numpy(position[:, :-1][forward])
        target = start + torch.from_numpy(step.astype(np.float32))
        end = finder.try_step(rows(start, number), start, target, sliding)
        collided = (end - start).norm(dim=1) + 1e-5 < (target - start).norm(dim=1)
        assert (off_by(end, position[:, 1:][forward]) <= 0.01).mean() >= 0.99
        assert (collided.numpy() == files[number][f"{kind}_collided"][forward]).mean() >= 0.99

    def test_navigable(self, case):
        ask, recorded = case
        answer = ask("is_navigable", "query_point").numpy()
        assert (answer == recorded["query_is_navigable"]).mean() >= 0.99

    def test_snapped_points(self, case):
        ask, recorded = case
        assert (off_by(ask("snap", "query_point"), recorded["query_snapped"]) <= 0.02).mean() >= 0.99

    def test_island_radius(self, case):
        ask, recorded = case
        error = np.abs(ask("island_radius", "query_point").numpy() - recorded["query_island_radius"])
        assert (error <= 0.01).mean() >= 0.99

    def test_distance_to_obstacle(self, case):
        ask, recorded = case
        answer = ask("distance_to_obstacle", "obstacle_point", max_distance=10.0).numpy()
        assert (np.abs(answer - recorded["obstacle_distance"]) <= 0.03).mean() >= 0.95


@pytest.fixture(scope="module")
def corridor(floor_mesh):
    """An L of width 1 m: along x to (5, 1), then along z to (5, 5); its inner corner is (4, 1)."""
    return PathFinder([floor_mesh(["#####", "....#", "....#", "....#", "....#"])])


class TestGeodesicDistance:
    def test_a_corridor_bends_about_its_inner_corner(self, corridor):
        start, goal = at([0.5, 0, 0.5]), at([4.5, 0, 4.5])
        distance = corridor.geodesic_distance(rows(start), start, goal)
        assert distance.item() == pytest.approx(2 * np.hypot(3.5, 0.5), rel=1e-6)

    def test_the_path_has_start_corner_and_goal(self, corridor):
        start, goal = at([0.5, 0, 0.5]), at([4.5, 0, 4.5])
        points, count = corridor.path(rows(start), start, goal, max_points=8)
        assert count.tolist() == [3]
        torch.testing.assert_close(points[0, :3], at([0.5, 0, 0.5], [4, 0, 1], [4.5, 0, 4.5]))
        assert (points[0, 3:] == 0).all()

    def test_in_the_open_it_is_the_straight_line(self, floor_mesh):
        room = PathFinder([floor_mesh(["#"])])
        draw = torch.Generator().manual_seed(0)
        start, goal = (room.sample(torch.zeros(200, dtype=torch.int64), draw) for _ in range(2))
        torch.testing.assert_close(
            room.geodesic_distance(rows(start), start, goal), (start - goal).norm(dim=1), atol=1e-5, rtol=1e-5
        )

    def test_paths_sum_up_to_the_distance_in_every_scene(self, recordings):
        finder, _ = recordings
        draw = torch.Generator().manual_seed(1)
        scene = torch.arange(3).repeat_interleave(100)
        start, goal = finder.sample(scene, draw), finder.sample(scene, draw)
        distance = finder.geodesic_distance(scene, start, goal)
        points, count = finder.path(scene, start, goal)
        assert ((count == 0) == distance.isinf()).all()
        length = (points[:, 1:] - points[:, :-1]).norm(dim=2)
        length[torch.arange(127) >= count[:, None] - 1] = 0
        found = distance.isfinite()
        torch.testing.assert_close(length.sum(1)[found], distance[found], atol=1e-4, rtol=1e-5)
        last = points[torch.arange(300), (count - 1).clamp(min=0)]
        assert ((points[:, 0] - start)[found].abs() < 0.05).all() and (
            (last - goal)[found].abs() < 0.05
        ).all()
        assert (distance[found] >= (start - goal).norm(dim=1)[found] - 1e-3).all()

    def test_between_islands_it_is_infinite(self, floor_mesh):
        islands = PathFinder([floor_mesh(["##.#"])])
        start, goal = at([0.5, 0, 0.5], [0.5, 0, 0.5]), at([3.5, 0, 0.5], [1.5, 0, 0.5])
        distance = islands.geodesic_distance(rows(start), start, goal)
        assert distance[0].isinf() and distance[1] == pytest.approx(1.0)
        assert islands.path(rows(start), start, goal)[1].tolist() == [0, 2]

    def test_far_from_the_mesh_it_is_infinite(self, corridor):
        start, goal = at([-9, 0, 0.5], [np.nan, 0, 0]), at([0.5, 0, 0.5], [0.5, 0, 0.5])
        assert corridor.geodesic_distance(rows(start), start, goal).isinf().all()

    def test_to_the_same_place_it_is_zero(self, corridor):
        start = at([0.5, 0, 0.5])
        assert corridor.geodesic_distance(rows(start), start, start).item() == 0

    def test_habitats_longest_corridor_has_256_polygons(self, floor_mesh):
        long = PathFinder([floor_mesh(["#" * 300])])
        start, goal = at([0.5, 0, 0.5], [0.5, 0, 0.5]), at([255.5, 0, 0.5], [256.5, 0, 0.5])
        distance = long.geodesic_distance(rows(start), start, goal)
        assert distance[0] == pytest.approx(255.0) and distance[1].isinf()

    def test_a_path_with_more_corners_than_room_keeps_the_first(self, corridor):
        start, goal = at([0.5, 0, 0.5]), at([4.5, 0, 4.5])
        points, count = corridor.path(rows(start), start, goal, max_points=2)
        assert count.tolist() == [2]
        torch.testing.assert_close(points[0], at([0.5, 0, 0.5], [4, 0, 1]))


class TestMoves:
    def test_a_free_move_arrives(self, corridor):
        start, target = at([0.5, 0, 0.5]), at([0.75, 0, 0.6])
        for sliding in (True, False):
            torch.testing.assert_close(corridor.try_step(rows(start), start, target, sliding), target)

    def test_a_blocked_move_slides_to_the_walls_nearest_point_or_stops_where_it_hits(self, corridor):
        start, target = at([4.9, 0, 2.0]), at([5.1, 0, 2.2])
        slid = corridor.try_step(rows(start), start, target, True)
        stopped = corridor.try_step(rows(start), start, target, False)
        torch.testing.assert_close(slid, at([5.0, 0, 2.2]))
        torch.testing.assert_close(stopped, at([5.0, 0, 2.1]))

    def test_no_move_leaves_the_floor(self, recordings):
        finder, _ = recordings
        draw = torch.Generator().manual_seed(2)
        scene = torch.arange(3).repeat_interleave(300)
        position = finder.sample(scene, draw)
        for sliding in (True, False) * 5:
            yaw = torch.rand(len(scene), generator=draw) * 2 * torch.pi
            way = 0.25 * torch.stack([yaw.cos(), torch.zeros_like(yaw), yaw.sin()], 1)
            moved = finder.try_step(scene, position, position + way, sliding)
            # In a corner a slide may end beyond the target; Habitat's did so by up to 0.1 m.
            assert ((moved - position)[:, [0, 2]].norm(dim=1) <= 0.25 + 0.15).all()
            position = moved
            assert finder.is_navigable(scene, position).all()

    def test_a_move_between_islands_stays(self, floor_mesh):
        islands = PathFinder([floor_mesh(["#.#"])])
        start, target = at([0.9, 0, 0.5]), at([2.1, 0, 0.5])
        torch.testing.assert_close(islands.try_step(rows(start), start, target, True), start)

    def test_a_move_off_the_mesh_or_to_no_point_stays(self, corridor):
        start = at([-20, 0, 0], [0.5, 0, 0.5], [0.5, 0, 0.5])
        target = at([-20, 0, 1], [np.nan, 0, 0], [np.inf, 0, 0])
        torch.testing.assert_close(corridor.try_step(rows(start), start, target, True), start)


class TestPlaces:
    def test_navigable_means_over_the_floor_and_near_its_height(self, corridor):
        points = at([0.5, 0.4, 0.5], [0.5, 0.6, 0.5], [0.5, 0, 1.005], [0.5, 0, 1.02], [0.5, -0.4, 0.5])
        assert corridor.is_navigable(rows(points), points).tolist() == [True, False, True, False, True]
        assert corridor.is_navigable(rows(points), points, max_y_delta=0.1).tolist() == [False] * 2 + [
            True,
            False,
            False,
        ]

    def test_points_snap_to_the_nearest_floor_or_to_none(self, corridor):
        points = at([0.5, 0.3, 0.5], [-1.0, 0, 0.5], [-1.0, 0, -1.0], [-5.0, 0, 0], [0.5, 9, 0.5])
        snapped = corridor.snap(rows(points), points)
        torch.testing.assert_close(snapped[:3], at([0.5, 0, 0.5], [0, 0, 0.5], [0, 0, 0]))
        assert snapped[3].isnan().all()

    def test_of_two_floors_the_near_one_counts(self, floor_mesh):
        upper = floor_mesh(["##"])
        tile = upper.tiles[0]
        lifted = tile.vertices + np.float32([0, 3, 0])
        both = NavMesh.from_polygons(
            NavMeshSettings(),
            np.float32([[0, 0, 0], [2, 5, 1]]),
            np.concatenate([tile.vertices, lifted]),
            np.concatenate([tile.polygons, np.where(tile.polygons >= 0, tile.polygons + len(lifted), -1)]),
            np.concatenate([upper.neighbours, np.where(upper.neighbours >= 0, upper.neighbours + 2, -1)]),
        )
        finder = PathFinder([both])
        points = at([0.5, 1.4, 0.5], [0.5, 1.6, 0.5], [1.5, 2.9, 0.5])
        assert finder.snap(rows(points), points)[:, 1].tolist() == [0, 3, 3]

    def test_distance_to_obstacle_is_that_to_the_nearest_wall(self, floor_mesh):
        room = PathFinder([floor_mesh(["####"] * 4)])
        points = room.sample(torch.zeros(500, dtype=torch.int64), torch.Generator().manual_seed(3))
        flat = points[:, [0, 2]]
        expected = torch.minimum(flat, 4 - flat).amin(1)
        torch.testing.assert_close(room.distance_to_obstacle(rows(points), points), expected)
        near = room.distance_to_obstacle(rows(points), points, max_distance=0.5)
        torch.testing.assert_close(near, expected.clamp(max=0.5))

    def test_off_the_mesh_there_is_neither_island_nor_obstacle(self, corridor):
        points = at([-20, 0, 0])
        assert corridor.island_radius(rows(points), points).item() == 0
        assert corridor.distance_to_obstacle(rows(points), points).isinf().all()

    def test_the_island_radius_of_a_square_is_half_its_diagonal(self, floor_mesh):
        room = PathFinder([floor_mesh(["#.##"])])
        points = at([0.5, 0, 0.5])
        assert room.island_radius(rows(points), points).item() == pytest.approx(np.sqrt(0.5))


class TestSampling:
    def test_points_are_uniform_by_area(self, split_floor_mesh):
        # Polygons of 3 m2 and of 1 m2: equal areas must get equally many points.
        mesh = split_floor_mesh(["####"] * 3, column=2, merge_left_rows=True)
        count = 12_000
        points = PathFinder([mesh]).sample(
            torch.zeros(count, dtype=torch.int64), torch.Generator().manual_seed(4)
        )
        cells = torch.bincount((points[:, 0].long() * 3 + points[:, 2].long()).clamp(0, 11), minlength=12)
        chi_squared = ((cells - count / 12) ** 2 / (count / 12)).sum().item()
        assert chi_squared < 31.3  # The 99.9th percentile with 11 degrees of freedom.

    def test_points_are_navigable_and_lie_in_the_scene_asked_for(self, recordings):
        finder, _ = recordings
        scene = torch.arange(3).repeat(200)
        points = finder.sample(scene, torch.Generator().manual_seed(5))
        assert finder.is_navigable(scene, points, max_y_delta=0.01).all()

    def test_the_generator_decides(self, recordings):
        finder, _ = recordings
        scene = torch.arange(3)
        first, again, other = (finder.sample(scene, torch.Generator().manual_seed(s)) for s in (6, 6, 7))
        assert torch.equal(first, again) and not torch.equal(first, other)

    def test_a_scene_without_walkable_floor_is_refused(self, floor_mesh):
        mesh = floor_mesh(["#"])
        closed = replace(mesh, tiles=(replace(mesh.tiles[0], flags=np.zeros(1, np.uint16)),))
        finder = PathFinder([mesh, closed])
        with pytest.raises(ValueError, match="scene 1 has no walkable area"):
            finder.sample(torch.tensor([0, 1]), torch.Generator())
        assert finder.snap(rows(at([0.5, 0, 0.5]), 1), at([0.5, 0, 0.5])).isnan().all()


def every_answer(finder, scene, start, goal):
    return [
        finder.is_navigable(scene, start),
        finder.snap(scene, start),
        finder.island_radius(scene, start),
        finder.distance_to_obstacle(scene, start),
        finder.geodesic_distance(scene, start, goal),
        *finder.path(scene, start, goal),
        finder.try_step(scene, start, start + 0.1 * (goal - start), True),
        finder.try_step(scene, start, start + 0.1 * (goal - start), False),
    ]


@pytest.fixture(scope="module")
def batch(recordings):
    finder, _ = recordings
    draw = torch.Generator().manual_seed(8)
    scene = torch.randint(0, 3, (3000,), generator=draw)
    spread = torch.randn(3000, 3, generator=draw) * 0.5
    return finder, scene, finder.sample(scene, draw) + spread, finder.sample(scene, draw)


class TestBatching:
    def test_rows_do_not_influence_each_other(self, batch):
        finder, scene, start, goal = batch
        together = every_answer(finder, scene, start, goal)
        for row in range(0, 3000, 300):
            alone = every_answer(finder, scene[row : row + 1], start[row : row + 1], goal[row : row + 1])
            for one, many in zip(alone, together, strict=True):
                torch.testing.assert_close(one, many[row : row + 1], rtol=0, atol=0, equal_nan=True)

    def test_threads_change_nothing(self, batch):
        finder, scene, start, goal = batch
        for threads in (1, 3):
            other = PathFinder(finder.navmeshes, num_threads=threads)
            expected = every_answer(finder, scene, start, goal)
            for got, want in zip(every_answer(other, scene, start, goal), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)

    def test_scenes_answer_together_as_they_do_apart(self, batch):
        finder, scene, start, goal = batch
        together = every_answer(finder, scene, start, goal)
        for number, mesh in enumerate(finder.navmeshes):
            own = scene == number
            apart = every_answer(PathFinder([mesh]), torch.zeros_like(scene[own]), start[own], goal[own])
            for got, want in zip(apart, together, strict=True):
                torch.testing.assert_close(got, want[own], rtol=0, atol=0, equal_nan=True)

    def test_calls_from_several_threads_do_not_mix(self, batch):
        finder, scene, start, goal = batch
        expected = finder.geodesic_distance(scene, start, goal)
        results = []

        def ask():
            results.extend(finder.geodesic_distance(scene, start, goal) for _ in range(5))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 15 and all(torch.equal(result, expected) for result in results)

    def test_an_empty_batch_is_answered(self, batch):
        finder = batch[0]
        answers = every_answer(
            finder, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3), torch.zeros(0, 3)
        )
        assert all(len(answer) == 0 for answer in answers)

    def test_strided_inputs_are_read_right(self, batch):
        finder, scene, start, goal = batch
        wide = torch.cat([start, goal], 1)[:50]
        torch.testing.assert_close(
            finder.geodesic_distance(scene[:50], wide[:, :3], wide[:, 3:]),
            finder.geodesic_distance(scene[:50], start[:50], goal[:50]),
            rtol=0,
            atol=0,
        )


class TestSeveralTiles:
    PLAN = ("####..##", "#..####.", "##.#..##", ".###.###")

    def test_a_floor_in_two_tiles_is_the_same_floor(self, floor_mesh, split_floor_mesh):
        whole, split = floor_mesh(self.PLAN), split_floor_mesh(self.PLAN, column=4)
        finder = PathFinder([whole, split])
        draw = torch.Generator().manual_seed(9)
        start, goal = (finder.sample(torch.zeros(400, dtype=torch.int64), draw) for _ in range(2))
        one, two = rows(start, 0), rows(start, 1)
        assert finder.is_navigable(two, start).all()
        target = start + 0.1 * (goal - start)
        for sliding in (True, False):
            torch.testing.assert_close(
                finder.try_step(one, start, target, sliding),
                finder.try_step(two, start, target, sliding),
                atol=1e-4,
                rtol=0,
            )
        torch.testing.assert_close(
            finder.distance_to_obstacle(one, start),
            finder.distance_to_obstacle(two, start),
            atol=1e-5,
            rtol=0,
        )
        whole_way = finder.geodesic_distance(one, start, goal)
        split_way = finder.geodesic_distance(two, start, goal)
        assert torch.equal(whole_way.isinf(), split_way.isinf())
        # Passages are kept in 255ths of an edge; and where two ways are about as long, either may be taken.
        same = (whole_way - split_way).abs()[whole_way.isfinite()] < 0.02
        assert same.float().mean() > 0.95


class TestRefusals:
    @pytest.mark.parametrize(
        ("scene", "points", "message"),
        [
            (torch.zeros(2, dtype=torch.int32), torch.zeros(2, 3), r"scene must be \(N,\) int64"),
            (torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 3), r"scene must be \(N,\) int64"),
            (torch.zeros(2, dtype=torch.int64), torch.zeros(3, 3), r"points must be \(2, 3\) float32"),
            (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2), r"points must be \(2, 3\) float32"),
            (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.float64), "float32"),
        ],
    )
    def test_wrong_shapes_and_types_are_named(self, corridor, scene, points, message):
        with pytest.raises(ValueError, match=message):
            corridor.snap(scene, points)

    @pytest.mark.parametrize("scene", [-1, 1])
    def test_a_scene_that_is_not_resident_is_named(self, corridor, scene):
        with pytest.raises(IndexError, match=f"scene {scene} is not one of the 1 resident"):
            corridor.snap(torch.tensor([0, scene]), torch.zeros(2, 3))

    def test_impossible_options_are_named(self, corridor, floor_mesh):
        point = at([0.5, 0, 0.5])
        with pytest.raises(ValueError, match="max_points 1"):
            corridor.path(rows(point), point, point, max_points=1)
        with pytest.raises(ValueError, match="max_distance"):
            corridor.distance_to_obstacle(rows(point), point, max_distance=float("inf"))
        with pytest.raises(ValueError, match="at least one"):
            PathFinder([])
        with pytest.raises(ValueError, match="num_threads 0"):
            PathFinder([floor_mesh(["#"])], num_threads=0)


def test_a_mesh_of_huge_polygons_needs_no_huge_grid():
    side = np.float32(90_000)
    square = np.float32([[0, 0, 0], [0, 0, side], [side, 0, side], [side, 0, 0]])
    mesh = NavMesh.from_polygons(
        NavMeshSettings(),
        np.stack([square.min(0), square.max(0) + 1]),
        square,
        np.int32([[0, 1, 2, 3, -1, -1]]),
        np.full((1, 6), -1, np.int32),
    )
    start, goal = at([1.0, 0, 1.0]), at([80_001.0, 0, 1.0])
    assert PathFinder([mesh]).geodesic_distance(rows(start), start, goal).item() == pytest.approx(80_000)
