import struct
from dataclasses import replace

import numpy as np
import pytest

from envs.scenes.navmesh import NavMesh, NavMeshSettings
from envs.scenes.navmesh_file import read_navmesh, write_navmesh
from envs.scenes.navmesh_tile import NavMeshError

SCENES = ("apartment", "studio", "loft")
# Byte offsets in a file of version 2: the settings, the first tile.
SETTINGS, TILE_PREFIX = 40, 96
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


def test_round_trip_keeps_every_tile(split_floor_mesh, tmp_path):
    mesh = split_floor_mesh(["####", "##.#"], column=2)
    write_navmesh(mesh, tmp_path / "tiles.navmesh")
    again = read_navmesh(tmp_path / "tiles.navmesh")
    assert [(tile.x, tile.y) for tile in again.tiles] == [(tile.x, tile.y) for tile in mesh.tiles]
    for name, array in arrays_of(mesh).items():
        np.testing.assert_array_equal(arrays_of(again)[name], array, err_msg=name)


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
