"""Top-down maps: where things land on the image, and which floor it shows."""

import numpy as np
import pytest

from envs.scenes.maps import MARK, TopDownMap, draw_map, draw_places, floor_heights, top_down_map
from envs.scenes.navmesh import NavMesh, NavMeshSettings
from envs.scenes.navmesh_file import read_navmesh


def mesh_of(*rectangles, neighbours=()):
    """A navigation mesh of rectangles (x0, z0, x1, z1, y), those in pairs of ``neighbours`` joined."""
    corners = [[(x0, y, z0), (x0, y, z1), (x1, y, z1), (x1, y, z0)] for x0, z0, x1, z1, y in rectangles]
    vertices = np.array(corners, dtype=np.float32).reshape(-1, 3)
    polygons = np.full((len(rectangles), 6), -1, dtype=np.int32)
    polygons[:, :4] = np.arange(len(vertices)).reshape(-1, 4)
    links = np.full((len(rectangles), 6), -1, dtype=np.int32)
    for a, b in neighbours:
        links[a, 2], links[b, 0] = b, a
    bounds = np.stack([vertices.min(axis=0), vertices.max(axis=0) + np.array([0, 2, 0])])
    return NavMesh.from_polygons(NavMeshSettings(), bounds, vertices, polygons, links)


ROOM = mesh_of((0, 0, 6, 4, 0))


def pixel_at(image, floor: TopDownMap, point):
    column, row = np.floor(floor.world_to_pixel(point)).astype(int)
    return image[row, column].astype(int)


def test_the_longer_side_has_the_size_asked_for():
    for size in (100, 600):
        floor = top_down_map(ROOM, size=size, margin=0.5)
        rows, columns = floor.image.shape[:2]
        assert columns == size
        assert rows == pytest.approx(size * 5 / 7, abs=1)
        assert floor.metres_per_pixel == pytest.approx(7 / size)
        assert floor.image.dtype == np.uint8
        assert floor.grid.shape == (rows, columns)


def test_the_grid_covers_the_walkable_area():
    floor = top_down_map(ROOM)
    assert floor.grid.sum() * floor.metres_per_pixel**2 == pytest.approx(24, rel=0.01)
    for point, inside in [
        ((0.05, 0, 0.05), True),
        ((5.95, 0, 3.95), True),
        ((-0.05, 0, 2), False),
        ((3, 0, 4.05), False),
    ]:
        column, row = np.floor(floor.world_to_pixel(point)).astype(int)
        assert floor.grid[row, column] == inside


def test_x_goes_right_and_z_goes_down():
    floor = top_down_map(ROOM, margin=0.5)
    first, right, down = floor.world_to_pixel([(0, 0, 0), (1, 0, 0), (0, 0, 1)])
    np.testing.assert_allclose(first, [0.5 / floor.metres_per_pixel] * 2, rtol=1e-5)
    np.testing.assert_allclose(right - first, [1 / floor.metres_per_pixel, 0], atol=1e-9)
    np.testing.assert_allclose(down - first, [0, 1 / floor.metres_per_pixel], atol=1e-9)


def test_pixels_and_points_are_inverse():
    floor = top_down_map(ROOM)
    points = np.random.default_rng(0).uniform([0, 0, 0], [6, 0, 4], (20, 3))
    np.testing.assert_allclose(floor.pixel_to_world(floor.world_to_pixel(points)), points, atol=1e-9)
    assert floor.world_to_pixel(points.reshape(4, 5, 3)).shape == (4, 5, 2)


def test_walkable_obstacle_and_outside_differ():
    ring = mesh_of((0, 0, 6, 1, 0), (0, 1, 1, 3, 0), (5, 1, 6, 3, 0), (0, 3, 6, 4, 0), neighbours=[])
    floor = top_down_map(ring, margin=1.0)
    free = pixel_at(floor.image, floor, (3, 0, 0.5))
    table = pixel_at(floor.image, floor, (3, 0, 2))
    outside = floor.image[0, 0].astype(int)
    assert np.abs(free - table).max() > 20
    assert np.abs(table - outside).max() > 20
    assert outside.min() == 255


def test_only_the_floor_asked_for_is_drawn():
    house = mesh_of((0, 0, 6, 4, 0), (2, 0, 8, 4, 2.8))
    lower, upper = top_down_map(house, height=0.1), top_down_map(house, height=2.7)
    assert lower.origin == pytest.approx((-0.4, -0.4))
    assert upper.origin == pytest.approx((1.6, -0.4))
    assert lower.height == 0.1


def test_stairs_are_drawn_on_both_floors_but_other_storeys_are_not():
    house = mesh_of((0, 0, 4, 4, 0), (4, 0, 8, 4, 1.4), (8, 0, 12, 4, 2.8), neighbours=[(0, 1), (1, 2)])
    for height, ends in ((0.0, (0, 8)), (2.8, (4, 12))):
        floor = top_down_map(house, height=height, margin=0.4)
        assert floor.origin[0] == pytest.approx(ends[0] - 0.4)
        assert floor.image.shape[1] * floor.metres_per_pixel == pytest.approx(8.8, abs=0.05)
        level = pixel_at(floor.image, floor, (2 if height == 0 else 10, 0, 2))
        stairs = pixel_at(floor.image, floor, (6, 0, 2))
        assert np.abs(level - stairs).max() > 5


def test_table_tops_are_not_floor():
    house = mesh_of((0, 0, 6, 4, 0), (8, 0, 10, 2, 0.8))
    floor = top_down_map(house)
    assert floor.image.shape[1] * floor.metres_per_pixel == pytest.approx(6.8, abs=0.05)


def test_floors_are_found_lowest_first():
    house = mesh_of((0, 0, 6, 4, 2.8), (0, 0, 6, 4, 0.05), (0, 4, 1, 5, 0.3), (0, 0, 1, 1, 1.4))
    assert floor_heights(house) == pytest.approx([0.05, 2.8])
    assert top_down_map(house).height == pytest.approx(0.05)


def test_recorded_loft_has_two_floors(reference_dir):
    floors = floor_heights(read_navmesh(reference_dir / "loft.navmesh"))
    assert floors == pytest.approx([0.1, 2.7], abs=0.15)


def test_every_recorded_place_has_a_map(reference_dir):
    mesh = read_navmesh(reference_dir / "loft.navmesh")
    places = np.load(reference_dir / "loft.reference.npz")["geodesic_start"]
    # Also those halfway up the stairs.
    assert np.histogram(places[:, 1], [0.8, 2.0])[0][0] > 0
    for place in places[np.unique(np.round(places[:, 1], 1), return_index=True)[1]]:
        floor = top_down_map(mesh, height=place[1], size=120)
        column, row = np.floor(floor.world_to_pixel(place)).astype(int)
        assert floor.grid[row - 1 : row + 2, column - 1 : column + 2].any()


def test_a_height_without_floor_names_the_floors():
    with pytest.raises(ValueError, match=r"within 0.35 m of height 5.00 m; floors: 0.0"):
        top_down_map(ROOM, height=5.0)


def test_start_goal_and_agent_are_where_they_belong():
    floor = top_down_map(ROOM)
    image = draw_map(floor, start=(1, 0, 1), goal=(5, 0, 3), agent_path=[(1, 0, 1), (3, 0, 2)], agent_yaw=0.0)
    red, green, _ = pixel_at(image, floor, (5, 0, 3))
    assert red > 180
    assert green < 100
    # The start is a ring with a bright middle; the agent is dark.
    assert pixel_at(image, floor, (1, 0, 1)).min() > 200
    assert pixel_at(image, floor, (3, 0, 2)).max() < 80
    assert image.shape == floor.image.shape
    assert image.dtype == np.uint8


def test_the_agent_points_where_it_looks():
    floor = top_down_map(ROOM)
    for yaw, ahead in (
        (0.0, (0, 0, -1)),
        (np.pi / 2, (-1, 0, 0)),
        (np.pi, (0, 0, 1)),
        (-np.pi / 2, (1, 0, 0)),
    ):
        image = draw_map(floor, agent_path=[(3, 0, 2)], agent_yaw=yaw)
        tip = np.array([3, 0, 2]) + 8 * floor.metres_per_pixel * np.array(ahead)
        tail = np.array([3, 0, 2]) - 8 * floor.metres_per_pixel * np.array(ahead)
        assert pixel_at(image, floor, tip).max() < 80
        assert pixel_at(image, floor, tail).min() > 200


def test_the_path_changes_colour_with_time():
    floor = top_down_map(ROOM)
    path = np.stack([np.linspace(0.5, 5.5, 60), np.zeros(60), np.full(60, 2.0)], axis=1)
    image = draw_map(floor, agent_path=path)
    early, late = pixel_at(image, floor, (0.8, 0, 2)), pixel_at(image, floor, (5.0, 0, 2))
    assert early[2] > early[1]
    assert late[0] > late[2]
    assert late.sum() > early.sum() + 100
    elsewhere = pixel_at(image, floor, (3, 0, 1))
    np.testing.assert_array_equal(elsewhere, pixel_at(floor.image, floor, (3, 0, 1)))


def test_shortest_path_and_goal_circle_are_drawn():
    floor = top_down_map(ROOM)
    image = draw_map(floor, goal=(5, 0, 2), shortest_path=[(1, 0, 2), (5, 0, 2)], success_distance=0.5)
    red, green, blue = pixel_at(image, floor, (3, 0, 2))
    assert green > red + 40
    assert green > blue + 20
    in_circle, beyond = pixel_at(image, floor, (5, 0, 2.4)), pixel_at(image, floor, (5, 0, 2.6))
    assert in_circle[0] > in_circle[1] + 20
    np.testing.assert_array_equal(beyond, pixel_at(floor.image, floor, (5, 0, 2.6)))


def test_marks_are_rings_around_places():
    floor = top_down_map(ROOM)
    image = draw_map(floor, marks=[(3, 0, 2)])
    orange = np.abs(image.astype(int) - MARK).sum(axis=2) < 120
    rows, columns = np.nonzero(orange)
    centre = floor.world_to_pixel((3, 0, 2))
    radii = np.hypot(columns + 0.5 - centre[0], rows + 0.5 - centre[1])
    assert 3 < radii.mean() < 7
    np.testing.assert_array_equal(pixel_at(image, floor, (3, 0, 2)), pixel_at(floor.image, floor, (3, 0, 2)))


def test_places_are_the_stronger_the_more_lie_together():
    floor = top_down_map(ROOM)
    image = draw_places(floor, [(1, 0, 1)], [(3, 0, 2), *[(5, 0, 3)] * 20, (np.nan, 0, 0), (900, 0, 0)])

    def far(point, colour):
        return np.abs(pixel_at(image, floor, point).astype(int) - colour).sum()

    assert far((5, 0, 3), MARK) < 10 < far((3, 0, 2), MARK) < far((1, 0, 1), MARK)
    np.testing.assert_array_equal(pixel_at(image, floor, (1, 0, 3)), pixel_at(floor.image, floor, (1, 0, 3)))
    np.testing.assert_array_equal(draw_places(floor, np.empty((0, 3)), np.empty((0, 3))), floor.image)


def test_drawing_leaves_the_map_alone_and_skips_what_is_not_finite():
    floor = top_down_map(ROOM)
    before = floor.image.copy()
    nan = (np.nan, np.nan, np.nan)
    image = draw_map(
        floor, start=nan, goal=nan, agent_path=[nan, nan], shortest_path=np.empty((0, 3)), agent_yaw=np.nan
    )
    np.testing.assert_array_equal(image, before)
    draw_map(floor, start=(1, 0, 1), agent_path=[(1, 0, 1)])
    np.testing.assert_array_equal(floor.image, before)


def test_points_off_the_map_are_harmless():
    floor = top_down_map(ROOM, size=64)
    image = draw_map(floor, start=(1e4, 0, -1e4), goal=(-50, 0, 0), agent_path=[(1, 0, 1), (500, 0, 1)])
    assert image.shape == floor.image.shape
