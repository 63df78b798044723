"""Text to pieces and back, exactly: SentencePiece with byte fallback and nothing that changes the text.

Every Unicode string comes back as it was, and no string that a user types can become a special token:
those have ids only in `mmtx.vocabulary`.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import sentencepiece

from mmtx.errors import InputError
from mmtx.files import read_json, write_json
from mmtx.modality.base import Tokenizer

SPACE = "\u2581"  # SentencePiece writes a space as this character
RESERVED = {SPACE, "\u2585"}  # the trainer takes the first for a space and drops texts with the second
FIXED = 257  # pieces that every model has: unknown and 256 bytes

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "config.json"


class TextTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback. `decode(encode(x)) == x` for every Unicode string x."""

    kind: ClassVar[str] = "text"

    def __init__(self, model_proto: bytes, where: str | Path = "text tokenizer"):
        """Take a serialized model; errors name it `where`.

        Raises InputError when it is damaged, lacks byte fallback, or changes the text.
        """
        self.model_proto = model_proto
        try:
            if not model_proto:
                raise RuntimeError("empty")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        except RuntimeError as error:
            raise InputError(f"{where}: not a SentencePiece model ({_one_line(error)})") from None
        bytes_found = sum(self._model.is_byte(i) for i in range(self.size))
        if bytes_found < 256:
            raise InputError(f"{where}: found {bytes_found} byte pieces, expected 256 (byte_fallback=true)")
        self._bytes = [self._content(i) for i in range(self.size)]
        self._escaped_space = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        for text, settings in (
            ("  a  b ", "add_dummy_prefix=false, remove_extra_whitespaces=false and a piece for the space"),
            ("\ufb01A\u030a\u00a0\uff21", "normalization_rule_name=identity"),
        ):
            if (found := self.decode(self.encode(text))) != text:
                raise InputError(f"{where}: changes {text!a} to {found!a}, expected a model with {settings}")

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> "TextTokenizer":
        """Train byte-pair pieces; equal texts and size give equal models.

        `size` is an upper bound of at least 258: a small corpus gives fewer pieces. At most half of what
        is left beside the bytes goes to single characters, the most common ones; others are written as bytes.
        Raises InputError when there is no text, or on a lone surrogate.
        """
        if size <= FIXED:
            raise InputError(f"text tokenizer: found size {size}, expected at least {FIXED + 1}")
        texts = list(texts)
        counts: Counter[str] = Counter()
        for text in texts:
            _check_unicode(text)
            counts.update(text)
        if not counts:
            raise InputError("text tokenizer: found no text to train on, expected at least one character")
        # Ties are broken by the character, because the order of a set of strings changes from run to run.
        common = sorted(counts.keys() - RESERVED - {" "}, key=lambda c: (-counts[c], c))
        kept = [" ", *common][: max(1, (size - FIXED) // 2)]
        # Texts are cut where a character is not kept: the trainer refuses more characters than pieces.
        runs = re.compile(f"[{re.escape(''.join(kept))}]+")
        # Without one text that has a space, the space would be no piece and come back as U+2581.
        corpus = [" ", *(run for text in texts for run in runs.findall(text))]
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
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
            max_sentence_length=2**30,  # bytes; the trainer drops longer texts without a word
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
        try:
            return cls(Path(path).read_bytes(), where=path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None

    @classmethod
    def from_folder(cls, folder: Path) -> "TextTokenizer":
        """Read what `save` wrote."""
        folder = Path(folder)
        config = read_json(folder / CONFIG_FILE)
        tokenizer = cls.from_file(folder / MODEL_FILE)
        if config != tokenizer._config:
            raise InputError(f"{folder / CONFIG_FILE}: found {config}, expected {tokenizer._config}")
        return tokenizer

    def files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self.model_proto, CONFIG_FILE: write_json(self._config)}

    @property
    def size(self) -> int:
        return self._model.vocab_size()

    def encode(self, media: str) -> list[int]:
        """Text to pieces. Raises InputError on a lone surrogate, which is no Unicode text."""
        _check_unicode(media)
        # A typed U+2581 would come back as a space, so it goes by its bytes.
        first, *others = (self._model.encode(segment) for segment in media.split(SPACE))
        for ids in others:
            first += self._escaped_space + ids
        return first

    def piece(self, id: int) -> str:
        """A piece as SentencePiece writes it, for people to look at."""
        return self._model.id_to_piece(id)

    def decode(self, codes: Sequence[int]) -> str:
        """Pieces to text. Bytes that are no UTF-8, and the unknown piece, become U+FFFD.

        Raises InputError on a code outside [0, size).
        """
        codes = [int(code) for code in codes]
        if codes and not 0 <= min(codes) <= max(codes) < self.size:
            found = f"{min(codes)} to {max(codes)}"
            raise InputError(f"text codes: found values from {found}, expected [0, {self.size})")
        return b"".join(self._bytes[code] for code in codes).decode("utf-8", errors="replace")

    def __reduce__(self):
        return type(self), (self.model_proto,)

    @property
    def _config(self) -> dict:
        return {"kind": self.kind, "size": self.size}

    def _content(self, code: int) -> bytes:
        """The UTF-8 bytes, possibly part of a character, that one piece stands for."""
        piece = self._model.id_to_piece(code)
        if self._model.is_byte(code):
            return bytes([int(piece[3:5], 16)])  # "<0x41>"
        if self._model.is_unknown(code):
            return "\ufffd".encode()
        if self._model.is_control(code):
            return b""
        return piece.replace(SPACE, " ").encode()


def _check_unicode(text: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"text: found {type(text).__name__}, expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"lone surrogate {text[error.start]!a} at character {error.start}"
        raise InputError(f"text: found {found}, expected Unicode text") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
