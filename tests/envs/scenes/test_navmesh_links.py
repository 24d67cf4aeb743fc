from dataclasses import replace

import numpy as np

from envs.scenes.navmesh_tile import EXTERNAL_EDGE


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


def test_external_edges_are_walls_in_a_single_tile(small_mesh):
    tile = small_mesh.tiles[0]
    edges = np.where(tile.edges == 0, 0, EXTERNAL_EDGE).astype(np.uint16)
    mesh = replace(small_mesh, tiles=(replace(tile, edges=edges),))
    assert (mesh.neighbours == -1).all()
