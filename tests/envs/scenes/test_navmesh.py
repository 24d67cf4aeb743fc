import struct
from dataclasses import replace

import numpy as np
import pytest

from envs.scenes.navmesh import (
    EXTERNAL_EDGE,
    NavMesh,
    NavMeshError,
    NavMeshSettings,
    read_navmesh,
    write_navmesh,
)

SCENES = ("apartment", "studio", "loft")
# Byte offsets in a file of version 2: the set's header, the settings, the first tile.
SET_HEADER, SETTINGS, TILE_PREFIX = 0, 40, 96
TILE = 104
POLYGON_COUNT, VERTEX_COUNT, LINK_COUNT = TILE + 24, TILE + 28, TILE + 32


def arrays_of(mesh):
    """Everything that a mesh tells about its graph."""
    links = mesh.links
    return {
        "vertices": mesh.vertices,
        "polygons": mesh.polygons,
        "neighbours": mesh.neighbours,
        "detail_starts": mesh.detail_starts,
        "detail_triangles": mesh.detail_triangles,
        "areas": mesh.areas,
        "walkable": mesh.walkable,
        "islands": mesh.islands,
        "island_radii": mesh.island_radii,
        "bounds": mesh.bounds,
        "links": np.stack([links.target, links.edge, links.low, links.high, links.crossing]),
        "link_starts": links.start,
    }


@pytest.fixture
def small_mesh(floor_mesh):
    return floor_mesh(["##", ".#"])


@pytest.fixture
def small_file(small_mesh, tmp_path):
    path = tmp_path / "small.navmesh"
    write_navmesh(small_mesh, path)
    return path


def patched(path, offset, layout, *values):
    data = bytearray(path.read_bytes())
    struct.pack_into("<" + layout, data, offset, *values)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("scene", SCENES)
class TestRecordedFiles:
    def test_writing_what_was_read_gives_the_same_bytes(self, scene, reference_dir, tmp_path):
        source = reference_dir / f"{scene}.navmesh"
        write_navmesh(read_navmesh(source), tmp_path / "copy.navmesh")
        assert (tmp_path / "copy.navmesh").read_bytes() == source.read_bytes()

    def test_settings_and_area_are_those_that_habitat_reports(self, scene, reference_dir, recorded_facts):
        facts = recorded_facts(scene)
        mesh = read_navmesh(reference_dir / f"{scene}.navmesh")
        for name, value in facts["navmesh"].items():
            assert getattr(mesh.settings, name) == pytest.approx(value), name
        assert mesh.navigable_area == pytest.approx(facts["navigable_area"], rel=1e-5)

    def test_polygons_wind_as_the_builder_has_to(self, scene, reference_dir):
        mesh = read_navmesh(reference_dir / f"{scene}.navmesh")
        tile = mesh.tiles[0]
        again = NavMesh.from_polygons(
            mesh.settings,
            tile.bounds,
            tile.vertices,
            tile.polygons,
            tile.edges.astype(np.int32) - 1,
            tile.detail_meshes,
            tile.detail_vertices,
            tile.detail_triangles,
        )
        for name, array in arrays_of(mesh).items():
            np.testing.assert_array_equal(arrays_of(again)[name], array, err_msg=name)

    def test_own_tree_sorts_polygons_into_boxes_as_detours(self, scene, reference_dir):
        mesh = read_navmesh(reference_dir / f"{scene}.navmesh")
        tile = mesh.tiles[0]
        rebuilt = NavMesh.from_polygons(
            mesh.settings, tile.bounds, tile.vertices, tile.polygons, tile.edges.astype(np.int32) - 1
        ).tiles[0]
        # Detour's trees end in an unused node, and their heights are those of the detail mesh.
        leaves, own = (t[t[:, 6] >= 0] for t in (tile.tree[:-1], rebuilt.tree))
        ground = [0, 2, 3, 5]
        assert len(own) == len(leaves)
        np.testing.assert_array_equal(
            own[np.argsort(own[:, 6])][:, ground], leaves[np.argsort(leaves[:, 6])][:, ground]
        )


def test_a_version_1_file_takes_its_settings_from_the_tile(small_file, small_mesh):
    data = small_file.read_bytes()
    data = data[:SETTINGS] + data[TILE_PREFIX:]
    small_file.write_bytes(data[:4] + struct.pack("<i", 1) + data[8:])
    settings = read_navmesh(small_file).settings
    assert settings.agent_radius == pytest.approx(small_mesh.settings.agent_radius)
    assert settings.cell_size == pytest.approx(small_mesh.settings.cell_size)


def test_a_written_mesh_reads_back_equal(small_mesh, small_file):
    again = read_navmesh(small_file)
    for name, array in arrays_of(small_mesh).items():
        np.testing.assert_array_equal(arrays_of(again)[name], array, err_msg=name)
    assert [getattr(again, name) for name in ("origin", "tile_size", "max_tiles", "max_polygons")] == [
        getattr(small_mesh, name) for name in ("origin", "tile_size", "max_tiles", "max_polygons")
    ]


def test_settings_survive_a_round_trip(small_mesh, tmp_path):
    settings = NavMeshSettings(
        0.125, 0.25, 2.0, 0.5, 0.75, 30.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 8.0, False, True
    )
    write_navmesh(replace(small_mesh, settings=settings), tmp_path / "a.navmesh")
    assert read_navmesh(tmp_path / "a.navmesh").settings == settings


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


class TestSeveralTiles:
    def test_tiles_join_along_their_border(self, split_floor_mesh):
        mesh = split_floor_mesh(["####", "####"], column=2)
        assert len(mesh.tiles) == 2
        assert len(np.unique(mesh.islands)) == 1
        # Of eight squares, those in the middle have a neighbour in the other tile.
        crossing = mesh.polygon_tiles[np.maximum(mesh.neighbours, 0)] != mesh.polygon_tiles[:, None]
        assert ((mesh.neighbours >= 0) & crossing).sum() == 4

    def test_edges_that_only_touch_at_their_ends_are_not_joined(self, split_floor_mesh):
        assert len(np.unique(split_floor_mesh(["##..", "..##"], column=2).islands)) == 2

    def test_a_border_higher_than_a_step_is_not_joined(self, split_floor_mesh):
        mesh = split_floor_mesh(["####"], column=2)
        right = mesh.tiles[1]
        raised = replace(right, vertices=right.vertices + np.float32([0, 1, 0]))
        assert len(np.unique(replace(mesh, tiles=(mesh.tiles[0], raised)).islands)) == 2

    def test_a_long_edge_links_to_the_part_that_each_neighbour_shares(self, split_floor_mesh):
        mesh = split_floor_mesh(["####", "####"], column=2, merge_left_rows=True)
        links = mesh.links
        wide = int(np.flatnonzero(mesh.polygon_tiles == 0)[-1])
        outgoing = range(links.start[wide], links.start[wide + 1])
        spans = sorted(
            (links.low[k], links.high[k]) for k in outgoing if mesh.polygon_tiles[links.target[k]] == 1
        )
        assert [(round(low / 255, 1), round(high / 255, 1)) for low, high in spans] == [(0, 0.5), (0.5, 1)]

    def test_round_trip_keeps_every_tile(self, split_floor_mesh, tmp_path):
        mesh = split_floor_mesh(["####", "##.#"], column=2)
        write_navmesh(mesh, tmp_path / "tiles.navmesh")
        again = read_navmesh(tmp_path / "tiles.navmesh")
        assert [(tile.x, tile.y) for tile in again.tiles] == [(tile.x, tile.y) for tile in mesh.tiles]
        for name, array in arrays_of(mesh).items():
            np.testing.assert_array_equal(arrays_of(again)[name], array, err_msg=name)

    def test_two_tiles_in_one_place_are_refused(self, split_floor_mesh):
        mesh = split_floor_mesh(["####"], column=2)
        with pytest.raises(NavMeshError, match="share a place"):
            replace(mesh, tiles=(mesh.tiles[0], replace(mesh.tiles[1], x=0)))


class TestFaultyFiles:
    def test_every_truncation_is_refused_by_name(self, small_file):
        data = small_file.read_bytes()
        for length in range(0, len(data), 7):
            small_file.write_bytes(data[:length])
            with pytest.raises(NavMeshError, match=r"small\.navmesh"):
                read_navmesh(small_file)

    @pytest.mark.parametrize(
        ("offset", "layout", "value", "message"),
        [
            (0, "i", 0x12345678, "starts with"),
            (4, "i", 3, "version 3"),
            (8, "i", 0, "no tiles"),
            (8, "i", -1, "no tiles"),
            (8, "i", 2**31 - 1, "truncated"),
            (12, "f", float("nan"), "tile grid"),
            (24, "f", 0.0, "tile grid"),
            (44, "f", float("nan"), "settings hold numbers that are not finite"),
            (TILE_PREFIX + 4, "i", 2**31 - 1, "truncated"),
            (TILE_PREFIX + 4, "i", -5, "needs -5 bytes"),
            (TILE, "i", 1, "magic"),
            (TILE + 4, "i", 6, "Detour version 6"),
            (POLYGON_COUNT, "i", 2**31 - 1, "detail meshes for"),
            (VERTEX_COUNT, "i", 2**31 - 1, "truncated"),
            (VERTEX_COUNT, "i", -1, "negative"),
            (LINK_COUNT, "i", 2**30, "truncated"),
            (TILE + 52, "i", 1, "off-mesh"),
            (TILE + 68, "f", float("inf"), "not finite"),
            (TILE + 100, "f", float("nan"), "not finite"),
            (TILE + 100, "f", 1e30, "from the origin"),
        ],
    )
    def test_a_hostile_header_is_refused(self, small_file, offset, layout, value, message):
        with pytest.raises(NavMeshError, match=message) as error:
            read_navmesh(patched(small_file, offset, layout, value))
        assert "small.navmesh" in str(error.value)

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
    def test_an_index_that_points_nowhere_is_refused(self, small_mesh, field, index, value, message):
        tile = small_mesh.tiles[0]
        array = getattr(tile, field).copy()
        array[index] = value
        if field == "polygons" and value == -1:
            array[0, 2:] = -1
        with pytest.raises(NavMeshError, match=message):
            replace(small_mesh, tiles=(replace(tile, **{field: array}),))

    def test_flipped_bytes_never_crash_the_reader(self, small_file):
        data = small_file.read_bytes()
        draw = np.random.default_rng(0)
        for _ in range(300):
            broken = bytearray(data)
            for place in draw.integers(0, len(data), 3):
                broken[place] = draw.integers(0, 256)
            small_file.write_bytes(broken)
            try:
                mesh = read_navmesh(small_file)
            except NavMeshError:
                continue
            assert mesh.links.target.max(initial=0) < len(mesh.polygons)
            assert len(mesh.islands) == len(mesh.polygons)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(NavMeshError, match=r"nowhere\.navmesh"):
            read_navmesh(tmp_path / "nowhere.navmesh")

    def test_a_mesh_too_large_for_the_format_is_refused(self, small_mesh, tmp_path):
        tile = small_mesh.tiles[0]
        vertices = np.concatenate([tile.vertices, np.zeros((70000, 3), np.float32)])
        with pytest.raises(NavMeshError, match="too many"):
            write_navmesh(
                replace(small_mesh, tiles=(replace(tile, vertices=vertices),)), tmp_path / "a.navmesh"
            )
        assert not (tmp_path / "a.navmesh").exists()


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


def test_external_edges_are_walls_in_a_single_tile(small_mesh):
    tile = small_mesh.tiles[0]
    edges = np.where(tile.edges == 0, 0, EXTERNAL_EDGE).astype(np.uint16)
    mesh = replace(small_mesh, tiles=(replace(tile, edges=edges),))
    assert (mesh.neighbours == -1).all()
