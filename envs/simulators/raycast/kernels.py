"""Warp kernels of the renderer, the same source for CPU and CUDA.

Rendering takes two steps. :func:`cast` finds the triangle that each pixel's ray meets first. All rays of a
camera leave from one point, so it walks the scene's tree once for a block of pixels and tests a triangle
against all of them: the three edge functions of a triangle and its inverse depth are linear over the image,
and each pixel costs a few additions. This is the ray cast of those pixels' centres, only regrouped. Then one
kernel for each sensor turns triangle and depth into what the sensor shows.
"""

# Warp compiles the source: a variable that a branch or a loop changes has to be made by int(), float() or
# bool(), and types are Warp's own.
# ruff: noqa: UP018, RUF046
# mypy: ignore-errors

from __future__ import annotations

import warp as wp

from envs.simulators.raycast.bvh import STACK_SIZE, Node

wp.set_module_options({"enable_backward": False, "max_unroll": 1})

NEAR = wp.constant(0.01)
"""Nearest that a camera sees [m], Habitat's near plane."""
FAR = wp.constant(1000.0)
"""Farthest that a camera sees [m], Habitat's far plane."""
_NO_FACE = wp.constant(-1)
_Stack = wp.types.vector(length=STACK_SIZE, dtype=wp.int32)


@wp.struct
class Surface:
    """A material: colour factor, rows of its mip levels, wrap modes and filters.

    Modes are as in ``WRAP_CODES`` and ``MIPMAP_CODES``.
    """

    color: wp.vec3
    first_level: wp.int32
    num_levels: wp.int32
    wrap_s: wp.int32
    wrap_t: wp.int32
    magnify_nearest: wp.int32
    minify_nearest: wp.int32
    mipmaps: wp.int32
    is_tinted: wp.int32


@wp.struct
class Face:
    """What shading a triangle needs, one cache line."""

    anchor: wp.vec3
    """Its first corner [m]."""
    normal: wp.vec3
    """Unit vector out of its front."""
    uv: wp.vec2
    """Texture coordinates at the anchor."""
    u_gradient: wp.vec3
    """Change of the first texture coordinate along the triangle [1/m]."""
    v_gradient: wp.vec3
    """Change of the second."""
    surface: wp.int32
    instance: wp.int32


@wp.struct
class Tint:
    """Vertex colours of a triangle: the colour at the anchor and how each channel changes [1/m]."""

    color: wp.vec3
    red_gradient: wp.vec3
    green_gradient: wp.vec3
    blue_gradient: wp.vec3


@wp.struct
class SceneData:
    """A resident scene; triangles in the order of the tree's leaves."""

    nodes: wp.array(dtype=Node)
    corners: wp.array(dtype=wp.vec3)
    faces: wp.array(dtype=Face)
    tints: wp.array(dtype=Tint)
    surfaces: wp.array(dtype=Surface)
    levels: wp.array(dtype=wp.vec4i)
    texels: wp.array(dtype=wp.uint32)


@wp.struct
class Camera:
    """A camera fixed to an agent."""

    height: wp.int32
    width: wp.int32
    step: wp.float32
    """Width of a pixel at distance 1."""
    lift: wp.float32
    """Height above the agent's feet [m]."""
    sin_pitch: wp.float32
    cos_pitch: wp.float32


@wp.struct
class Views:
    """Where each agent is, for all N agents."""

    scene: wp.array(dtype=wp.int64)
    position: wp.array(dtype=wp.vec3)
    heading: wp.array(dtype=wp.vec2)
    """Sine and cosine of the yaw."""


@wp.func
def _camera_axes(camera: Camera, heading: wp.vec2) -> wp.mat33:
    """Right, up and back of a camera in the world, one a row."""
    sin_yaw = heading[0]
    cos_yaw = heading[1]
    return wp.mat33(
        cos_yaw,
        0.0,
        -sin_yaw,
        sin_yaw * camera.sin_pitch,
        camera.cos_pitch,
        cos_yaw * camera.sin_pitch,
        sin_yaw * camera.cos_pitch,
        -camera.sin_pitch,
        cos_yaw * camera.cos_pitch,
    )


@wp.func
def _outside(normal: wp.vec3, center: wp.vec3, half: wp.vec3) -> bool:
    """Whether a box lies behind a plane through the origin."""
    return wp.dot(normal, center) + wp.dot(wp.abs(normal), half) < 0.0


@wp.func
def _project(place: float, per_depth_positive: float, per_depth_negative: float) -> float:
    """Place over depth, where the depth to take depends on the place's sign."""
    if place > 0.0:
        return place * per_depth_positive
    return place * per_depth_negative


@wp.func
def _first_pixel(place: float) -> int:
    """First pixel whose centre is not before a place in the image, and a hundredth more against rounding."""
    return int(wp.clamp(place + 0.49, 0.0, 1.0e6))


@wp.func
def _end_pixel(place: float) -> int:
    """One past the last pixel whose centre is not behind a place in the image, and a hundredth more."""
    return int(wp.clamp(place + 0.51, 0.0, 1.0e6))


@wp.kernel
def cast(
    scenes: wp.array(dtype=SceneData),
    views: Views,
    camera: Camera,
    tile: int,
    start: int,
    inverse_depth: wp.array(dtype=wp.float32),
    hit_face: wp.array(dtype=wp.int32),
) -> None:
    """Finds the nearest front face for a block of ``tile`` x ``tile`` pixels.

    Writes 1 / depth along the axis and the face, 1 / FAR and -1 where there is none. Back faces are
    invisible, as in Habitat, even those of double-sided materials. Edge functions are made from the sum and
    difference of an edge's ends: two triangles then get exactly opposite values along the edge that they
    share, and no ray slips between them. For edge functions in three dimensions see Davidovic, Engelhardt,
    Georgiev, Slusallek and Dachsbacher, "3D rasterization: a bridge between rasterization and ray casting"
    (2012).
    """
    columns = (camera.width + tile - 1) // tile
    rows = (camera.height + tile - 1) // tile
    block = start + wp.tid()
    x_first = (block % columns) * tile
    y_first = ((block // columns) % rows) * tile
    agent = block // (columns * rows)
    x_end = wp.min(x_first + tile, camera.width)
    y_end = wp.min(y_first + tile, camera.height)
    base = agent * camera.height * camera.width

    half_width = 0.5 * float(camera.width)
    half_height = 0.5 * float(camera.height)
    focal = 1.0 / camera.step
    axes = _camera_axes(camera, views.heading[agent])
    right = axes[0]
    up = axes[1]
    back = axes[2]
    origin = views.position[agent] + wp.vec3(0.0, camera.lift, 0.0)

    # Planes through the outermost rays' pixels; a box is skipped only where none of its points can matter.
    x_low = (float(x_first) - half_width) * camera.step
    x_high = (float(x_end) - half_width) * camera.step
    y_high = (half_height - float(y_first)) * camera.step
    y_low = (half_height - float(y_end)) * camera.step
    side_left = right + x_low * back
    side_right = -right - x_high * back
    side_top = -up - y_high * back
    side_bottom = up + y_low * back

    for y in range(y_first, y_end):
        for x in range(x_first, x_end):
            inverse_depth[base + y * camera.width + x] = 1.0 / FAR
            hit_face[base + y * camera.width + x] = _NO_FACE

    data = scenes[int(views.scene[agent])]
    stack = _Stack()
    size = int(1)
    stack[0] = 0
    # Depth of the farthest pixel so far: what lies behind it cannot be seen.
    far = float(FAR)
    while size > 0:
        size = size - 1
        node = data.nodes[stack[size]]
        center = 0.5 * (node.lower + node.upper) - origin
        half = 0.5 * (node.upper - node.lower)
        visible = not (
            _outside(side_left, center, half)
            or _outside(side_right, center, half)
            or _outside(side_top, center, half)
            or _outside(side_bottom, center, half)
        )
        middle = -wp.dot(back, center)
        reach = wp.dot(wp.abs(back), half)
        # Boxes of a few pixels often lie between the pixels' centres, large ones never.
        if visible and middle - reach > NEAR and wp.max(half) * focal < 3.0 * middle:
            per_near = 1.0 / (middle - reach)
            per_far = 1.0 / (middle + reach)
            across = wp.dot(right, center)
            across_reach = wp.dot(wp.abs(right), half)
            left_end = _project(across - across_reach, per_far, per_near) * focal + half_width
            right_end = _project(across + across_reach, per_near, per_far) * focal + half_width
            along = -wp.dot(up, center)
            along_reach = wp.dot(wp.abs(up), half)
            top_end = _project(along - along_reach, per_far, per_near) * focal + half_height
            bottom_end = _project(along + along_reach, per_near, per_far) * focal + half_height
            visible = wp.max(_first_pixel(left_end), x_first) < wp.min(
                _end_pixel(right_end), x_end
            ) and wp.max(_first_pixel(top_end), y_first) < wp.min(_end_pixel(bottom_end), y_end)
        if visible and middle - reach < far and middle + reach > 0.0:
            if node.count == 0:
                left = data.nodes[node.first]
                right_node = data.nodes[node.first + 1]
                # The nearer child goes on top of the stack.
                nearer = wp.dot(back, left.lower + left.upper - right_node.lower - right_node.upper) > 0.0
                if nearer:
                    stack[size] = node.first + 1
                    stack[size + 1] = node.first
                else:
                    stack[size] = node.first
                    stack[size + 1] = node.first + 1
                size = size + 2
            else:
                changed = bool(False)
                for face in range(node.first, node.first + node.count):
                    a = axes * (data.corners[3 * face] - origin)
                    b = axes * (data.corners[3 * face + 1] - origin)
                    c = axes * (data.corners[3 * face + 2] - origin)
                    normal = wp.cross(b - a, c - a)
                    plane = wp.dot(normal, a)
                    if plane < 0.0:
                        x0 = x_first
                        x1 = x_end
                        y0 = y_first
                        y1 = y_end
                        if wp.max(a[2], wp.max(b[2], c[2])) < -NEAR:
                            ax = -a[0] / a[2]
                            bx = -b[0] / b[2]
                            cx = -c[0] / c[2]
                            ay = a[1] / a[2]
                            by = b[1] / b[2]
                            cy = c[1] / c[2]
                            x0 = wp.max(x0, _first_pixel(wp.min(ax, wp.min(bx, cx)) * focal + half_width))
                            x1 = wp.min(x1, _end_pixel(wp.max(ax, wp.max(bx, cx)) * focal + half_width))
                            y0 = wp.max(y0, _first_pixel(wp.min(ay, wp.min(by, cy)) * focal + half_height))
                            y1 = wp.min(y1, _end_pixel(wp.max(ay, wp.max(by, cy)) * focal + half_height))
                        if x0 < x1 and y0 < y1:
                            # Values at the point (x, y, -1) of the image plane: dot with that.
                            edge_a = wp.cross(c - b, c + b)
                            edge_b = wp.cross(a - c, a + c)
                            edge_c = wp.cross(b - a, b + a)
                            per_plane = 1.0 / plane
                            # From the block's corner, not the triangle's: shared edges must round alike.
                            image_x = (float(x_first) + 0.5 - half_width) * camera.step
                            a_step = edge_a[0] * camera.step
                            b_step = edge_b[0] * camera.step
                            c_step = edge_c[0] * camera.step
                            w_step = normal[0] * per_plane * camera.step
                            for y in range(y0, y1):
                                image_y = (half_height - float(y) - 0.5) * camera.step
                                a_row = edge_a[0] * image_x + edge_a[1] * image_y - edge_a[2]
                                b_row = edge_b[0] * image_x + edge_b[1] * image_y - edge_b[2]
                                c_row = edge_c[0] * image_x + edge_c[1] * image_y - edge_c[2]
                                w_row = (normal[0] * image_x + normal[1] * image_y - normal[2]) * per_plane
                                pixel = base + y * camera.width
                                for x in range(x0, x1):
                                    k = float(x - x_first)
                                    inside = wp.min(
                                        wp.min(a_row + k * a_step, b_row + k * b_step), c_row + k * c_step
                                    )
                                    w = w_row + k * w_step
                                    if inside >= 0.0 and w > inverse_depth[pixel + x] and w < 1.0 / NEAR:
                                        inverse_depth[pixel + x] = w
                                        hit_face[pixel + x] = face
                                        changed = bool(True)
                if changed:
                    least = float(1.0 / NEAR)
                    for y in range(y_first, y_end):
                        for x in range(x_first, x_end):
                            least = wp.min(least, inverse_depth[base + y * camera.width + x])
                    far = 1.0 / least


@wp.kernel
def shade_depth(
    start: int,
    inverse_depth: wp.array(dtype=wp.float32),
    hit_face: wp.array(dtype=wp.int32),
    depth: wp.array(dtype=wp.float32),
) -> None:
    """Depth along the axis [m]."""
    pixel = start + wp.tid()
    value = float(0.0)
    if hit_face[pixel] >= 0:
        value = 1.0 / inverse_depth[pixel]
    depth[pixel] = value


@wp.kernel
def shade_normals(
    scenes: wp.array(dtype=SceneData),
    views: Views,
    camera: Camera,
    start: int,
    hit_face: wp.array(dtype=wp.int32),
    normals: wp.array(dtype=wp.vec3),
) -> None:
    """Surface normals in the camera's frame."""
    pixel = start + wp.tid()
    agent = pixel // (camera.width * camera.height)
    face = hit_face[pixel]
    normal = wp.vec3()
    if face >= 0:
        data = scenes[int(views.scene[agent])]
        normal = _camera_axes(camera, views.heading[agent]) * data.faces[face].normal
    normals[pixel] = normal


@wp.kernel
def shade_instance(
    scenes: wp.array(dtype=SceneData),
    views: Views,
    camera: Camera,
    start: int,
    hit_face: wp.array(dtype=wp.int32),
    instance: wp.array(dtype=wp.int32),
) -> None:
    """Instance ids."""
    pixel = start + wp.tid()
    agent = pixel // (camera.width * camera.height)
    face = hit_face[pixel]
    number = int(0)
    if face >= 0:
        data = scenes[int(views.scene[agent])]
        number = data.faces[face].instance
    instance[pixel] = number


@wp.func
def _wrap_coordinate(value: float, mode: int) -> float:
    """Folds a texture coordinate into 0..1."""
    if mode == 0:
        return value - wp.floor(value)
    if mode == 1:
        return wp.clamp(value, 0.0, 1.0)
    return wp.abs(value - 2.0 * wp.floor(0.5 * value + 0.5))


@wp.func
def _wrap_index(index: int, size: int, mode: int) -> int:
    """Texel that a look-up at most one texel outside the image stands for."""
    if index < 0:
        if mode == 0:
            return size - 1
        return 0
    if index >= size:
        if mode == 0:
            return 0
        return size - 1
    return index


@wp.func
def _sample_level(
    texels: wp.array(dtype=wp.uint32), level: wp.vec4i, s: float, t: float, surface: Surface, nearest: int
) -> wp.vec3:
    """Look-up in one mip level, bilinear or of the nearest texel: RGB in 0..255.

    Red and blue are weighted together, as the two halves of one integer, with weights of 1/256.
    """
    width = level[1]
    height = level[2]
    x = s * float(width) - 0.5
    y = t * float(height) - 0.5
    if nearest != 0:
        x = wp.floor(x + 0.5)
        y = wp.floor(y + 0.5)
    left = wp.floor(x)
    top = wp.floor(y)
    weight_x = wp.uint32((x - left) * 256.0)
    weight_y = wp.uint32((y - top) * 256.0)
    x0 = _wrap_index(int(left), width, surface.wrap_s)
    x1 = _wrap_index(int(left) + 1, width, surface.wrap_s)
    row0 = level[0] + _wrap_index(int(top), height, surface.wrap_t) * width
    row1 = level[0] + _wrap_index(int(top) + 1, height, surface.wrap_t) * width
    a = texels[row0 + x0]
    b = texels[row0 + x1]
    c = texels[row1 + x0]
    d = texels[row1 + x1]
    eight = wp.uint32(8)
    weight_d = (weight_x * weight_y) >> eight
    weight_c = weight_y - weight_d
    weight_b = weight_x - weight_d
    weight_a = wp.uint32(256) - weight_x - weight_c
    outer = wp.uint32(0x00FF00FF)
    inner = wp.uint32(0x000000FF)
    red_blue = (a & outer) * weight_a + (b & outer) * weight_b
    red_blue = red_blue + (c & outer) * weight_c + (d & outer) * weight_d
    green = (
        ((a >> eight) & inner) * weight_a
        + ((b >> eight) & inner) * weight_b
        + ((c >> eight) & inner) * weight_c
        + ((d >> eight) & inner) * weight_d
    )
    return (
        wp.vec3(float(red_blue & wp.uint32(0xFFFF)), float(green), float(red_blue >> wp.uint32(16))) / 256.0
    )


@wp.kernel
def shade_rgb(
    scenes: wp.array(dtype=SceneData),
    views: Views,
    camera: Camera,
    span: int,
    start: int,
    inverse_depth: wp.array(dtype=wp.float32),
    hit_face: wp.array(dtype=wp.int32),
    rgb: wp.array(dtype=wp.uint8),
) -> None:
    """Colour of ``span`` pixels of a row: factor times texture times vertex colour.

    Textures are sampled as OpenGL does, trilinearly unless the material says otherwise, the mip level by the
    larger of the distances that one pixel to the right and one pixel up move on the texture.
    """
    first = start + wp.tid() * span
    line = first // camera.width
    row = line % camera.height
    agent = line // camera.height
    data = scenes[int(views.scene[agent])]
    axes = _camera_axes(camera, views.heading[agent])
    origin = views.position[agent] + wp.vec3(0.0, camera.lift, 0.0)
    image_y = (0.5 * float(camera.height) - float(row) - 0.5) * camera.step
    row_direction = image_y * axes[1] - axes[2]
    for pixel in range(first, first + span):
        color = wp.vec3()
        index = hit_face[pixel]
        if index >= 0:
            face = data.faces[index]
            surface = data.surfaces[face.surface]
            color = wp.vec3(255.0, 255.0, 255.0)
            image_x = (float(pixel - line * camera.width) + 0.5 - 0.5 * float(camera.width)) * camera.step
            direction = row_direction + image_x * axes[0]
            depth = 1.0 / inverse_depth[pixel]
            offset = origin + depth * direction - face.anchor
            if surface.num_levels > 0:
                finest = data.levels[surface.first_level]
                # How far the hit moves on the surface from this pixel to the next, in texels.
                pixel_size = camera.step * depth
                slant = 1.0 / wp.dot(face.normal, direction)
                along_x = pixel_size * (axes[0] - direction * (wp.dot(face.normal, axes[0]) * slant))
                along_y = pixel_size * (axes[1] - direction * (wp.dot(face.normal, axes[1]) * slant))
                u_scale = float(finest[1])
                v_scale = float(finest[2])
                u_x = wp.dot(face.u_gradient, along_x) * u_scale
                u_y = wp.dot(face.u_gradient, along_y) * u_scale
                v_x = wp.dot(face.v_gradient, along_x) * v_scale
                v_y = wp.dot(face.v_gradient, along_y) * v_scale
                footprint = wp.max(u_x * u_x + v_x * v_x, u_y * u_y + v_y * v_y)
                s = _wrap_coordinate(face.uv[0] + wp.dot(face.u_gradient, offset), surface.wrap_s)
                t = _wrap_coordinate(face.uv[1] + wp.dot(face.v_gradient, offset), surface.wrap_t)
                level = int(0)
                blend = float(0.0)
                nearest = int(surface.magnify_nearest)
                if footprint > 1.0:
                    nearest = surface.minify_nearest
                if footprint > 1.0 and surface.mipmaps != 2:
                    # Texture coordinates may be so steep that single precision has no number for it.
                    detail = 0.5 * wp.log2(wp.min(footprint, 1.0e30))
                    if surface.mipmaps == 1:
                        detail = wp.floor(detail + 0.5)
                    level = int(detail)
                    blend = detail - float(level)
                    if level >= surface.num_levels - 1:
                        level = surface.num_levels - 1
                        blend = 0.0
                level = level + surface.first_level
                color = _sample_level(data.texels, data.levels[level], s, t, surface, nearest)
                if blend > 0.0:
                    coarser = _sample_level(data.texels, data.levels[level + 1], s, t, surface, nearest)
                    color = color + blend * (coarser - color)
            if surface.is_tinted != 0:
                color = wp.cw_mul(color, surface.color)
            if data.tints.shape[0] > 0:
                tint = data.tints[index]
                color = wp.vec3(
                    color[0] * wp.max(tint.color[0] + wp.dot(tint.red_gradient, offset), 0.0),
                    color[1] * wp.max(tint.color[1] + wp.dot(tint.green_gradient, offset), 0.0),
                    color[2] * wp.max(tint.color[2] + wp.dot(tint.blue_gradient, offset), 0.0),
                )
        # Factors and vertex colours may exceed 1.
        rgb[3 * pixel] = wp.uint8(wp.min(color[0], 255.0) + 0.5)
        rgb[3 * pixel + 1] = wp.uint8(wp.min(color[1], 255.0) + 0.5)
        rgb[3 * pixel + 2] = wp.uint8(wp.min(color[2], 255.0) + 0.5)


@wp.func
def _gradient(first: float, second: float, third: float, over: wp.vec3, up: wp.vec3) -> wp.vec3:
    """Direction and rate in which a value given at the three corners of a triangle grows along it."""
    return (second - first) * over + (third - first) * up


@wp.kernel
def prepare_faces(
    order: wp.array(dtype=wp.int32),
    vertices: wp.array(dtype=wp.vec3),
    triangles: wp.array2d(dtype=wp.int32),
    uvs: wp.array(dtype=wp.vec2),
    colors: wp.array(dtype=wp.vec4),
    surface_ids: wp.array(dtype=wp.int32),
    instance_ids: wp.array(dtype=wp.int32),
    corners: wp.array(dtype=wp.vec3),
    faces: wp.array(dtype=Face),
    tints: wp.array(dtype=Tint),
) -> None:
    """Lays out what rendering needs of each triangle, in the order of the tree's leaves."""
    index = wp.tid()
    triangle = order[index]
    i = triangles[triangle, 0]
    j = triangles[triangle, 1]
    k = triangles[triangle, 2]
    a = vertices[i]
    over = vertices[j] - a
    up = vertices[k] - a
    corners[3 * index] = a
    corners[3 * index + 1] = vertices[j]
    corners[3 * index + 2] = vertices[k]
    normal = wp.cross(over, up)
    length_squared = wp.dot(normal, normal)
    over_dual = wp.vec3()
    up_dual = wp.vec3()
    if length_squared > 0.0:
        over_dual = wp.cross(up, normal) / length_squared
        up_dual = wp.cross(normal, over) / length_squared
    face = Face()
    face.anchor = a
    face.normal = wp.normalize(normal)
    face.uv = uvs[i]
    face.u_gradient = _gradient(uvs[i][0], uvs[j][0], uvs[k][0], over_dual, up_dual)
    face.v_gradient = _gradient(uvs[i][1], uvs[j][1], uvs[k][1], over_dual, up_dual)
    face.surface = surface_ids[triangle]
    face.instance = instance_ids[triangle]
    faces[index] = face
    if tints.shape[0] > 0:
        p = colors[i]
        q = colors[j]
        r = colors[k]
        tint = Tint()
        tint.color = wp.vec3(p[0], p[1], p[2])
        tint.red_gradient = _gradient(p[0], q[0], r[0], over_dual, up_dual)
        tint.green_gradient = _gradient(p[1], q[1], r[1], over_dual, up_dual)
        tint.blue_gradient = _gradient(p[2], q[2], r[2], over_dual, up_dual)
        tints[index] = tint
