"""The public Python API: pictures, sounds and text in; text, pictures and sounds out.

    model = mmtx.load()                                   # the small model that comes with the package
    model.caption("cat.png")                              # 'cat'
    model.caption(["cat.png", "trumpet.wav"])             # ['cat', 'trumpet, C 4']
    model.generate([Path("cat.png")], out="text")
    model.generate("cat", out="image", temperature=1.0)    # a PIL image

Shapes: C channels, H height, W width, S samples.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image as PILImage

from mmtx.data.media import kind_of, load_audio, load_image
from mmtx.data.storage import FileSource, open_binary
from mmtx.errors import InputError
from mmtx.files import find_shipped, read_json, replace_folder, write_json
from mmtx.inference.generation import generate, steps
from mmtx.inference.row import lay_out
from mmtx.inference.sampling import Sampling
from mmtx.inference.weights import Weights
from mmtx.modality.base import Tokenizer, load_tokenizer
from mmtx.model import Decoder, DecoderConfig
from mmtx.sequence import AudioPart, Document, Grammar, ImagePart, Part, Prompt, TextPart, Turn, parse, prompt, render
from mmtx.vocabulary import Vocabulary

FORMAT = 1
DEFAULT_MODEL = "demos/starter"
AUDIO_TOKENIZER = "tokenizers/audio"
BATCH = 32  # media that are encoded, and prompts that are answered, together
MOST_THREADS = 4  # that do so at a time on a CPU


@dataclass(frozen=True)
class Image:
    """Marks something as a picture: a path, URL, PIL image, uint8 or float array (H, W, C) or tensor (C, H, W)."""

    data: Any


@dataclass(frozen=True)
class Audio:
    """Marks something as a sound: a path, URL, or samples (S,) or (S, C) at `rate` Hz (None: the model's rate)."""

    data: Any
    rate: int | None = None


class Sound(NamedTuple):
    """A generated sound: float samples (S,) in [-1, 1] and their rate in Hz."""

    samples: np.ndarray
    rate: int

    def save(self, path: str | Path) -> None:
        """Write it as a file; the extension chooses the format (wav, flac, ogg)."""
        import soundfile

        soundfile.write(path, self.samples, self.rate)


Media = str | PILImage.Image | Sound


def load(folder: str | Path = DEFAULT_MODEL, device: str | torch.device | None = None) -> "Model":
    """Load a model folder.

    Args:
        folder: what training wrote; by default the small model that comes with the package.
        device: by default the GPU if there is one.

    Raises:
        InputError: the folder is not a whole model, or does not fit its tokenizers.
    """
    folder = find_shipped(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(f"{folder / 'config.json'}: not a model of mmtx (expected \"format\": {FORMAT})")
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    tokenizers = {kind: load_tokenizer(folder / kind) for kind in vocabulary.kinds}
    vocabulary.check(tokenizers)
    path = folder / "model.safetensors"
    try:
        decoder = Decoder(DecoderConfig(**config["decoder"]))
        decoder.load_state_dict(safetensors.torch.load(path.read_bytes()))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: does not fit {folder / 'config.json'} ({str(error).splitlines()[0]})") from None
    if decoder.config.vocabulary_size != vocabulary.size:
        raise InputError(f"{folder}: the decoder has {decoder.config.vocabulary_size} ids, "
                         f"its vocabulary {vocabulary.size}")
    model, device = Model(decoder, vocabulary, tokenizers), device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device).fix()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise InputError(f"device: {device} cannot be used ({str(error).splitlines()[0]})") from None


class Model:
    """A decoder with its tokenizers. Make one with `mmtx.load`."""

    def __init__(self, decoder: Decoder, vocabulary: Vocabulary, tokenizers: Mapping[str, Tokenizer]):
        self.decoder, self.vocabulary, self.tokenizers = decoder, vocabulary, dict(tokenizers)
        self.grammar = Grammar(vocabulary)
        self._weights: Weights | None = None

    def fix(self) -> "Model":
        """Promise that the decoder will not change any more, or not before `fix` or `to` is called again, which makes
        long answers of one prompt on a CPU up to twice as fast. `mmtx.load` does it.
        """
        if self.decoder.embedding.weight.device.type == "cpu":
            lay_out(self.decoder)
        self._weights = Weights.of(self.decoder, fixed=True)
        return self

    def to(self, device: str | torch.device) -> "Model":
        """Move the decoder and the codecs to a device."""
        self._weights = None
        for module in (self.decoder, *self.tokenizers.values()):
            if isinstance(module, torch.nn.Module):
                module.to(device).eval()
        return self

    def save(self, folder: str | Path) -> None:
        """Write a self-contained model folder, which appears whole or not at all."""
        with replace_folder(folder) as staging:
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.decoder.state_dict().items()}
            (staging / "model.safetensors").write_bytes(safetensors.torch.save(weights))
            config = {"format": FORMAT, "decoder": asdict(self.decoder.config)}
            (staging / "config.json").write_bytes(write_json(config))
            self.vocabulary.save(staging / "vocabulary.json")
            for kind, tokenizer in self.tokenizers.items():
                tokenizer.save(staging / kind)

    # -- Captions --------------------------------------------------------------------------------------------

    def caption(self, media: Any, **sampling: Any) -> str | list[str]:
        """Say what a picture or a sound is.

        Args:
            media: a path or URL, PIL image, array, tensor, `Image` or `Audio`, or a list of these. A 1-D array is a
                sound at the model's rate (use `Audio` to give another), any other array a picture.
            **sampling: fields of `Sampling`; greedy by default.

        Returns:
            A caption, or a list of captions for a list. Many at once are much faster than one by one.
        """
        if not _is_list(media):
            return self.caption([media], **sampling)[0]
        parts = self.encode_parts([self._as_media(item) for item in media])
        documents = [Document((Turn("user", (part,)),)) for part in parts]
        return self._answer_texts(documents, Sampling.of(**sampling))

    def caption_documents(self, documents: Sequence[Document], sampling: Sampling = Sampling()) -> list[str]:
        """Answer documents of codes (everything up to the last user turn) in text."""
        asked = []
        for document in documents:
            users = [number for number, turn in enumerate(document.turns, 1) if turn.role == "user"]
            asked.append(Document(document.turns[:max(users, default=0)]))
        return self._answer_texts(asked, sampling)

    def _answer_texts(self, documents: Sequence[Document], sampling: Sampling) -> list[str]:
        answers = self._answer([prompt(document, self.vocabulary) for document in documents], "text", sampling)
        return [self.tokenizers["text"].decode(ids) for ids in answers]

    def _answer(self, prompts: Sequence[Prompt], out: str, sampling: Sampling,
                prefix: Sequence[int] = ()) -> list[list[int]]:
        """The ids of each answer, `prefix` first, without <end>."""
        # Neighbours in length share a batch, so that little is padded.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        answers: list[list[int]] = [[]] * len(prompts)
        write = lambda chosen: generate(self.decoder, self.grammar, [prompts[i] for i in chosen], out, sampling,  # noqa: E731
                                        prefix, self._weights, chosen)
        for i, ids in self._in_batches(write, order):
            answers[i] = ids[:-1].tolist()
        return answers

    def _in_batches(self, run: Callable[[Sequence[int]], Sequence[Any]], numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Run batches of numbers -> each number with its result.

        On a CPU several batches run at a time in a thread each, where torch would share the work of single operations
        among as many threads: these are too small for that, and reading media would wait for none of it.
        """
        on_cpu = self.decoder.embedding.weight.device.type == "cpu"
        batches = [numbers[first:first + BATCH] for first in range(0, len(numbers), BATCH)]
        threads = min(torch.get_num_threads(), MOST_THREADS, len(batches)) if on_cpu else 1
        results = map(run, batches) if threads < 2 else _in_threads(run, batches, threads)
        for batch, items in zip(batches, results, strict=True):
            yield from zip(batch, items, strict=True)

    # -- Generation ------------------------------------------------------------------------------------------

    def generate(self, parts: Any, out: str = "text", size: tuple[int, int] | None = None, **sampling: Any) -> Any:
        """Answer a prompt with text, a picture or a sound.

        Args:
            parts: text (str), pictures and sounds (`Path`, PIL image, array, tensor, `Image`, `Audio`), or a list of them.
            out: "text", "image" or "audio"; or "any", and the model chooses.
            size: height and width in pixels of a picture, by default the tokenizer's own; multiples of its patch.
            **sampling: fields of `Sampling`; greedy by default.

        Returns:
            str, PIL image or `Sound`; for "any" a list of these.
        """
        return self.generate_batch([parts], out, size, **sampling)[0]

    def generate_batch(self, prompts: Sequence[Any], out: str = "text", size: tuple[int, int] | None = None,
                       **sampling: Any) -> list[Any]:
        """`generate` for each prompt: many at once are much faster than one by one."""
        asked, prefix = [self._prompt(parts) for parts in prompts], self._size_prefix(out, size)
        answers = [self._to_media(ids) for ids in self._answer(asked, out, Sampling.of(**sampling), prefix)]
        return answers if out == "any" else [answer[0] if answer else "" for answer in answers]

    def complete(self, picture: Any, rows: int | None = None, parts: Any = (), **sampling: Any) -> PILImage.Image:
        """Keep the top of a picture and draw the rest.

        Args:
            picture: in any form that `caption` takes.
            rows: pixel rows that are kept, of the picture in the tokenizer's size; a multiple of its patch, by default
                the upper half. Kept are their codes, which the encoder gave them in sight of the rest.
            parts: what the picture shall show, as in `generate`; by default nothing is said.
            **sampling: fields of `Sampling`; greedy by default.
        """
        given, v = self._given(picture, ImagePart), self.vocabulary
        patch, (height, width) = self.tokenizers["image"].config.patch, given.codes.shape
        kept = height // 2 if rows is None else rows // patch
        if rows is not None and (rows % patch or not 0 <= kept <= height):
            raise InputError(f"rows: found {rows}, expected a multiple of {patch} from 0 to {height * patch}")
        prefix = [v.image, v.height(height), v.width(width), *v.to_global("image", given.codes[:kept]).ravel()]
        return self._to_media(self._answer([self._prompt(parts)], "image", Sampling.of(**sampling), prefix)[0])[0]

    def extend(self, sound: Any, seconds: float = 1.0, parts: Any = (), **sampling: Any) -> Sound:
        """Let a sound go on: its reconstruction, and what the model hears behind it.

        Args:
            sound: in any form that `caption` takes.
            seconds: how much may be added; the model may end the sound before.
            parts: what the sound shall be, as in `generate`; by default nothing is said.
            **sampling: fields of `Sampling` but `max_new_tokens`; greedy by default.
        """
        if not 0 < seconds < math.inf:
            raise InputError(f"seconds: found {seconds}, expected more than 0")
        given, v, tokenizer = self._given(sound, AudioPart), self.vocabulary, self.tokenizers["audio"]
        times = math.ceil(seconds * tokenizer.codes_per_second / tokenizer.bands)
        if "max_new_tokens" in sampling:
            raise InputError(f"max_new_tokens: found {sampling['max_new_tokens']!r:.40}, expected seconds alone")
        limited = Sampling.of(**sampling, max_new_tokens=times * tokenizer.bands)
        prefix = [v.audio, *v.to_global("audio", given.codes).ravel()]
        return self._to_media(self._answer([self._prompt(parts)], "audio", limited, prefix)[0])[0]

    def _given(self, medium: Any, kind: type[Part]) -> Part:
        """The codes of a picture or sound. Raises InputError when it is another."""
        part = self.encode_parts([self._as_media(medium)])[0]
        if not isinstance(part, kind):
            raise InputError(f"found {part.kind}, expected {kind.kind}")
        return part

    def stream(self, parts: Any, out: str = "text", size: tuple[int, int] | None = None, **sampling: Any) -> Iterator[Media]:
        """Like `generate`, but yields text in pieces as it is written, and pictures and sounds when they are whole."""
        v, decode = self.vocabulary, self.tokenizers["text"].decode
        prefix = self._size_prefix(out, size)
        pending, shown = list(prefix), 0
        for step in steps(self.decoder, self.grammar, [self._prompt(parts)], out, Sampling.of(**sampling), prefix, self._weights):
            ident = int(step[0])
            writing = bool(pending) and v.kind(pending[0]) == "text"
            if writing and v.kind(ident) != "text":
                # Bytes that did not become a character were held back.
                if rest := decode(pending)[shown:]:
                    yield rest
                pending, shown = [], 0
            if ident in (v.end, v.pad):
                break
            pending.append(ident)
            if v.kind(pending[0]) == "text":
                text = decode(pending)
                # A character may need several byte pieces: wait until it is whole.
                if not text.endswith("\ufffd") and len(text) > shown:
                    yield text[shown:]
                    shown = len(text)
            elif ident in (v.image_end, v.audio_end):
                yield from self._to_media(pending)
                pending = []

    def _prompt(self, parts: Any) -> Prompt:
        media = [item if isinstance(item, str) else self._as_media(item) for item in (parts if _is_list(parts) else [parts])]
        return prompt(Document((Turn("user", tuple(self.encode_parts(media))),)), self.vocabulary)

    def _size_prefix(self, out: str, size: tuple[int, int] | None) -> list[int]:
        if out != "image" or "image" not in self.tokenizers:
            return []
        config = self.tokenizers["image"].config
        if size is None:
            if config.side is None:
                return []
            size = (config.side, config.side)
        if any(edge % config.patch for edge in size):
            raise InputError(f"size: found {size}, expected multiples of {config.patch}")
        v = self.vocabulary
        return [v.image, v.height(size[0] // config.patch), v.width(size[1] // config.patch)]

    # -- Media and ids ---------------------------------------------------------------------------------------

    def tokenize(self, parts: Any) -> list[int]:
        """Text, pictures and sounds (as in `generate`) -> ids of a plain document, <bos> and <eos> included."""
        media = [item if isinstance(item, str) else self._as_media(item) for item in (parts if _is_list(parts) else [parts])]
        document = Document((Turn(None, tuple(self.encode_parts(media))),))
        return render(document, self.vocabulary).ids.tolist()

    def detokenize(self, ids: Sequence[int]) -> list[Media]:
        """Ids of a document -> its text (str), pictures (PIL) and sounds (`Sound`) in order."""
        return [self._decode(part) for turn in parse(ids, self.vocabulary).turns for part in turn.parts]

    def _to_media(self, ids: Sequence[int]) -> list[Media]:
        v = self.vocabulary
        return self.detokenize([v.bos, *map(int, ids), v.eos])

    def encode_parts(self, media: Sequence[str | Image | Audio]) -> list[Part]:
        """Text, pictures and sounds -> parts of codes and features; media of a kind go through their tokenizer together."""
        parts: list[Part | None] = [None] * len(media)
        for kind, mark, make in (("image", Image, ImagePart), ("audio", Audio, AudioPart)):
            places = [i for i, item in enumerate(media) if isinstance(item, mark)]
            if places and kind not in self.tokenizers:
                raise InputError(f"found {kind}, but this model has tokenizers for {', '.join(self.tokenizers)} only")
            embed = lambda chosen: self.tokenizers[kind].embed_batch([self._read(media[i]) for i in chosen])  # noqa: B023, E731
            for i, encoding in self._in_batches(embed, places):
                parts[i] = make(*encoding)
        for i, item in enumerate(media):
            if isinstance(item, str):
                parts[i] = TextPart(self.tokenizers["text"].encode(item))
        return parts

    def _read(self, item: Image | Audio) -> torch.Tensor:
        data, name = item.data, None
        if isinstance(data, (str, Path)):
            name = str(data)
            data = FileSource(name).read()
        if isinstance(item, Image):
            return load_image(data, name)
        return load_audio(data, self.tokenizers["audio"].rate, name, item.rate)

    def _decode(self, part: Part) -> Media:
        tokenizer = self.tokenizers[part.kind]
        if isinstance(part, TextPart):
            return tokenizer.decode(part.ids.tolist())
        if isinstance(part, ImagePart):
            return PILImage.fromarray(tokenizer.decode(part.codes).permute(1, 2, 0).numpy())
        return Sound(self._voice.decode(part.codes).numpy(), tokenizer.rate)

    @cached_property
    def _voice(self) -> Tokenizer:
        """What makes sounds: the audio tokenizer or, where it lacks a vocoder and the codes are the same, the shipped one."""
        own = self.tokenizers["audio"]
        if getattr(own, "vocoder", own) is None:
            shipped = load_tokenizer(find_shipped(AUDIO_TOKENIZER))
            if shipped.fingerprint == own.fingerprint:
                return shipped
        return own

    def _as_media(self, item: Any) -> Image | Audio:
        """What something is when it is not marked as `Image` or `Audio`."""
        if isinstance(item, (Image, Audio)):
            return item
        if isinstance(item, Sound):
            return Audio(item.samples, item.rate)
        if isinstance(item, PILImage.Image):
            return Image(item)
        if isinstance(item, (np.ndarray, torch.Tensor)):
            return Audio(item) if item.ndim == 1 else Image(item)
        if isinstance(item, (str, Path)):
            with open_binary(str(item)) as file:
                kind = kind_of(str(item), file.read(64))
            if kind is None:
                raise InputError(f"{item}: found neither a picture nor a sound that can be read")
            return (Image if kind == "image" else Audio)(str(item))
        raise InputError(f"found {type(item).__name__}, expected a path, PIL image, array, tensor, Image or Audio")


def _in_threads(run: Callable[[Any], Any], items: Sequence[Any], threads: int) -> list[Any]:
    """`run` each item, `threads` of them at a time, each of which lets torch use one thread only."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, items))
    finally:
        torch.set_num_threads(before)   # what the threads set is also what new ones of the caller would start with


def _is_list(item: Any) -> bool:
    """Whether several media are given; a `Sound` is a tuple, but one medium."""
    return isinstance(item, (list, tuple)) and not isinstance(item, Sound)
