"""More training images than are shipped: a part of build_starter.py that is built on demand.

    python build_starter.py --work WORKDIR --out OUTDIR --only images_extra

The emoji of the training data, as drawn by three fonts in one colour, and each training image once more as it may look elsewhere:
smaller, off centre, slightly rotated, on a colour or a gradient, and single-colour drawings in another colour. The names are those of
the shipped images; nothing of a held-out name, of Twemoji or of Lucide is included.
"""
import collections
import functools
import io
import json
import multiprocessing
import os
import random
import tarfile
from pathlib import Path

import numpy as np
from build_drawings import NPM as DRAWN
from build_drawings import UNSEEN_SET, icons_of
from build_starter import (
    MORE_STYLES,
    SEED,
    TRAIN_STYLES,
    UNSEEN_STYLE,
    icon_of_codepoint,
    load_emoji,
    merge_same_picture,
    name_tables,
    on_white,
    rmse,
    small,
    stored_pixels,
    strip_fe0f,
    svgs_of,
    write_shards,
)
from build_starter import NPM as EMOJI

FONT = "@expo-google-fonts/noto-emoji@0.4.7"
NPM = {**EMOJI, **{name: spec for name, spec in DRAWN.items() if name != UNSEEN_SET}, "noto-emoji-font": FONT}
DEB = ["fonts-symbola", "fonts-unifont"]
FONTS = {  # the weights of a font are variants of one style
    "noto-emoji-font": [f"npm/noto-emoji-font/{weight}/NotoEmoji_{weight}.ttf" for weight in ("300Light", "400Regular", "700Bold")],
    "symbola": ["deb/fonts-symbola/usr/share/fonts/truetype/ancient-scripts/Symbola_hint.ttf"],
    "unifont": ["deb/fonts-unifont/usr/share/fonts/opentype/unifont/unifont_upper.otf"]}
ONE_COLOUR = {*FONTS, "emojione-monotone", "fluent-emoji-high-contrast", "game-icons", "mdi", "ph", "tabler"}
SHIPPED = Path(__file__).parent / "starter"
SIZE, FINE, PER_SHARD = 64, 128, 4000


def known_pictures(out):
    """{(style, codepoint): metadata} of all training images, built before this part or shipped next to this file."""
    known = {}
    for pattern in ("images-train-*", "images-more-*", "images-drawings-train-*"):
        for path in sorted(out.glob(pattern)) or sorted(SHIPPED.glob(pattern)):
            with tarfile.open(path) as tar:
                metas = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith("json")]
            known.update({(meta["style"], meta["codepoint"]): meta for meta in metas})
    return known


@functools.lru_cache(4)
def open_font(path):
    from PIL import ImageFont
    return ImageFont.truetype(str(path), 16 if "unifont" in path.name else 100)  # Unifont is designed on a 16 x 16 grid


def glyph(path, character):
    """The glyph of a character, black on transparent, FINE pixels square; None if the font has none."""
    from PIL import Image, ImageDraw
    font = open_font(path)
    mask = font.getmask(character)
    if not mask.size[0] or not mask.size[1] or bytes(mask) == bytes(font.getmask("\U0010fffd")):
        return None
    left, top, right, bottom = font.getbbox(character)
    side = max(right - left, bottom - top)
    drawn = Image.new("L", (side, side))
    ImageDraw.Draw(drawn).text(((side - right + left) // 2 - left, (side - bottom + top) // 2 - top), character, 255, font)
    drawn = drawn.resize((FINE, FINE), Image.NEAREST if font.size == 16 else Image.LANCZOS)
    image = Image.new("RGBA", (FINE, FINE))
    image.putalpha(drawn)
    return image


def open_drawn(source):
    """SVG, or the path of an image -> RGBA, FINE pixels square"""
    from PIL import Image
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, Path):
        image = Image.open(source).convert("RGBA")
    else:
        import resvg_py
        png = resvg_py.svg_to_bytes(svg_string=source, width=FINE, height=FINE, skip_system_fonts=True)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    square = Image.new("RGBA", (max(image.size),) * 2)
    square.alpha_composite(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square.resize((FINE, FINE), Image.LANCZOS)


def luminance(colour):
    return float(np.dot(colour, (0.299, 0.587, 0.114)))


def background(rng):
    """(FINE, FINE, 3) in 0..255: white, a light colour, any colour, or a gradient between two."""
    def colour(light):
        return rng.uniform(150 if light else 0, 255, 3)
    kind = rng.choice(["white", "light", "any", "gradient"], p=[0.15, 0.4, 0.25, 0.2])
    if kind == "gradient":
        angle, light = rng.uniform(0, 2 * np.pi), rng.random() < 0.7
        at = np.linspace(-0.5, 0.5, FINE)
        share = np.clip(0.5 + np.cos(angle) * at[None] + np.sin(angle) * at[:, None], 0, 1)[..., None]
        return share * colour(light) + (1 - share) * colour(light)
    return np.broadcast_to(np.full(3, 255.0) if kind == "white" else colour(kind == "light"), (FINE, FINE, 3))


def varied(image, one_colour, rng):
    """RGBA, FINE pixels square -> RGB, SIZE pixels square: the thing at a random place on a background."""
    from PIL import Image
    behind = background(rng)
    if one_colour:                                         # in a colour that stands out from the background
        mean = behind.mean((0, 1))
        ink = rng.uniform(0, 255, 3) if rng.random() < 0.6 else np.zeros(3)
        while abs(luminance(ink) - luminance(mean)) < 90:
            ink = rng.uniform(0, 255, 3)
        drawn = Image.new("RGBA", image.size, tuple(int(part) for part in ink))
        drawn.putalpha(image.getchannel("A"))
        image = drawn
    scale, angle = rng.uniform(0.45, 1.0), np.deg2rad(rng.uniform(-12, 12) if rng.random() < 0.5 else 0)
    room = (1 - scale) * FINE / 2                          # it stays inside, except for rotated corners
    x, y = FINE / 2 + rng.uniform(-room, room, 2)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    centre = FINE / 2
    image = image.transform(image.size, Image.AFFINE, (
        cos, sin, centre - cos * x - sin * y, -sin, cos, centre + sin * x - cos * y), Image.BICUBIC)
    canvas = Image.fromarray(behind.astype(np.uint8)).convert("RGBA")
    canvas.alpha_composite(image)
    pixels = np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.LANCZOS), float)
    if rng.random() < 0.3:
        pixels = 255 * (pixels / 255) ** rng.uniform(0.7, 1.4)
    if rng.random() < 0.2:
        pixels = pixels + rng.normal(0, rng.uniform(2, 8), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def webp(image):
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75, method=6)
    return buffer.getvalue()


def draw(task):
    """(style, codepoint, source) -> (plain image if from a font, else None; varied image as WebP), or None without a glyph."""
    style, code, source = task
    rng = np.random.default_rng(random.Random(f"{SEED} extra {style} {code}").getrandbits(64))
    if style in FONTS:
        weights = [image for path in source if (image := glyph(path, chr(int(code, 16)))) is not None]
        if not weights:
            return None
        plain, source = on_white(weights[len(weights) // 2]), weights[rng.integers(len(weights))]
    image = varied(open_drawn(source), style in ONE_COLOUR, rng)
    return (plain if style in FONTS else None), webp(image)


def codes_of_fonts(known):
    """Emoji of a single codepoint among the training images."""
    return {code for style, code in known if style in TRAIN_STYLES and "-" not in code}


def sources_of(work, known):
    """({(style, codepoint): source for `draw`}, {codepoint: names})"""
    emoji = load_emoji(work)
    tables = name_tables(work, emoji)
    sources = {}
    for style in {style: None for style, _ in known}:
        folder = work / "npm" / style
        if style == "fluent-emoji-3d":
            found = {strip_fe0f(path.stem): path for path in sorted((folder / "assets").glob("*.webp"))}
        elif style in TRAIN_STYLES + MORE_STYLES:
            found = svgs_of(folder, icon_of_codepoint(folder, emoji, tables))
        else:
            # As in build_drawings: held-out emoji are not searched for, so that no alias can match one.
            found = svgs_of(folder, icons_of(folder, {code: e for code, e in emoji.items() if (style, code) in known}, tables))
        sources.update({(style, code): source for code, source in found.items() if (style, code) in known})
    for style, paths in FONTS.items():
        sources.update({(style, code): [work / path for path in paths] for code in sorted(codes_of_fonts(known))})
    return sources, emoji


def build_images_extra(work, out):
    known = known_pictures(out)
    assert not {UNSEEN_STYLE, UNSEEN_SET} & {style for style, _ in known}
    sources, emoji = sources_of(work, known)
    with multiprocessing.Pool(os.cpu_count()) as pool:
        drawn = dict(zip(sources, pool.map(draw, [(*name, source) for name, source in sources.items()], chunksize=100)))
    shards = sorted(out.glob("images-*test*.tar.gz")) or sorted(SHIPPED.glob("images-*test*.tar.gz"))
    held_out = np.stack([pixels for path in shards for pixels in stored_pixels(path)])
    samples, dropped = [], 0
    for style in FONTS:
        plain = {code: pictures[0] for (s, code), pictures in drawn.items() if s == style and pictures}
        also = merge_same_picture(plain, emoji)            # removes images that look alike from `plain`
        near = rmse(np.stack([small(image) for image in plain.values()]), held_out).min(1) < 0.02
        dropped += int(near.sum())
        for code, image in (item for item, too_near in zip(plain.items(), near) if not too_near):
            e = emoji[code]
            meta = {"caption": e["caption"], "tags": e["tags"], "style": style, "group": e["group"], "subgroup": e["subgroup"],
                    "codepoint": code, **({"also": [emoji[c]["caption"] for c in also[code]]} if also[code] else {})}
            samples.append((f"extra-{style}-{code}", "webp", webp(image), meta))
            samples.append((f"extra-{style}-{code}-varied", "webp", drawn[style, code][1], {**meta, "varied": True}))
    for (style, code), (_, picture) in ((name, pictures) for name, pictures in drawn.items() if name[0] not in FONTS):
        meta = {key: value for key, value in known[style, code].items() if key != "description"}
        samples.append((f"extra-{style}-{code}-varied", "webp", picture, {**meta, "varied": True}))
    random.Random(SEED).shuffle(samples)
    return {"files": write_shards(out, "images-extra", samples, PER_SHARD), "dropped_near_duplicates": dropped,
            "per_style": collections.Counter(sample[3]["style"] for sample in samples)}
