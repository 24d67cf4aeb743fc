import json
from dataclasses import replace

import numpy as np
import pytest

from envs.scenes.navmesh import NavMesh, NavMeshSettings
from envs.scenes.navmesh_tile import EXTERNAL_EDGE


def cells_of(plan):
    """Unit squares (x, z) of a plan whose rows are strings along +z, '#' for floor."""
    return [(x, z) for z, row in enumerate(plan) for x, mark in enumerate(row) if mark == "#"]


def squares(rectangles):
    """Vertices, polygons and neighbours of rectangles (x0, z0, x1, z1) that share whole edges."""
    vertices, index = [], {}
    polygons = np.full((len(rectangles), 6), -1, np.int32)
    neighbours = np.full((len(rectangles), 6), -1, np.int32)
    owner = {}
    for polygon, (x0, z0, x1, z1) in enumerate(rectangles):
        corners = [(x0, z0), (x0, z1), (x1, z1), (x1, z0)]  # Counter-clockwise seen from above.
        for place, corner in enumerate(corners):
            if corner not in index:
                index[corner] = len(vertices)
                vertices.append((corner[0], 0.0, corner[1]))
            polygons[polygon, place] = index[corner]
        for edge in range(4):
            ends = (corners[edge], corners[(edge + 1) % 4])
            if ends[::-1] in owner:
                other, other_edge = owner[ends[::-1]]
                neighbours[polygon, edge], neighbours[other, other_edge] = other, polygon
            owner[ends] = (polygon, edge)
    return np.array(vertices, np.float32), polygons, neighbours


def bounds_of(vertices):
    return np.stack([vertices.min(0), vertices.max(0) + np.float32([0, 2, 0])])


@pytest.fixture(scope="session")
def floor_mesh():
    """Makes a mesh of unit squares from a plan, on the ground y = 0."""

    def make(plan):
        vertices, polygons, neighbours = squares([(x, z, x + 1, z + 1) for x, z in cells_of(plan)])
        return NavMesh.from_polygons(NavMeshSettings(), bounds_of(vertices), vertices, polygons, neighbours)

    return make


@pytest.fixture
def small_mesh(floor_mesh):
    """Three squares in an L."""
    return floor_mesh(["##", ".#"])


@pytest.fixture(scope="session")
def split_floor_mesh():
    """Makes the same floor from two tiles that meet at a column, with long polygons on the left if wanted."""

    def make(plan, column, merge_left_rows=False):
        height, width = len(plan), len(plan[0])
        parts = []
        for number, (low, high) in enumerate(((0, column), (column, width))):
            cells = [(x, z) for x, z in cells_of(plan) if low <= x < high]
            rectangles = [(x, z, x + 1, z + 1) for x, z in cells]
            if merge_left_rows and number == 0:
                rectangles = [(x, 0, x + 1, height) for x in range(low, high)]
            vertices, polygons, neighbours = squares(rectangles)
            bounds = np.float32([[low, 0, 0], [high, 2, height]])
            tile = NavMesh.from_polygons(NavMeshSettings(), bounds, vertices, polygons, neighbours).tiles[0]
            # Edges on the shared border look out of the tile: to +x (side 0) or, from the right, to -x (4).
            following = np.roll(polygons[:, :4], -1, axis=1)
            ends = np.stack([vertices[polygons[:, :4], 0], vertices[following, 0]])
            edges = tile.edges.copy()
            edges[:, :4][(ends == column).all(0)] = EXTERNAL_EDGE | (0 if number == 0 else 4)
            parts.append((tile, edges, number))
        return NavMesh(
            settings=NavMeshSettings(),
            tiles=tuple(replace(tile, edges=edges, x=number) for tile, edges, number in parts),
            origin=(0.0, 0.0, 0.0),
            tile_size=(float(column), float(height)),
            max_tiles=2,
            max_polygons=max(len(tile.polygons) for tile, _, _ in parts),
        )

    return make


@pytest.fixture(scope="session")
def recorded_facts(reference_dir):
    """Reads what Habitat reported about a recorded scene."""
    return lambda scene: json.loads((reference_dir / f"{scene}.json").read_text())
