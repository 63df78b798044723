"""The public Python API: pictures, sounds and text in; text, pictures and sounds out.

    model = mmtx.load()                                   # the small model that comes with the package
    model.caption("cat.png")                              # 'cat'
    model.caption(["cat.png", "trumpet.wav"])             # ['cat', 'trumpet, C 4']
    model.generate([Path("cat.png")], out="text")
    model.generate("cat", out="image", temperature=1.0)    # a PIL image

Shapes: C channels, H height, W width, S samples.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from io import IOBase
from numbers import Integral, Real
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from PIL import Image as PILImage

from mmtx.ambient import MOST_THREADS, in_threads, neutral, neutral_steps
from mmtx.atomic_folder import replace_folder
from mmtx.attention import AttentionMaps, attention_maps
from mmtx.data.sound_files import MAX_SECONDS
from mmtx.data.storage import FileSource, display
from mmtx.document import Document, MediaPart, Part, TextPart, Turn
from mmtx.errors import InputError
from mmtx.files import Content, user_name
from mmtx.grammar import Grammar
from mmtx.hub import model_card, push
from mmtx.inference.choose import choose_engine
from mmtx.inference.classification import Labels, label_ends
from mmtx.inference.engine import pad
from mmtx.inference.generation import Choose, generate, steps
from mmtx.inference.row import prepack_weights
from mmtx.inference.sampling import Sampling
from mmtx.inference.transcription import cut_at_pauses, transcribe
from mmtx.inference.weights import Weights
from mmtx.medium import Audio, BaseMedium, Media, ReadMedium, Sound, as_medium, check_open, to_array, to_sound
from mmtx.modality.base import Encoding, Tokenizer, load_tokenizer, media_tokenizer
from mmtx.modality.encoder import build_encoder
from mmtx.modality.registry import MODALITIES, media_kinds
from mmtx.model import Decoder
from mmtx.model_folder import WEIGHTS, model_files, read_model
from mmtx.schema import typed, within
from mmtx.sequence import Prompt, parse, prompt, render
from mmtx.shipped_files import shipped
from mmtx.vocabulary import Vocabulary
from mmtx.weights import load_module, weights_of

if TYPE_CHECKING:
    from mmtx.modality.image import ImageConfig, ImageTokenizer

DTYPES = ("float32", "bfloat16", "float16")
AUDIO_TOKENIZER = "tokenizers/audio"
BATCH = 32  # most media encoded together, and most prompts answered together
# A batch never holds more than this, except for a single medium or prompt that is larger: memory depends on the longest of
# many, not on their number. On a CPU up to MOST_THREADS batches run at a time.
BATCH_TOKENS = 16_384   # of prompts, padding included
BATCH_VALUES = 2 ** 21  # values of media as their tokenizer reads them: 131 s of sound, or 170 pictures of 64 pixels a side
SHORT = 64              # length of a prompt in tokens up to which padding costs less than another batch


@neutral()
def load(folder: str | Path | None = None, device: str | torch.device | None = None, load_in_8bit: bool = False,
         dtype: str | torch.dtype = "float32") -> "Model":
    """Load a model folder.

    Args:
        folder: a folder written by training, or the name of a model on the Hugging Face hub ("user/model", "user/model@revision");
            by default the small model that comes with the package, regardless of the current directory.
        device: by default the GPU if there is one.
        load_in_8bit: decode with 8-bit weights, on a CPU: long answers are faster, and occasionally another token is the best.
            Everything but decoding keeps full precision.
        dtype: of the decoder's weights, one of DTYPES: "bfloat16" halves their memory and the time to read them, on a GPU and on a
            CPU with instructions for it (AVX512-BF16), and keeps 8 bits of precision of each.

    Raises:
        InputError: the folder is not a complete model, or does not fit its tokenizers; 8 bits on a device other than a CPU;
            another dtype.
    """
    if (name := str(dtype).removeprefix("torch.")) not in DTYPES:
        raise InputError(f"dtype: found {str(dtype)!r:.40}, expected one of {', '.join(DTYPES)}")
    config, vocabulary, tokenizers, folder = read_model(folder)
    decoder = load_module(lambda: Decoder(config, build_encoder), folder / WEIGHTS)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder.to(getattr(torch, name))
    return Model(decoder, vocabulary, tokenizers).to(device).prepare_for_inference(load_in_8bit)


_LAYING_OUT = threading.Lock()  # shared by all models: a model with a lock of its own could not be pickled


class Model:
    """A decoder with its tokenizers, as `mmtx.load` returns it.

    Many threads may use one model concurrently, and each gets the answers that it would get alone; only `to`,
    `prepare_for_inference` and changes of the weights must not overlap with other calls. A model can be copied (`copy.deepcopy`),
    pickled, and used in other processes, spawned or forked. Torch's threads do not survive a fork, so the first call in the child
    sets torch to one thread. With the start method "forkserver", the default of Python 3.14, a model is too many file descriptors
    for an argument: call `torch.multiprocessing.set_sharing_strategy("file_system")` first, or load the model in the child.
    Global settings of torch in the program do not change answers (`mmtx.ambient`).
    """

    @typed
    def __init__(self, decoder: Decoder, vocabulary: Vocabulary, tokenizers: Mapping[str, Tokenizer]):
        self.decoder, self.vocabulary, self.tokenizers = decoder, vocabulary, dict(tokenizers)
        self.grammar = Grammar(vocabulary)
        self._weights: Weights | None = None
        self._laid_out: tuple = ()  # `_versions` when `_weights` were made

    def __getstate__(self) -> dict[str, Any]:
        # The laid-out weights are views of parameters, which can be remade but not copied.
        return {**self.__dict__, "_weights": None if self._weights is None else self._weights.in_8_bits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _weights=None)
        if state["_weights"] is not None:
            self.prepare_for_inference(state["_weights"])

    @neutral()
    def prepare_for_inference(self, load_in_8bit: bool = False) -> "Model":
        """Lay out the decoder's weights for decoding, which makes long answers to one prompt on a CPU up to twice as fast.

        `mmtx.load` calls it, and explains `load_in_8bit`. Call it again after `to`. If weights have changed since, by training or
        `load_state_dict`, the next answer lays them out again; changes through `Parameter.data` are not detected.
        """
        device = self.decoder.embedding.weight.device
        if load_in_8bit and device.type != "cpu":
            raise InputError(f"load_in_8bit: found the device {device}, expected cpu")
        if device.type == "cpu":
            prepack_weights(self.decoder)
        self._weights = Weights.of(self.decoder, fixed=True, load_in_8bit=load_in_8bit)
        self._laid_out = self._versions()
        return self

    def _versions(self) -> tuple[tuple[int, int], ...]:
        """The address of each weight of the decoder, and how often it was written to."""
        return tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in self.decoder.parameters())

    def _ready(self) -> Weights | None:
        """The weights as laid out for decoding, laid out again if they have changed."""
        if self._weights is not None and self._laid_out != self._versions():
            with _LAYING_OUT:
                if self._laid_out != self._versions():
                    self.prepare_for_inference(self._weights.in_8_bits)
        return self._weights

    @neutral()
    def to(self, device: str | torch.device) -> "Model":
        """Move the decoder and the codecs to a device."""
        self._weights = None
        try:
            place = torch.device(device)
            if place.type == "meta":
                raise RuntimeError("it holds no values")
            for module in (self.decoder, *self.tokenizers.values()):
                if isinstance(module, torch.nn.Module):
                    module.to(place).eval()
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # AssertionError: torch was built without CUDA
            raise InputError(f"device: {device} cannot be used ({str(error).splitlines()[0]})") from None
        return self

    def save(self, folder: str | Path) -> None:
        """Write a self-contained model folder, atomically.

        Raises InputError if the folder holds something that mmtx did not write, or if there is no room.
        """
        replace_folder(folder, self._files())

    def push_to_hub(self, name: str, private: bool | None = None) -> str:
        """Upload the model folder to the Hugging Face hub as "user/model", with a model card -> its URL.

        An existing card that mmtx did not write is kept. Credentials are those of `hf auth login` or HF_TOKEN. `private` is the
        visibility of a new repository; None: as in the user's settings. Raises InputError if the hub refuses, or is unreachable.
        """
        count = sum(parameter.numel() for parameter in self.decoder.parameters())
        card = model_card(name, self.decoder.config, self.vocabulary, count, self.vocabulary.chat_format is not None)
        return push(name, self.save, card, private)

    def _files(self) -> Iterator[tuple[str, Content]]:
        return model_files(self.decoder.config, weights_of(self.decoder), self.vocabulary, self.tokenizers)

    # -- Captions --------------------------------------------------------------------------------------------

    @neutral()
    def caption(self, media: Any, *, start_index: int = 0, **sampling: Any) -> str | list[str]:
        """Caption pictures or sounds.

        Args:
            media: a path or URL, PIL image, array, tensor, `Image` or `Audio`, or a list of these. A 1-D array is a
                sound at the model's sample rate (use `Audio` for another), any other array a picture; an array that could
                be a multi-channel sound must be marked as `Image` or `Audio`. An iterator and a column of pandas count as lists.
            start_index: index of the first medium if a longer list is captioned in parts: with a `seed`, the random
                choices of an answer depend on its index.
            **sampling: fields of `Sampling`; greedy by default.

        Returns:
            A caption, or a list of captions for a list. Many at once are much faster than one by one: up to 32 of
            about the same length share a batch, within limits on memory (`BATCH_TOKENS`, `BATCH_VALUES`).
        """
        if not (isinstance(start_index, Integral) and start_index >= 0):
            raise InputError(f"start_index: found {start_index!r:.100}, expected a whole number, 0 or more")
        if not _is_list(media):
            return self.caption([media], start_index=start_index, **sampling)[0]
        parts = self.encode_parts(self._map_numbered(media, as_medium), codes=False)
        documents = [Document((Turn("user", (part,)),)) for part in parts]
        return self._answer_texts(documents, Sampling.of(**sampling), start_index)

    @neutral()
    def caption_documents(self, documents: Iterable[Document], sampling: Sampling = Sampling()) -> list[str]:
        """Answer documents of codes (everything up to the last user turn) with text."""
        if not isinstance(sampling, Sampling):
            raise InputError(f"sampling: found {type(sampling).__name__}, expected a Sampling")
        return self._answer_texts(_asked(documents), sampling)

    @neutral()
    def classify(self, media: Any, candidate_labels: Iterable[str],
                 question: str | None = None) -> dict[str, float] | list[dict[str, float]]:
        """Say which of some labels fits a picture or sound best, and with which probability.

        The probability of a label is that of answers that are the label, or begin with it and go on after a punctuation mark, as
        "trumpet, C 4" does for "trumpet"; divided by the sum over all labels, as if no other answer were possible.

        Args:
            media: one picture or sound, or a list of them, in any form that `caption` takes.
            candidate_labels: at least two different texts, best those that the model was trained to answer.
            question: asked about each medium, as in training; by default none, as in `caption`.

        Returns:
            The labels with their probabilities, the most likely first; for a list of media, a list of that.
        """
        if not _is_list(media):
            return cast(list, self.classify([media], candidate_labels, question))[0]
        if not isinstance(question, str | None):
            raise InputError(f"question: found {type(question).__name__}, expected text")
        asked = self._parts([] if question is None else [question])
        parts = self.encode_parts(self._map_numbered(media, as_medium), codes=False)
        return self.classify_documents([Document((Turn("user", (part, *asked)),)) for part in parts], candidate_labels)

    @neutral()
    def classify_documents(self, documents: Iterable[Document], candidate_labels: Iterable[str]) -> list[dict[str, float]]:
        """`classify` for documents of codes (everything up to the last user turn)."""
        texts = typed_list(candidate_labels, "candidate_label", str, "text")
        labels = Labels.of(texts, self.tokenizers["text"], self._label_ends)
        prompts = [prompt(document, self.vocabulary) for document in _asked(documents)]
        write = lambda chosen: [labels.probabilities(self.decoder, self.grammar, prompts[i], self._ready()) for i in chosen]
        return [found for _, found in self._in_batches(write, [[number] for number in range(len(prompts))])]

    @cached_property
    def _label_ends(self) -> torch.Tensor:
        return label_ends(self.tokenizers["text"], self.vocabulary)

    @neutral()
    def transcribe(self, sounds: Any, *, chunk_length_s: float = 3.5) -> str | list[str]:
        """Transcribe speech; `caption`, in contrast, describes a sound.

        Args:
            sounds: a sound in any form that `caption` takes, or a list of them.
            chunk_length_s: seconds; longer sounds are cut at pauses, and the transcripts of the pieces are joined. Best is
                the length of most training sounds; the default is that of `demos/speech`.

        Returns:
            A transcript, or a list for a list.

        Raises:
            InputError: a picture, or a model that was not trained with CTC (`model.ctc` of a training configuration).
        """
        self._check_transcribes()
        if not _is_list(sounds):
            return self.transcribe([sounds], chunk_length_s=chunk_length_s)[0]
        within("chunk_length_s", chunk_length_s, 0.1, MAX_SECONDS)
        media = self._map_numbered(sounds, as_medium)
        tokenizer: Any = self.tokenizers.get("audio")
        said: list[list[str]] = [[] for _ in media]
        held: list[tuple[int, torch.Tensor]] = []  # pieces, each with the index of its sound
        for number, medium in enumerate(media):
            with numbered("item", number, len(media)):
                if medium.kind != "audio":
                    raise InputError(f"found {medium.kind}, expected audio")
                held += [(number, piece) for piece in cut_at_pauses(self.read_medium(medium).data, tokenizer.rate, chunk_length_s)]
            if sum(len(piece) for _, piece in held) >= BATCH_VALUES or number == len(media) - 1:
                # Each piece is a new sound, so it gets the loudness of those in training.
                parts = self.encode_parts([Audio(piece, tokenizer.rate) for _, piece in held], codes=False)
                for (owner, _), text in zip(held, self.transcribe_documents([Document((Turn("user", (part,)),)) for part in parts])):
                    said[owner].append(text.strip())
                held.clear()
        return [" ".join(filter(None, texts)) for texts in said]

    @neutral()
    def transcribe_documents(self, documents: Iterable[Document]) -> list[str]:
        """Transcribe the sound with which the last user turn of each document ends."""
        self._check_transcribes()
        text, asked = self.tokenizers["text"], _asked(documents)
        for number, document in enumerate(asked):
            if not any(isinstance(part, MediaPart) and part.kind == "audio" and part.features is not None
                       for turn in document.turns[-1:] for part in turn.parts):
                with numbered("document", number, len(asked)):
                    raise InputError("found no sound with its features in the last user turn, expected one")
        said = self._answer_texts(asked, Sampling())
        prompts = [prompt(document, self.vocabulary) for document in asked]
        write = lambda chosen: [transcribe(self.decoder, self.vocabulary, text, prompts[i], said[i]) for i in chosen]
        return [transcript for _, transcript in self._in_batches(write, [[number] for number in range(len(prompts))])]

    @property
    def transcribes(self) -> bool:
        """Whether the model was trained to transcribe (`model.ctc` of a training configuration)."""
        return self.decoder.config.ctc_blocks is not None

    def _check_transcribes(self) -> None:
        if not self.transcribes:
            raise InputError("this model does not transcribe: found ctc_blocks null in its config.json, expected a number, which "
                             "training with model.ctc sets; demos/speech is a model that transcribes")

    def _answer_texts(self, documents: Sequence[Document], sampling: Sampling, first: int = 0) -> list[str]:
        answers = self._answer([prompt(document, self.vocabulary) for document in documents], "text", sampling, first=first)
        return [self.tokenizers["text"].decode(ids) for ids in answers]

    def _answer(self, prompts: Sequence[Prompt], out: str, sampling: Sampling,
                prefix: Sequence[int] = (), first: int = 0) -> list[list[int]]:
        """The ids of each answer, with `prefix` but without <end>; `first` is the index of the first prompt in a longer list."""
        answers: list[list[int]] = [[]] * len(prompts)
        write = lambda chosen: generate(self.decoder, self.grammar, [prompts[i] for i in chosen], out, sampling,
                                        prefix, weights=self._ready(), places=[first + i for i in chosen])
        for i, ids in self._in_batches(write, by_length([len(prompt.ids) for prompt in prompts])):
            answers[i] = ids[:-1].tolist()
        return answers

    def _in_batches(self, run: Callable[[Sequence[int]], Sequence[Any]],
                    batches: Sequence[Sequence[int]]) -> Iterator[tuple[int, Any]]:
        """Run batches of indices -> each index with its result.

        On a CPU several batches run at a time, in one thread each. Torch would instead split each operation among as many
        threads: operations are too small for that, and reading media would not run in parallel at all.
        """
        on_cpu = self.decoder.embedding.weight.device.type == "cpu"
        threads = min(torch.get_num_threads(), MOST_THREADS, len(batches)) if on_cpu else 1
        results = map(run, batches) if threads < 2 else in_threads(run, batches, threads)
        for batch, items in zip(batches, results, strict=True):
            yield from zip(batch, items, strict=True)

    # -- Generation ------------------------------------------------------------------------------------------

    @neutral()
    def generate(self, parts: Any, out: str = "text", size: tuple[int, int] | None = None, **sampling: Any) -> Any:
        """Answer a prompt with text, a picture or a sound.

        Args:
            parts: text (str), pictures and sounds (`Path`, PIL image, array, tensor, `Image`, `Audio`), or a list of them.
            out: "text", "image" or "audio"; with "any" the model chooses. With "document" there is no question and no answer:
                the parts are the beginning of a plain document, as in training data of text alone, and the model goes on with it.
            size: height and width of a picture in pixels, multiples of the tokenizer's patch; by default the tokenizer's size.
            **sampling: fields of `Sampling`; greedy by default.

        Returns:
            str, PIL image or `Sound`; for "any" and "document" a list of these.
        """
        return self.generate_batch([parts], out, size, **sampling)[0]

    @neutral()
    def generate_batch(self, prompts: Iterable[Any], out: str = "text", size: tuple[int, int] | None = None,
                       **sampling: Any) -> list[Any]:
        """`generate` for each prompt; many at once are much faster than one by one."""
        prefix = self._size_prefix(out, size)
        asked = self._map_numbered([*iterate(prompts, "prompt")], lambda parts: self._prompt(parts, out), "prompt")
        answers = [self._to_media(ids) for ids in self._answer(asked, out, Sampling.of(**sampling), prefix)]
        return answers if out in ("any", "document") else [answer[0] if answer else "" for answer in answers]

    @neutral()
    def outpaint(self, picture: Any, rows: int | None = None, parts: Any = (), **sampling: Any) -> PILImage.Image:
        """Keep the top of a picture and draw the rest.

        Args:
            picture: in any form that `caption` takes.
            rows: number of pixel rows to keep, of the picture in the tokenizer's size; a multiple of its patch, by default
                the upper half. Their codes are kept, which the encoder computed from the whole picture.
            parts: what the picture is to show, as in `generate`; by default no prompt.
            **sampling: fields of `Sampling`; greedy by default.
        """
        if rows is not None and not isinstance(rows, Integral):
            raise InputError(f"rows: found {rows!r:.100}, expected a whole number")
        given, v = self._encode_one(picture, "image"), self.vocabulary
        patch, (height, width) = self._image_config.patch, given.array.shape
        kept = height // 2 if rows is None else rows // patch
        if not 0 <= kept <= height or (rows is not None and rows % patch):
            raise InputError(f"rows: found {rows}, expected a multiple of {patch} from 0 to {height * patch}")
        prefix = [v.image, v.height(height), v.width(width), *v.to_global("image", given.array[:kept]).ravel()]
        (ids,) = self._answer([self._prompt(parts)], "image", Sampling.of(**sampling), prefix)
        return cast(PILImage.Image, self._to_media(ids)[0])

    @neutral()
    def continue_audio(self, sound: Any, seconds: float = 1.0, parts: Any = (), **sampling: Any) -> Sound:
        """Continue a sound -> its reconstruction, followed by the continuation.

        Args:
            sound: in any form that `caption` takes.
            seconds: most seconds to add; the model may end the sound earlier.
            parts: what the sound is to be, as in `generate`; by default no prompt.
            **sampling: fields of `Sampling` except `max_new_tokens`; greedy by default.
        """
        if not (isinstance(seconds, Real) and 0 < seconds <= MAX_SECONDS):
            raise InputError(f"seconds: found {seconds!r:.100}, expected more than 0, up to {MAX_SECONDS}")
        given, v, tokenizer = self._encode_one(sound, "audio"), self.vocabulary, self.tokenizers["audio"]
        times = math.ceil(seconds * tokenizer.codes_per_second / tokenizer.bands)
        if "max_new_tokens" in sampling:
            raise InputError(f"max_new_tokens: found {sampling['max_new_tokens']!r:.40}, expected `seconds` instead")
        limited = Sampling.of(**sampling, max_new_tokens=times * tokenizer.bands)
        prefix = [v.audio, *v.to_global("audio", given.codes).ravel()]
        return self._to_media(self._answer([self._prompt(parts)], "audio", limited, prefix)[0])[0]

    def _encode_one(self, medium: Any, kind: str) -> Part:
        """The encoded part of a medium. Raises InputError if it is of another kind."""
        part = self.encode_parts([as_medium(medium)])[0]
        if part.kind != kind:
            raise InputError(f"found {part.kind}, expected {kind}")
        return part

    @neutral_steps
    def stream(self, parts: Any, out: str = "text", size: tuple[int, int] | None = None, **sampling: Any) -> Iterator[Media]:
        """As `generate`, but yields text and sounds in pieces as they are generated, and pictures when they are complete.

        The samples of all pieces of a sound are those of `generate`, up to rounding. A code affects samples of its own chunk and of
        `vocoder.context` frames around it (with the shipped codec, chunks of 0.8 s, and 0.28 s), so a piece comes once all codes
        that affect it are generated. Without a vocoder a sound comes only when complete, since Griffin-Lim needs all of it.
        """
        v, decode = self.vocabulary, self.tokenizers["text"].decode
        prefix = self._size_prefix(out, size)
        pending, shown, closing = list(prefix), 0, {v.closing(kind) for kind in v.media}
        begins = v.opening("audio") if "audio" in v.media and getattr(self._sound_decoder, "vocoder", None) is not None else None
        asked = steps(self.decoder, self.grammar, [self._prompt(parts, out)], out, Sampling.of(**sampling), prefix, self._ready())
        ids = (int(step[0]) for step in asked)
        for ident in ids:
            writing = bool(pending) and v.kind(pending[0]) == "text"
            if writing and (v.kind(ident) != "text" or ident == v.end):  # in a chat format <end> is text, too
                # Bytes of an incomplete character were held back.
                if rest := decode(pending)[shown:]:
                    yield rest
                pending, shown = [], 0
            if ident in (v.end, v.eos, v.pad):
                break
            if ident == begins:
                yield from self.stream_sound(ids)
                continue
            pending.append(ident)
            if v.kind(pending[0]) == "text":
                text = decode(pending)
                # A character may need several byte pieces: wait until it is complete.
                if not text.endswith("\ufffd") and len(text) > shown:
                    yield text[shown:]
                    shown = len(text)
            elif ident in closing:
                yield from self._to_media(pending)
                pending = []

    @neutral_steps
    def stream_sound(self, ids: Iterator[int]) -> Iterator[Sound]:
        """Consume ids up to the end of a sound -> the sound in pieces, or whole without a vocoder, as `stream` explains."""
        self._check_kind("audio")
        if getattr(self._sound_decoder, "vocoder", None) is None:
            yield to_sound(self._sound_decoder, np.concatenate([*self._time_steps(ids)]))
            return
        for samples in self._sound_decoder.decode_stream(self._time_steps(ids)):
            yield Sound(samples.numpy(), self._sound_decoder.rate)

    def _time_steps(self, ids: Iterator[int]) -> Iterator[np.ndarray]:
        """Consume ids up to the end of a sound -> its codes, one time step (1, bands) at a time."""
        v, step = self.vocabulary, []
        for ident in ids:
            if ident == v.closing("audio"):
                return
            if ident != v.opening("audio"):
                step.append(ident)
            if len(step) == v.bands("audio"):
                yield v.to_local("audio", np.array(step))[None]
                step = []

    @neutral_steps
    def stream_ids(self, prompts: Sequence[Prompt], out: str = "text", size: tuple[int, int] | None = None,
                   sampling: Sampling = Sampling(), places: Sequence[int] | None = None, wanted: torch.Tensor | None = None,
                   choose: Choose = choose_engine) -> Iterator[torch.Tensor]:
        """Ids of the answers to prompts, one per prompt (B,) at a time, as in `inference.generation.steps`.

        The ids that `size` determines are included, so that each row of the batch gets a complete answer.
        """
        prefix = self._size_prefix(out, size)
        for ident in prefix:
            yield torch.full((len(prompts),), ident)
        yield from steps(self.decoder, self.grammar, prompts, out, sampling, prefix, self._ready(), places, choose, wanted)

    def _prompt(self, parts: Any, out: str = "text", codes: bool = False) -> Prompt:
        """The parts of `generate` as a user turn, or as the beginning of a plain document; `codes` as in `encode_parts`."""
        plain = out == "document"  # outside of user turns, media are codes
        return prompt(Document((Turn(None if plain else "user", self._parts(parts, codes or plain)),)), self.vocabulary)

    def _parts(self, parts: Any, codes: bool = True) -> tuple[Part, ...]:
        """The parts of `generate`, encoded; a str is always text, never a path."""
        as_media = lambda item: item if isinstance(item, str) else as_medium(item)
        return tuple(self.encode_parts(self._map_numbered(parts if _is_list(parts) else [parts], as_media), codes))

    @staticmethod
    def _map_numbered(items: Iterable[Any], make: Callable[[Any], Any], name: str = "item") -> list[Any]:
        """Apply `make` to each item; errors state its number."""
        items, made = [*items], []
        for number, item in enumerate(items):
            with numbered(name, number, len(items)):
                made.append(make(item))
        return made

    @property
    def _image_config(self) -> "ImageConfig":
        return cast("ImageTokenizer", self.tokenizers["image"]).config

    def _size_prefix(self, out: str, size: tuple[int, int] | None) -> list[int]:
        if not isinstance(out, str):
            raise InputError(f"out: found {type(out).__name__}, expected one of {', '.join(self.grammar.rules.starts)}")
        if out not in self.grammar.rules.starts:
            raise InputError(f"out: found {out!r:.40}, expected one of {', '.join(self.grammar.rules.starts)}")
        if out != "image" or "image" not in self.tokenizers:
            if size is not None:
                raise InputError(f"size: found {size!r:.100} with out={out!r}, expected it only with out='image'")
            return []
        config = self._image_config
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

    # -- Vectors ---------------------------------------------------------------------------------------------

    def embed(self, parts: Any) -> np.ndarray:
        """Text, pictures and sounds (as in `generate`) -> a unit vector (D,): the normalised mean of the final hidden states."""
        return self.embed_prompt(self._prompt(parts))

    @neutral()
    def embed_prompt(self, asked: Prompt) -> np.ndarray:
        """As `embed`, for a prompt."""
        if not isinstance(asked, Prompt):
            raise InputError(f"prompt: found {type(asked).__name__}, expected a Prompt; `embed` takes text and media")
        device = self.decoder.embedding.weight.device
        with torch.inference_mode():
            ids, _, features = pad([asked], device)
            hidden = self.decoder(ids, torch.arange(ids.shape[1], device=device)[None], features=features)[0].float().mean(0)
            return torch.nn.functional.normalize(hidden, dim=0).cpu().numpy()

    @neutral()
    def attention(self, parts: Any, answer: str | None = None) -> AttentionMaps:
        """What each word of an answer, and everything before it, attends to.

        Args:
            parts: as in `generate`.
            answer: the answer to explain; by default the model's own, greedy.
        """
        asked = self._prompt(parts, codes=True)  # the maps show codes
        ids = self._answer([asked], "text", Sampling())[0] if answer is None else self.tokenizers["text"].encode(answer)
        return attention_maps(self.decoder, self.vocabulary, self.tokenizers, asked, ids)

    # -- Media and ids ---------------------------------------------------------------------------------------

    @neutral()
    def tokenize(self, parts: Any, format: Literal["document", "chat"] = "document", out: str = "text") -> list[int]:
        """Text, pictures and sounds (as in `generate`) -> their ids.

        By default those of a plain document, with <bos> and <eos>; with "chat", those of the prompt that `generate` would answer
        with `out`, for engines that take ids.
        """
        if format not in ("document", "chat"):
            raise InputError(f"format: found {format!r:.40}, expected document or chat")
        if format == "document" and out != "text":
            raise InputError(f"out: found {out!r:.40} with format='document', expected it only with format='chat'")
        if format == "chat":
            return [*self._prompt(parts, codes=True).ids.tolist(), *self._size_prefix(out, None)]
        return render(Document((Turn(None, self._parts(parts)),)), self.vocabulary).ids.tolist()

    @neutral()
    def detokenize(self, ids: Sequence[int]) -> list[Media]:
        """Ids of a document -> its text (str), pictures (PIL) and sounds (`Sound`) in order."""
        return [self._decode(part) for turn in parse(self._checked(ids), self.vocabulary).turns for part in turn.parts]

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

    def _to_media(self, ids: Sequence[int]) -> list[Media]:
        v = self.vocabulary
        return self.detokenize([v.bos, *self._checked(ids), v.eos])

    @neutral()
    def read_medium(self, item: BaseMedium) -> ReadMedium:
        """Decode a medium, so that `encode_parts` can encode it together with others. Raises InputError if it is not valid."""
        item = as_medium(item)
        self._check_kind(item.kind)
        medium = self._read(item)
        return ReadMedium(item.kind, medium, media_tokenizer(self.tokenizers, item.kind).grid(medium))

    @neutral()
    def encode_documents(self, documents: Iterable[Document], codes: bool = True) -> list[Document]:
        """Encode each `ReadMedium` in documents, with the same result as if it were encoded alone.

        Without `codes`, codes are 0 where that changes no answer: in user turns, if the decoder reads patches.
        """
        documents = _documents(documents)
        codes = codes or any(isinstance(part, ReadMedium) and turn.role != "user" for document in documents
                             for turn in document.turns for part in turn.parts)
        parts = iter(self.encode_parts([part for document in documents for turn in document.turns for part in turn.parts], codes))
        return [Document(tuple(replace(turn, parts=tuple(next(parts) for _ in turn.parts)) for turn in document.turns))
                for document in documents]

    def prompt_length(self, document: Document) -> int:
        """Number of tokens of a document's prompt; its media need not be encoded yet."""
        (document,) = _documents([document])
        read = lambda medium: medium if isinstance(medium, ReadMedium) else self.read_medium(medium)
        blank = lambda part: read(part).blank if isinstance(part, BaseMedium) else part
        turns = tuple(replace(turn, parts=tuple(map(blank, turn.parts))) for turn in document.turns)
        return len(prompt(Document(turns), self.vocabulary).ids)

    def _check_kind(self, kind: str) -> None:
        if kind not in self.tokenizers:
            raise InputError(f"found {kind}, but this model has tokenizers for {', '.join(self.tokenizers)} only")

    @neutral()
    def encode_parts(self, media: Iterable[str | BaseMedium | Part], codes: bool = True) -> list[Part]:
        """Text and media -> parts of codes and features; media of a kind are encoded in batches.

        Without `codes`, codes are 0 if the model has its own encoder, and so does not read them in a user turn.
        """
        media = typed_list(media, "item", (str, BaseMedium, Part), "text, Image, Audio, Medium or a part of a document")
        parts: list[Part | None] = [item if isinstance(item, Part) else None for item in media]
        for kind in media_kinds():
            places = [i for i, item in enumerate(media) if isinstance(item, BaseMedium) and item.kind == kind]
            if places:
                self._check_kind(kind)
            embed = lambda chosen: self._embed(kind, media, chosen, codes)  # noqa: B023
            batches = [places[first:first + BATCH] for first in range(0, len(places), BATCH)]
            for i, encoding in self._in_batches(embed, batches):
                parts[i] = MediaPart(kind, *encoding)
        for i, item in enumerate(media):
            if isinstance(item, str):
                parts[i] = TextPart(self.tokenizers["text"].encode(item))
        return parts

    def _embed(self, kind: str, media: Sequence[Any], chosen: Sequence[int], codes: bool) -> list[Encoding]:
        """The encodings of some media of a kind, in batches of about BATCH_VALUES values, to bound memory."""
        encodings: list[Encoding] = []
        held: list[torch.Tensor] = []
        for i in chosen:
            with numbered("item", i, len(media)):
                held.append(self._read(media[i]))
            if sum(medium.numel() for medium in held) >= BATCH_VALUES or i == chosen[-1]:
                encodings += media_tokenizer(self.tokenizers, kind).embed_batch(held, kind in self.decoder.encoders, codes)
                held.clear()
        return encodings

    def _read(self, item: BaseMedium) -> torch.Tensor:
        if isinstance(item, ReadMedium):
            return item.data
        data, name = item.data, None
        if isinstance(data, (str, Path)):
            name = display(path := user_name(data))
            data = FileSource(path).read()
        if isinstance(data, PILImage.Image):
            check_open(data)
        return MODALITIES[item.kind].get("read")(self.tokenizers[item.kind], data, name, **item.options())

    def _decode(self, part: Part) -> Media:
        tokenizer = self.tokenizers[part.kind]
        if isinstance(part, TextPart):
            return tokenizer.decode(part.ids.tolist())
        if getattr(tokenizer, "vocoder", tokenizer) is None:
            tokenizer = self._sound_decoder
        show = MODALITIES[part.kind].get("show") or to_array
        return show(tokenizer, part.array)

    @cached_property
    def _sound_decoder(self) -> Any:
        """The tokenizer that decodes sounds: the model's own or, if it lacks a vocoder and has the same codes, the shipped one."""
        own = self.tokenizers["audio"]
        if getattr(own, "vocoder", own) is None:
            other = load_tokenizer(shipped(AUDIO_TOKENIZER))
            if other.fingerprint == own.fingerprint:
                return other
        return own


def _asked(documents: Any) -> list[Document]:
    """Each document up to its last user turn. Raises InputError for media that are not encoded."""
    asked = [_up_to_last_user(document) for document in _documents(documents)]
    for number, document in enumerate(asked):
        if other := [part for turn in document.turns for part in turn.parts if not isinstance(part, Part)]:
            with numbered("document", number, len(asked)):
                raise InputError(f"found {type(other[0]).__name__}, expected parts of codes, as `encode_documents` makes them")
    return asked


def _up_to_last_user(document: Document) -> Document:
    users = [number for number, turn in enumerate(document.turns, 1) if turn.role == "user"]
    return Document(document.turns[:max(users, default=0)])


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of prompts, batched by similar length, within BATCH and BATCH_TOKENS.

    At most half of a batch is padding, unless its shortest prompt has fewer than SHORT tokens.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[number]
        fits = batches and len(batches[-1]) < BATCH and (len(batches[-1]) + 1) * length <= BATCH_TOKENS
        if not fits or length > 2 * max(SHORT, lengths[batches[-1][0]]):
            batches.append([])
        batches[-1].append(number)
    return batches


@contextmanager
def numbered(name: str, number: int, count: int) -> Iterator[None]:
    """Errors in this context state which of several items they concern."""
    try:
        yield
    except InputError as error:
        if count == 1:
            raise
        raise InputError(f"{name} {number + 1} of {count}: {error}") from error


def iterate(items: Any, name: str) -> Iterator[Any]:
    """Iterate over several items. Raises InputError for a single one, even if it is iterable, as a str is."""
    try:
        if isinstance(items, (str, bytes, Sound)):
            raise TypeError
        return iter(items)
    except TypeError:
        raise InputError(f"{name}s: found {type(items).__name__}, expected a list of {name}s") from None


def typed_list(items: Any, name: str, kinds: type | tuple[type, ...], expected: str) -> list[Any]:
    """A list of items of some types. Raises InputError that names the first item of another type."""
    found = [*iterate(items, name)]
    for number, item in enumerate(found):
        if not isinstance(item, kinds):
            with numbered(name, number, len(found)):
                raise InputError(f"found {type(item).__name__}, expected {expected}")
    return found


def _documents(documents: Any) -> list[Document]:
    return typed_list(documents, "document", Document, "a Document")


def _is_list(item: Any) -> bool:
    """Whether several media are given: a list, an iterator, or a column of a table. A `Sound` is a tuple, but one medium."""
    if isinstance(item, (list, tuple, Iterator)):
        return not isinstance(item, (Sound, IOBase))
    # Columns of pandas, and arrays of names or objects.
    return getattr(item, "ndim", 0) == 1 and getattr(item.dtype, "kind", "") in ("O", "U")
