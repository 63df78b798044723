"""Text tokenizers of pretrained language models: byte-level BPE through the `tokenizers` library (extra `interop`).

Special tokens that a user types stay text: their ids come only from the chat format.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from mmtx.errors import InputError
from mmtx.extras import require
from mmtx.files import read_text, user_path
from mmtx.json_files import read_json, write_json
from mmtx.modality.base import ChatFormat, Tokenizer, read_config
from mmtx.modality.text import MOST_BYTES, check_unicode, whole_numbers
from mmtx.saved_folder import CONFIG
from mmtx.schema import build, shown, within

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"


def _alphabet() -> dict[str, int]:
    """Characters of byte-level BPE -> bytes: printable bytes stand for themselves, the others are numbered from U+0100."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


ALPHABET = _alphabet()
UTF8 = {character for character, byte in ALPHABET.items() if byte not in (0xC0, 0xC1, *range(0xF5, 0x100))}


class PretrainedText(Tokenizer):
    """A byte-level BPE from a tokenizer.json, with its chat format and the template from which that was derived."""

    kind: ClassVar[str] = "text"

    def __init__(self, content: str, size: int, chat_format: ChatFormat | None = None, chat_template: str = "",
                 specials: dict[str, str] | None = None, where: str | Path = "text tokenizer"):
        """
        Args:
            content: the text of tokenizer.json.
            size: rows of the model's embedding, at least the number of pieces.
            chat_format: how turns are written.
            chat_template: the Jinja chat template; kept for exports of the model.
            specials: names of special tokens by role: "bos_token", "eos_token".
            where: what errors call the tokenizer.
        """
        tokenizers = require("tokenizers", "interop", "text tokenizer")
        self.content, self.chat_format, self.chat_template, self.specials = content, chat_format, chat_template, specials or {}
        try:
            values = json.loads(content)
            model = values["model"]
            vocabulary, added = model["vocab"], values.get("added_tokens", [])
            steps = [values.get("pre_tokenizer") or {}, *((values.get("pre_tokenizer") or {}).get("pretokenizers", ()))]
            if model.get("type", "BPE") != "BPE" or not any(step.get("type") == "ByteLevel" for step in steps):
                raise InputError(f"{where}: found the type {shown(model.get('type'))}, expected a byte-level BPE")
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except InputError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{where}: not a tokenizer.json ({' '.join(str(error).split())[:100]})") from None
        self._tokenizer.encode_special_tokens = True
        # The file keeps what was asked of the last call before it was saved; transformers resets both as well.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.model.dropout = None  # of training, which makes ids random
        if missing := UTF8 - vocabulary.keys():
            raise InputError(f"{where}: found no pieces for {len(missing)} bytes, whose text would be lost, expected all of UTF-8")
        used = {*vocabulary.values(), *(token["id"] for token in added)}
        within(f"{where}: rows of the embedding", size, max(used, default=-1) + 1, 2**22)
        self._size, self._bytes, self._names = size, [b"\xef\xbf\xbd"] * size, [""] * size
        for piece, ident in vocabulary.items():
            self._names[ident] = piece
            self._bytes[ident] = bytes(ALPHABET[c] for c in piece) if all(c in ALPHABET for c in piece) else piece.encode()
        # Ids without a piece are never generated either.
        self.control = frozenset({*(token["id"] for token in added if token["special"]),
                                  *({*range(size)} - used)})
        for token in added:
            self._names[token["id"]] = token["content"]
            self._bytes[token["id"]] = b"" if token["special"] else token["content"].encode()
        for text in ("b", "  \ufb01A\u00a0\uff21 b  "):
            if (found := self.decode(self.encode(text))) != text:
                raise InputError(f"{where}: changes {text!a} to {found!a}, expected add_prefix_space=false and no normalizer but NFC")

    @classmethod
    def from_folder(cls, folder: Path) -> "PretrainedText":
        folder = user_path(folder)
        config, where = read_config(folder, "pretrained text"), folder / CONFIG
        if config.keys() != {"kind", "size", "markup", "specials"}:
            raise InputError(f"{where}: found the fields {shown(', '.join(config))}, expected kind, size, markup, specials")
        chat_format = None if config["markup"] is None else build(ChatFormat, config["markup"], where, "markup")
        template = read_text(folder / TEMPLATE, MOST_BYTES) if (folder / TEMPLATE).exists() else ""
        return cls(read_text(folder / TOKENIZER, MOST_BYTES), config["size"], chat_format, template,
                   config["specials"], folder / TOKENIZER)

    def files(self) -> dict[str, bytes]:
        config = {"kind": "pretrained text", "size": self.size, "markup": self.chat_format and asdict(self.chat_format),
                  "specials": self.specials}
        return {TOKENIZER: self.content.encode(), CONFIG: write_json(config),
                **({TEMPLATE: self.chat_template.encode()} if self.chat_template else {})}

    @property
    def size(self) -> int:
        return self._size

    def encode(self, media: str) -> list[int]:
        """Text to pieces. Raises InputError on a lone surrogate, which is not Unicode text."""
        check_unicode(media)
        return self._tokenizer.encode(media, add_special_tokens=False).ids

    def piece(self, id: int) -> str:
        """A piece as the library writes it, for people to look at."""
        return self._names[id]

    def piece_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes that a piece stands for, possibly part of a character."""
        return self._bytes[id]

    def id(self, name: str) -> int | None:
        """The id of a token by its name, None if there is none."""
        return self._tokenizer.token_to_id(name)

    def decode(self, codes: Sequence[int]) -> str:
        """Pieces to text; special tokens give none. Raises InputError on a code outside [0, size)."""
        codes = whole_numbers(codes, range(self.size))
        return b"".join(self._bytes[code] for code in codes).decode("utf-8", errors="replace")

    def marked(self, text: str) -> list[int]:
        """Ids of text in which names of special tokens become special tokens, for chat formats."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True

    def __reduce__(self) -> Any:
        return type(self), (self.content, self.size, self.chat_format, self.chat_template, self.specials)


def read_specials(folder: Path) -> dict[str, str]:
    """The special tokens, by role, in a folder of transformers; empty if it does not name them."""
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.exists() else {}
    named = {role: values.get(role) for role in ("bos_token", "eos_token")} if isinstance(values, dict) else {}
    named = {role: token.get("content") if isinstance(token, dict) else token for role, token in named.items()}
    return {role: token for role, token in named.items() if isinstance(token, str)}
