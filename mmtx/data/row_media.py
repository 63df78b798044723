"""The media that a row names, as paths, URLs, objects or bytes in base64, and the cuts of its sounds."""

import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmtx.data.field_names import FILE_NAME, names
from mmtx.data.fields import pop_number, reason, shown
from mmtx.data.sample import Media, known_kind, suffix
from mmtx.data.storage import DatasetSource, FileSource, MemorySource, decode_base64, decode_data_url, display
from mmtx.data.trust import Base
from mmtx.data.urls import is_url, scheme_of
from mmtx.errors import InputError
from mmtx.modality.registry import MODALITIES, media_kinds


@dataclass(frozen=True)
class MediaReader:
    """Reads the media of a row, which errors name as `where`.

    `base` is what the row may name; None: only media in the row itself, such as bytes in base64.
    """

    where: str
    base: Base | None

    def of_row(self, row: dict[str, Any]) -> list[Media]:
        """Remove the media from the fields of a row, pictures before sounds."""
        media: list[Media] = []
        fields = names().fields
        if fields.keys().isdisjoint(row):
            return media
        nemo = "audio_filepath" in row
        for kind in media_kinds():
            found = [name for name in fields if fields[name] == kind and name in row]
            if len(found) > 1:
                raise InputError(f"{self.where}: found the fields {found}, expected one of them")
            for name in found:
                media += self._all(row.pop(name), kind, name)
        name = row.get(FILE_NAME)
        if isinstance(name, str) and not media:
            kind = known_kind(name)
            if kind or not suffix(name):
                media = self._all(row.pop(FILE_NAME), kind or media_kinds()[0], FILE_NAME)
        sounds = [place for place, medium in enumerate(media) if MODALITIES[medium.kind].cuts]
        if sounds and (nemo or "offset" in row):
            if len(sounds) > 1:
                raise InputError(f"{self.where}: found {len(sounds)} sounds beside 'offset' or 'duration', expected one")
            media[sounds[0]] = _cut(row, media[sounds[0]], self.where)
        return media

    def _all(self, value: Any, kind: str, at: str) -> list[Media]:
        if isinstance(value, list):
            return [self.medium(item, kind, f"{at}[{place}]") for place, item in enumerate(value)]
        return [self.medium(value, kind, at)]

    def medium(self, value: Any, kind: str, at: str) -> Media:
        """The medium of a path or URL, or of an object that holds one, or the bytes in base64; `at` names the field."""
        inside = value if isinstance(value, dict) else {}
        value = inside.get("url") or inside.get("path") or value
        if isinstance(data := inside.get("data"), str) and data:
            medium = self._inline(data, decode_base64, shown(data), kind, at)
        elif self.base is None:
            raise InputError(f"{self.where}: field {at!r} is {shown(value)}, expected no medium other than the file next to this one")
        elif isinstance(value, str) and scheme_of(value) == "data":
            medium = self._inline(value, decode_data_url, display(value), kind, at)
        else:
            medium = self._located(value, kind, at)
        return self.cut_inside(inside, medium, at)

    def _located(self, value: Any, kind: str, at: str) -> Media:
        if isinstance(value, DatasetSource):
            return Media(kind, f"{self.where}: {at}" if value.place else self.where, value)
        if not isinstance(value, str) or not value:
            raise InputError(f"{self.where}: field {at!r} is {shown(value)}, expected a path or URL")
        path = self.base.join(value)
        name = display(path)
        told = f"{self.where}: field {at!r} names {name}"
        if refusal := self.base.refusal(path):
            raise InputError(f"{told}: {refusal}")
        if known_kind(path) not in (kind, None):
            raise InputError(f"{told}, expected a file of kind {kind}")
        if not is_url(path) and not os.path.isfile(path):
            found = [] if self.base.remote else [*filter(os.path.isfile, map(self.base.join, _spellings(value)))]
            if not found:
                raise InputError(f"{told}: no such file")
            path = found[0]
        return Media(kind, f"{self.where}: {name}", FileSource(path, base=self.base))

    def _inline(self, text: str, decode: Callable[[str], bytes], told: str, kind: str, at: str) -> Media:
        """The medium that stands in the row itself as a text; errors show it as `told`."""
        try:
            return Media(kind, f"{self.where}: field {at!r}", MemorySource(decode(text)))
        except ValueError as error:
            raise InputError(f"{self.where}: field {at!r} is {told}, expected base64 ({reason(error)})") from None

    def cut_inside(self, given: Mapping[str, Any], medium: Media, at: str) -> Media:
        """The medium of an object or of a part of a message: of a sound, what "offset" and "duration" there select."""
        known = {name: value for name, value in given.items() if value is not None}
        cut = "offset" in known and MODALITIES[medium.kind].cuts
        return _cut(known, medium, f"{self.where}: field {at!r}") if cut else medium


def _spellings(name: str) -> Iterator[str]:
    """A name as other systems write it: Windows with backslashes, macOS with the accent of a letter behind it."""
    for text in dict.fromkeys((name, name.replace("\\", "/"))):
        yield from (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))


def _cut(row: dict[str, Any], medium: Media, where: str) -> Media:
    """The part of a sound that "offset" and "duration" (as in a NeMo manifest) or "offset" and "end" select."""
    start, seconds = pop_number(row, "offset", 0, where) or 0.0, pop_number(row, "duration", 0, where)
    if seconds == 0:
        raise InputError(f"{where}: field 'duration' is 0, expected more than 0")
    if seconds is None and (end := pop_number(row, "end", 0, where)) is not None:
        if end <= start:
            raise InputError(f"{where}: field 'end' is {end:g}, expected more than 'offset', which is {start:g}")
        seconds = round(end - start, 6)
    if not start and seconds is None:
        return medium
    long = "the rest" if seconds is None else f"{seconds} s"
    return replace(medium, name=f"{medium.name} ({long} from {start} s)", start=start, seconds=seconds)
