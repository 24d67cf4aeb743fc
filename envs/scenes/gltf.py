"""Reads ``.glb`` and ``.gltf`` files as Habitat shows them: triangles, base colours and where up is.

Written against the glTF 2.0 specification, over plain JSON and numpy: every offset, count and index that the
file states is checked before it is used, so a damaged or hostile file ends in a :class:`SceneError` and
neither in a crash nor in an allocation larger than its own contents call for.

What follows Habitat rather than glTF: shading is unlit, the base-colour factor and the vertex colour multiply
the stored texture value with no sRGB conversion, alpha is ignored, and every texture uses the first set of
texture coordinates whatever ``texCoord`` says. Only what has no material at all is lit in Habitat, by light
from all around; here it gets the colour that this light gives on average.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import struct
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from envs.scenes.scene import Filter, Material, Scene, SceneError, Wrap

MAX_TRIANGLES = 1 << 25
"""Most triangles a scene may have; a small file can ask for any number by instancing one mesh."""
_MAX_ZERO_FILLED = 1 << 24
"""Most elements of an accessor that has no bytes in the file (all zero, as the specification allows)."""
_FREE_TEXELS = 1 << 27
"""Texels that a scene's images may unpack to however small they are packed: 512 MiB."""
_TEXELS_PER_BYTE = 64
"""Texels that each byte of its images allows beyond that; photographs and paintings have about four."""
_COMPONENTS: dict[int, np.dtype[Any]] = {
    5120: np.dtype("<i1"),
    5121: np.dtype("<u1"),
    5122: np.dtype("<i2"),
    5123: np.dtype("<u2"),
    5125: np.dtype("<u4"),
    5126: np.dtype("<f4"),
}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
_WRAPS: dict[int, Wrap] = {10497: "repeat", 33071: "clamp", 33648: "mirror"}
_MAGNIFY: dict[int, Filter] = {9728: "nearest", 9729: "linear"}
_MINIFY: dict[int, tuple[Filter, Filter | None]] = {
    9728: ("nearest", None),
    9729: ("linear", None),
    9984: ("nearest", "nearest"),
    9985: ("linear", "nearest"),
    9986: ("nearest", "linear"),
    9987: ("linear", "linear"),
}
_NO_MATERIAL = Material("default", base_color=(0.49, 0.42, 0.31, 1.0))
_READABLE_EXTENSIONS = {"KHR_texture_transform", "KHR_mesh_quantization", "KHR_texture_basisu"}
_UV_LIMIT = 1e6

_Json = dict[str, Any]
_Floats = npt.NDArray[np.float64]


def load_scene(path: str | Path) -> Scene:
    """Reads a scene and turns it into the world frame.

    Where ``NAME.stage_config.json`` lies beside ``NAME.glb``, its ``up``, ``front`` and ``scale`` say how, +Y
    and -Z where it leaves out ``up`` or ``front``; otherwise a ``.glb`` is taken to be Z-up,
    ``(x, y, z) -> (x, z, -y)``, and a ``.gltf`` Y-up, all as Habitat takes them. Habitat reads ``origin`` too
    but moves nothing by it, so neither does this; an origin other than zero gives a warning. So does a scale
    other than one: it acts once here, on pictures and navigation mesh alike, while Habitat 0.3.3 applies it
    twice to pictures and never to the mesh.
    Textures that are compressed for the GPU (``KHR_texture_basisu``, as in HM3D's ``.basis.glb``) cannot be
    read: the surface keeps its base-colour factor, with one warning a file. Depth, normals and instance ids
    do not suffer.

    Raises:
        SceneError: if the file is missing, broken or empty, or needs something that cannot be read.
    """
    path = Path(path)
    if path.name.endswith(".scene_instance.json"):
        raise SceneError(
            f"{path}: a scene made of many parts, which habitat-sim alone reads: simulator=habitat"
        )
    document, binary = _read_container(path)
    scene = _Reader(path, document, binary).read()
    transform = _stage_transform(path)
    vertices = (scene.vertices.astype(np.float64) @ transform.T).astype(np.float32)
    triangles, solid = scene.triangles, scene.solid_triangles
    if np.linalg.det(transform) < 0:
        solid = scene.ground
        triangles = np.ascontiguousarray(triangles[:, ::-1])
    if not np.isfinite(vertices).all():
        raise SceneError(f"{path}: vertices overflow in the world frame; check the stage config's scale")
    return replace(scene, vertices=vertices, triangles=triangles, solid_triangles=solid)


def _read_bytes(path: Path) -> bytes:
    if not path.exists():
        raise SceneError(f"{path}: no such file")
    # A pipe or a device would be read for ever.
    if not path.is_file():
        raise SceneError(f"{path}: not a regular file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise SceneError(f"{path}: cannot be read: {error.strerror}") from error


def _parse_json(path: Path, text: bytes) -> _Json:
    try:
        document = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SceneError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise SceneError(f"{path}: its JSON is a {type(document).__name__}, expected an object")
    return document


def _read_container(path: Path) -> tuple[_Json, bytes | None]:
    """Splits a file into its JSON and its binary chunk, None where it has none."""
    data = _read_bytes(path)
    if not data:
        raise SceneError(f"{path}: the file is empty")
    if data[:4] != b"glTF":
        if data.lstrip()[:1] not in (b"{", b"\xef"):
            raise SceneError(f"{path}: neither a binary nor a JSON glTF file; it starts with {data[:8]!r}")
        return _parse_json(path, data), None
    if len(data) < 20:
        raise SceneError(f"{path}: truncated: {len(data)} bytes, a header and a chunk take 20")
    version, length = struct.unpack_from("<II", data, 4)
    if version != 2:
        raise SceneError(f"{path}: glTF version {version}, only version 2 can be read")
    if length > len(data):
        raise SceneError(f"{path}: truncated: {len(data)} bytes of {length}")
    chunks: dict[bytes, bytes] = {}
    offset = 12
    while offset + 8 <= length:
        size = struct.unpack_from("<I", data, offset)[0]
        kind = data[offset + 4 : offset + 8]
        offset += 8
        if offset + size > length:
            raise SceneError(f"{path}: truncated: chunk {kind!r} ends at {offset + size} of {length} bytes")
        chunks.setdefault(kind, data[offset : offset + size])
        offset += size
    if b"JSON" not in chunks:
        raise SceneError(f"{path}: it has no JSON chunk")
    return _parse_json(path, chunks[b"JSON"]), chunks.get(b"BIN\0")


def _stage_transform(path: Path) -> _Floats:
    """Matrix (3, 3) from the file's frame to the world's, from the stage config beside the file."""
    config_path = path.parent / (path.name.removesuffix(path.suffix) + ".stage_config.json")
    up, front, scale = (0.0, 1.0, 0.0), (0.0, 0.0, -1.0), (1.0, 1.0, 1.0)
    if not config_path.exists() and path.suffix == ".glb":
        up, front = (0.0, 0.0, 1.0), (0.0, 1.0, 0.0)
    elif config_path.exists():
        config = _parse_json(config_path, _read_bytes(config_path))
        up = _config_vector(config_path, config, "up", up)
        front = _config_vector(config_path, config, "front", front)
        scale = _config_vector(config_path, config, "scale", scale)
        if any(_config_vector(config_path, config, "origin", (0.0, 0.0, 0.0))):
            warnings.warn(
                f"{config_path}: origin {config['origin']} moves nothing, as in Habitat", stacklevel=4
            )
    lengths = np.linalg.norm(up), np.linalg.norm(front)
    if min(lengths) < 1e-6 or abs(np.dot(up, front)) > 1e-4 * lengths[0] * lengths[1]:
        raise SceneError(f"{config_path}: up {up} and front {front} must be non-zero and at right angles")
    if 0.0 in scale:
        raise SceneError(f"{config_path}: scale {scale} must not be 0")
    if scale != (1.0, 1.0, 1.0):
        warnings.warn(
            f"{config_path}: scale {scale} acts once on pictures and navigation mesh, unlike in Habitat",
            stacklevel=4,
        )
    rotation = _rotation_to_world(np.array(up, np.float32), np.array(front, np.float32))
    return np.asarray(np.diag(scale) @ rotation)


def _rotation_to_world(up: npt.NDArray[np.float32], front: npt.NDArray[np.float32]) -> _Floats:
    """Matrix (3, 3) that turns up to +Y and front to -Z, rounded as Habitat's.

    Habitat goes from +Y to up by the shortest way, then from where -Z came to front, both by quaternions in
    single precision. Where up is +Y and front +Z, the second turn is half a turn about X and leaves the scene
    upside down; that is Habitat's too.
    """
    first = _shortest_turn(np.array([0, 1, 0], np.float32), up)
    vector, scalar = first[:3], first[3]
    ahead = np.array([0, 0, -1], np.float32)
    twice = np.float32(2) * np.cross(vector, ahead)
    ahead = ahead + scalar * twice + np.cross(vector, twice)
    second = _shortest_turn(ahead, front)
    turn = np.append(
        second[3] * vector + scalar * second[:3] + np.cross(second[:3], vector),
        second[3] * scalar - second[:3] @ vector,
    )
    turn = turn / np.sqrt(turn @ turn)
    x, y, z, w = -turn[0], -turn[1], -turn[2], turn[3]  # back again
    one, two = np.float32(1), np.float32(2)
    return np.array(
        [
            [one - two * y * y - two * z * z, two * x * y - two * z * w, two * x * z + two * y * w],
            [two * x * y + two * z * w, one - two * x * x - two * z * z, two * y * z - two * x * w],
            [two * x * z - two * y * w, two * y * z + two * x * w, one - two * x * x - two * y * y],
        ],
        np.float64,
    )


def _shortest_turn(start: npt.NDArray[np.float32], end: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Quaternion x, y, z, w between two unit vectors, half a turn about an axis of Habitat's choice."""
    cosine = start @ end
    if cosine > 1 - 1e-5:
        return np.array([0, 0, 0, 1], np.float32)
    if cosine < 1e-5 - 1:
        axis = np.cross(np.array([0, 1, 0], np.float32), start)
        if axis @ axis < 1e-5:
            axis = np.cross(np.array([1, 0, 0], np.float32), start)
        return np.append(axis / np.sqrt(axis @ axis), np.float32(0))
    length = np.sqrt((np.float32(1) + cosine) * np.float32(2))
    return np.append(np.cross(start, end) / length, np.float32(0.5) * length)


def _config_vector(
    path: Path, config: _Json, key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    value = config.get(key, default)
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_number, value)):
        raise SceneError(f"{path}: {key} is {value!r}, expected three numbers")
    return float(value[0]), float(value[1]), float(value[2])


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a number that single precision can hold; JSON's integers have no end."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


class _Reader:
    """One pass over one document; the methods read one kind of glTF object each."""

    def __init__(self, path: Path, document: _Json, binary: bytes | None) -> None:
        self.path = path
        self.document = document
        self.binary = binary
        self.buffers: dict[int, bytes] = {}
        self.images: dict[int, npt.NDArray[np.uint8] | None] = {}
        self.num_texels = 0
        self.image_bytes = 0
        self.compressed_textures = 0
        self.num_triangles = 0

    def fail(self, fault: str) -> SceneError:
        return SceneError(f"{self.path}: {fault}")

    # Access to the document. It may hold anything, so every value is checked for its type.

    def entry(self, kind: str, index: Any) -> _Json:
        """Object ``index`` of the document's list ``kind``."""
        values = self.document.get(kind, [])
        if not isinstance(values, list):
            raise self.fail(f"{kind} is a {type(values).__name__}, expected a list")
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(values):
            raise self.fail(f"{kind} {index!r} is asked for, but there are {len(values)}")
        if not isinstance(values[index], dict):
            raise self.fail(f"{kind} {index} is a {type(values[index]).__name__}, expected an object")
        return values[index]

    def child(self, owner: _Json, key: str, where: str) -> _Json:
        """Object under a key, empty where there is none."""
        value = owner.get(key, {})
        if not isinstance(value, dict):
            raise self.fail(f"{where}: {key} is a {type(value).__name__}, expected an object")
        return value

    def items(self, owner: _Json, key: str, where: str) -> list[Any]:
        """List under a key, empty where there is none."""
        value = owner.get(key, [])
        if not isinstance(value, list):
            raise self.fail(f"{where}: {key} is a {type(value).__name__}, expected a list")
        return value

    def natural(self, owner: _Json, key: str, default: int, where: str) -> int:
        """Whole number of at least 0 under a key."""
        value = owner.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.fail(f"{where}: {key} is {value!r}, expected a whole number of at least 0")
        return value

    def numbers(self, owner: _Json, key: str, default: list[float], where: str) -> list[float]:
        """As many finite numbers under a key as the default has."""
        value = owner.get(key, default)
        if not isinstance(value, list) or len(value) != len(default) or not all(map(_is_number, value)):
            raise self.fail(f"{where}: {key} is {value!r}, expected {len(default)} finite numbers")
        return [float(v) for v in value]

    # Bytes.

    def uri_bytes(self, uri: Any, where: str) -> bytes:
        """What a data URI holds, or a file beside the scene."""
        if not isinstance(uri, str):
            raise self.fail(f"{where}: uri is {uri!r}, expected text")
        if uri.startswith("data:"):
            header, comma, payload = uri.partition(",")
            if not comma or not header.endswith(";base64"):
                raise self.fail(f"{where}: its data URI is not base64")
            try:
                return base64.b64decode(payload, validate=True)
            except (binascii.Error, ValueError) as error:
                raise self.fail(f"{where}: its data URI is damaged: {error}") from error
        name = unquote(uri)
        if "://" in name or "\0" in name or Path(name).is_absolute():
            raise self.fail(f"{where}: uri {uri[:80]!r} is not a relative file name")
        try:
            return _read_bytes(self.path.parent / name)
        except (SceneError, OSError) as error:
            raise self.fail(f"{where}: {error}") from error

    def buffer(self, index: Any) -> bytes:
        entry = self.entry("buffers", index)
        if index not in self.buffers:
            where = f"buffer {index}"
            length = self.natural(entry, "byteLength", 0, where)
            if "uri" in entry:
                data = self.uri_bytes(entry["uri"], where)
            elif index == 0 and self.binary is not None:
                data = self.binary
            else:
                raise self.fail(f"{where} has neither a uri nor a binary chunk")
            if len(data) < length:
                raise self.fail(f"{where} is truncated: {len(data)} bytes of {length}")
            self.buffers[index] = data
        return self.buffers[index]

    def view(self, index: Any) -> tuple[memoryview, int]:
        """Bytes of a buffer view and its stride, 0 for tightly packed."""
        entry = self.entry("bufferViews", index)
        where = f"bufferView {index}"
        data = self.buffer(entry.get("buffer"))
        offset = self.natural(entry, "byteOffset", 0, where)
        length = self.natural(entry, "byteLength", 0, where)
        if offset + length > len(data):
            raise self.fail(f"{where} ends at byte {offset + length} of a buffer of {len(data)}")
        return memoryview(data)[offset : offset + length], self.natural(entry, "byteStride", 0, where)

    def elements(
        self, view: Any, offset: int, dtype: np.dtype[Any], count: int, width: int, where: str
    ) -> npt.NDArray[Any]:
        """``count`` elements of ``width`` components in a buffer view: (count, width)."""
        data, stride = self.view(view)
        size = dtype.itemsize * width
        stride = stride or size
        if stride < size:
            raise self.fail(f"{where}: a stride of {stride} bytes is less than an element's {size}")
        if count and offset + (count - 1) * stride + size > len(data):
            raise self.fail(
                f"{where}: {count} elements need {offset + (count - 1) * stride + size} bytes, "
                f"its bufferView has {len(data)}"
            )
        if not count:
            return np.zeros((0, width), dtype)
        return np.ndarray((count, width), dtype, data, offset, (stride, dtype.itemsize))

    def accessor(self, index: Any, types: tuple[str, ...]) -> npt.NDArray[Any]:
        """An accessor's values as stored, (count, width), normalised integers turned into numbers."""
        entry = self.entry("accessors", index)
        where = f"accessor {index}"
        kind, component = entry.get("type"), entry.get("componentType")
        if kind not in types:
            raise self.fail(f"{where}: type is {kind!r}, expected {' or '.join(types)}")
        if not isinstance(component, int) or component not in _COMPONENTS:
            raise self.fail(f"{where}: componentType {component!r} is not one of glTF's")
        dtype, width = _COMPONENTS[component], _WIDTHS[kind]
        count = self.natural(entry, "count", 0, where)
        if "bufferView" in entry:
            offset = self.natural(entry, "byteOffset", 0, where)
            values = self.elements(entry["bufferView"], offset, dtype, count, width, where)
        elif count > _MAX_ZERO_FILLED:
            raise self.fail(f"{where}: {count} elements without a bufferView")
        else:
            values = np.zeros((count, width), dtype)
        if "sparse" in entry:
            values = self.sparse(values, self.child(entry, "sparse", where), where)
        if entry.get("normalized") and dtype.kind in "iu":
            return np.maximum(values / np.float32(np.iinfo(dtype).max), np.float32(-1.0))
        return values

    def sparse(self, values: npt.NDArray[Any], entry: _Json, where: str) -> npt.NDArray[Any]:
        """The values with some of them replaced."""
        count = self.natural(entry, "count", 0, where)
        indices, replacement = (self.child(entry, key, where) for key in ("indices", "values"))
        component = indices.get("componentType")
        if component not in (5121, 5123, 5125):
            raise self.fail(f"{where}: sparse indices of componentType {component!r}")
        rows = self.elements(
            indices.get("bufferView"),
            self.natural(indices, "byteOffset", 0, where),
            _COMPONENTS[component],
            count,
            1,
            where,
        )[:, 0]
        if count and rows.max() >= len(values):
            raise self.fail(f"{where}: sparse index {rows.max()} of {len(values)} elements")
        values = values.copy()
        values[rows] = self.elements(
            replacement.get("bufferView"),
            self.natural(replacement, "byteOffset", 0, where),
            values.dtype,
            count,
            values.shape[1],
            where,
        )
        return values

    # Materials.

    def image(self, index: Any) -> npt.NDArray[np.uint8]:
        """Pixels (H, W, 4) uint8 of an image."""
        entry = self.entry("images", index)
        where = f"image {index}"
        if "uri" in entry:
            data = self.uri_bytes(entry["uri"], where)
        else:
            data = bytes(self.view(entry.get("bufferView"))[0])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                picture: Image.Image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
                self.count_texels(picture.size, len(data))
                if picture.mode.startswith("I"):
                    # 16-bit grey, which Pillow would cut off at 255.
                    wide = np.asarray(picture, dtype=np.int64)
                    picture = Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8))
                pixels = np.asarray(picture.convert("RGBA"))
        except (
            UnidentifiedImageError,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
            OSError,
            SyntaxError,
            ValueError,
            struct.error,
        ) as error:
            raise self.fail(f"{where} cannot be read as PNG or JPEG: {error}") from error
        return np.ascontiguousarray(pixels)

    def count_texels(self, size: tuple[int, int], packed: int) -> None:
        """Counts an image before it is unpacked; a few kilobytes of PNG can ask for gigabytes."""
        self.num_texels += size[0] * size[1]
        self.image_bytes += packed
        if self.num_texels > max(_FREE_TEXELS, _TEXELS_PER_BYTE * self.image_bytes):
            raise self.fail(
                f"its images unpack to {self.num_texels} texels or more from {self.image_bytes} bytes, far "
                "more than pictures do; make them smaller"
            )

    def texture(self, index: Any, material: Material) -> Material:
        """The material with a texture (None if its pixels cannot be read) and its sampler's settings."""
        entry = self.entry("textures", index)
        where = f"texture {index}"
        if "sampler" in entry:
            sampler = self.entry("samplers", entry["sampler"])
            codes = [sampler.get(key, 10497) for key in ("wrapS", "wrapT")]
            if not all(isinstance(code, int) and code in _WRAPS for code in codes):
                raise self.fail(f"{where}: wrap modes {codes} are not glTF's")
            magnify, minify = sampler.get("magFilter", 9729), sampler.get("minFilter", 9987)
            if not isinstance(magnify, int) or magnify not in _MAGNIFY:
                raise self.fail(f"{where}: magFilter {magnify!r} is not one of glTF's")
            if not isinstance(minify, int) or minify not in _MINIFY:
                raise self.fail(f"{where}: minFilter {minify!r} is not one of glTF's")
            material = replace(
                material,
                wrap_s=_WRAPS[codes[0]],
                wrap_t=_WRAPS[codes[1]],
                magnify=_MAGNIFY[magnify],
                minify=_MINIFY[minify][0],
                mipmaps=_MINIFY[minify][1],
            )
        if "source" not in entry:
            self.compressed_textures += 1
            return material
        source = entry["source"]
        if not isinstance(source, int):
            raise self.fail(f"{where}: source is {source!r}, expected a number")
        if source not in self.images:
            mime = self.entry("images", source).get("mimeType")
            self.images[source] = None if mime in ("image/ktx2", "image/ktx") else self.image(source)
        self.compressed_textures += self.images[source] is None
        return replace(material, texture=self.images[source])

    def material(self, index: Any) -> tuple[Material, _Floats]:
        """A material and the transform (2, 3) of its texture coordinates."""
        entry = self.entry("materials", index)
        where = f"material {index}"
        surface = self.child(entry, "pbrMetallicRoughness", where)
        factor, picture = "baseColorFactor", "baseColorTexture"
        glossy = self.child(
            self.child(entry, "extensions", where), "KHR_materials_pbrSpecularGlossiness", where
        )
        if picture not in surface and ("diffuseTexture" in glossy or factor not in surface):
            surface, factor, picture = glossy, "diffuseFactor", "diffuseTexture"
        red, green, blue, alpha = self.numbers(surface, factor, [1.0, 1.0, 1.0, 1.0], where)
        material = Material(str(entry.get("name", index)), (red, green, blue, alpha))
        transform = np.eye(2, 3)
        if picture in surface:
            info = self.child(surface, picture, where)
            material = self.texture(info.get("index"), material)
            extensions = self.child(info, "extensions", where)
            if "KHR_texture_transform" in extensions:
                change = self.child(extensions, "KHR_texture_transform", where)
                offset = self.numbers(change, "offset", [0.0, 0.0], where)
                scale = self.numbers(change, "scale", [1.0, 1.0], where)
                angle = self.numbers({"rotation": [change.get("rotation", 0.0)]}, "rotation", [0.0], where)[0]
                cos, sin = math.cos(angle), math.sin(angle)
                turn = np.array([[cos, sin], [-sin, cos]]) * scale
                transform = np.column_stack([turn, offset])
        return material, transform

    # Geometry.

    def nodes(self) -> Iterator[tuple[int, _Json, _Floats]]:
        """Nodes of the scene, each with its matrix (4, 4) to the file's frame."""
        if self.items(self.document, "scenes", "document"):
            roots = self.items(self.entry("scenes", self.document.get("scene", 0)), "nodes", "scene")
        else:
            total = len(self.items(self.document, "nodes", "document"))
            below: list[Any] = []
            for index in range(total):
                below += self.items(self.entry("nodes", index), "children", f"node {index}")
            children = {index for index in below if isinstance(index, int)}
            roots = [index for index in range(total) if index not in children]
        visited: set[int] = set()
        pending = [(index, np.eye(4)) for index in reversed(roots)]
        while pending:
            index, parent = pending.pop()
            node = self.entry("nodes", index)
            if index in visited:
                raise self.fail(f"node {index} is its own ancestor or has two parents, expected a tree")
            visited.add(index)
            with np.errstate(over="ignore", invalid="ignore"):
                matrix = parent @ self.local_matrix(node, f"node {index}")
            yield index, node, matrix
            children_of = self.items(node, "children", f"node {index}")
            pending += [(child, matrix) for child in reversed(children_of)]

    def local_matrix(self, node: _Json, where: str) -> _Floats:
        if "matrix" in node:
            columns = self.numbers(node, "matrix", [0.0] * 16, where)
            return np.array(columns).reshape(4, 4).T
        x, y, z, w = self.numbers(node, "rotation", [0.0, 0.0, 0.0, 1.0], where)
        norm = math.sqrt(x * x + y * y + z * z + w * w)
        if norm < 1e-12:
            raise self.fail(f"{where}: rotation is a quaternion of length 0")
        x, y, z, w = x / norm, y / norm, z / norm, w / norm
        rotation = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        )
        matrix = np.eye(4)
        matrix[:3, :3] = rotation * self.numbers(node, "scale", [1.0, 1.0, 1.0], where)
        matrix[:3, 3] = self.numbers(node, "translation", [0.0, 0.0, 0.0], where)
        return matrix

    def corners(self, primitive: _Json, count: int, where: str) -> npt.NDArray[np.int64]:
        """Vertex indices of a primitive's triangles: (T, 3) int64."""
        if "indices" in primitive:
            stored = self.accessor(primitive["indices"], ("SCALAR",))[:, 0]
            if stored.dtype.kind != "u":
                raise self.fail(f"{where}: indices are {stored.dtype}, expected unsigned integers")
            order = stored.astype(np.int64)
            if len(order) and order.max() >= count:
                raise self.fail(f"{where}: index {order.max()} of {count} vertices")
        else:
            order = np.arange(count, dtype=np.int64)
        mode = primitive.get("mode", 4)
        if mode == 4:
            return order[: len(order) // 3 * 3].reshape(-1, 3)
        if mode not in (5, 6):
            raise self.fail(f"{where}: mode {mode!r} is not one of glTF's")
        if len(order) < 3:
            return np.zeros((0, 3), np.int64)
        if mode == 6:
            return np.stack([order[1:-1], order[2:], np.full(len(order) - 2, order[0])], axis=1)
        strip = np.stack([order[:-2], order[1:-1], order[2:]], axis=1)
        strip[1::2] = strip[1::2][:, [1, 0, 2]]
        return strip

    def attribute(self, primitive: _Json, name: str, types: tuple[str, ...], count: int) -> _Floats | None:
        """A vertex attribute other than the position, None where there is none."""
        attributes = primitive["attributes"]
        if name not in attributes:
            return None
        values = self.accessor(attributes[name], types)
        if len(values) != count:
            raise self.fail(f"{name} has {len(values)} elements for {count} vertices")
        return np.nan_to_num(np.asarray(values, np.float32), nan=0.0, posinf=_UV_LIMIT, neginf=-_UV_LIMIT)

    def read(self) -> Scene:
        """The scene in the file's own frame."""
        self.check_extensions()
        materials: list[Material] = []
        numbers: dict[Any, tuple[int, _Floats]] = {}
        names: list[str] = []
        parts: dict[str, list[npt.NDArray[Any]]] = {
            key: []
            for key in ("vertices", "triangles", "solid", "uvs", "colors", "material_ids", "instance_ids")
        }
        num_vertices = 0
        plain = True
        for index, node, matrix in self.nodes():
            if "mesh" not in node:
                continue
            mesh = self.entry("meshes", node["mesh"])
            names.append(str(node.get("name", mesh.get("name", f"node {index}"))))
            for number, primitive in enumerate(self.items(mesh, "primitives", f"mesh {node['mesh']}")):
                where = f"mesh {node['mesh']} primitive {number}"
                if not isinstance(primitive, dict) or not isinstance(primitive.get("attributes"), dict):
                    raise self.fail(f"{where}: it has no attributes")
                if primitive.get("mode", 4) in (0, 1, 2, 3):
                    continue  # points and lines
                key = primitive.get("material")
                if not isinstance(key, int | None):
                    raise self.fail(f"{where}: material is {key!r}, expected a number")
                if key not in numbers:
                    material, transform = (_NO_MATERIAL, np.eye(2, 3)) if key is None else self.material(key)
                    numbers[key] = (len(materials), transform)
                    materials.append(material)
                material_id, transform = numbers[key]
                part = self.primitive(primitive, matrix, transform, where)
                corners = part.pop("triangles") + num_vertices
                count = len(corners)
                mirrored = np.linalg.det(matrix[:3, :3]) < 0
                parts["triangles"].append(corners[:, ::-1] if mirrored else corners)
                if primitive.get("mode", 4) == 4:
                    parts["solid"].append(corners)
                else:
                    plain = False
                plain = plain and not mirrored
                parts["material_ids"].append(np.full(count, material_id))
                parts["instance_ids"].append(np.full(count, len(names)))
                num_vertices += len(part["vertices"])
                for name, values in part.items():
                    parts[name].append(values)
        if not self.num_triangles:
            raise self.fail("it has no triangles")
        if self.compressed_textures:
            warnings.warn(
                f"{self.path}: {self.compressed_textures} textures are compressed (KHR_texture_basisu) and "
                "cannot be read; their surfaces show the base-colour factor",
                stacklevel=3,
            )
        solid = parts.pop("solid")
        whole = {key: np.concatenate(values) for key, values in parts.items()}
        return Scene(
            name=self.path.name.removesuffix(self.path.suffix),
            path=self.path,
            vertices=whole["vertices"],
            triangles=whole["triangles"].astype(np.int32),
            uvs=whole["uvs"],
            colors=whole["colors"],
            material_ids=whole["material_ids"].astype(np.int32),
            instance_ids=whole["instance_ids"].astype(np.int32),
            materials=tuple(materials),
            instance_names=tuple(names),
            solid_triangles=None
            if plain
            else np.concatenate([np.zeros((0, 3), np.int32), *solid]).astype(np.int32),
        )

    def check_extensions(self) -> None:
        required = self.items(self.document, "extensionsRequired", "document")
        # Lights and other material models change nothing that an unlit picture shows.
        harmless = ("KHR_materials_", "KHR_lights_", "KHR_xmp")
        unknown = [
            name
            for name in map(str, required)
            if name not in _READABLE_EXTENSIONS and not name.startswith(harmless)
        ]
        if unknown:
            raise self.fail(f"it requires {', '.join(unknown)}, which cannot be read; export it without")

    def primitive(
        self, primitive: _Json, matrix: _Floats, transform: _Floats, where: str
    ) -> dict[str, npt.NDArray[Any]]:
        """A primitive's triangles, wound as stored, and the vertices that they use, in the file's frame."""
        if "POSITION" not in primitive["attributes"]:
            raise self.fail(f"{where}: it has no POSITION")
        stored = self.accessor(primitive["attributes"]["POSITION"], ("VEC3",))
        count = len(stored)
        triangles = self.corners(primitive, count, where)
        self.num_triangles += len(triangles)
        if self.num_triangles > MAX_TRIANGLES:
            raise self.fail(f"it has more than {MAX_TRIANGLES} triangles")
        uvs = self.attribute(primitive, "TEXCOORD_0", ("VEC2",), count)
        colors = self.attribute(primitive, "COLOR_0", ("VEC3", "VEC4"), count)
        # Primitives may share one large vertex buffer; keep only what this one uses.
        used = np.zeros(count, bool)
        used[triangles] = True
        if not used.all():
            triangles = (np.cumsum(used) - 1)[triangles]
            stored = stored[used]
            uvs = None if uvs is None else uvs[used]
            colors = None if colors is None else colors[used]
        count = len(stored)
        with np.errstate(over="ignore", invalid="ignore"):
            vertices = (stored.astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]).astype(np.float32)
        if not np.isfinite(vertices).all():
            bad = np.count_nonzero(~np.isfinite(vertices).all(axis=1))
            raise self.fail(f"{where}: {bad} of {count} vertices are not finite")
        if uvs is None:
            uvs = np.zeros((count, 2), np.float32)
        else:
            uvs = (uvs @ transform[:, :2].T + transform[:, 2]).clip(-_UV_LIMIT, _UV_LIMIT).astype(np.float32)
        tint = np.ones((count, 4), np.float32)
        if colors is not None:
            tint[:, : colors.shape[1]] = colors.clip(0.0, None)
        return {"vertices": vertices, "triangles": triangles, "uvs": uvs, "colors": tint}
