"""Drawings from further icon sets, in one colour or several: a part of build_starter.py.

Only names that images are trained on are used: an icon is included if its name is that of an emoji or one of ALIASES. User-interface
icons that use a name in another sense were found by inspection and are left out. One set is held out for testing.
"""
import json
import random

import numpy as np
from build_descriptions import describe
from build_starter import NPM as EMOJI
from build_starter import (
    SEED,
    encode_webp,
    icon_of_codepoint,
    load_emoji,
    merge_same_picture,
    name_tables,
    render_icons,
    rmse,
    slug,
    small,
    stored_pixels,
    write_shards,
    write_tar,
)

SETS = {"streamline-emojis": "1.2.4", "game-icons": "1.2.4", "mdi": "1.2.3", "ph": "1.2.2", "tabler": "1.2.41", "icon-park": "1.2.4",
        "lucide": "1.2.137"}
UNSEEN_SET = "lucide"
NPM = {**{name: EMOJI[name] for name in ("emojibase-data", "noto", "twemoji", "fluent-emoji-flat")},
       **{name: f"@iconify-json/{name}@{version}" for name, version in SETS.items()}}
ALIASES = {
    "bike": "bicycle", "car": "automobile", "bee": "honeybee", "lightbulb": "light bulb", "bulb": "light bulb", "phone": "telephone",
    "ladybug": "lady beetle", "headphones": "headphone", "gift": "wrapped gift", "cheese": "cheese wedge", "corn": "ear of corn",
    "flame": "fire", "atom": "atom symbol", "palette": "artist palette", "medal": "sports medal", "knife": "kitchen knife",
    "high-heel": "high-heeled shoe", "sneaker": "running shoe", "scales": "balance scale", "scale": "balance scale",
    "eyeglasses": "glasses", "paint-brush": "paintbrush", "filmstrip": "film frames", "film-strip": "film frames",
    "moon": "crescent moon", "lifebuoy": "ring buoy", "life-buoy": "ring buoy", "island": "desert island", "coffee": "hot beverage",
    "cloud-rain": "cloud with rain", "cloud-snow": "cloud with snow", "cloud-lightning": "cloud with lightning", "beer": "beer mug",
    "football": "american football", "aubergine": "eggplant", "paper-clip": "paperclip", "lips": "mouth", "hand-bag": "handbag",
    "apple": "red apple", "scooter": "kick scooter", "gem": "gem stone", "desktop": "desktop computer",
    "computer": "desktop computer",
    "lantern": "red paper lantern", "push-pin": "pushpin", "golf": "flag in hole", "milk": "glass of milk", "kayak": "canoe"}
LEFT_OUT = {  # names with another meaning in a set, or icons that do not show the thing
    "streamline-emojis": {"turkey", "map of japan", "water pistol"},
    "game-icons": {"ram", "pig face", "ribbon", "star-struck"},
    "mdi": {"red apple", "mouse", "seal", "cricket", "hospital", "school", "satellite", "ribbon", "label"},
    "ph": {"mouse", "seal", "cricket", "police car light"},
    "tabler": {"mouse", "cricket", "school", "bicycle", "curly loop", "joker", "world map", "label", "heart exclamation"},
    "icon-park": {"mouse", "seal", "anchor", "american football", "balance scale", "ring", "cook", "rock", "copyright", "compass",
                  "telephone", "fireworks", "telescope", "trumpet", "treasure chest", "handbag", "seat", "magic wand", "label"},
    "lucide": {"mouse", "bicycle", "radio", "ribbon"}}


def icons_of(folder, emoji, tables):
    """{codepoint: icon name}: all icons of an emoji set; of other sets, those with exactly the name of an emoji or an alias of it."""
    emoji = {code: e for code, e in emoji.items() if e["caption"] not in LEFT_OUT[folder.name]}
    if folder.name == "streamline-emojis":
        return {code: name for code, name in icon_of_codepoint(folder, emoji, tables).items() if code in emoji}
    names, found = json.loads((folder / "icons.json").read_text())["icons"].keys(), {}
    for code, e in emoji.items():
        wanted = [slug(e["caption"]), *(alias for alias, name in ALIASES.items() if name == e["caption"])]
        wanted = [f"{name}{end}" for end in ("", "-one") for name in wanted] if folder.name == "icon-park" else wanted
        if icon := next((name for name in wanted if name in names), None):
            found[code] = icon
    return found


def build_drawings(work, out):
    unseen = set(json.loads((out / "manifest.json").read_text())["images"]["unseen_emoji"])
    emoji = {code: e for code, e in load_emoji(work).items() if e["caption"] not in unseen}
    tables = name_tables(work, emoji)
    held_out = np.stack([pixels for path in sorted(out.glob("images-test-*.tar.gz")) for pixels in stored_pixels(path)])
    train, test, per_style, dropped = [], [], {}, 0
    for style in SETS:
        images = render_icons(work / "npm" / style, icons_of(work / "npm" / style, emoji, tables))
        images = {code: image for code, image in images.items() if np.asarray(image).std() >= 3}
        also = merge_same_picture(images, emoji)
        near = rmse(np.stack([small(image) for image in images.values()]), held_out).min(1) < 0.02
        dropped += int(near.sum())
        for (code, image), too_near in zip(images.items(), near):
            if not too_near:
                e = emoji[code]
                meta = {"caption": e["caption"], "tags": e["tags"], "style": style, "group": e["group"], "subgroup": e["subgroup"],
                        "codepoint": code}
                if also.get(code):
                    meta["also"] = [emoji[c]["caption"] for c in also[code]]
                meta["description"] = describe(meta)
                (test if style == UNSEEN_SET else train).append((f"{style}-{code}", "webp", encode_webp(image), meta))
        per_style[style] = len(images) - int(near.sum())
    random.Random(SEED).shuffle(train)
    files = write_shards(out, "images-drawings-train", train, 2000)
    name = "images-drawings-test.tar.gz"
    files[name] = write_tar(out / name, test)
    return {"files": files, "per_style": per_style, "dropped_near_duplicates": dropped}
