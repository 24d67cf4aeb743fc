"""A home as a binary glTF 2.0 file that is the same, byte for byte, for the same home."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from envs.scenes.homes.mesh import Surface
from envs.scenes.homes.style import Paint

_FLOAT, _UINT, _UBYTE = 5126, 5125, 5121
_ARRAY, _ELEMENTS = 34962, 34963


def to_glb(objects: Mapping[str, Mapping[str, Surface]], materials: Mapping[str, Paint]) -> bytes:
    """Encodes objects as one node and mesh each, with a primitive for each material.

    The file is +Y up, as glTF asks. Materials are unlit: a base-colour texture (PNG) times vertex colours.

    Args:
        objects: surfaces by material, by object name.
        materials: textures by name; those that no surface uses are left out.
    """
    used = sorted({material for surfaces in objects.values() for material in surfaces})
    index = {name: k for k, name in enumerate(used)}
    chunks: dict[str, list[bytes]] = {"positions": [], "uvs": [], "colors": [], "triangles": []}
    counts = dict.fromkeys(chunks, 0)
    accessors: list[dict[str, Any]] = []
    views = {name: k for k, name in enumerate(chunks)}

    def add(kind: str, array: np.ndarray, component: int, shape: str, **more: Any) -> int:
        data = np.ascontiguousarray(array).tobytes()
        accessor = {
            "bufferView": views[kind],
            "byteOffset": counts[kind],
            "componentType": component,
            "count": array.size if shape == "SCALAR" else len(array),
            "type": shape,
            **more,
        }
        chunks[kind].append(data)
        counts[kind] += len(data)
        accessors.append(accessor)
        return len(accessors) - 1

    meshes: list[dict[str, Any]] = []
    nodes: list[dict[str, Any]] = []
    for name, surfaces in objects.items():
        primitives = []
        for material in sorted(surfaces):
            surface = surfaces[material]
            # The bounds must equal the stored float32 values exactly.
            low, high = surface.positions.min(axis=0).tolist(), surface.positions.max(axis=0).tolist()
            attributes = {
                "POSITION": add("positions", surface.positions, _FLOAT, "VEC3", min=low, max=high),
                "TEXCOORD_0": add("uvs", surface.uvs, _FLOAT, "VEC2"),
                "COLOR_0": add("colors", surface.colors, _UBYTE, "VEC4", normalized=True),
            }
            triangles = add("triangles", surface.triangles, _UINT, "SCALAR")
            primitives.append({"attributes": attributes, "indices": triangles, "material": index[material]})
        nodes.append({"mesh": len(meshes), "name": name})
        meshes.append({"name": name, "primitives": primitives})
    images = [_png(materials[name].pixels) for name in used]
    strides = {"positions": 12, "uvs": 8, "colors": 4}
    buffer_views: list[dict[str, Any]] = []
    body = b""
    for name, parts in chunks.items():
        view: dict[str, Any] = {"buffer": 0, "byteOffset": len(body), "byteLength": counts[name]}
        view["target"] = _ARRAY if name in strides else _ELEMENTS
        if name in strides:
            view["byteStride"] = strides[name]
        buffer_views.append(view)
        body += b"".join(parts)
    for image in images:
        buffer_views.append({"buffer": 0, "byteOffset": len(body), "byteLength": len(image)})
        body += image + b"\0" * (-len(image) % 4)
    document = {
        "asset": {"generator": "navagent", "version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(nodes)))}],
        "nodes": nodes,
        "meshes": meshes,
        "accessors": accessors,
        "bufferViews": buffer_views,
        "buffers": [{"byteLength": len(body)}],
        "images": [
            {"bufferView": len(chunks) + k, "mimeType": "image/png", "name": name}
            for k, name in enumerate(used)
        ],
        "samplers": [{"magFilter": 9729, "minFilter": 9987, "wrapS": 10497, "wrapT": 10497}],
        "textures": [{"sampler": 0, "source": k} for k in range(len(used))],
        "materials": [
            {
                "name": name,
                "doubleSided": True,
                "extensions": {"KHR_materials_unlit": {}},
                "pbrMetallicRoughness": {
                    "baseColorTexture": {"index": k},
                    "metallicFactor": 0.0,
                    "roughnessFactor": 1.0,
                },
            }
            for k, name in enumerate(used)
        ],
        "extensionsUsed": ["KHR_materials_unlit"],
    }
    header = json.dumps(document, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    header += b" " * (-len(header) % 4)
    total = 12 + 8 + len(header) + 8 + len(body)
    return b"".join(
        (
            struct.pack("<4sII", b"glTF", 2, total),
            struct.pack("<I4s", len(header), b"JSON"),
            header,
            struct.pack("<I4s", len(body), b"BIN\0"),
            body,
        )
    )


def _png(pixels: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", pixels[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 6])
    if not done:
        raise RuntimeError(f"OpenCV could not encode a {pixels.shape} texture as PNG")
    return data.tobytes()
