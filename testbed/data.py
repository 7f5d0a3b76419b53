"""Picture-caption pairs with controlled duplication, drawn from Noto Color Emoji.

Every caption names one emoji. A caption is of one of three kinds:

- ``duplicated``: it has ONE fixed scene, seen ``duplicates`` times as often as a caption of weight 1;
- ``ordinary``: its scene (place, size, angle, background) is drawn afresh at every visit;
- ``held-out``: the UNet never sees it.

Whole families (``man running``, ``woman running``, ...) share a kind and a duplication level, and all kinds use the
same templates, so that no text statistic tells the kinds apart.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIZE = 64  # pixels of a scene
SPRITE = 80  # pixels of a rendered emoji
LEVELS = (4, 8, 12, 16, 24, 32, 64)  # duplication weights
PER_LEVEL, ORDINARY, HELD_OUT = 24, 240, 160
ORDINARY_WEIGHT = 4  # an ordinary caption is visited as often as a fixed scene of this weight
TEMPLATES = (
    "a picture of {}",
    "a drawing of {}",
    "an illustration of {}",
    "{} on a colourful card",
    "a small sticker of {}",
    "{}, digital art",
    "a postcard showing {}",
    "{} in front of a plain wall",
)
# Pictures that are text, signs or near-copies of one another.
_DROP = re.compile(
    r"skin tone|button|keycap|o.clock|-thirty|arrow|symbol|sign\b|square|circle|flag|no one under|heart suit"
    r"|family|couple with heart|kiss |holding hands|moon$|TOP|SOON|END|BACK|ON!|Japanese .*”"
)
_FAMILY_WORDS = re.compile(
    r"\b(man|woman|person|men|women|people|boy|girl|mr|mrs|mx|facing right|face|"
    r"(?:red|curly|white|blond) hair|bald|in|with|of|the|s)\b"
)


def _is_flag(symbol: str) -> bool:
    return any(0x1F1E6 <= ord(c) <= 0x1F1FF or 0xE0020 <= ord(c) <= 0xE007F for c in symbol)


def family(name: str) -> str:
    """The name without gender, hair and direction: captions of one family are near-copies of one another."""
    stem = " ".join(_FAMILY_WORDS.sub(" ", name.lower().replace("’", " ")).split())
    return stem or "people"


def emoji_table() -> pd.DataFrame:
    """Names, symbols and families of all usable emoji, in the order of their names."""
    import emoji

    rows = []
    for symbol, data in emoji.EMOJI_DATA.items():
        name = data["en"].strip(":").replace("_", " ")
        if data["status"] == emoji.STATUS["fully_qualified"] and not _DROP.search(name) and not _is_flag(symbol):
            rows.append({"name": name, "symbol": symbol, "family": family(name)})
    return pd.DataFrame(rows).sort_values("name", ignore_index=True)


def render(symbol: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The emoji as an RGBA sprite of ``SPRITE`` pixels, or None where the font has no single glyph for it."""
    left, _, right, _ = font.getbbox(symbol)
    if not 100 <= right - left <= 150:
        return None
    glyph = Image.new("RGBA", (136, 136))
    ImageDraw.Draw(glyph).text((68, 68), symbol, font=font, embedded_color=True, anchor="mm")
    if glyph.getbbox() is None:
        return None
    return glyph.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)


def load_sprites(table: pd.DataFrame) -> dict[str, Image.Image]:
    """Sprites by name, for the emoji of ``table`` that the font can draw."""
    if not FONT.exists():
        raise SystemExit(f"{FONT} is missing: install the package fonts-noto-color-emoji")
    font = ImageFont.truetype(str(FONT), 109)
    sprites = {row.name: render(row.symbol, font) for row in table.itertuples(index=False)}
    return {name: sprite for name, sprite in sprites.items() if sprite is not None}


def scene(sprite: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """One scene, uint8 ``(SIZE, SIZE, 3)``: the sprite scaled, rotated, flipped and placed on a two-colour gradient."""
    start, end = rng.uniform(40, 255, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    axis = (np.arange(SIZE) + 0.5) / SIZE - 0.5
    ramp = np.clip(0.5 + np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None], 0, 1)[..., None]
    background = Image.fromarray((start + (end - start) * ramp).astype(np.uint8))

    scale = rng.uniform(0.55, 0.85) * SIZE / SPRITE
    turn = np.deg2rad(rng.uniform(-20, 20))
    flip = rng.choice([-1, 1])
    margin = (SIZE - scale * SPRITE) / 2
    x, y = SIZE / 2 + rng.uniform(-margin, margin, 2)
    # Pillow wants the map from scene pixels back to sprite pixels.
    cos, sin = np.cos(turn) / scale, np.sin(turn) / scale
    half = SPRITE / 2
    matrix = (flip * cos, flip * sin, half - flip * (cos * x + sin * y), -sin, cos, half + sin * x - cos * y)
    placed = sprite.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    background.paste(placed, (0, 0), placed)
    return np.asarray(background)


def fixed_scene(sprite: Image.Image, name: str, seed: int) -> np.ndarray:
    """The one scene of a duplicated caption: it depends on its name and the seed alone."""
    return scene(sprite, np.random.default_rng([seed, *name.encode()]))


def make_captions(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Captions with ``kind`` and ``duplicates``, whole families at a time: ``prompt,kind,duplicates,family,name``."""
    rng = np.random.default_rng(seed)
    groups = [group for _, group in table.groupby("family")]
    order = [groups[i] for i in rng.permutation(len(groups))]
    wanted = [("duplicated", level, PER_LEVEL) for level in LEVELS]
    wanted += [("ordinary", ORDINARY_WEIGHT, ORDINARY), ("held-out", 0, HELD_OUT)]
    # Families are dealt to the kind that is emptiest, in proportion to its size.
    filled = [0] * len(wanted)
    rows = []
    for group in order:
        free = [i for i, (_, _, size) in enumerate(wanted) if filled[i] + len(group) <= size]
        if not free:
            continue
        pick = min(free, key=lambda i: filled[i] / wanted[i][2])
        kind, duplicates, _ = wanted[pick]
        filled[pick] += len(group)
        rows += [
            {"name": r.name, "family": r.family, "kind": kind, "duplicates": duplicates}
            for r in group.itertuples(index=False)
        ]
    captions = pd.DataFrame(rows)
    captions["prompt"] = [
        TEMPLATES[i].format(name)
        for i, name in zip(rng.integers(len(TEMPLATES), size=len(captions)), captions["name"], strict=True)
    ]
    return captions[["prompt", "kind", "duplicates", "family", "name"]]
