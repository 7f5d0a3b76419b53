"""Composed scenes of 64x64 pixels: an object on a coloured, patterned background.

A scene is a row of numbers, :data:`FIELDS`: what its caption names (object, colour, pattern) and what a caption leaves
open (place, size, light; phase, angle, period, shades, grain). Scenes are drawn in batches, on any device; the same row
gives the same picture, to a level of one of its bytes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

HERE = Path(__file__).parent
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
ATLAS = HERE / "objects.png"  # the objects as FONT draws them, ten to a row
SIZE = 64  # pixels of a scene
SPRITE = 64  # pixels of an object in the atlas
TILE = 256  # pixels of the noise from which textures and grain are cut

OBJECTS = {
    "apple": "🍎", "banana": "🍌", "watermelon": "🍉", "strawberry": "🍓", "pineapple": "🍍", "carrot": "🥕",
    "mushroom": "🍄", "pizza": "🍕", "hamburger": "🍔", "doughnut": "🍩", "cupcake": "🧁", "pretzel": "🥨",
    "panda": "🐼", "frog": "🐸", "lion": "🦁", "pig": "🐷", "owl": "🦉", "penguin": "🐧",
    "octopus": "🐙", "turtle": "🐢", "butterfly": "🦋", "snail": "🐌", "ladybird": "🐞", "fish": "🐠",
    "bus": "🚌", "rocket": "🚀", "sailboat": "⛵", "tent": "⛺", "cactus": "🌵", "sunflower": "🌻",
    "football": "⚽", "guitar": "🎸", "drum": "🥁", "umbrella": "☔", "key": "🔑", "bell": "🔔",
    "crown": "👑", "robot": "🤖", "ghost": "👻", "camera": "📷",
}  # fmt: skip
COLOURS = {
    "red": (220, 45, 45), "orange": (245, 145, 30), "yellow": (240, 220, 60), "green": (60, 170, 60),
    "teal": (25, 165, 165), "blue": (55, 90, 225), "purple": (140, 60, 195), "pink": (250, 135, 195),
    "brown": (125, 80, 45), "grey": (140, 140, 140),
}  # fmt: skip
PATTERNS = ("stripes", "dots", "checks", "waves", "bricks", "plaid", "rings", "sand", "grass", "fog")

NAMED = ("object", "colour", "pattern")
OF_OBJECT = ("x", "y", "scale", "shade", "light", "light_angle")
OF_BACKGROUND = ("phase_u", "phase_v", "angle", "period", "bright", "dark", "tile_u", "tile_v")
FIELDS = (*NAMED, *OF_OBJECT, *OF_BACKGROUND)
PLACE = {name: i for i, name in enumerate(FIELDS)}
OBJECT_COLUMNS = [PLACE[name] for name in OF_OBJECT]
BACKGROUND_COLUMNS = [PLACE[name] for name in OF_BACKGROUND]

SCALE = (0.5, 0.72)  # side of an object, as a share of the scene's
GRAIN = 3.0  # standard deviation, of 255


def render_atlas() -> None:
    """Draw ``objects.png`` with Noto Color Emoji (Debian: fonts-noto-color-emoji)."""
    font = ImageFont.truetype(str(FONT), 109)
    atlas = Image.new("RGBA", (10 * SPRITE, -(-len(OBJECTS) // 10) * SPRITE))
    for i, symbol in enumerate(OBJECTS.values()):
        glyph = Image.new("RGBA", (136, 136))
        ImageDraw.Draw(glyph).text((68, 68), symbol, font=font, embedded_color=True, anchor="mm")
        glyph = glyph.crop(glyph.getbbox())
        side = max(glyph.size)
        square = Image.new("RGBA", (side, side))
        square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
        atlas.paste(square.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS), (i % 10 * SPRITE, i // 10 * SPRITE))
    atlas.save(ATLAS, optimize=True)


@cache
def sprites(device: torch.device) -> Tensor:
    """The objects, ``(objects, 4, SPRITE, SPRITE)`` in [0, 1], colours multiplied by the alpha channel."""
    atlas = np.asarray(Image.open(ATLAS).convert("RGBA"), dtype=np.float32) / 255
    rows, columns = (side // SPRITE for side in atlas.shape[:2])
    cells = atlas.reshape(rows, SPRITE, columns, SPRITE, 4).transpose(0, 2, 4, 1, 3).reshape(-1, 4, SPRITE, SPRITE)
    cells = torch.from_numpy(np.ascontiguousarray(cells[: len(OBJECTS)]))
    return torch.cat([cells[:, :3] * cells[:, 3:], cells[:, 3:]], dim=1).to(device)


@cache
def tile(device: torch.device) -> Tensor:
    """Standard normal noise ``(TILE, TILE)``, the same everywhere."""
    return torch.from_numpy(np.random.default_rng(7).standard_normal((TILE, TILE)).astype(np.float32)).to(device)


def random_scenes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Rows ``(count, fields)`` with every field drawn at random."""
    rows = np.empty((count, len(FIELDS)))
    for column, size in zip(NAMED, (len(OBJECTS), len(COLOURS), len(PATTERNS)), strict=True):
        rows[:, PLACE[column]] = rng.integers(size, size=count)
    low = dict.fromkeys(FIELDS[3:], 0.0) | {"scale": SCALE[0], "shade": 0.8, "light": 0.05, "angle": -0.4,
                                            "period": 9.0, "bright": 0.05, "dark": 0.55}  # fmt: skip
    high = dict.fromkeys(FIELDS[3:], 1.0) | {"scale": SCALE[1], "shade": 1.05, "light": 0.3, "angle": 0.4,
                                             "period": 14.0, "bright": 0.3, "dark": 0.75}  # fmt: skip
    for column in FIELDS[3:]:
        rows[:, PLACE[column]] = rng.uniform(low[column], high[column], count)
    return rows


def _smooth(values: Tensor, width: float) -> Tensor:
    """A step at 0 that is ``width`` wide, from 0 to 1."""
    return (values / width + 0.5).clamp(0, 1)


def _noise(u: Tensor, v: Tensor) -> Tensor:
    """The noise tile at any places, repeated for ever, bilinear."""
    source = tile(u.device)
    left, top = u.floor(), v.floor()
    across, down = u - left, v - top
    x0, y0 = left.long() % TILE, top.long() % TILE
    x1, y1 = (x0 + 1) % TILE, (y0 + 1) % TILE
    upper = source[y0, x0].lerp(source[y0, x1], across)
    return upper.lerp(source[y1, x0].lerp(source[y1, x1], across), down)


def _pattern(name: str, x: Tensor, y: Tensor, row: dict[str, Tensor]) -> Tensor:
    """Between 0 (the dark shade) and 1 (the bright one), ``(n, SIZE, SIZE)``."""
    period = row["period"]
    u = (x * row["angle"].cos() + y * row["angle"].sin()) / period + row["phase_u"]
    v = (y * row["angle"].cos() - x * row["angle"].sin()) / period + row["phase_v"]
    tau, edge = 2 * torch.pi, 0.12
    tile_u, tile_v = row["tile_u"] * TILE, row["tile_v"] * TILE

    def band(w: Tensor, share: float) -> Tensor:
        """1 on a ``share`` of each period of w."""
        return _smooth((w - w.floor() - 0.5).abs().neg() + share / 2, edge)

    match name:
        case "stripes":
            return band(u, 0.5)
        case "dots":
            return _smooth(0.3 - ((u - u.floor() - 0.5).square() + (v - v.floor() - 0.5).square()).sqrt(), edge)
        case "checks":
            return _smooth((tau * u / 2).sin() * (tau * v / 2).sin(), 0.35)
        case "waves":
            return band(v + 0.28 * (tau * u / 2).sin(), 0.5)
        case "bricks":
            w = 0.5 * u + 0.25 * (v.floor() % 2)
            return torch.minimum(band(v + 0.5, 0.8), band(w + 0.5, 0.9))
        case "plaid":
            return 0.45 * band(u, 0.5) + 0.3 * band(v, 0.5) + 0.25 * band(2 * v + 0.3, 0.25)
        case "rings":
            radius = ((x - SIZE * row["phase_u"]).square() + (y - SIZE * row["phase_v"]).square()).sqrt()
            return band(radius / period, 0.5)
        case "sand":
            return 0.5 + 0.24 * _noise(x / 1.7 + tile_u, y / 1.7 + tile_v)
        case "grass":
            leaning = x + y * row["angle"]
            return 0.5 + 0.3 * _noise(leaning / 1.8 + tile_u, y / 9 + tile_v)
        case "fog":
            coarse = _noise(x / (1.3 * period) + tile_u, y / (1.3 * period) + tile_v)
            return 0.5 + 0.26 * coarse + 0.12 * _noise(x / 5 + tile_v, y / 5 + tile_u)
    raise ValueError(f"no pattern {name!r}")


def _background(row: dict[str, Tensor], grid: Tensor) -> Tensor:
    """``(n, 3, SIZE, SIZE)`` in [0, 255]."""
    y, x = grid[:, None], grid[None, :]
    value = torch.empty(len(row["pattern"]), SIZE, SIZE, device=grid.device)
    for i, name in enumerate(PATTERNS):
        chosen = (row["pattern"].flatten() == i).nonzero()[:, 0]
        if len(chosen):
            value[chosen] = _pattern(name, x, y, {key: column[chosen] for key, column in row.items()}).clamp(0, 1)
    base = torch.tensor(list(COLOURS.values()), device=grid.device, dtype=torch.float32)
    base = base[row["colour"].flatten().long()][..., None, None]
    bright, dark = (row[name][:, None] for name in ("bright", "dark"))
    return (dark * base).lerp(base + bright * (255 - base), value[:, None])


def _object(row: dict[str, Tensor], grid: Tensor) -> tuple[Tensor, Tensor]:
    """Colours times alpha ``(n, 3, SIZE, SIZE)`` in [0, 255], and alpha ``(n, 1, SIZE, SIZE)``."""
    scale = row["scale"].flatten()
    room = (1 - scale) * (1 - 2 / SIZE)  # an object keeps a pixel's distance from the edges
    centre = [(2 * row[name].flatten() - 1) * room for name in ("x", "y")]
    theta = torch.zeros(len(scale), 2, 3, device=grid.device)
    for i in range(2):
        theta[:, i, i] = 1 / scale
        theta[:, i, 2] = -centre[i] / scale
    places = affine_grid(theta, [len(scale), 4, SIZE, SIZE], align_corners=False)
    sprite = sprites(grid.device)[row["object"].flatten().long()]
    drawn = grid_sample(sprite, places, mode="bilinear", align_corners=False)
    turn = 2 * torch.pi * row["light_angle"]
    ramp = places[..., 0] * turn.cos() + places[..., 1] * turn.sin()  # -1 to 1 across the object
    colours = drawn[:, :3] * (row["shade"] * (1 + row["light"] * ramp))[:, None]
    return colours.clamp(max=1) * 255, drawn[:, 3:]


@torch.no_grad()
def draw(rows: np.ndarray | Tensor, device: torch.device | str = "cpu", *, objects: bool = True) -> Tensor:
    """Pictures, uint8 ``(n, 3, SIZE, SIZE)``, of scene rows ``(n, fields)``; without ``objects``, of backgrounds."""
    rows = torch.as_tensor(np.asarray(rows), dtype=torch.float32).to(device)
    row = {name: rows[:, i, None, None] for name, i in PLACE.items()}
    grid = torch.arange(SIZE, device=rows.device, dtype=torch.float32)
    picture = _background(row, grid)
    if objects:
        colours, alpha = _object(row, grid)
        picture = picture * (1 - alpha) + colours
    at_u = (row["tile_u"] * TILE).floor() + grid[None, :] + 0 * grid[:, None]
    at_v = (row["tile_v"] * TILE).floor() + grid[:, None] + 0 * grid[None, :]
    picture = picture + GRAIN * tile(rows.device)[at_v.long() % TILE, at_u.long() % TILE][:, None]
    return picture.round().clamp(0, 255).byte()


@torch.no_grad()
def object_alpha(rows: np.ndarray | Tensor) -> Tensor:
    """How much of each pixel the object covers, ``(n, SIZE, SIZE)`` in [0, 1]."""
    rows = torch.as_tensor(np.asarray(rows), dtype=torch.float32)
    row = {name: rows[:, i, None, None] for name, i in PLACE.items()}
    return _object(row, torch.arange(SIZE, dtype=torch.float32))[1][:, 0]
