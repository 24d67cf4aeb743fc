from dataclasses import replace

import pytest

from envs.scenes.navmesh_tile import NavMeshError


@pytest.mark.parametrize(
    ("field", "index", "value", "message"),
    [
        ("polygons", (0, 1), 1000, "names vertex 1000"),
        ("polygons", (0, 2), -1, "fewer than 3 corners"),
        ("edges", (0, 0), 77, "leads to polygon 76"),
        ("detail_meshes", (0, 0), 5, "reaches past"),
        ("detail_meshes", (0, 2), 500, "reaches past"),
        ("detail_meshes", (0, 3), 0, "empty"),
        ("detail_triangles", (0, 0), 9, "does not have"),
        ("tree", (0, 6), 50, "the tree names polygon 50"),
    ],
)
def test_an_index_that_points_nowhere_is_refused(small_mesh, field, index, value, message):
    tile = small_mesh.tiles[0]
    array = getattr(tile, field).copy()
    array[index] = value
    if field == "polygons" and value == -1:
        array[0, 2:] = -1
    with pytest.raises(NavMeshError, match=message):
        replace(small_mesh, tiles=(replace(tile, **{field: array}),))
