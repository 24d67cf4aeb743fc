from dataclasses import replace

import numpy as np
import pytest

from envs.scenes.navmesh import NavMesh, NavMeshSettings
from envs.scenes.navmesh_tile import NavMeshError


def test_neighbours_lie_across_shared_edges_and_walls_elsewhere(small_mesh):
    # Three squares in an L: two shared edges, so four of the twelve edges lead somewhere.
    assert (small_mesh.neighbours >= 0).sum() == 4
    for polygon, edge in np.argwhere(small_mesh.neighbours >= 0):
        ends = {small_mesh.polygons[polygon, edge], small_mesh.polygons[polygon, (edge + 1) % 4]}
        other = small_mesh.neighbours[polygon, edge]
        assert ends <= set(small_mesh.polygons[other])


def test_islands_are_the_connected_parts(floor_mesh):
    mesh = floor_mesh(["#.##", "#...", "#.#."])
    assert len(np.unique(mesh.islands)) == 3
    assert sorted(np.bincount(mesh.islands)) == [1, 2, 3]
    # Corners of a unit square lie half its diagonal from their mean.
    single = mesh.islands[np.bincount(mesh.islands)[mesh.islands] == 1][0]
    assert mesh.island_radii[single] == pytest.approx(np.sqrt(0.5))


def test_polygons_without_area_or_floor_flag_are_not_walkable(small_mesh):
    tile = small_mesh.tiles[0]
    vertices = tile.vertices.copy()
    vertices[tile.polygons[0, :4]] = vertices[tile.polygons[0, 0]]
    flags = tile.flags.copy()
    flags[2] = 4
    mesh = replace(small_mesh, tiles=(replace(tile, vertices=vertices, flags=flags),))
    assert mesh.walkable.tolist() == [False, True, False]
    assert not np.isin(mesh.neighbours, [0, 2]).any()


def test_two_tiles_in_one_place_are_refused(split_floor_mesh):
    mesh = split_floor_mesh(["####"], column=2)
    with pytest.raises(NavMeshError, match="share a place"):
        replace(mesh, tiles=(mesh.tiles[0], replace(mesh.tiles[1], x=0)))


class TestFromPolygons:
    def test_clockwise_polygons_are_refused(self):
        square = np.float32([[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]])
        with pytest.raises(NavMeshError, match="clockwise"):
            NavMesh.from_polygons(
                NavMeshSettings(),
                np.float32([[0, 0, 0], [1, 1, 1]]),
                square,
                np.int32([[0, 1, 2, 3, -1, -1]]),
                np.full((1, 6), -1, np.int32),
            )

    def test_more_polygons_than_edges_can_name_are_refused(self, small_mesh):
        tile = small_mesh.tiles[0]
        many = np.repeat(tile.polygons[:1], 40_000, axis=0)
        with pytest.raises(NavMeshError, match="40000 polygons are too many"):
            NavMesh.from_polygons(
                small_mesh.settings, tile.bounds, tile.vertices, many, np.full((40_000, 6), -1, np.int32)
            )

    def test_no_polygons_are_refused(self):
        with pytest.raises(NavMeshError, match="at least one polygon"):
            NavMesh.from_polygons(
                NavMeshSettings(),
                np.zeros((2, 3)),
                np.zeros((0, 3)),
                np.zeros((0, 6), np.int32),
                np.zeros((0, 6), np.int32),
            )

    def test_fan_triangles_cover_the_polygon_and_know_its_border(self):
        angle = -np.arange(6) * np.pi / 3
        hexagon = np.stack([np.cos(angle), np.zeros(6), np.sin(angle)], 1).astype(np.float32)
        mesh = NavMesh.from_polygons(
            NavMeshSettings(),
            np.float32([[-1, 0, -1], [1, 1, 1]]),
            hexagon,
            np.arange(6, dtype=np.int32)[None],
            np.full((1, 6), -1, np.int32),
        )
        assert mesh.areas[0] == pytest.approx(1.5 * np.sqrt(3), rel=1e-6)
        border = set()
        for a, b, c, flags in mesh.detail_triangles:
            border |= {pair for bit, pair in ((0, (a, b)), (2, (b, c)), (4, (c, a))) if flags >> bit & 1}
        assert {tuple(sorted(pair)) for pair in border} == {tuple(sorted((k, (k + 1) % 6))) for k in range(6)}
