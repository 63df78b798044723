"""Text to pieces and back, exactly: SentencePiece with byte fallback and without normalisation.

Every Unicode string is decoded as it was, and no string that a user types can become a special token:
those have ids only in `mmtx.vocabulary`.
"""

import io
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import isfinite
from operator import index
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import sentencepiece

from mmtx.errors import InputError
from mmtx.files import read_bytes, user_path
from mmtx.json_files import write_json
from mmtx.modality.base import Tokenizer, check_codes, read_config
from mmtx.saved_folder import CONFIG
from mmtx.schema import shown, typed, within

SPACE = "\u2581"  # SentencePiece writes a space as this character
RESERVED = {SPACE, "\u2585"}  # the trainer takes the first for a space and drops texts with the second
IDENTITY = "normalization_rule_name=identity"
UNKNOWN, CONTROL, BYTE = 2, 3, 6
TYPES = {1, 2, 3, 4, 5, 6}
SCORE = struct.Struct("<f")
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
SIZES = {1: 8, 5: 4}  # bytes of the fixed-size types of the wire format
FIXED = 257  # pieces that every model has: unknown and 256 bytes

MOST_BYTES, MOST_PIECES = 64 * 2**20, 2**20  # of a model

MODEL_FILE = "tokenizer.model"


class TextTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback. `decode(encode(x)) == x` for every Unicode string x."""

    kind: ClassVar[str] = "text"

    def __init__(self, model_proto: bytes, where: str | Path = "text tokenizer"):
        """Take a serialized model; errors name it `where`.

        Raises InputError if it is damaged, lacks byte fallback, or changes the text.
        """
        self.model_proto = model_proto
        pieces = read_pieces(model_proto, where)
        bytes_found = len({piece.text for piece in pieces if piece.type == BYTE} & BYTES)
        if bytes_found < 256:
            raise InputError(f"{where}: found {bytes_found} byte pieces, expected 256 (byte_fallback=true)")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        except RuntimeError as error:
            raise InputError(f"{where}: not a SentencePiece model ({' '.join(str(error).split())[:100]})") from None
        if len(pieces) != self.size:
            raise InputError(f"{where}: found {len(pieces)} pieces, of which {self.size} can be used")
        self._bytes = [piece.content() for piece in pieces]
        self._escaped_space = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        for text, settings in (
            ("  a  b ", "add_dummy_prefix=false, remove_extra_whitespaces=false and a piece for the space"),
            ("\ufb01A\u030a\u00a0\uff21", IDENTITY),
        ):
            if (found := self.decode(self.encode(text))) != text:
                raise InputError(f"{where}: changes {text!a} to {found!a}, expected a model with {settings}")

    @classmethod
    @typed
    def train(cls, texts: Iterable[str], size: int) -> "TextTokenizer":
        """Train a BPE model; equal texts and size give equal models.

        `size` is an upper bound, 258 or more: a small corpus gives fewer pieces. At most half of the pieces beyond the
        bytes are single characters, the most common ones; others are written as bytes.
        Raises InputError if there is no text, or on a lone surrogate.
        """
        within("text tokenizer: size", size, FIXED + 1, MOST_PIECES)
        texts = list(texts)
        counts: Counter[str] = Counter()
        for text in texts:
            check_unicode(text)
            counts.update(text)
        if not counts:
            raise InputError("text tokenizer: found no text to train on, expected at least one character")
        # Ties are broken by the character, because the order of a set of strings varies between runs.
        common = sorted(counts.keys() - RESERVED - {" "}, key=lambda c: (-counts[c], c))
        kept = [" ", *common][: max(1, (size - FIXED) // 2)]
        # Texts are split at characters that are not kept: the trainer refuses more characters than pieces.
        runs = re.compile(f"[{re.escape(''.join(kept))}]+")
        # Without a text that has a space, the space would not be a piece, and would be decoded as U+2581.
        corpus = chain([" "], (run for text in texts for run in runs.findall(text)))
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=corpus,
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            character_coverage=1.0,
            max_sentence_length=2**30,  # bytes; the trainer silently drops longer texts
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
        return cls(model.getvalue())

    @classmethod
    def from_file(cls, path: str | Path) -> "TextTokenizer":
        """Load an existing `.model` file. Raises InputError that names what it lacks."""
        return cls(read_bytes(user_path(path), MOST_BYTES), where=path)

    @classmethod
    def from_folder(cls, folder: Path) -> "TextTokenizer":
        """Read what `save` wrote."""
        folder = user_path(folder)
        config = read_config(folder, cls.kind)
        tokenizer = cls.from_file(folder / MODEL_FILE)
        if write_json(config) != write_json(tokenizer._config):  # in Python 1 == 1.0 == True
            raise InputError(f"{folder / CONFIG}: found {str(config)[:80]}, expected {tokenizer._config}")
        return tokenizer

    def files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self.model_proto, CONFIG: write_json(self._config)}

    @property
    def size(self) -> int:
        return self._model.vocab_size()

    def encode(self, media: str) -> list[int]:
        """Text to pieces. Raises InputError on a lone surrogate, which is not Unicode text."""
        check_unicode(media)
        # A typed U+2581 would be decoded as a space, so it is encoded as bytes.
        first, *others = (self._model.encode(segment) for segment in media.split(SPACE))
        for ids in others:
            first += self._escaped_space + ids
        return first

    def piece(self, id: int) -> str:
        """A piece as SentencePiece writes it, for people to look at."""
        return self._model.id_to_piece(id)

    def piece_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes that a piece stands for, possibly part of a character."""
        return self._bytes[id]

    def decode(self, codes: Sequence[int]) -> str:
        """Pieces to text. Bytes that are not UTF-8, and the unknown piece, become U+FFFD.

        Raises InputError on a code outside [0, size).
        """
        codes = whole_numbers(codes, range(self.size))
        return b"".join(self._bytes[code] for code in codes).decode("utf-8", errors="replace")

    def __reduce__(self):
        return type(self), (self.model_proto,)

    @property
    def _config(self) -> dict:
        return {"kind": self.kind, "size": self.size}


class Piece(NamedTuple):
    """A piece as stored in its file; `type` is the number of SentencePiece's piece type."""

    text: str
    type: int

    def content(self) -> bytes:
        """The UTF-8 bytes, possibly part of a character, that the piece stands for."""
        if self.type == BYTE:
            return bytes([int(self.text[3:5], 16)])  # "<0x41>"
        if self.type == UNKNOWN:
            return "\ufffd".encode()
        return b"" if self.type == CONTROL else self.text.replace(SPACE, " ").encode()


def read_pieces(model_proto: bytes, where: str | Path) -> list[Piece]:
    """The pieces of a serialized model, parsed without the library, which does not validate its input.

    Raises InputError if it is damaged, or has tables that change the text.
    """
    pieces: list[Piece] = []
    try:
        for number, value in _fields(model_proto):
            if number == 1:
                facts = dict(_fields(value))
                text, kind, (score,) = facts[1].decode(), facts.get(3, 1), SCORE.unpack(facts.get(2, bytes(4)))
                if not text or "\0" in text or kind not in TYPES or kind == BYTE and text not in BYTES or not isfinite(score):
                    raise ValueError
                pieces.append(Piece(text, kind))
            elif number in (3, 5) and dict(_fields(value)).get(2):  # the table of a normalizer
                raise InputError(f"{where}: changes the text, expected a model with {IDENTITY}")
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, struct.error):
        raise InputError(f"{where}: not a SentencePiece model (damaged at piece {len(pieces)})") from None
    if not 0 < len(pieces) <= MOST_PIECES:
        raise InputError(f"{where}: not a SentencePiece model ({len(pieces)} pieces, expected 1 to {MOST_PIECES})")
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protocol buffer message in wire format."""
    at, end = 0, len(data)
    while at < end:
        key, at = data[at], at + 1
        if key > 127:
            key, at = _varint(data, at - 1)
        kind = key & 7
        if kind == 2:
            size, at = data[at], at + 1
            if size > 127:
                size, at = _varint(data, at - 1)
        elif kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        else:
            size = SIZES[kind]
        value, at = data[at:at + size], at + size
        if at > end:
            raise ValueError
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError


def whole_numbers(codes: Any, allowed: range) -> list[int]:
    """Codes of text as a list of int. Raises InputError unless all are whole numbers in the range `allowed`."""
    try:
        found = [*map(index, codes)]
    except TypeError:
        raise InputError(f"text codes: found {shown(codes)}, expected whole numbers") from None
    check_codes(found, allowed, "text codes")
    return found


def check_unicode(text: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"text: found {type(text).__name__}, expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"lone surrogate {text[error.start]!a} at character {error.start}"
        raise InputError(f"text: found {found}, expected Unicode text") from None
