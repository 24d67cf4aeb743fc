"""What the cameras see must be what geometry says, and what Habitat saw."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from envs.scenes.gltf import load_scene
from envs.scenes.scene import Material, Scene
from envs.simulators.base import Action, AgentSpec, SensorSpec
from envs.simulators.raycast.bvh import build_bvh
from envs.simulators.raycast.renderer import Renderer
from envs.simulators.raycast.simulator import RaycastSimulator
from envs.simulators.raycast.textures import mip_levels, pack_textures

KINDS = ("rgb", "depth", "normals", "instance")
# A box's six sides: its corners are counted by the bits x, y, z; each side is wound to face inwards.
SIDES = {
    "left": [0, 2, 6, 4],
    "right": [1, 5, 7, 3],
    "floor": [0, 4, 5, 1],
    "ceiling": [2, 3, 7, 6],
    "north": [0, 1, 3, 2],
    "south": [4, 6, 7, 5],
}


def room(low=(-2, 0, -3), high=(2, 2.5, 3), inwards=True, materials=None, colors=None, name="room"):
    """A box seen from inside (or outside), one instance a side."""
    corners = np.array([[(high if i >> k & 1 else low)[k] for k in range(3)] for i in range(8)], np.float32)
    vertices, triangles, uvs = [], [], []
    for side in SIDES.values():
        order = side if inwards else side[::-1]
        base = len(vertices)
        vertices += [corners[i] for i in order]
        uvs += [(0, 0), (1, 0), (1, 1), (0, 1)]
        triangles += [(base, base + 1, base + 2), (base, base + 2, base + 3)]
    if materials is None:
        materials = [Material(f"m{i}", (i / 10, 0.5, 1 - i / 10, 1)) for i in range(6)]
    return Scene(
        name=name,
        path=Path(f"{name}.glb"),
        vertices=np.array(vertices, np.float32),
        triangles=np.array(triangles, np.int32),
        uvs=np.array(uvs, np.float32),
        colors=np.ones((24, 4), np.float32) if colors is None else colors,
        material_ids=np.repeat(np.arange(6) % len(materials), 2).astype(np.int32),
        instance_ids=np.repeat(np.arange(1, 7), 2).astype(np.int32),
        materials=tuple(materials),
        instance_names=tuple(SIDES),
    )


def join(*scenes):
    """Several scenes as one, instances and materials counted on."""
    parts = {"vertices": [], "triangles": [], "uvs": [], "colors": [], "material_ids": [], "instance_ids": []}
    first = dict.fromkeys(parts, 0)
    for scene in scenes:
        for key, values in parts.items():
            values.append(getattr(scene, key) + first[key])
        first |= {
            "triangles": first["triangles"] + len(scene.vertices),
            "material_ids": first["material_ids"] + len(scene.materials),
            "instance_ids": first["instance_ids"] + len(scene.instance_names),
        }
    return Scene(
        name="joined",
        path=Path("joined.glb"),
        materials=sum((scene.materials for scene in scenes), ()),
        instance_names=sum((scene.instance_names for scene in scenes), ()),
        **{key: np.concatenate(values).astype(values[0].dtype) for key, values in parts.items()},
    )


def look(scenes, position, yaw, index=None, num_threads=1, **sensor):
    """All four images of some views, as numpy."""
    sensors = [SensorSpec(kind, kind, **{"sensor_height": 0.0, **sensor}) for kind in KINDS]
    renderer = Renderer(sensors, num_threads=num_threads)
    renderer.load_scenes(scenes)
    position = torch.as_tensor(np.array(position), dtype=torch.float32).view(-1, 3)
    yaw = torch.as_tensor(np.array(yaw), dtype=torch.float32).view(-1)
    index = torch.zeros(len(yaw), dtype=torch.int64) if index is None else torch.as_tensor(index)
    images = renderer.render(index, position, yaw)
    renderer.close()
    return {name: image.numpy() for name, image in images.items()}


def rays(height, width, hfov_deg=90.0, pitch_deg=0.0, yaw=0.0):
    """Directions with forward part 1 in the camera's frame, turned into the world: (H, W, 3)."""
    step = 2 * math.tan(math.radians(hfov_deg) / 2) / width
    x = (np.arange(width) + 0.5 - width / 2) * step
    y = (height / 2 - np.arange(height) - 0.5) * step
    camera = np.stack([*np.meshgrid(x, y), -np.ones((height, width))], axis=-1)
    p, a = math.radians(pitch_deg), yaw
    pitch = np.array([[1, 0, 0], [0, math.cos(p), -math.sin(p)], [0, math.sin(p), math.cos(p)]])
    turn = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    return camera @ (turn @ pitch).T, turn @ pitch


def box_depth(direction, eye, low, high):
    """Depth and side that each ray out of a box meets, in closed form."""
    with np.errstate(divide="ignore"):
        reach = np.where(direction > 0, np.array(high) - eye, np.array(low) - eye) / direction
    reach[direction == 0] = np.inf
    axis = reach.argmin(axis=-1)
    positive = np.take_along_axis(direction, axis[..., None], -1)[..., 0] > 0
    return reach.min(axis=-1), axis, positive


@pytest.mark.parametrize("height,width,hfov,pitch,yaw", [
    (32, 32, 90, 0, 0.3), (17, 40, 70, -20, 2.0), (40, 9, 120, 35, -1.1), (1, 1, 60, 0, 0.7),
    (8, 100, 150, 80, 4.0),
])  # fmt: skip
def test_a_box_room_looks_as_in_closed_form(height, width, hfov, pitch, yaw):
    low, high, eye = (-2, 0, -3), (2, 2.5, 3), np.array([0.4, 1.1, -0.8])
    images = look(
        [room(low, high)], eye - [0, 0.6, 0], yaw, height=height, width=width, hfov_deg=hfov, pitch_deg=pitch,
        sensor_height=0.6,
    )  # fmt: skip
    direction, turn = rays(height, width, hfov, pitch, yaw)
    depth, axis, positive = box_depth(direction, eye, low, high)
    np.testing.assert_allclose(images["depth"][0], depth, rtol=1e-5)
    sides = np.array([[1, 2], [3, 4], [5, 6]])
    side = sides[axis, positive.astype(int)]
    np.testing.assert_array_equal(images["instance"][0], side)
    world = np.eye(3)[axis] * np.where(positive, -1, 1)[..., None]
    np.testing.assert_allclose(images["normals"][0], world @ turn, atol=1e-5)
    colors = np.array([material.base_color[:3] for material in room().materials]) * 255
    np.testing.assert_allclose(images["rgb"][0], colors[side - 1], atol=0.51)


def test_nothing_hit_is_zero_and_back_faces_are_invisible():
    # From inside a box that faces outwards all sides are back faces.
    for scene in (room(inwards=False), room((50, 0, 50), (51, 1, 51))):
        images = look([scene], [0, 1, 0], 0.0, height=16, width=16)
        for image in images.values():
            assert not image.any()


def test_a_back_face_in_the_same_place_as_a_front_face_does_not_hide_it():
    inner, outer = room(), room(inwards=False)
    for scene, shift in ((join(inner, outer), 0), (join(outer, inner), 6)):
        images = look([scene], [0, 1, 0], 0.2, height=32, width=32)
        expected = look([inner], [0, 1, 0], 0.2, height=32, width=32)
        np.testing.assert_array_equal(images["instance"] - shift, expected["instance"])


def test_what_is_nearer_than_a_centimetre_is_not_seen():
    scene = join(room(), room((-1, 0, -1.005), (1, 2, -1.004), inwards=False))
    assert look([scene], [0, 1, -1], 0.0, height=8, width=8)["instance"].max() <= 6
    assert look([scene], [0, 1, -0.9], 0.0, height=8, width=8)["instance"].max() > 6


def soup(seed=0, count=4000):
    """Random small triangles in a room, a quarter of them long and thin."""
    rng = np.random.default_rng(seed)
    center = rng.uniform([-1.8, 0.1, -2.8], [1.8, 2.4, 2.8], (count, 1, 3))
    spread = rng.normal(0, 0.06, (count, 3, 3))
    spread[: count // 4] *= np.array([8.0, 0.05, 1.0])
    vertices = (center + spread).reshape(-1, 3).astype(np.float32)
    loose = Scene(
        name="soup",
        path=Path("soup.glb"),
        vertices=vertices,
        triangles=np.arange(3 * count, dtype=np.int32).reshape(-1, 3),
        uvs=np.zeros((3 * count, 2), np.float32),
        colors=np.ones((3 * count, 4), np.float32),
        material_ids=np.zeros(count, np.int32),
        instance_ids=np.arange(1, count + 1, dtype=np.int32),
        materials=(Material("m"),),
        instance_names=tuple(map(str, range(count))),
    )
    return join(room(), loose)


def brute_force(scene, eye, direction):
    """Depth and instance of the nearest front face on rays (P, 3), all triangles tried (Moller-Trumbore)."""
    a, b, c = (scene.vertices[scene.triangles[:, k]].astype(np.float64) for k in range(3))
    best, found = np.full(len(direction), np.inf), np.zeros(len(direction), int)
    for i, d in enumerate(direction):
        p = np.cross(d, c - a)
        det = ((b - a) * p).sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            u = ((eye - a) * p).sum(1) / det
            q = np.cross(eye - a, b - a)
            v = (d * q).sum(1) / det
            t = ((c - a) * q).sum(1) / det
            t = np.where((det > 0) & (u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0.01), t, np.inf)
        best[i], found[i] = t.min(), scene.instance_ids[t.argmin()]
    return best, found


def test_every_pixel_is_the_nearest_of_all_triangles():
    scene, eye = soup(), np.array([0.2, 1.2, 0.3])
    for yaw in (0.0, 1.3, 3.9):
        images = look([scene], eye, yaw, height=21, width=30)
        direction, _ = rays(21, 30, yaw=yaw)
        depth, instance = brute_force(scene, eye, direction.reshape(-1, 3))
        same = images["instance"].ravel() == instance
        # Single precision may decide otherwise where a ray grazes an edge.
        assert same.mean() > 0.995
        np.testing.assert_allclose(images["depth"].ravel()[same], depth[same], rtol=1e-4)


def test_no_ray_slips_between_two_triangles():
    side = 60
    line = np.linspace(-2, 2, side + 1)
    x, y = np.meshgrid(line, line, indexing="ij")
    # A wall whose inner corners are shaken; its triangles still share their edges.
    shake = np.random.default_rng(0).normal(0, 0.01, (2, side + 1, side + 1))
    shake[:, [0, -1]] = shake[:, :, [0, -1]] = 0
    wall = np.stack([x + shake[0], y + shake[1], np.full_like(x, -1.0)], axis=-1).reshape(-1, 3)
    corner = (np.arange(side)[:, None] * (side + 1) + np.arange(side)).reshape(-1, 1)
    cells = (corner + np.array([0, side + 1, side + 2, 0, side + 2, 1])).reshape(-1, 3)
    scene = Scene(
        name="wall",
        path=Path("wall.glb"),
        vertices=wall.astype(np.float32),
        triangles=cells.astype(np.int32),
        uvs=np.zeros((len(wall), 2), np.float32),
        colors=np.ones((len(wall), 4), np.float32),
        material_ids=np.zeros(len(cells), np.int32),
        instance_ids=np.ones(len(cells), np.int32),
        materials=(Material("m"),),
        instance_names=("wall",),
    )
    # Poses on the grid of the wall send rays exactly through its edges and corners.
    position = [
        [i * 4 / side, j * 2 / side, k / 10] for i in range(-3, 4) for j in range(-3, 4) for k in range(3)
    ]
    images = look([scene], position, [0.0] * len(position), height=60, width=60)
    assert (images["instance"] == 1).all()


def test_the_tree_holds_every_triangle_once_inside_all_boxes_above_it():
    scene = soup()
    # Many triangles in one place, which no plane can part, and a line of them growing without end.
    twins = np.repeat(scene.vertices[:3], 500, axis=0)
    growing = (scene.vertices[:9].reshape(1, -1, 3) * 1.5 ** np.arange(60).reshape(-1, 1, 1)).reshape(-1, 3)
    for vertices in (scene.vertices, twins, growing.astype(np.float32)):
        triangles = np.arange(len(vertices) // 3 * 3, dtype=np.int32).reshape(-1, 3)
        bvh = build_bvh(vertices, triangles)
        np.testing.assert_array_equal(np.sort(bvh.order), np.arange(len(triangles)))
        seen = np.zeros(len(triangles), int)
        pending = [(0, np.full(3, -np.inf), np.full(3, np.inf), 1)]
        while pending:
            index, lower, upper, depth = pending.pop()
            node = bvh.nodes[index]
            assert (node["lower"] >= lower).all() and (node["upper"] <= upper).all()
            assert depth < 96
            if node["count"]:
                inside = slice(node["first"], node["first"] + node["count"])
                seen[inside] += 1
                points = vertices[triangles[bvh.order[inside]]]
                assert (points >= node["lower"]).all() and (points <= node["upper"]).all()
            else:
                pending += [(node["first"] + k, node["lower"], node["upper"], depth + 1) for k in range(2)]
        assert (seen == 1).all()


def test_views_in_a_batch_equal_views_one_by_one_and_any_threads():
    scenes = [room(), soup(), room((-4, 0, -4), (4, 3, 4), name="hall")]
    rng = np.random.default_rng(0)
    index = rng.integers(0, 3, 12)
    position = rng.uniform([-1.5, 0.5, -2], [1.5, 2, 2], (12, 3))
    yaw = rng.uniform(0, 6.28, 12)
    size = {"height": 37, "width": 50}
    batch = look(scenes, position, yaw, index, **size)
    for threads in (2, 3):
        for name, image in look(scenes, position, yaw, index, threads, **size).items():
            np.testing.assert_array_equal(image, batch[name])
    for i in range(12):
        alone = look([scenes[index[i]]], position[i], yaw[i], **size)
        for name, image in alone.items():
            np.testing.assert_array_equal(image[0], batch[name][i])


def test_sensors_with_different_cameras_do_not_mix():
    sensors = [
        SensorSpec("near", "depth", 16, 24, 60.0, 0.5),
        SensorSpec("far", "depth", 32, 32, 90.0, 1.0, -30.0),
        SensorSpec("color", "rgb", 16, 24, 60.0, 0.5),
    ]
    renderer = Renderer(sensors)
    renderer.load_scenes([room()])
    pose = torch.zeros(1, dtype=torch.int64), torch.tensor([[0.0, 0.2, 0.0]]), torch.tensor([1.0])
    together = renderer.render(*pose)
    assert list(together) == ["near", "far", "color"]
    for sensor in sensors:
        alone = Renderer([sensor])
        alone.load_scenes([room()])
        assert torch.equal(alone.render(*pose)[sensor.name], together[sensor.name])


def checkerboard(size, squares=8):
    cell = (np.indices((size, size)) * squares // size).sum(0)
    pixels = np.full((size, size, 4), 255, np.uint8)
    pixels[..., :3] = np.where(cell % 2, 230, 30)[..., None]
    return pixels


def plate(texture, distance, tiles=1.0, half=1.0, wrap="repeat", offset=0.0, **material):
    """A square that faces +Z at some distance, with its texture repeated."""
    corners = [(-half, half), (-half, -half), (half, -half), (half, half)]
    return Scene(
        name="plate",
        path=Path("plate.glb"),
        vertices=np.array([(x, y, -distance) for x, y in corners], np.float32),
        triangles=np.array([(0, 1, 2), (0, 2, 3)], np.int32),
        uvs=np.array([(0, 0), (0, tiles), (tiles, tiles), (tiles, 0)], np.float32) + np.float32(offset),
        colors=np.ones((4, 4), np.float32),
        material_ids=np.zeros(2, np.int32),
        instance_ids=np.ones(2, np.int32),
        materials=(Material("m", texture=texture, wrap_s=wrap, wrap_t=wrap, **material),),
        instance_names=("plate",),
    )


def test_a_texture_at_its_own_resolution_is_shown_as_it_is():
    texture = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    image = look([plate(texture, 1.0)], [0, 0, 0], 0.0, height=64, width=64)["rgb"][0]
    np.testing.assert_allclose(image.astype(int), texture[..., :3], atol=4)


def test_a_magnified_texture_is_bilinear():
    texture = np.full((2, 2, 4), 255, np.uint8)
    texture[0, :, :3], texture[1, :, :3] = 0, 200
    image = look([plate(texture, 1.0, wrap="clamp")], [0, 0, 0], 0.0, height=64, width=64)["rgb"][0, :, 32, 0]
    expected = np.clip(((np.arange(64) + 0.5) / 64 * 2 - 0.5), 0, 1) * 200
    np.testing.assert_allclose(image, expected, atol=2)


@pytest.mark.parametrize(("wrap", "index"), [
    ("repeat", lambda i: i % 4), ("clamp", lambda i: np.clip(i, 0, 3)),
    ("mirror", lambda i: np.where(i % 8 < 4, i % 4, 3 - i % 4)),
])  # fmt: skip
def test_textures_go_on_outside_the_unit_square_as_they_are_told(wrap, index):
    texture = np.full((4, 4, 4), 255, np.uint8)
    texture[..., 0] = np.arange(4) * 60
    texture[..., 1] = np.arange(4)[:, None] * 60
    # Three repeats from -1 to 2, a texel for every pixel.
    scene = plate(texture, 1.0, tiles=3.0, offset=-1.0, wrap=wrap)
    image = look([scene], [0, 0, 0], 0.0, height=12, width=12)["rgb"][0]
    column = index(np.arange(-4, 8)) * 60
    np.testing.assert_allclose(image[6, :, 0], column, atol=3)
    np.testing.assert_allclose(image[:, 6, 1], column, atol=3)


def test_a_distant_checkerboard_turns_into_its_mean_and_does_not_shimmer():
    scene = plate(checkerboard(64), 20.0, tiles=40.0, half=20.0)
    sway = np.linspace(0, 0.3, 12)
    images = look([scene], [[s, 0, 0] for s in sway], [0.0] * 12, height=32, width=32)["rgb"].astype(float)
    # A pixel covers 80 texels, ten squares.
    np.testing.assert_allclose(images, 130, atol=3)
    assert images.std(axis=0).max() < 2


def test_a_slanted_distant_texture_does_not_shimmer_either():
    floor = plate(checkerboard(64), 0.0, tiles=200.0, half=50.0)
    turned = Scene(**{**floor.__dict__, "vertices": floor.vertices[:, [0, 2, 1]] * np.float32([1, 1, -1])})
    sway = [[0, 1, z] for z in np.linspace(0, 0.2, 10)]
    images = look([turned], sway, [0.0] * 10, height=32, width=32)["rgb"].astype(float)
    assert images[:, 17:22].std(axis=0).max() < 4


def test_texture_coordinates_too_steep_for_any_number_show_the_mean():
    texture = checkerboard(1024)
    image = look([plate(texture, 1.0, tiles=1e6, half=1e-11)], [0, 0, 0], 0.0, height=1, width=1)
    assert image["depth"].item() == pytest.approx(1.0)
    np.testing.assert_allclose(image["rgb"].ravel(), 130, atol=2)


def test_factor_texture_and_vertex_colour_multiply():
    texture = np.full((4, 4, 4), 200, np.uint8)
    scene = plate(texture, 1.0, base_color=(0.5, 1.0, 0.25, 1.0))
    image = look([scene], [0, 0, 0], 0.0, height=8, width=8)["rgb"][0]
    np.testing.assert_allclose(image, np.broadcast_to([100, 200, 50], image.shape), atol=1)
    colors = np.ones((4, 4), np.float32)
    colors[:2, 1] = 0.0  # left half to the right: green grows from 0 to 1
    scene = Scene(**{**scene.__dict__, "colors": colors})
    image = look([scene], [0, 0, 0], 0.0, height=8, width=8)["rgb"][0]
    np.testing.assert_allclose(image[4, :, 1], 200 * (np.arange(8) + 0.5) / 8, atol=1)
    np.testing.assert_allclose(image[..., 0], 100, atol=1)


def test_colours_beyond_one_are_cut_off_last():
    texture = np.full((4, 4, 4), 100, np.uint8)
    scene = plate(texture, 1.0, base_color=(2.0, 4.0, 1.0, 1.0))
    scene = Scene(**{**scene.__dict__, "colors": np.full((4, 4), [0.5, 1.0, 1.5, 1.0], np.float32)})
    image = look([scene], [0, 0, 0], 0.0, height=8, width=8)["rgb"][0]
    np.testing.assert_allclose(image, np.broadcast_to([100, 255, 150], image.shape), atol=1)


def test_a_texture_may_show_its_nearest_texel_near_and_far():
    texture = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    scene = plate(texture, 1.0, magnify="nearest")
    image = look([scene], [0, 0, 0], 0.0, height=32, width=32)["rgb"][0]
    np.testing.assert_array_equal(image, np.kron(texture[..., :3], np.ones((4, 4, 1), np.uint8)))
    # Five repeats, 8 texels for 5 pixels: the texel under each pixel's middle.
    scene = plate(texture, 1.0, tiles=5.0, minify="nearest", mipmaps=None)
    image = look([scene], [0, 0, 0], 0.0, height=25, width=25)["rgb"][0]
    index = np.floor((np.arange(25) + 0.5) * 8 / 5).astype(int) % 8
    np.testing.assert_array_equal(image, texture[index][:, index, :3])


def test_a_texture_may_show_the_nearest_mip_level_alone():
    texture = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    # 64 texels over 24 pixels: log2(64 / 24) = 1.4, nearest to level 1.
    scene = plate(texture, 1.0, minify="nearest", mipmaps="nearest")
    image = look([scene], [0, 0, 0], 0.0, height=24, width=24)["rgb"][0]
    index = np.floor((np.arange(24) + 0.5) * 32 / 24).astype(int)
    np.testing.assert_array_equal(image, mip_levels(texture)[1][index][:, index, :3])


@pytest.mark.parametrize("shape", [(8, 8), (8, 2), (1, 5), (7, 3), (13, 6), (1, 1)])
def test_mip_levels_halve_down_to_one_texel_and_keep_the_mean(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 4), dtype=np.uint8)
    levels = mip_levels(image)
    for fine, coarse in itertools.pairwise(levels):
        assert coarse.shape[:2] == tuple(max(1, size // 2) for size in fine.shape[:2])
        if not any(size % 2 and size > 1 for size in fine.shape[:2]):
            np.testing.assert_allclose(coarse.mean((0, 1)), fine.mean((0, 1)), atol=1.0)
    assert levels[-1].shape == (1, 1, 4)


def test_mip_levels_of_odd_sizes_are_the_image_at_their_texels_middles():
    ramp = np.broadcast_to(10 * np.arange(7, dtype=np.uint8)[:, None, None], (7, 3, 4))
    second = mip_levels(ramp)[1]
    assert second.shape == (3, 1, 4)
    # Middles at 7/6, 7/2 and 35/6 of 7 texels, the first of which has its own middle at 1/2.
    np.testing.assert_allclose(second[:, 0, 0], 10 * (np.array([7 / 6, 7 / 2, 35 / 6]) - 0.5), atol=0.5)


def test_materials_that_share_an_image_share_its_texels():
    texture = np.zeros((16, 16, 4), np.uint8)
    pack = pack_textures([Material("a", texture=texture), Material("b"), Material("c", texture=texture)])
    assert len(pack.texels) == sum(4**k for k in range(5))
    assert pack.num_levels.tolist() == [5, 0, 5]


def reference(folder, path):
    recorded = np.load(path.with_suffix(".reference.npz"))
    about = json.loads(path.with_suffix(".json").read_text())
    return recorded, about


def test_depth_and_colour_are_habitats(reference_dir):
    paths = sorted(reference_dir.glob("*.glb"))
    assert paths
    for path in paths:
        recorded, about = reference(reference_dir, path)
        lift = about["sensor_height"]
        sensors = [
            SensorSpec("view_depth128", "depth", 128, 128, 90.0, lift),
            SensorSpec("view_depth64x96", "depth", 64, 96, 70.0, lift),
            SensorSpec("view_rgb128", "rgb", 128, 128, 90.0, lift),
        ]
        renderer = Renderer(sensors)
        renderer.load_scenes([load_scene(path)])
        position = torch.tensor(recorded["view_position"], dtype=torch.float32)
        yaw = torch.tensor(recorded["view_yaw"], dtype=torch.float32)
        images = renderer.render(torch.zeros(len(yaw), dtype=torch.int64), position, yaw)
        for name in ("view_depth128", "view_depth64x96"):
            error = np.abs(images[name].numpy() - recorded[name])
            assert np.median(error) <= 1e-4
            assert np.percentile(error, 99) <= 1e-3
            assert (error > 0.05).mean() <= 5e-4
        error = images["view_rgb128"].numpy().astype(float) - recorded["view_rgb128"]
        assert 10 * np.log10(255**2 / (error**2).mean()) >= 45


def test_moves_turns_and_collisions_are_habitats(reference_dir):
    for path in sorted(reference_dir.glob("*.glb")):
        recorded, about = reference(reference_dir, path)
        body = {"radius": about["agent_radius"], "height": about["agent_height"]}
        for rule, sliding in (("slide", True), ("stop", False)):
            actions = torch.from_numpy(recorded[f"rollout_{rule}_actions"]).long().reshape(-1) + 1
            position = recorded[f"rollout_{rule}_position"].astype(np.float32)
            xyzw = recorded[f"rollout_{rule}_rotation_xyzw"]
            yaw = 2 * np.arctan2(xyzw[..., 1], xyzw[..., 3]).astype(np.float32)
            count = len(actions)
            simulator = RaycastSimulator([path], count, [], AgentSpec(**body, allow_sliding=sliding))
            before, heading = (torch.from_numpy(v[:, :-1].reshape(count, -1).copy()) for v in (position, yaw))
            nowhere = torch.zeros(count, dtype=torch.int64)
            simulator.reset(torch.arange(count), nowhere, before, heading[:, 0])
            simulator.step(actions)
            moved = np.linalg.norm(simulator.position.numpy() - position[:, 1:].reshape(-1, 3), axis=1)
            assert np.mean(moved < 0.01) >= 0.99
            turned = simulator.yaw.numpy() - yaw[:, 1:].reshape(-1)
            assert np.abs(np.angle(np.exp(1j * turned))).max() < 1e-3
            collided = recorded[f"rollout_{rule}_collided"].reshape(-1)
            assert np.mean(simulator.collided.numpy() == collided) >= 0.99
            simulator.close()


@pytest.fixture
def simulator():
    halls = [room((-4, 0, -4), (4, 3, 4), name=name) for name in ("one", "two")]
    made = RaycastSimulator(
        halls, 4, [SensorSpec("depth", "depth", 8, 8), SensorSpec("id", "instance", 8, 8)]
    )
    yield made
    made.close()


def put(simulator, position=(0.0, 0.0, 0.0), yaw=0.0, scene=0, agents=None):
    agents = torch.arange(simulator.num_agents) if agents is None else agents
    floor = simulator.paths.snap(torch.zeros(1, dtype=torch.int64), torch.tensor([position]))
    count = len(agents)
    simulator.reset(agents, torch.full((count,), scene), floor.repeat(count, 1), torch.full((count,), yaw))


def test_actions_move_and_turn_each_agent_on_its_own(simulator):
    put(simulator, yaw=0.5)
    start = simulator.position
    simulator.step(torch.tensor([Action.STOP, Action.MOVE_FORWARD, Action.TURN_LEFT, Action.TURN_RIGHT]))
    ten = math.radians(10)
    torch.testing.assert_close(simulator.yaw, torch.tensor([0.5, 0.5, 0.5 + ten, 0.5 - ten]))
    moved = simulator.position - start
    expected = torch.zeros(4, 3)
    expected[1] = 0.25 * torch.tensor([-math.sin(0.5), 0.0, -math.cos(0.5)])
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=0)
    assert not simulator.collided.any()


def test_headings_stay_within_half_a_turn(simulator):
    put(simulator)
    for _ in range(40):
        simulator.step(torch.full((4,), Action.TURN_LEFT))
        assert simulator.yaw.abs().max() <= math.pi + 1e-6
    torch.testing.assert_close(
        torch.exp(1j * simulator.yaw), torch.exp(1j * torch.full((4,), math.radians(400)))
    )


def test_a_wall_stops_the_agent_and_collided_lasts_one_action(simulator):
    put(simulator, position=(0.0, 0.0, -3.5))
    for _ in range(4):
        simulator.step(torch.full((4,), Action.MOVE_FORWARD))
    assert simulator.collided.all()
    assert (simulator.position[:, 2] > -4).all()
    simulator.step(torch.full((4,), Action.TURN_LEFT))
    assert not simulator.collided.any()


def test_what_was_read_or_rendered_stays_as_it_was(simulator):
    put(simulator)
    held = simulator.position, simulator.yaw, simulator.scene, simulator.collided, simulator.render()["depth"]
    copies = [value.clone() for value in held]
    put(simulator, position=(1.0, 0.0, 1.0), yaw=2.0, scene=1)
    simulator.step(torch.full((4,), Action.MOVE_FORWARD))
    simulator.render()
    assert all(torch.equal(value, copied) for value, copied in zip(held, copies, strict=True))


def test_rendering_some_agents_equals_those_of_all(simulator):
    put(simulator, position=(1.0, 0.0, 1.0), yaw=2.0, agents=torch.tensor([1, 3]))
    everything = simulator.render()
    some = simulator.render(torch.tensor([3, 0]))
    for name, image in some.items():
        assert torch.equal(image, everything[name][[3, 0]])
    assert simulator.render(torch.zeros(0, dtype=torch.int64))["depth"].shape == (0, 8, 8)


@pytest.mark.filterwarnings("ignore:.*was built for an agent")
def test_loading_scenes_keeps_residents_and_agents_follow_theirs(simulator, reference_dir):
    put(simulator, scene=1)
    before = simulator.render()["depth"]
    kept = simulator.scenes[1]
    simulator.load_scenes([reference_dir / "loft.glb", kept])
    assert simulator.scenes == (reference_dir / "loft.glb", kept)
    assert simulator.scene.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(simulator.render()["depth"], before)
    simulator.load_scenes([kept])
    assert simulator.scene.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(simulator.render()["depth"], before)


def test_a_scene_that_cannot_be_loaded_changes_nothing(simulator, tmp_path):
    put(simulator)
    scenes, before = simulator.scenes, simulator.render()["depth"]
    with pytest.raises(ValueError, match="no such file"):
        simulator.load_scenes([scenes[0], tmp_path / "none.glb"])
    assert simulator.scenes == scenes
    assert torch.equal(simulator.render()["depth"], before)


def test_wrong_input_is_refused_by_name(simulator):
    one, pose = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3)
    cases = [
        (lambda: simulator.step(torch.zeros(3, dtype=torch.int64)), r"\(3,\), expected \(4,\)"),
        (lambda: simulator.step(torch.full((4,), 4)), r"0\.\.3"),
        (lambda: simulator.reset(one, one + 2, pose, torch.zeros(1)), r"0\.\.1"),
        (lambda: simulator.reset(one, one, pose[0], torch.zeros(1)), "position has shape"),
        (lambda: simulator.reset(one, one, pose / 0, torch.zeros(1)), "finite"),
        (lambda: simulator.load_scenes([]), "at least one scene"),
        (lambda: simulator.load_scenes([simulator.scenes[0]] * 2), "must differ"),
        (lambda: Renderer([SensorSpec("a", "rgb"), SensorSpec("a", "depth")]), "must differ"),
        (lambda: Renderer([], num_threads=0), "num_threads 0"),
        (lambda: RaycastSimulator([room()], 0, []), "num_agents 0"),
    ]
    for call, fault in cases:
        with pytest.raises(ValueError, match=fault):
            call()


def test_close_twice_is_harmless():
    simulator = RaycastSimulator([room((-4, 0, -4), (4, 3, 4))], 1, [SensorSpec("depth", "depth", 128, 128)])
    simulator.render()
    simulator.close()
    simulator.close()
