"""Captions of several words, made from the metadata of the starter data: a part of build_starter.py that is built on demand.

    python build_starter.py --work WORKDIR --out OUTDIR --only descriptions

Writes each shipped shard of images and notes as OUTDIR/described/NAME, with the same samples and one more field, "description":
"outline drawing of a red apple", "a low cello note". A source with `fields: {caption: description}` reads this field as the caption.
The shipped shards are not changed.
"""
import json
import re
import tarfile
from pathlib import Path

from build_starter import INSTRUMENTS, write_tar

MANNERS = {
    **dict.fromkeys(("noto", "noto-v1", "emojione", "emojione-v1", "fxemoji", "twemoji", "fluent-emoji-flat"), "flat picture"),
    **dict.fromkeys(("emojione-monotone", "fluent-emoji-high-contrast"), "black and white drawing"),
    **dict.fromkeys(("game-icons", "mdi"), "black drawing"), **dict.fromkeys(("ph", "tabler", "lucide"), "outline drawing"),
    "fluent-emoji": "shaded picture", "fluent-emoji-3d": "3D picture", "streamline-emojis": "flat drawing",
    "icon-park": "coloured outline drawing"}
COUNTED = {"animals-nature", "food-drink", "objects", "travel-places", "activities", "smileys-emotion", "people-body"}
NO_ARTICLE = re.compile(r"^(cooked rice|shaved ice|sushi|spaghetti|bread|bacon|salt|butter|tofu|ice|ice hockey|lacrosse|badminton|"
                        r"sake|curry rice|baguette bread|meat on bone|fire|fog|jade|toilet paper|roll of paper|money with wings|dna|"
                        r"[a-z]+ing|[0-9].*|.*'s .*|m(rs|x)\.? claus)$")


def with_article(name, group):
    """"red apple" -> "a red apple"; plurals, mass nouns and names of signs stay as they are."""
    head = re.split(r" with | in | on | of | and |:", name)[0]
    plural = head.endswith("s") and not re.search(r"(ss|us|is)$", head) or re.match(r"(people|men|women)\b", name)
    only_one = re.match(r"(sun|moon|earth|mount|full|new)\b", name)
    if group not in COUNTED or plural or only_one or " and " in name or NO_ARTICLE.match(name):
        return name
    return f"{'an' if name[0] in 'aeiou' and not re.match('uni|eu|one', name) else 'a'} {name}"


def describe(meta):
    """A caption of several words for an image or a note, from its other fields."""
    if "style" in meta:
        return f"{MANNERS[meta['style']]} of {with_article(meta['caption'], meta['group'])}"
    low, high = (int(edge) for edge in INSTRUMENTS[meta["midi_program"]][1:])
    third = min(2, max(0, 3 * (meta["midi_note"] - low) // (high - low + 1)))
    return f"a {('low ', 'medium ', 'high ')[third]}{meta['instrument']} note"


def build_descriptions(work, out):
    shipped, files = Path(__file__).parent / "starter", {}
    (out / "described").mkdir(exist_ok=True)
    for path in sorted([*shipped.glob("images-*.tar.gz"), *shipped.glob("sound*.tar.gz")]):
        with tarfile.open(path) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        samples = []
        for (name, data), (_, text) in zip(members[::2], members[1::2], strict=True):
            key, _, extension = name.rpartition(".")
            meta = json.loads(text)
            if "style" in meta or "instrument" in meta:
                samples.append((key, extension, data, {**meta, "description": describe(meta)}))
        if samples:
            files[f"described/{path.name}"] = write_tar(out / "described" / path.name, samples)
    return {"files": files}
