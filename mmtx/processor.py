"""The tokenizers of a model together: what a user gives becomes prompts, and what the model answers becomes media.

Shapes: H height, W width of pixels; h, w of codes.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from numbers import Integral, Real
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image as PILImage

from mmtx.ambient import neutral
from mmtx.batching import in_order, run_batches, run_by_values
from mmtx.conversation import messages_of
from mmtx.data.media import Sampled, load_windows
from mmtx.data.pauses import cut_at_pauses
from mmtx.data.sample import Media as SampleMedia
from mmtx.data.sound_files import MAX_SECONDS
from mmtx.data.storage import FileSource, display
from mmtx.data.tokens import load_media
from mmtx.document import Document, MediaPart, Part, TextPart, Turn
from mmtx.errors import InputError
from mmtx.files import user_name
from mmtx.items import is_list, map_numbered, numbered, typed_list
from mmtx.medium import Audio, BaseMedium, Media, ReadMedium, as_medium, check_open, to_array
from mmtx.modality.base import Encoding, Tokenizer, load_tokenizer, media_tokenizer
from mmtx.modality.registry import MODALITIES, media_kinds
from mmtx.sequence import Prompt, parse, prompt
from mmtx.shipped_files import shipped
from mmtx.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mmtx.modality.image import ImageConfig, ImageTokenizer

AUDIO_TOKENIZER = "tokenizers/audio"


class Processor:
    """Reads and encodes text and media, and decodes ids; `Model` documents what its methods share with it.

    `patches` are the kinds of media of which the decoder reads patches in user turns, and not codes.
    """

    def __init__(self, vocabulary: Vocabulary, tokenizers: Mapping[str, Tokenizer], patches: Collection[str]):
        self.vocabulary, self.tokenizers, self.patches = vocabulary, tokenizers, patches

    # -- Media to prompts ------------------------------------------------------------------------------------

    def check_kind(self, kind: str) -> None:
        if kind not in self.tokenizers:
            raise InputError(f"found {kind}, but this model has tokenizers for {', '.join(self.tokenizers)} only")

    @neutral()
    def read_medium(self, item: BaseMedium) -> ReadMedium:
        item = as_medium(item)
        self.check_kind(item.kind)
        medium = self._read(item)
        return ReadMedium(item.kind, medium, media_tokenizer(self.tokenizers, item.kind).grid(medium))

    def _read(self, item: BaseMedium) -> torch.Tensor:
        if isinstance(item, ReadMedium):
            return item.data
        data, name = item.data, None
        if isinstance(data, SampleMedia):
            return load_media(data, self.tokenizers)
        if isinstance(data, (str, Path)):
            name = display(path := user_name(data))
            data = FileSource(path).read()
        if isinstance(data, PILImage.Image):
            check_open(data)
        return MODALITIES[item.kind].get("read")(self.tokenizers[item.kind], data, name, **item.options())

    @neutral()
    def encode_parts(self, items: Iterable[str | BaseMedium | Part], codes: bool = True) -> list[Part]:
        items = typed_list(items, "item", (str, BaseMedium, Part), "text, Image, Audio, Medium or a part of a document")
        parts: list[Part | None] = [item if isinstance(item, Part) else None for item in items]
        for kind in media_kinds():
            places = [i for i, item in enumerate(items) if isinstance(item, BaseMedium) and item.kind == kind]
            if places:
                self.check_kind(kind)
                embed, device = partial(self._embed, kind, items, codes), media_tokenizer(self.tokenizers, kind).device
                for i, encoding in run_batches(embed, in_order(places), device):
                    parts[i] = MediaPart(kind, *encoding)
        for i, item in enumerate(items):
            if isinstance(item, str):
                parts[i] = TextPart(self.tokenizers["text"].encode(item))
        return parts

    def _embed(self, kind: str, items: Sequence[Any], codes: bool, chosen: Sequence[int]) -> list[Encoding]:
        def read(i: int) -> torch.Tensor:
            with numbered("item", i, len(items)):
                return self._read(items[i])

        tokenizer = media_tokenizer(self.tokenizers, kind)
        return run_by_values(lambda media: tokenizer.embed_batch(media, kind in self.patches, codes), map(read, chosen),
                             torch.Tensor.numel)

    def encode_one(self, medium: Any, kind: str) -> Part:
        """The encoded part of a medium. Raises InputError if it is of another kind."""
        part = self.encode_parts([as_medium(medium)])[0]
        if part.kind != kind:
            raise InputError(f"found {part.kind}, expected {kind}")
        return part

    def encode_documents(self, documents: Iterable[Document], codes: bool = True) -> list[Document]:
        documents = typed_documents(documents)
        codes = codes or any(isinstance(part, ReadMedium) and turn.role != "user" for document in documents
                             for turn in document.turns for part in turn.parts)
        parts = iter(self.encode_parts([part for document in documents for turn in document.turns for part in turn.parts], codes))
        return [Document(tuple(replace(turn, parts=tuple(next(parts) for _ in turn.parts)) for turn in document.turns))
                for document in documents]

    def prompt_length(self, document: Document) -> int:
        (document,) = typed_documents([document])
        read = lambda medium: medium if isinstance(medium, ReadMedium) else self.read_medium(medium)
        blank = lambda part: read(part).blank if isinstance(part, BaseMedium) else part
        turns = tuple(replace(turn, parts=tuple(map(blank, turn.parts))) for turn in document.turns)
        return len(prompt(Document(turns), self.vocabulary).ids)

    def questions(self, media: Iterable[Any], text: str | None = None) -> list[Document]:
        """For each medium a document in which the user shows it, and asks something about it."""
        asked = self.parts([] if text is None else [text])
        parts = self.encode_parts(map_numbered(media, as_medium), codes=False)
        return [Document((Turn("user", (part, *asked)),)) for part in parts]

    def cut_speech(self, sound: BaseMedium, seconds: float) -> Iterator[tuple[float, Audio]]:
        """The pieces of a sound of any length, cut at pauses, each with its beginning in seconds.

        Each is a sound of its own, so that it gets the loudness of those in training.
        """
        if sound.kind != "audio":
            raise InputError(f"found {sound.kind}, expected audio")
        self.check_kind(sound.kind)
        rate = cast(Sampled, self.tokenizers["audio"]).rate
        for start, window in self._windows(sound, rate):
            for piece in cut_at_pauses(window, rate, seconds):
                yield start + piece.first / rate, Audio(piece.samples, rate)

    def _windows(self, sound: BaseMedium, rate: int) -> Iterator[tuple[float, torch.Tensor]]:
        data, name = sound.data, None
        if isinstance(sound, ReadMedium) or isinstance(data, SampleMedia) and data.options:  # a cut is no longer than a window
            yield 0.0, self.read_medium(sound).data
            return
        if isinstance(data, SampleMedia):
            name, data = data.name, data.source.read()
        yield from load_windows(data, rate, name, **sound.options())

    def parts(self, parts: Any, codes: bool = True) -> tuple[Part, ...]:
        """The parts of `Model.generate`, encoded; a str is always text, never a path."""
        as_media = lambda item: item if isinstance(item, str) else as_medium(item)
        return tuple(self.encode_parts(map_numbered(parts if is_list(parts) else [parts], as_media), codes))

    def prompt(self, parts: Any, out: str = "text", codes: bool = False) -> Prompt:
        """The parts of `Model.generate` as a user turn, or as the beginning of a plain document, or the messages of a conversation.

        `codes` as in `encode_parts`.
        """
        plain = out == "document"  # outside of user turns, media are codes
        if (messages := messages_of(parts)) is not None:
            if plain:
                raise InputError("out: found 'document' with messages, expected another: a plain document has no roles")
            turn = lambda message: Turn(message[0], self.parts(message[1], codes or message[0] == "assistant"))
            return prompt(Document(tuple(map_numbered(messages, turn, "message"))), self.vocabulary)
        return prompt(Document((Turn(None if plain else "user", self.parts(parts, codes or plain)),)), self.vocabulary)

    # -- Ids with which answers begin ------------------------------------------------------------------------

    @property
    def image_config(self) -> "ImageConfig":
        return cast("ImageTokenizer", self.tokenizers["image"]).config

    def size_prefix(self, out: str, size: tuple[int, int] | None) -> list[int]:
        """The ids of a picture's size (H, W), by default the tokenizer's; none for other answers."""
        outs = (*self.vocabulary.kinds, "any", "document")
        if not isinstance(out, str):
            raise InputError(f"out: found {type(out).__name__}, expected one of {', '.join(outs)}")
        if out not in outs:
            raise InputError(f"out: found {out!r:.40}, expected one of {', '.join(outs)}")
        if out != "image" or "image" not in self.tokenizers:
            if size is not None:
                raise InputError(f"size: found {size!r:.100} with out={out!r}, expected it only with out='image'")
            return []
        config = self.image_config
        if size is None:
            if config.side is None:
                return []
            size = (config.side, config.side)
        if not (isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(edge, Integral) for edge in size)):
            raise InputError(f"size: found {size!r:.100}, expected height and width in pixels")
        if any(edge % config.patch for edge in size):
            raise InputError(f"size: found {size}, expected multiples of {config.patch}")
        v = self.vocabulary
        return [v.image, v.height(size[0] // config.patch), v.width(size[1] // config.patch)]

    def picture_prefix(self, picture: Any, rows: int | None) -> list[int]:
        """The ids of a picture down to a row of pixels, by default the upper half."""
        if rows is not None and not isinstance(rows, Integral):
            raise InputError(f"rows: found {rows!r:.100}, expected a whole number")
        given, v = self.encode_one(picture, "image"), self.vocabulary
        patch, (height, width) = self.image_config.patch, given.array.shape
        kept = height // 2 if rows is None else rows // patch
        if not 0 <= kept <= height or (rows is not None and rows % patch):
            raise InputError(f"rows: found {rows}, expected a multiple of {patch} from 0 to {height * patch}")
        return [v.image, v.height(height), v.width(width), *v.to_global("image", given.array[:kept]).ravel()]

    def sound_prefix(self, sound: Any, seconds: float) -> tuple[list[int], int]:
        """The ids of a sound that goes on, and how many more last at most `seconds`."""
        if not (isinstance(seconds, Real) and 0 < seconds <= MAX_SECONDS):
            raise InputError(f"seconds: found {seconds!r:.100}, expected more than 0, up to {MAX_SECONDS}")
        given, v, tokenizer = self.encode_one(sound, "audio"), self.vocabulary, self.tokenizers["audio"]
        more = math.ceil(seconds * tokenizer.codes_per_second / tokenizer.bands) * tokenizer.bands
        return [v.audio, *v.to_global("audio", given.array).ravel()], more

    # -- Ids to media ----------------------------------------------------------------------------------------

    @neutral()
    def detokenize(self, ids: Sequence[int]) -> list[Media]:
        return [self._decode(part) for turn in parse(self._checked(ids), self.vocabulary).turns for part in turn.parts]

    def to_media(self, ids: Sequence[int]) -> list[Media]:
        """The ids of an answer, without <end>, as its media."""
        v = self.vocabulary
        return self.detokenize([v.bos, *self._checked(ids), v.eos])

    def _checked(self, ids: Sequence[int]) -> list[int]:
        """Ids as a list of int. Raises InputError that names the position of one that the vocabulary does not have."""
        try:
            ids = [*map(index, ids)]
        except TypeError as error:
            raise InputError(f"ids: expected a list of whole numbers ({error})") from None
        for position, ident in enumerate(ids):
            if not 0 <= ident < self.vocabulary.size:
                raise InputError(f"ids: found {str(ident):.40} at position {position}, expected 0 to {self.vocabulary.size - 1}")
        return ids

    def _decode(self, part: Part) -> Media:
        tokenizer = self.tokenizers[part.kind]
        if isinstance(part, TextPart):
            return tokenizer.decode(part.ids.tolist())
        if getattr(tokenizer, "vocoder", tokenizer) is None:
            tokenizer = self.sound_decoder
        show = MODALITIES[part.kind].get("show") or to_array
        return show(tokenizer, part.array)

    @cached_property
    def sound_decoder(self) -> Any:
        """The tokenizer that decodes sounds: the model's own or, if it lacks a vocoder and has the same codes, the shipped one."""
        own = self.tokenizers["audio"]
        if getattr(own, "vocoder", own) is None:
            other = load_tokenizer(shipped(AUDIO_TOKENIZER))
            if other.fingerprint == own.fingerprint:
                return other
        return own


def typed_documents(documents: Any) -> list[Document]:
    return typed_list(documents, "document", Document, "a Document")


def asked_documents(documents: Any) -> list[Document]:
    """Each document up to its last user turn. Raises InputError for media that are not encoded."""
    def asked(document: Document) -> Document:
        users = [number for number, turn in enumerate(document.turns, 1) if turn.role == "user"]
        turns = document.turns[:max(users, default=0)]
        for part in (part for turn in turns for part in turn.parts):
            if not isinstance(part, Part):
                raise InputError(f"found {type(part).__name__}, expected parts of codes, as `encode_documents` makes them")
        return Document(turns)

    return map_numbered(typed_documents(documents), asked, "document")
