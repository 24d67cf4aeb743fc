"""What a scene file says must be what the scene holds, and nothing a file says may do harm."""

import base64
import copy
import io
import json
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

from envs.scenes import gltf
from envs.scenes.gltf import load_scene
from envs.scenes.scene import SceneError

CORNERS = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32)
SQUARE = np.array([0, 1, 2, 0, 2, 3], np.uint32)
UVS = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
CODES = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class Maker:
    """Writes glTF files for tests, one accessor a call."""

    def __init__(self):
        self.blob = b""
        self.document = {
            "asset": {"version": "2.0"},
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0}],
            "bufferViews": [],
            "accessors": [],
        }

    def view(self, data, **extra):
        self.blob += b"\0" * (-len(self.blob) % 4)
        view = {"buffer": 0, "byteOffset": len(self.blob), "byteLength": len(data), **extra}
        self.blob += data
        self.document["bufferViews"].append(view)
        return len(self.document["bufferViews"]) - 1

    def accessor(self, values, **extra):
        values = np.asarray(values)
        width = 1 if values.ndim == 1 else values.shape[1]
        entry = {
            "bufferView": self.view(values.astype(values.dtype.newbyteorder("<")).tobytes()),
            "componentType": CODES[values.dtype.str[1:]],
            "type": ["SCALAR", "VEC2", "VEC3", "VEC4"][width - 1],
            "count": len(values),
            **extra,
        }
        self.document["accessors"].append(entry)
        return len(self.document["accessors"]) - 1

    def square(self, indices=SQUARE, mode=None, material=None, **attributes):
        primitive = {"attributes": {"POSITION": self.accessor(CORNERS), **attributes}}
        if indices is not None:
            primitive["indices"] = self.accessor(indices)
        if mode is not None:
            primitive["mode"] = mode
        if material is not None:
            primitive["material"] = material
        self.document["meshes"] = [{"primitives": [primitive]}]
        return self

    def glb(self, path):
        document = {**self.document, "buffers": [{"byteLength": len(self.blob)}]}
        text = json.dumps(document).encode()
        text += b" " * (-len(text) % 4)
        blob = self.blob + b"\0" * (-len(self.blob) % 4)
        chunks = (
            struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(blob), b"BIN\0") + blob
        )
        path.write_bytes(b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks)
        return path


@pytest.fixture
def glb(tmp_path):
    return tmp_path / "scene.glb"


def in_file_frame(points):
    """Undoes the turn from Z-up files to the world."""
    return np.stack([points[:, 0], -points[:, 2], points[:, 1]], axis=1)


def test_files_without_a_stage_config_are_z_up(glb):
    maker = Maker().square()
    scene = load_scene(maker.glb(glb))
    np.testing.assert_allclose(scene.vertices, CORNERS[:, [0, 2, 1]] * [1, 1, -1], atol=2e-7)
    np.testing.assert_array_equal(scene.triangles, SQUARE.reshape(-1, 3))
    assert scene.ground is scene.triangles
    assert scene.instance_ids.tolist() == [1, 1]
    assert scene.name == "scene"
    assert scene.num_triangles == 2
    np.testing.assert_allclose(scene.bounds, [[0, 0, -1], [1, 0, 0]], atol=2e-7)


def test_up_and_front_of_the_stage_config_become_y_and_minus_z(glb):
    path = Maker().square().glb(glb)
    for up, front in (([0, 1, 0], [0, 0, -1]), ([0, 0, 1], [1, 0, 0]), ([0, -1, 0], [1, 0, 0]),
                      ([1, 0, 0], [0, 1, 0]), ([0.6, 0.8, 0], [-0.8, 0.6, 0])):  # fmt: skip
        glb.with_suffix(".stage_config.json").write_text(json.dumps({"up": up, "front": front}))
        world = load_scene(path).vertices
        np.testing.assert_allclose(world[:, 1], CORNERS @ up, atol=1e-6)
        np.testing.assert_allclose(world[:, 2], -CORNERS @ front, atol=1e-6)
        np.testing.assert_allclose(world[:, 0], CORNERS @ np.cross(front, up), atol=1e-6)


def test_a_stage_config_or_a_gltf_without_a_frame_is_y_up(glb):
    path = Maker().square().glb(glb)
    glb.with_suffix(".stage_config.json").write_text("{}")
    np.testing.assert_array_equal(load_scene(path).vertices, CORNERS)
    glb.with_suffix(".stage_config.json").unlink()
    np.testing.assert_array_equal(load_scene(path.rename(glb.with_suffix(".gltf"))).vertices, CORNERS)


def test_a_front_opposite_to_minus_z_turns_the_scene_about_x_as_in_habitat(glb):
    path = Maker().square().glb(glb)
    glb.with_suffix(".stage_config.json").write_text('{"up": [0, 1, 0], "front": [0, 0, 1]}')
    np.testing.assert_allclose(load_scene(path).vertices, CORNERS * [1, -1, -1], atol=1e-6)


def test_turning_z_up_files_rounds_as_single_precision_quaternions_do(glb):
    maker = Maker()
    maker.square()
    points = np.array([[0, 0, 0], [7, 3, 2], [1, 12, 0.25], [-5, -9, 1]], np.float32)
    maker.document["meshes"][0]["primitives"][0]["attributes"]["POSITION"] = maker.accessor(points)
    # Half a right angle has sine and cosine 0.70710678, 2^-25 above the root of 1/2 in single precision:
    # twice its square is 1 + 2^-23.
    x, y, z = points.astype(np.float64).T
    step = 2.0**-23
    expected = np.stack([x, (1 + step) * z - step * y, -(1 + step) * y - step * z], axis=1)
    np.testing.assert_array_equal(load_scene(maker.glb(glb)).vertices, expected.astype(np.float32))


def test_scale_acts_in_the_world_and_a_mirror_keeps_fronts_in_front(glb):
    path = Maker().square().glb(glb)
    glb.with_suffix(".stage_config.json").write_text(json.dumps({"scale": [-2, 3, 4]}))
    with pytest.warns(UserWarning, match="scale"):
        scene = load_scene(path)
    np.testing.assert_allclose(scene.vertices, CORNERS * [-2, 3, 4], atol=1e-6)
    a, b, c = scene.vertices[scene.triangles[0]]
    assert np.cross(b - a, c - a)[2] > 0


def test_an_origin_moves_nothing_as_in_habitat(glb):
    path = Maker().square().glb(glb)
    glb.with_suffix(".stage_config.json").write_text("{}")
    before = load_scene(path).vertices
    glb.with_suffix(".stage_config.json").write_text(json.dumps({"origin": [1, 2, 3]}))
    with pytest.warns(UserWarning, match="origin"):
        np.testing.assert_array_equal(load_scene(path).vertices, before)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ('{"up": [0, 0, 0]}', "at right angles"),
        ('{"up": [0, 1, 0], "front": [0, 0.5, 1]}', "at right angles"),
        ('{"up": "y"}', "three numbers"),
        ('{"scale": [1, NaN, 1]}', "three numbers"),
        ('{"scale": [1, 0, 1]}', "must not be 0"),
        ("[1]", "expected an object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_wrong_stage_config_is_refused_by_name(glb, config, fault):
    path = Maker().square().glb(glb)
    glb.with_suffix(".stage_config.json").write_text(config)
    with pytest.raises(SceneError, match=fault) as error:
        load_scene(path)
    assert "scene.stage_config.json" in str(error.value)


def test_node_transforms_multiply_down_the_tree(glb):
    maker = Maker().square()
    matrix = np.eye(4)
    matrix[:3, 3] = [5, 0, 0]
    half = float(np.sqrt(0.5))
    maker.document["nodes"] = [
        {"children": [1], "matrix": matrix.T.ravel().tolist()},
        {
            "mesh": 0,
            "name": "b",
            "translation": [0, 1, 0],
            "rotation": [0, 0, half, half],
            "scale": [2, 1, 1],
        },
        {"mesh": 0, "name": "unused"},
    ]
    scene = load_scene(maker.glb(glb))
    turned = np.stack([-CORNERS[:, 1], 2 * CORNERS[:, 0], CORNERS[:, 2]], axis=1)
    np.testing.assert_allclose(in_file_frame(scene.vertices), turned + np.array([5, 1, 0]), atol=1e-6)
    assert scene.instance_names == ("b",)


def test_every_node_with_a_mesh_is_an_instance(glb):
    maker = Maker().square()
    maker.document["nodes"] = [{"mesh": 0}, {"name": "empty"}, {"mesh": 0}]
    maker.document["scenes"] = [{"nodes": [0, 1, 2]}]
    assert load_scene(maker.glb(glb)).instance_ids.tolist() == [1, 1, 2, 2]


def test_a_mirrored_node_keeps_fronts_in_front(glb):
    maker = Maker().square()
    maker.document["nodes"][0]["scale"] = [-1, 1, 1]
    scene = load_scene(maker.glb(glb))
    a, b, c = scene.vertices[scene.triangles[0]]
    assert np.cross(b - a, c - a)[1] > 0


def test_the_ground_is_triangle_lists_wound_as_stored_as_in_habitat(glb):
    maker = Maker().square()
    maker.document["nodes"][0]["scale"] = [-1, 1, 1]
    scene = load_scene(maker.glb(glb))
    np.testing.assert_array_equal(scene.ground, SQUARE.reshape(-1, 3))
    np.testing.assert_array_equal(scene.triangles, SQUARE.reshape(-1, 3)[:, ::-1])
    scene = load_scene(Maker().square(np.array([0, 1, 3, 2], np.uint8), 5).glb(glb))
    assert scene.ground.shape == (0, 3)
    assert scene.num_triangles == 2


def test_without_scenes_the_roots_are_the_nodes_without_a_parent(glb):
    maker = Maker().square()
    maker.document["nodes"] = [{"mesh": 0}, {"children": [0], "translation": [1, 0, 0]}]
    del maker.document["scenes"], maker.document["scene"]
    assert load_scene(maker.glb(glb)).vertices[:, 0].min() == 1


@pytest.mark.parametrize("kind", ["u1", "u2", "u4"])
def test_indices_of_all_types(glb, kind):
    scene = load_scene(Maker().square(SQUARE.astype(kind)).glb(glb))
    np.testing.assert_array_equal(scene.triangles, SQUARE.reshape(-1, 3))


def test_strips_fans_and_lists_without_indices_cover_the_same_square(glb):
    expected = CORNERS[SQUARE].reshape(-1, 3, 3)
    area = np.cross(expected[:, 1] - expected[:, 0], expected[:, 2] - expected[:, 0])[:, 2]
    for indices, mode in ((np.array([0, 1, 3, 2], np.uint8), 5), (np.array([0, 1, 2, 3], np.uint8), 6)):
        scene = load_scene(Maker().square(indices, mode).glb(glb))
        corners = in_file_frame(scene.vertices)[scene.triangles]
        # All triangles face +Z: none is wound the wrong way round.
        np.testing.assert_allclose(
            np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])[:, 2], area, atol=1e-6
        )
    scene = load_scene(Maker().square(None).glb(glb))
    assert scene.triangles.tolist() == [[0, 1, 2]]


def test_points_and_lines_are_left_out(glb):
    maker = Maker().square()
    primitives = maker.document["meshes"][0]["primitives"]
    primitives += [{**primitives[0], "mode": mode} for mode in (0, 1, 3)]
    assert load_scene(maker.glb(glb)).num_triangles == 2


@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
@pytest.mark.parametrize("width", [3, 4])
def test_vertex_colours_of_all_types(glb, kind, width):
    values = (
        np.array([[0, 51, 102, 255], [255, 0, 0, 255], [0, 255, 0, 255], [0, 0, 255, 255]])[:, :width] / 255
    )
    stored = values if kind == "f4" else np.round(values * np.iinfo(kind).max)
    maker = Maker()
    maker.square(COLOR_0=maker.accessor(stored.astype(kind), normalized=kind != "f4"))
    scene = load_scene(maker.glb(glb))
    np.testing.assert_allclose(scene.colors[:, :width], values, atol=1e-5)
    assert (scene.colors[:, width:] == 1).all()


def test_normalised_texture_coordinates_and_their_transform(glb):
    maker = Maker()
    stored = (UVS * 65535).astype(np.uint16)
    maker.square(material=0, TEXCOORD_0=maker.accessor(stored, normalized=True))
    change = {"offset": [0.25, 0.5], "scale": [2, 3], "rotation": np.pi / 2}
    texture = {"index": 0, "extensions": {"KHR_texture_transform": change}}
    maker.document |= {
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": texture}}],
        "textures": [{"source": 0}],
        "images": [{"bufferView": maker.view(png(np.zeros((2, 2, 3))))}],
    }
    # The extension's matrix: translation, rotation, scale, with rotation towards -v.
    expected = np.stack([3 * UVS[:, 1] + 0.25, -2 * UVS[:, 0] + 0.5], axis=1)
    np.testing.assert_allclose(load_scene(maker.glb(glb)).uvs, expected, atol=1e-5)


def test_vertex_colours_may_exceed_one_but_not_fall_below_zero(glb):
    maker = Maker()
    stored = np.array([[2, -1, 0.5], [1, 1, 1], [0, 0, 0], [3, 0, 0]], np.float32)
    scene = load_scene(maker.square(COLOR_0=maker.accessor(stored)).glb(glb))
    np.testing.assert_array_equal(scene.colors[:, :3], stored.clip(0, None))


def test_textures_use_the_first_coordinates_whatever_the_file_says_as_in_habitat(glb):
    maker = textured(None, png(np.zeros((2, 2, 3))))
    attributes = maker.document["meshes"][0]["primitives"][0]["attributes"]
    attributes["TEXCOORD_1"] = maker.accessor(UVS * 7)
    surface = maker.document["materials"][0]["pbrMetallicRoughness"]
    surface["baseColorTexture"]["texCoord"] = 1
    np.testing.assert_array_equal(load_scene(maker.glb(glb)).uvs, UVS)


@pytest.mark.parametrize(("sampler", "filters"), [
    ({}, ("linear", "linear", "linear")), ({"magFilter": 9728}, ("nearest", "linear", "linear")),
    ({"minFilter": 9728}, ("linear", "nearest", None)), ({"minFilter": 9729}, ("linear", "linear", None)),
    ({"minFilter": 9984}, ("linear", "nearest", "nearest")),
    ({"minFilter": 9985}, ("linear", "linear", "nearest")),
    ({"minFilter": 9986}, ("linear", "nearest", "linear")),
    ({"magFilter": 9729, "minFilter": 9987}, ("linear", "linear", "linear")),
])  # fmt: skip
def test_samplers_say_how_textures_are_filtered(glb, sampler, filters):
    maker = textured(None, png(np.zeros((2, 2, 3))))
    maker.document["samplers"] = [sampler]
    material = load_scene(maker.glb(glb)).materials[0]
    assert (material.magnify, material.minify, material.mipmaps) == filters


@pytest.mark.parametrize("sampler", [{"minFilter": 5}, {"magFilter": 9987}, {"minFilter": "9728"}])
def test_a_wrong_filter_is_refused_by_name(glb, sampler):
    maker = textured(None, png(np.zeros((2, 2, 3))))
    maker.document["samplers"] = [sampler]
    with pytest.raises(SceneError, match=r"texture 0: m..Filter"):
        load_scene(maker.glb(glb))


def test_specular_glossiness_gives_the_colour_where_there_is_no_other(glb):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    maker = textured(None, png(pixels))
    old = maker.document["materials"][0]["pbrMetallicRoughness"]
    glossy = {"diffuseFactor": [0.2, 0.6, 0.3, 1], "diffuseTexture": {"index": 0}}
    entry = {"extensions": {"KHR_materials_pbrSpecularGlossiness": glossy}}
    maker.document["materials"] = [entry]
    material = load_scene(maker.glb(glb)).materials[0]
    assert material.base_color == (0.2, 0.6, 0.3, 1.0)
    np.testing.assert_array_equal(material.texture[..., :3], pixels)
    maker.document["materials"] = [{**entry, "pbrMetallicRoughness": old}]
    assert load_scene(maker.glb(glb)).materials[0].base_color == (0.5, 1.0, 0.0, 1.0)


def textured(source, blob=None):
    maker = Maker()
    maker.square(material=0, TEXCOORD_0=maker.accessor(UVS))
    image = {"bufferView": maker.view(blob)} if blob is not None else {"uri": source}
    maker.document |= {
        "materials": [
            {
                "name": "wall",
                "pbrMetallicRoughness": {"baseColorFactor": [0.5, 1, 0, 1], "baseColorTexture": {"index": 0}},
            }
        ],
        "textures": [{"source": 0, "sampler": 0}],
        "samplers": [{"wrapS": 33071, "wrapT": 33648}],
        "images": [image],
    }
    return maker


def test_textures_embedded_beside_and_in_a_data_uri(glb, tmp_path):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    (tmp_path / "my wall.png").write_bytes(png(pixels))
    uri = "data:image/png;base64," + base64.b64encode(png(pixels)).decode()
    for maker in (textured("my%20wall.png"), textured(uri), textured(None, png(pixels))):
        material = load_scene(maker.glb(glb)).materials[0]
        np.testing.assert_array_equal(material.texture[..., :3], pixels)
        assert (material.texture[..., 3] == 255).all()
        assert (material.wrap_s, material.wrap_t, material.name) == ("clamp", "mirror", "wall")
        assert material.base_color == (0.5, 1.0, 0.0, 1.0)


def test_jpeg_grey_palette_and_16_bit_images(glb):
    grey = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    jpeg, palette, wide = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(grey).save(jpeg, "JPEG", quality=100)
    Image.fromarray(grey).convert("P").save(palette, "PNG")
    Image.fromarray(grey.astype(np.uint16) * 257).save(wide, "PNG")
    for blob in (jpeg, palette, wide):
        texture = load_scene(textured(None, blob.getvalue()).glb(glb)).materials[0].texture
        assert texture.shape == (8, 8, 4)
        np.testing.assert_allclose(texture[..., 1].astype(int), grey, atol=3)


def test_a_json_file_with_its_buffer_beside_or_inside(tmp_path):
    maker = Maker().square()
    (tmp_path / "data.bin").write_bytes(maker.blob)
    inline = "data:application/octet-stream;base64," + base64.b64encode(maker.blob).decode()
    for uri in ("data.bin", inline):
        buffers = [{"byteLength": len(maker.blob), "uri": uri}]
        path = tmp_path / "scene.gltf"
        path.write_text(json.dumps({**maker.document, "buffers": buffers}))
        assert load_scene(path).num_triangles == 2


def test_sparse_accessors_replace_some_elements(glb):
    maker = Maker().square()
    position = maker.document["accessors"][
        maker.document["meshes"][0]["primitives"][0]["attributes"]["POSITION"]
    ]
    position["sparse"] = {
        "count": 1,
        "indices": {"bufferView": maker.view(np.array([2], np.uint16).tobytes()), "componentType": 5123},
        "values": {"bufferView": maker.view(np.array([[7, 8, 9]], np.float32).tobytes())},
    }
    expected = CORNERS.copy()
    expected[2] = [7, 8, 9]
    np.testing.assert_allclose(in_file_frame(load_scene(maker.glb(glb)).vertices), expected, atol=1e-5)


def test_interleaved_vertices(glb):
    maker = Maker().square()
    mixed = np.concatenate([CORNERS, np.full((4, 2), 9, np.float32)], axis=1)
    maker.document["accessors"][0] |= {"bufferView": maker.view(mixed.tobytes(), byteStride=20)}
    np.testing.assert_allclose(in_file_frame(load_scene(maker.glb(glb)).vertices), CORNERS, atol=1e-6)


def test_vertices_that_no_triangle_uses_are_dropped(glb):
    scene = load_scene(Maker().square(np.array([1, 2, 3], np.uint8)).glb(glb))
    np.testing.assert_allclose(in_file_frame(scene.vertices), CORNERS[1:], atol=1e-6)


def test_textures_compressed_for_the_gpu_leave_the_base_colour_and_one_warning(glb):
    maker = Maker()
    maker.square(material=0)
    maker.document |= {
        "extensionsRequired": ["KHR_texture_basisu"],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}],
        "textures": [{"extensions": {"KHR_texture_basisu": {"source": 0}}}],
        "images": [{"mimeType": "image/ktx2", "bufferView": maker.view(b"ktx")}],
    }
    with pytest.warns(UserWarning, match="KHR_texture_basisu") as caught:
        scene = load_scene(maker.glb(glb))
    assert len(caught) == 1
    assert scene.materials[0].texture is None


def test_recorded_scenes_lie_where_habitat_put_them(reference_dir):
    for path in sorted(reference_dir.glob("*.glb")):
        bounds = json.loads(path.with_suffix(".json").read_text())["bounds"]
        np.testing.assert_allclose(load_scene(path).bounds, bounds, atol=2e-2)


def change(document, where, value):
    *path, last = where
    for key in path:
        document = document[key]
    document[last] = value


HOSTILE = {
    "no triangles": (["nodes"], [{}], "no triangles"),
    "nodes in a circle": (["nodes"], [{"mesh": 0, "children": [0]}], "expected a tree"),
    "missing node": (["scenes", 0, "nodes"], [7], "nodes 7"),
    "missing scene": (["scene"], 3, "scenes 3"),
    "missing mesh": (["nodes", 0, "mesh"], 9, "meshes 9"),
    "negative mesh": (["nodes", 0, "mesh"], -1, "meshes -1"),
    "nodes of the wrong type": (["nodes"], {"mesh": 0}, "expected a list"),
    "node of the wrong type": (["nodes"], [None], "expected an object"),
    "huge count": (["accessors", 0, "count"], 10**18, "bytes"),
    "count that no integer holds": (["accessors", 0, "count"], 10**300, "bytes"),
    "count without bytes": (
        ["accessors", 0],
        {"count": 10**9, "type": "VEC3", "componentType": 5126},
        "without",
    ),
    "negative count": (["accessors", 0, "count"], -4, "whole number"),
    "fractional count": (["accessors", 0, "count"], 1.5, "whole number"),
    "offset beyond the end": (["accessors", 0, "byteOffset"], 10**6, "bytes"),
    "view beyond the buffer": (["bufferViews", 0, "byteLength"], 10**6, "ends at byte"),
    "small stride": (["bufferViews", 0, "byteStride"], 4, "stride"),
    "component type": (["accessors", 0, "componentType"], 99, "componentType"),
    "type": (["accessors", 0, "type"], "MAT4", "expected VEC3"),
    "float indices": (["accessors", 1, "componentType"], 5126, "unsigned"),
    "missing accessor": (["meshes", 0, "primitives", 0, "attributes", "POSITION"], 50, "accessors 50"),
    "list for an accessor": (["meshes", 0, "primitives", 0, "indices"], [1], "accessors"),
    "no position": (["meshes", 0, "primitives", 0, "attributes"], {}, "no POSITION"),
    "no attributes": (["meshes", 0, "primitives", 0], {}, "no attributes"),
    "mode": (["meshes", 0, "primitives", 0, "mode"], 77, "mode"),
    "missing material": (["meshes", 0, "primitives", 0, "material"], 4, "materials 4"),
    "zero quaternion": (["nodes", 0, "rotation"], [0, 0, 0, 0], "length 0"),
    "short matrix": (["nodes", 0, "matrix"], [1, 2], "16"),
    "huge translation": (["nodes", 0, "translation"], [10**400, 0, 0], "3"),
    "overflowing scale": (["nodes", 0, "scale"], [1e37, 1e37, 1e37], "not finite"),
    "required extension": (["extensionsRequired"], ["KHR_draco_mesh_compression"], "draco"),
    "buffer of another file": (["bufferViews", 0, "buffer"], 1, "buffers 1"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_document_is_refused_by_name(glb, case):
    where, value, fault = HOSTILE[case]
    maker = Maker().square()
    if case == "overflowing scale":
        maker.document["nodes"][0] |= {"children": [1]}
        maker.document["nodes"].append({"mesh": 0, "scale": [1e37, 1e37, 1e37]})
    change(maker.document, where, value)
    with warnings.catch_warnings(), pytest.raises(SceneError, match=fault) as error:
        warnings.simplefilter("error")
        load_scene(maker.glb(glb))
    assert "scene.glb" in str(error.value)


def test_an_index_beyond_the_vertices_is_refused(glb):
    with pytest.raises(SceneError, match="index 4 of 4"):
        load_scene(Maker().square(np.array([0, 1, 4], np.uint16)).glb(glb))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vertices_that_are_not_finite_are_refused(glb, value):
    maker = Maker().square()
    bad = CORNERS.copy()
    bad[2, 1] = value
    maker.document["accessors"][0]["bufferView"] = maker.view(bad.tobytes())
    with pytest.raises(SceneError, match="not finite"):
        load_scene(maker.glb(glb))


def test_instancing_cannot_blow_up_a_small_file(glb, monkeypatch):
    monkeypatch.setattr(gltf, "MAX_TRIANGLES", 10)
    maker = Maker().square()
    maker.document["nodes"] = [{"mesh": 0}] * 6
    maker.document["scenes"] = [{"nodes": list(range(6))}]
    with pytest.raises(SceneError, match="more than 10 triangles"):
        load_scene(maker.glb(glb))


def test_images_cannot_blow_up_a_small_file(glb, monkeypatch):
    flat = png(np.full((512, 512, 3), 7))
    monkeypatch.setattr(gltf, "_FREE_TEXELS", 2**18)
    assert load_scene(textured(None, flat).glb(glb)).materials[0].texture.shape == (512, 512, 4)
    maker = textured(None, flat)
    maker.document["images"].append({"bufferView": maker.view(flat)})
    maker.document["textures"].append({"source": 1})
    maker.document["materials"].append({"pbrMetallicRoughness": {"baseColorTexture": {"index": 1}}})
    maker.document["nodes"].append({"mesh": 1})
    maker.document["scenes"] = [{"nodes": [0, 1]}]
    (primitive,) = maker.document["meshes"][0]["primitives"]
    maker.document["meshes"].append({"primitives": [primitive | {"material": 1}]})
    with pytest.raises(SceneError, match=r"scene\.glb: its images unpack to 524288 texels"):
        load_scene(maker.glb(glb))
    # Pictures with as many bytes as pictures have are not held up.
    monkeypatch.setattr(gltf, "_FREE_TEXELS", 0)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3))
    assert load_scene(textured(None, png(noise)).glb(glb)).materials[0].texture.shape == (64, 64, 4)


@pytest.mark.parametrize(
    ("uri", "fault"),
    [
        ("missing.png", "no such file"),
        ("/etc/hostname", "relative"),
        ("http://example.com/a.png", "relative"),
        ("data:image/png;base64,***", "damaged"),
        ("data:image/png,abc", "not base64"),
        (".", "not a regular file"),
        ("scene.glb", "PNG or JPEG"),
        (5, "expected text"),
    ],
)
def test_an_image_that_cannot_be_read_is_refused(glb, uri, fault):
    with pytest.raises(SceneError, match=fault):
        load_scene(textured(uri).glb(glb))


def test_a_truncated_image_is_refused(glb):
    blob = png(np.random.default_rng(0).integers(0, 255, (32, 32, 3)))
    with pytest.raises(SceneError, match="PNG or JPEG"):
        load_scene(textured(None, blob[: len(blob) // 2]).glb(glb))


def test_every_truncation_and_any_damaged_byte_ends_in_an_error_or_a_scene(glb, tmp_path):
    whole = textured(None, png(np.zeros((4, 4, 3)))).glb(glb).read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:size] for size in range(0, len(whole) - 4, 7)]
    for _ in range(300):
        copy_ = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            copy_[place] = rng.integers(0, 256)
        damaged.append(bytes(copy_))
    path = tmp_path / "damaged.glb"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, data in enumerate(damaged):
            path.write_bytes(data)
            try:
                scene = load_scene(path)
            except SceneError as error:
                assert "damaged.glb" in str(error)
            else:
                assert number >= len(damaged) - 300, "a truncated file passed for whole"
                assert scene.triangles.max() < len(scene.vertices)
                assert np.isfinite(scene.vertices).all()


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "empty"),
        (b"not a scene", "neither"),
        (b"glTF", "truncated"),
        (b"glTF" + struct.pack("<II", 1, 20) + b"\0" * 8, "version 1"),
        (b"glTF" + struct.pack("<II", 2, 20) + struct.pack("<I4s", 0, b"BIN\0"), "no JSON"),
        (b"{}", "no triangles"),
        (b'{"scenes": 5}', "expected a list"),
        (b"[" * 10**5, "neither"),
        (b'{"a":' * 10**5, "not valid JSON"),
    ],
)
def test_files_that_are_no_scene_are_refused(tmp_path, data, fault):
    path = tmp_path / "x.glb"
    path.write_bytes(data)
    with pytest.raises(SceneError, match=fault) as error:
        load_scene(path)
    assert "x.glb" in str(error.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(SceneError, match="no such file"):
        load_scene(tmp_path / "none.glb")
    with pytest.raises(SceneError, match="not a regular file"):
        load_scene(tmp_path)


def test_a_scene_made_of_parts_is_left_to_habitat_sim(tmp_path):
    path = tmp_path / "home.scene_instance.json"
    path.write_text('{"stage_instance": {"template_name": "home"}}')
    with pytest.raises(SceneError, match=r"home\.scene_instance\.json: .* simulator=habitat"):
        load_scene(path)


def test_a_million_triangles_load_whole(glb):
    side = 708
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1).reshape(-1, 2)
    corner = (np.arange(side - 1)[:, None] * side + np.arange(side - 1)).reshape(-1, 1)
    cells = corner + np.array([0, side, side + 1, 0, side + 1, 1])
    maker = Maker().square()
    document = copy.deepcopy(maker.document)
    maker.document["accessors"] = []
    positions = np.concatenate([grid, np.zeros((len(grid), 1))], axis=1).astype(np.float32)
    primitive = document["meshes"][0]["primitives"][0]
    primitive["attributes"]["POSITION"] = maker.accessor(positions)
    primitive["indices"] = maker.accessor(cells.ravel().astype(np.uint32))
    maker.document["meshes"] = document["meshes"]
    scene = load_scene(maker.glb(glb))
    assert scene.num_triangles == 2 * (side - 1) ** 2
    np.testing.assert_array_equal(scene.triangles, cells.reshape(-1, 3))
