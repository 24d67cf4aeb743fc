"""Geometric targets against closed forms: planes, a sphere and a cylinder, seen by the pinhole camera."""

import math

import pytest
import torch
from scipy import ndimage

from navagent.learning.geometry import (
    LAMP_HALF_LIFE,
    occlusion_edges,
    principal_curvatures,
    rays,
    reshading,
)

HEIGHT, WIDTH, HFOV = 48, 64, 80.0


def image(distance, normals):
    """Depth (1, H, W) and normals (1, H, W, 3) of what rays of unit depth meet at ``distance``."""
    hit = distance.isfinite() & (distance > 0)
    depth = torch.where(hit, distance, 0.0)
    return depth.float()[None], torch.where(hit[..., None], normals, 0.0).float()[None]


def plane(point, normal):
    ray = rays(HEIGHT, WIDTH, HFOV).double()
    normal = torch.tensor(normal, dtype=torch.float64)
    normal = normal / normal.norm()
    distance = (torch.tensor(point, dtype=torch.float64) @ normal) / (ray @ normal)
    return image(distance, normal.expand_as(ray))


def quadric(centre, radius, across, inside=False):
    """A sphere, or with one axis left out of ``across`` a cylinder along it."""
    ray = rays(HEIGHT, WIDTH, HFOV).double()
    centre = torch.tensor(centre, dtype=torch.float64)
    across = torch.tensor(across, dtype=torch.float64)
    a, b = (ray * across).square().sum(2), (ray * across) @ (centre * across)
    c = (centre * across).square().sum() - radius**2
    root = (b * b - a * c).sqrt()
    distance = ((b + root) if inside else (b - root)) / a
    normals = (distance[..., None] * ray - centre) * across / radius
    return image(distance, -normals if inside else normals)


def test_rays_leave_through_pixel_centres_of_a_pinhole_camera():
    ray = rays(2, 4, 90.0)
    assert ray[0, 0].tolist() == pytest.approx([-0.75, 0.25, -1.0])
    assert ray[1, 3].tolist() == pytest.approx([0.75, -0.25, -1.0])


def test_a_plane_is_not_curved_however_steep_the_view():
    for normal in ([0.0, 0.0, 1.0], [0.3, 0.2, 1.0], [0.0, 1.0, 0.02]):
        curvatures = principal_curvatures(*plane([0.0, -1.0, -2.0], normal), HFOV)
        defined = curvatures.isfinite()
        assert defined.float().mean() > 0.4
        assert curvatures[defined].abs().max() < 1e-3


@pytest.mark.parametrize(("inside", "sign"), [(False, 1.0), (True, -1.0)])
def test_a_sphere_is_curved_by_one_over_its_radius_in_all_directions(inside, sign):
    depth, normals = quadric([0.1, -0.2, -3.0], 0.8 if not inside else 4.0, [1, 1, 1], inside)
    curvatures = principal_curvatures(depth, normals, HFOV)
    defined = curvatures.isfinite().all(1)
    assert defined.sum() > 0.7 * (depth > 0).sum()
    expected = torch.full((), sign / (4.0 if inside else 0.8))
    torch.testing.assert_close(curvatures[:, 0][defined].median(), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(curvatures[:, 1][defined].median(), expected, rtol=1e-3, atol=0)
    assert (curvatures[:, 0][defined] - expected).abs().max() < 0.01


@pytest.mark.parametrize("across", [[1, 0, 1], [0, 1, 1]])
def test_a_cylinder_is_curved_in_one_direction_only(across):
    depth, normals = quadric([0.3, -0.1, -2.0], 0.5, across)
    curvatures = principal_curvatures(depth, normals, HFOV)
    defined = curvatures.isfinite().all(1)
    assert defined.sum() > 0.6 * (depth > 0).sum()
    first, second = curvatures[:, 0][defined], curvatures[:, 1][defined]
    assert first.median().item() == pytest.approx(2.0, rel=0.01)
    assert second.median().item() == pytest.approx(0.0, abs=0.01)
    assert (first >= second).all()


def test_curvature_is_not_defined_where_one_thing_ends_in_front_of_another():
    near, normals = plane([0.0, 0.0, -1.5], [0.0, 0.0, 1.0])
    far, _ = plane([0.0, 0.0, -3.0], [0.0, 0.0, 1.0])
    right = torch.arange(WIDTH) >= WIDTH // 2
    defined = principal_curvatures(torch.where(right, far, near), normals, HFOV).isfinite()[0, 0]
    broken = ~defined[1:-1].all(0)
    assert broken.nonzero().flatten().tolist() == [0, WIDTH // 2 - 1, WIDTH // 2, WIDTH - 1]
    assert not defined[0].any()
    assert not defined[-1].any()


def test_curvature_is_defined_in_the_corner_of_a_room():
    left, left_normals = plane([-1.0, 0.0, 0.0], [1.0, 0.0, 1.0])
    right, right_normals = plane([1.0, 0.0, 0.0], [-1.0, 0.0, 1.0])
    # Of two walls that enclose the camera, the nearer one is seen.
    distances = torch.stack((left, right)).where(torch.stack((left, right)) > 0, torch.inf)
    nearer = distances[0] <= distances[1]
    normals = torch.where(nearer[..., None], left_normals, right_normals)
    curvatures = principal_curvatures(distances.min(0).values, normals, HFOV)[0, :, 1:-1, 1:-1]
    assert curvatures.isfinite().all()
    corner = curvatures[:, :, WIDTH // 2 - 2 : WIDTH // 2]
    assert (corner[1] < -5).all()
    torch.testing.assert_close(corner[0], torch.zeros_like(corner[0]), rtol=0, atol=1e-3)


def test_pixels_beside_nothing_have_no_curvature():
    depth, normals = plane([0.0, 0.0, -2.0], [0.0, 0.0, 1.0])
    depth[0, 20, 30] = 0.0
    curvatures = principal_curvatures(depth, normals, HFOV)[0, 0]
    hole = [(20, 30), (19, 30), (21, 30), (20, 29), (20, 31)]
    missing = (~curvatures[1:-1, 1:-1].isfinite()).nonzero() + 1
    assert sorted(map(tuple, missing.tolist())) == sorted(hole)


def test_a_wall_is_as_bright_as_the_cosine_of_incidence_and_the_lamp_at_its_distance():
    depth, normals = plane([0.0, 0.0, -2.0], [0.0, 0.0, 1.0])
    bright = reshading(depth, normals, HFOV)[0]
    length = 2 * rays(HEIGHT, WIDTH, HFOV).norm(dim=2)
    torch.testing.assert_close(bright, 2 / length / (1 + (length / LAMP_HALF_LIFE) ** 2))


def test_at_its_half_life_the_lamp_is_half_as_bright_and_nothing_is_lit_from_behind():
    depth = torch.full((1, 1, 1), LAMP_HALF_LIFE)
    facing = torch.tensor([0.0, 0.0, 1.0]).expand(1, 1, 1, 3)
    assert reshading(depth, facing, HFOV).item() == pytest.approx(0.5)
    assert reshading(depth, -facing, HFOV).item() == 0.0
    slanted = torch.tensor([math.sin(1.0), 0.0, math.cos(1.0)]).expand(1, 1, 1, 3)
    assert reshading(depth, slanted, HFOV).item() == pytest.approx(0.5 * math.cos(1.0))
    assert reshading(torch.zeros(1, 1, 1), facing, HFOV).isnan().all()


def test_occlusion_edges_are_sobels_of_the_smoothed_root_of_depth():
    torch.manual_seed(0)
    depth = torch.rand(1, 20, 24) * 5 + 0.5
    smooth = ndimage.gaussian_filter(depth[0].sqrt().numpy(), 1.0, mode="constant", radius=4)
    smooth /= ndimage.gaussian_filter(torch.ones(20, 24).numpy(), 1.0, mode="constant", radius=4)
    steps = [ndimage.sobel(smooth, axis, mode="nearest") / 8 for axis in (0, 1)]
    expected = ((steps[0] ** 2 + steps[1] ** 2) / 2) ** 0.5
    torch.testing.assert_close(occlusion_edges(depth)[0], torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_an_occlusion_edge_is_where_depth_jumps_and_as_strong_as_the_jump():
    depth = torch.full((1, 16, 32), 1.0)
    depth[:, :, 16:] = 4.0
    edge = occlusion_edges(depth)[0]
    # The steepest slope of a jump by sqrt(4) - sqrt(1) under the blur and the wider Sobel kernel.
    weights = torch.exp(-torch.arange(-4.0, 5.0).square() / 2)
    weights /= weights.sum()
    expected = (weights[4] + weights[5]) / 2 / math.sqrt(2)
    torch.testing.assert_close(edge[8, 15:17], expected.expand(2))
    assert edge[:, :8].max() < 1e-6
    assert edge[:, 24:].max() < 1e-6


def test_what_was_not_hit_blurs_into_no_edge():
    depth = torch.full((1, 16, 16), 3.0)
    depth[0, 4:8, 4:8] = 0.0
    edge = occlusion_edges(depth)[0]
    assert edge[4:8, 4:8].isnan().all()
    assert edge[:, 12:].max() < 1e-5
