"""Generated textures: small tiling pictures of wood, stone, cloth and paint.

Only sums, products and table look-ups of generated numbers are used, no transforms whose last bits differ
between machines, so that a seed gives the same pixels everywhere. Every function returns (size, size, 3)
uint8.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np

Rgb = tuple[float, float, float]
"""A colour, 0 to 1."""
Texture = Callable[[np.random.Generator, Rgb], np.ndarray]

_SIZE = 128


def hsv(hue: float, saturation: float, value: float) -> Rgb:
    """A colour from hue (turns, any number), saturation and value (0 to 1)."""
    return colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))


def _noise(rng: np.random.Generator, size: int, rows: int, columns: int | None = None) -> np.ndarray:
    """Smooth tiling noise (size, size) in 0..1, with ``rows`` x ``columns`` random knots."""
    columns = columns or rows
    knots = rng.random((rows, columns))

    def weights(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.arange(size) * (count / size)
        low = at.astype(int) % count
        t = at - np.floor(at)
        return low, (low + 1) % count, t * t * (3 - 2 * t)

    r0, r1, tr = weights(rows)
    c0, c1, tc = weights(columns)
    top = knots[r0][:, c0] * (1 - tc) + knots[r0][:, c1] * tc
    bottom = knots[r1][:, c0] * (1 - tc) + knots[r1][:, c1] * tc
    return top * (1 - tr[:, None]) + bottom * tr[:, None]


def _paint(colour: Rgb, level: np.ndarray) -> np.ndarray:
    """A colour times a brightness map (H, W), as pixels."""
    return np.clip(np.asarray(colour) * level[..., None] * 255.0 + 0.5, 0, 255).astype(np.uint8)


def _mix(a: Rgb, b: Rgb, weight: np.ndarray, level: np.ndarray | float = 1.0) -> np.ndarray:
    """Two colours blended by a map (H, W), times a brightness."""
    w = weight[..., None]
    both = np.asarray(a) * (1 - w) + np.asarray(b) * w
    return np.clip(both * np.asarray(level)[..., None] * 255.0 + 0.5, 0, 255).astype(np.uint8)


def _shift(colour: Rgb, value: float, saturation: float = 1.0) -> Rgb:
    h, s, v = colorsys.rgb_to_hsv(*colour)
    return hsv(h, s * saturation, v * value)


def plaster(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Painted wall with faint blotches."""
    level = 0.94 + 0.06 * (0.6 * _noise(rng, 64, 6) + 0.4 * _noise(rng, 64, 32))
    return _paint(colour, level)


def plain(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Almost even paint, for frames, metal and plastic."""
    return _paint(colour, 0.97 + 0.03 * _noise(rng, 32, 8))


def wood(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Furniture wood: grain along u."""
    grain = (
        0.5 * _noise(rng, _SIZE, 48, 3) + 0.3 * _noise(rng, _SIZE, 16, 2) + 0.2 * _noise(rng, _SIZE, 96, 6)
    )
    return _paint(colour, 0.72 + 0.36 * grain)


def planks(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Floor boards along u, each with its own shade, offset joints and dark gaps."""
    boards = int(rng.integers(5, 9))
    level = np.zeros((_SIZE, _SIZE))
    edges = np.round(np.linspace(0, _SIZE, boards + 1)).astype(int)
    column = np.arange(_SIZE)
    for k in range(boards):
        joint = int(rng.integers(_SIZE))
        second = (column >= joint) & (column < joint + _SIZE // 2)
        second |= column + _SIZE < joint + _SIZE // 2
        shade = np.where(second, rng.uniform(0.8, 1.02), rng.uniform(0.8, 1.02))
        level[edges[k] : edges[k + 1]] = shade
        level[edges[k] : edges[k + 1], [joint, (joint + _SIZE // 2) % _SIZE]] *= 0.72
        level[edges[k]] *= 0.66
    grain = 0.6 * _noise(rng, _SIZE, 64, 4) + 0.4 * _noise(rng, _SIZE, 128, 8)
    return _paint(colour, level * (0.86 + 0.2 * grain))


def parquet(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Basket-weave parquet: squares of strips that run either way."""
    cells, strips = 4, 4
    y, x = np.divmod(np.arange(_SIZE * _SIZE), _SIZE)
    step = _SIZE // cells
    turned = ((x // step + y // step) % 2).astype(bool)
    across = np.where(turned, x % step, y % step)
    strip = across * strips // step
    shade = rng.uniform(0.78, 1.02, (cells, cells, strips))[y // step, x // step, strip]
    gap = (across % (step // strips) == 0) | (np.where(turned, y, x) % step == 0)
    level = np.where(gap, 0.7, 1.0) * shade
    return _paint(colour, level.reshape(_SIZE, _SIZE) * (0.9 + 0.12 * _noise(rng, _SIZE, 64)))


def tiles(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Square tiles with light grout, some of them a shade off."""
    count = int(rng.choice([2, 3, 4, 8]))
    step = _SIZE / count
    index = np.arange(_SIZE)
    cell = (index / step).astype(int)
    shade = rng.uniform(0.9, 1.0, (count, count))[cell][:, cell]
    line = (index % step) < max(1.0, _SIZE / 64)
    grout = line[:, None] | line[None, :]
    body = _paint(colour, shade * (0.94 + 0.08 * _noise(rng, _SIZE, 16)))
    body[grout] = _paint(_shift(colour, 0.72, 0.5), np.ones((1, 1)))[0, 0]
    return body


def checker(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Tiles of two colours in turn."""
    index = np.arange(_SIZE)
    step = _SIZE // 4
    odd = ((index[:, None] // step + index[None, :] // step) % 2).astype(float)
    line = index % step < 2
    level = np.where(line[:, None] | line[None, :], 0.8, 1.0) * (0.93 + 0.08 * _noise(rng, _SIZE, 24))
    return _mix(_shift(colour, 1.05, 0.35), _shift(colour, 0.55), odd, level)


def brick(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Brick courses with mortar."""
    rows, columns = 8, 4
    height, width = _SIZE // rows, _SIZE // columns
    y, x = np.indices((_SIZE, _SIZE))
    row = y // height
    shifted = (x + (row % 2) * (width // 2)) % _SIZE
    shade = rng.uniform(0.72, 1.05, (rows, columns))[row, shifted // width]
    mortar = (y % height < 2) | (shifted % width < 2)
    body = _paint(colour, shade * (0.85 + 0.25 * _noise(rng, _SIZE, 48)))
    grout = _paint(_shift(colour, 1.15, 0.25), 0.9 + 0.1 * _noise(rng, _SIZE, 32))
    return np.where(mortar[..., None], grout, body)


def stone(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Marble or granite: veins where two noises are equal."""
    one = 0.65 * _noise(rng, _SIZE, 5) + 0.35 * _noise(rng, _SIZE, 14)
    vein = np.clip(1 - np.abs(one - 0.5) * 14, 0, 1)
    return _paint(colour, 0.9 + 0.1 * _noise(rng, _SIZE, 64) - 0.22 * vein)


def carpet(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Short pile."""
    level = 0.78 + 0.3 * rng.random((_SIZE, _SIZE)) * (0.6 + 0.4 * _noise(rng, _SIZE, 10))
    return _paint(colour, level)


def fabric(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Cloth: a weave, now and then with stripes or checks."""
    index = np.arange(_SIZE)
    weave = 0.92 + 0.08 * ((index[:, None] // 2 + index[None, :] // 2) % 2)
    level = weave * (0.92 + 0.1 * _noise(rng, _SIZE, 40))
    kind = rng.random()
    stripe = ((index * 6 // _SIZE) % 2).astype(float)
    other = _shift(colour, 0.72) if rng.random() < 0.5 else _shift(colour, 1.2, 0.5)
    if kind < 0.5:
        return _paint(colour, level)
    pattern = np.broadcast_to(stripe, (_SIZE, _SIZE))
    return _mix(
        colour, other, pattern * (0.6 if kind < 0.75 else 0.35) + (kind >= 0.75) * 0.35 * pattern.T, level
    )


def wallpaper(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Wallpaper: stripes, dots, diamonds or leaves in a second tone."""
    index = np.arange(_SIZE)
    y, x = np.indices((_SIZE, _SIZE))
    other = _shift(colour, rng.uniform(0.72, 0.85)) if rng.random() < 0.6 else hsv(rng.random(), 0.35, 0.75)
    kind = int(rng.integers(4))
    if kind == 0:
        pattern = np.broadcast_to(((index * int(rng.choice([4, 8])) * 2 // _SIZE) % 2).astype(float), x.shape)
    else:
        step = int(rng.choice([16, 32]))
        dx = (x + (y // step % 2) * (step // 2)) % step - step / 2 + 0.5
        dy = y % step - step / 2 + 0.5
        if kind == 1:
            pattern = (dx * dx + dy * dy < (0.24 * step) ** 2).astype(float)
        elif kind == 2:
            pattern = (np.abs(np.abs(dx) + np.abs(dy) - 0.4 * step) < 0.07 * step).astype(float)
        else:
            leaf = (np.abs(dx + 0.35 * dy) < 0.12 * step) | (np.abs(dx - 0.35 * dy) < 0.12 * step)
            pattern = (leaf & (np.abs(dy) < 0.38 * step)).astype(float)
    return _mix(colour, other, 0.8 * pattern, 0.95 + 0.05 * _noise(rng, _SIZE, 12))


def panelling(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Upright boards."""
    index = np.arange(_SIZE)
    step = _SIZE // 8
    line = np.where(index % step < 2, 0.75, 1.0) * rng.uniform(0.93, 1.0, 8)[index // step]
    return _paint(colour, line[None, :] * (0.92 + 0.08 * _noise(rng, _SIZE, 4, 48)))


def rug(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """A whole rug: borders around a field with a repeated figure."""
    y, x = np.indices((_SIZE, _SIZE))
    edge = np.minimum(np.minimum(x, _SIZE - 1 - x), np.minimum(y, _SIZE - 1 - y))
    second, third = hsv(rng.random(), 0.45, 0.8), _shift(colour, 0.5)
    step = int(rng.choice([16, 20, 32]))
    dx, dy = np.abs(x % step - step // 2), np.abs(y % step - step // 2)
    kind = int(rng.integers(3))
    figure = (
        (dx + dy < step * 0.3)
        if kind == 0
        else (np.maximum(dx, dy) < step * 0.22)
        if kind == 1
        else dy < step // 5
    )
    out = _mix(colour, second, figure.astype(float), 0.85 + 0.2 * rng.random((_SIZE, _SIZE)))
    for low, high, tone in ((0, 4, third), (4, 12, second), (12, 15, third)):
        band = (edge >= low) & (edge < high)
        out[band] = _paint(tone, 0.85 + 0.2 * rng.random((_SIZE, _SIZE)))[band]
    return out


def books(rng: np.random.Generator, _: Rgb) -> np.ndarray:
    """A row of book spines, standing on the lower edge."""
    out = np.full((_SIZE, _SIZE, 3), 38, np.uint8)
    at = 0
    while at < _SIZE:
        width = int(rng.integers(5, 13))
        top = int(rng.integers(4, 40))
        tone = hsv(rng.random(), rng.uniform(0.15, 0.75), rng.uniform(0.3, 0.9))
        spine = np.ones((_SIZE - top, min(width, _SIZE - at)))
        spine[:, 0] = 0.6
        band = int(rng.integers(8, 30))
        spine[band : band + 5] = 1.35
        out[top:, at : at + width] = _paint(tone, spine)
        at += width
    return out


def painting(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """A framed picture: a landscape, blocks of colour or circles."""
    size = 96
    y, x = np.indices((size, size)) / size
    kind = int(rng.integers(3))
    hue = float(rng.random())
    if kind == 0:
        horizon = 0.4 + 0.25 * _noise(rng, size, 2, 4)[0]
        hills = (y > horizon[None, :]).astype(float)
        out = _mix(hsv(hue, 0.35, 0.95), hsv(hue + 0.4, 0.55, 0.5), hills, 1.05 - 0.4 * y)
    elif kind == 1:
        out = _paint(hsv(hue, 0.15, 0.92), np.ones((size, size)))
        for _ in range(7):
            x0, y0 = rng.integers(0, 72, 2)
            w, h = rng.integers(14, 50, 2)
            out[y0 : y0 + h, x0 : x0 + w] = (
                np.asarray(hsv(hue + rng.uniform(-0.2, 0.6), 0.7, rng.uniform(0.4, 0.95))) * 255
            )
    else:
        out = _paint(hsv(hue, 0.3, 0.35), np.ones((size, size)))
        for _ in range(6):
            cx, cy, r = rng.uniform(0.15, 0.85), rng.uniform(0.15, 0.85), rng.uniform(0.06, 0.25)
            out[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = (
                np.asarray(hsv(hue + rng.uniform(0.1, 0.7), 0.6, 0.9)) * 255
            )
    edge = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))
    out[edge < 0.12] = 236
    out[edge < 0.055] = np.asarray(colour) * 255
    return out


def view(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """What a window looks out on: sky, clouds, houses or trees, a lawn."""
    size = _SIZE
    y, x = np.indices((size, size)) / size
    sky = hsv(0.55 + 0.05 * rng.random(), rng.uniform(0.15, 0.5), rng.uniform(0.9, 1.0))
    clouds = np.clip(1.7 * (_noise(rng, size, 5, 3) * 0.7 + _noise(rng, size, 14, 8) * 0.3) - 0.7, 0, 1)
    out = _mix(sky, (0.97, 0.97, 0.98), np.clip(clouds + 0.5 * y, 0, 1))
    ground = 0.68
    column = 0
    while column < size:
        width = int(rng.integers(10, 30))
        part = slice(column, column + width)
        if rng.random() < 0.45:
            top = int(size * rng.uniform(0.25, 0.55))
            wall = np.asarray(hsv(rng.random(), 0.25, rng.uniform(0.45, 0.8))) * 255
            out[top:, part] = wall
            for wy in range(top + 5, int(size * ground), 11):
                for wx in range(column + 3, min(column + width - 3, size), 8):
                    out[wy : wy + 5, wx : wx + 4] = wall * 0.55
        else:
            crown = rng.uniform(0.35, 0.6)
            middle = (column + width / 2) / size
            tree = (np.abs(x - middle) < width / size * 0.6) & (y > crown + 1.2 * (x - middle) ** 2 * 8)
            out[tree] = _paint(hsv(0.3, 0.5, rng.uniform(0.3, 0.5)), 0.8 + 0.4 * _noise(rng, size, 40))[tree]
        column += width
    lawn = y > ground + 0.02 * _noise(rng, size, 6)
    out[lawn] = _paint(hsv(rng.uniform(0.2, 0.33), 0.45, 0.55), 0.8 + 0.3 * _noise(rng, size, 48))[lawn]
    del colour
    return out


def leaves(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """Foliage."""
    level = 0.55 + 0.55 * (0.5 * _noise(rng, 64, 10) + 0.5 * rng.random((64, 64)))
    return _paint(colour, level)


def screen(rng: np.random.Generator, _: Rgb) -> np.ndarray:
    """A television or monitor that is off, with a faint reflection."""
    y, x = np.indices((32, 32)) / 32
    out = _paint((0.09, 0.1, 0.12), 0.9 + 1.2 * np.clip(0.25 - np.abs(x - y + rng.uniform(-0.3, 0.3)), 0, 1))
    out[[0, -1]] = out[:, [0, -1]] = 22
    return out


def mirror(rng: np.random.Generator, _: Rgb) -> np.ndarray:
    """A mirror: pale diagonal bands."""
    y, x = np.indices((64, 64)) / 64
    band = np.clip(0.2 - np.abs((x + y) % 0.5 - rng.uniform(0.15, 0.35)), 0, 1)
    return _paint((0.72, 0.8, 0.84), 0.85 + 0.9 * band)


def fronts(rng: np.random.Generator, colour: Rgb) -> np.ndarray:
    """One cupboard door or drawer with its groove and handle."""
    size = 64
    y, x = np.indices((size, size))
    edge = np.minimum(np.minimum(x, size - 1 - x), np.minimum(y, size - 1 - y))
    level = 0.92 + 0.08 * _noise(rng, size, 32, 3)
    level = np.where(edge < 2, 0.55 * level, level)
    level = np.where((edge >= 8) & (edge < 10), 0.85 * level, level)
    out = _paint(colour, level)
    out[30:34, 26:38] = 70 if rng.random() < 0.5 else 205
    return out
