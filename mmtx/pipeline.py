"""The public Python API: pictures, sounds and text in; text, pictures and sounds out.

    model = mmtx.load()                                   # the small model that comes with the package
    model.caption("cat.png")                              # 'cat'
    model.caption(["cat.png", "trumpet.wav"])             # ['cat', 'trumpet, C 4']
    model.generate([Path("cat.png")], out="text")
    model.generate("cat", out="image", temperature=1.0)    # a PIL image

A `Model` is a `Processor`, which turns media into prompts and ids into media, and a decoder, which answers prompts with ids.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image as PILImage

from mmtx.ambient import neutral, neutral_steps
from mmtx.atomic_folder import replace_folder
from mmtx.attention import AttentionMaps, attention_maps
from mmtx.batching import by_length, in_order, run_batches, run_by_values, run_each
from mmtx.data.media import Sampled
from mmtx.data.sound_files import MAX_SECONDS
from mmtx.document import Document, MediaPart, Part, Turn
from mmtx.errors import InputError
from mmtx.files import Content
from mmtx.grammar import Grammar
from mmtx.hub import model_card, push
from mmtx.inference.choose import choose_engine
from mmtx.inference.classification import Labels, label_ends, log_probabilities
from mmtx.inference.engine import pad
from mmtx.inference.generation import Choose, generate, steps
from mmtx.inference.prepared_weights import PreparedWeights
from mmtx.inference.sampling import Sampling
from mmtx.inference.transcription import transcribe
from mmtx.inference.weights import Weights
from mmtx.items import is_list, iterate, map_numbered, numbered, typed_list
from mmtx.medium import Audio, BaseMedium, Media, ReadMedium, Sound, as_medium
from mmtx.modality.base import Tokenizer
from mmtx.modality.encoder import build_encoder
from mmtx.model import Decoder
from mmtx.model_folder import WEIGHTS, model_files, read_model
from mmtx.processor import Processor, asked_documents
from mmtx.schema import typed, within
from mmtx.sequence import Prompt, prompt, render
from mmtx.streaming import stream_media, stream_sound
from mmtx.subtitles import Chunk, Transcript
from mmtx.vocabulary import Vocabulary
from mmtx.weights import load_module, weights_of

DTYPES = ("float32", "bfloat16", "float16")


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
        self.processor = Processor(vocabulary, self.tokenizers, patches=decoder.config.encoders)
        self._prepared = PreparedWeights()

    @neutral()
    def prepare_for_inference(self, load_in_8bit: bool = False) -> "Model":
        """Lay out the decoder's weights for decoding, which makes long answers to one prompt on a CPU up to twice as fast.

        `mmtx.load` calls it, and explains `load_in_8bit`. Call it again after `to`. If weights have changed since, by training or
        `load_state_dict`, the next answer lays them out again; changes through `Parameter.data` are not detected.
        """
        self._prepared.prepare(self.decoder, load_in_8bit)
        return self

    @property
    def _weights(self) -> Weights | None:
        return self._prepared.of(self.decoder)

    @property
    def _device(self) -> torch.device:
        return self.decoder.embedding.weight.device

    @neutral()
    def to(self, device: str | torch.device) -> "Model":
        """Move the decoder and the codecs to a device."""
        self._prepared = PreparedWeights()
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
            media: a path or URL, bytes or an open file, PIL image, array, tensor, `Image` or `Audio`, or a list of these. A 1-D
                array is a sound at the model's sample rate (use `Audio` for another), any other array a picture; an array that
                could be a multi-channel sound must be marked as `Image` or `Audio`. A sound with its rate, (samples, rate), as
                torchaudio and soundfile read it, and cells of Hugging Face datasets are one medium each. An iterator and a column of
                pandas count as lists.
            start_index: index of the first medium if a longer list is captioned in parts: with a `seed`, the random
                choices of an answer depend on its index.
            **sampling: fields of `Sampling`; greedy by default.

        Returns:
            A caption, or a list of captions for a list. Many at once are much faster than one by one: up to 32 of
            about the same length share a batch, within limits on memory (`mmtx.batching`).
        """
        if not (isinstance(start_index, Integral) and start_index >= 0):
            raise InputError(f"start_index: found {start_index!r:.100}, expected a whole number, 0 or more")
        if not is_list(media):
            return self.caption([media], start_index=start_index, **sampling)[0]
        return self._answer_texts(self.processor.questions(media), Sampling.of(**sampling), start_index)

    @neutral()
    def caption_documents(self, documents: Iterable[Document], sampling: Sampling = Sampling()) -> list[str]:
        """Answer documents of codes (everything up to the last user turn) with text."""
        if not isinstance(sampling, Sampling):
            raise InputError(f"sampling: found {type(sampling).__name__}, expected a Sampling")
        return self._answer_texts(asked_documents(documents), sampling)

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
        if not is_list(media):
            return cast(list, self.classify([media], candidate_labels, question))[0]
        if not isinstance(question, str | None):
            raise InputError(f"question: found {type(question).__name__}, expected text")
        return self.classify_documents(self.processor.questions(media, question), candidate_labels)

    @neutral()
    def classify_documents(self, documents: Iterable[Document], candidate_labels: Iterable[str]) -> list[dict[str, float]]:
        """`classify` for documents of codes (everything up to the last user turn)."""
        texts = typed_list(candidate_labels, "candidate_label", str, "text")
        labels = Labels.of(texts, self.tokenizers["text"], self._label_ends)
        prompts = [prompt(document, self.vocabulary) for document in asked_documents(documents)]
        find = lambda asked: labels.probabilities(self.decoder, self.grammar, asked, self._weights)
        return run_each(find, prompts, self._device)

    @neutral()
    def log_likelihood(self, parts: Any, answers: Iterable[str]) -> list[float]:
        """The log-probability of each text as the whole answer to a prompt, in nats, as generation at temperature 1 draws it.

        `parts` is a prompt as in `generate`. Raises InputError for an answer without tokens.
        """
        texts = typed_list(answers, "answer", str, "text")
        ids = map_numbered(texts, self._answer_ids, "answer")
        end = torch.tensor([self.vocabulary.end])
        find = lambda asked: log_probabilities(self.decoder, self.grammar, asked, ids, end, self._weights).tolist()
        return run_each(find, [self.processor.prompt(parts)], self._device)[0] if ids else []

    def _answer_ids(self, text: str) -> list[int]:
        if not (ids := [*self.tokenizers["text"].encode(text)]):
            raise InputError(f"found {text!r:.40}, expected text")
        return ids

    @cached_property
    def _label_ends(self) -> torch.Tensor:
        return label_ends(self.tokenizers["text"], self.vocabulary)

    @neutral()
    def transcribe(self, sounds: Any, *, chunk_length_s: float = 3.5, return_timestamps: bool = False,
                   progress: Callable[[float], object] | None = None) -> Any:
        """Transcribe speech of any length; `caption`, in contrast, describes a sound.

        Args:
            sounds: a sound in any form that `caption` takes, a video, or a list of them.
            chunk_length_s: seconds; longer sounds are cut at pauses, and the transcripts of the pieces are joined. Best is
                the length of most training sounds; the default is that of `demos/speech`.
            return_timestamps: also return when each piece is spoken.
            progress: called from time to time with the seconds of speech transcribed since the last call.

        Returns:
            A transcript, or a list for a list. With `return_timestamps`, each is in the form of transformers' pipeline for speech
            recognition: {"text": transcript, "chunks": [{"timestamp": (begin, end), "text": part}, ...]}, in seconds.

        Raises:
            InputError: a picture, or a model that was not trained with CTC (`model.ctc` of a training configuration).
        """
        self._check_transcribes()
        if not is_list(sounds):
            return self.transcribe([sounds], chunk_length_s=chunk_length_s, return_timestamps=return_timestamps, progress=progress)[0]
        within("chunk_length_s", chunk_length_s, 0.1, MAX_SECONDS)
        media = map_numbered(sounds, as_medium)
        rate = cast(Sampled, self.tokenizers["audio"]).rate
        Cut = tuple[int, float, Audio]  # number of a sound, and a piece of it with its beginning in seconds

        def cut() -> Iterator[Cut]:
            for number, medium in enumerate(media):
                with numbered("item", number, len(media)):
                    for begin, piece in self.processor.cut_speech(medium, chunk_length_s):
                        yield number, begin, piece

        def write(held: Sequence[Cut]) -> list[tuple[int, Chunk]]:
            texts = self.transcribe_documents(self.processor.questions(piece for _, _, piece in held))
            seconds = [len(piece.data) / rate for _, _, piece in held]
            if progress is not None:
                progress(sum(seconds))
            return [(number, {"timestamp": (round(begin, 3), round(begin + length, 3)), "text": text.strip()})
                    for (number, begin, _), length, text in zip(held, seconds, texts, strict=True)]

        found: list[Transcript] = [{"text": "", "chunks": []} for _ in media]
        for number, chunk in run_by_values(write, cut(), lambda piece: len(piece[2].data)):
            if chunk["text"]:
                found[number]["chunks"].append(chunk)
        for transcript in found:
            transcript["text"] = " ".join(chunk["text"] for chunk in transcript["chunks"])
        return found if return_timestamps else [transcript["text"] for transcript in found]

    @neutral()
    def transcribe_documents(self, documents: Iterable[Document]) -> list[str]:
        """Transcribe the sound with which the last user turn of each document ends."""
        self._check_transcribes()
        text, asked = self.tokenizers["text"], asked_documents(documents)
        for number, document in enumerate(asked):
            if not any(isinstance(part, MediaPart) and part.kind == "audio" and part.features is not None
                       for turn in document.turns[-1:] for part in turn.parts):
                with numbered("document", number, len(asked)):
                    raise InputError("found no sound with its features in the last user turn, expected one")
        said = self._answer_texts(asked, Sampling())
        prompts = [prompt(document, self.vocabulary) for document in asked]
        write = lambda pair: transcribe(self.decoder, self.vocabulary, text, *pair)
        return run_each(write, [*zip(prompts, said, strict=True)], self._device)

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
                                        prefix, weights=self._weights, places=[first + i for i in chosen])
        for i, ids in run_batches(write, by_length([len(prompt.ids) for prompt in prompts]), self._device):
            answers[i] = ids[:-1].tolist()
        return answers

    # -- Generation ------------------------------------------------------------------------------------------

    @neutral()
    def generate(self, parts: Any, out: str = "text", size: tuple[int, int] | None = None, **sampling: Any) -> Any:
        """Answer a prompt with text, a picture or a sound.

        Args:
            parts: text (str), pictures and sounds (`Path`, PIL image, array, tensor, `Image`, `Audio`), or a list of them; or a
                conversation, a list of messages {"role": "user", "content": parts}, of which the last one is answered.
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
        prefix = self.processor.size_prefix(out, size)
        asked = map_numbered(iterate(prompts, "prompt"), lambda parts: self.processor.prompt(parts, out), "prompt")
        answers = [self.processor.to_media(ids) for ids in self._answer(asked, out, Sampling.of(**sampling), prefix)]
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
        prefix = self.processor.picture_prefix(picture, rows)
        (ids,) = self._answer([self.processor.prompt(parts)], "image", Sampling.of(**sampling), prefix)
        return cast(PILImage.Image, self.processor.to_media(ids)[0])

    @neutral()
    def continue_audio(self, sound: Any, seconds: float = 1.0, parts: Any = (), **sampling: Any) -> Sound:
        """Continue a sound -> its reconstruction, followed by the continuation.

        Args:
            sound: in any form that `caption` takes.
            seconds: most seconds to add; the model may end the sound earlier.
            parts: what the sound is to be, as in `generate`; by default no prompt.
            **sampling: fields of `Sampling` except `max_new_tokens`; greedy by default.
        """
        prefix, more = self.processor.sound_prefix(sound, seconds)
        if "max_new_tokens" in sampling:
            raise InputError(f"max_new_tokens: found {sampling['max_new_tokens']!r:.40}, expected `seconds` instead")
        limited = Sampling.of(**sampling, max_new_tokens=more)
        (ids,) = self._answer([self.processor.prompt(parts)], "audio", limited, prefix)
        return cast(Sound, self.processor.to_media(ids)[0])

    @neutral_steps
    def stream(self, parts: Any, out: str = "text", size: tuple[int, int] | None = None, **sampling: Any) -> Iterator[Media]:
        """As `generate`, but yields text and sounds in pieces as they are generated, and pictures when they are complete.

        The samples of all pieces of a sound are those of `generate`, up to rounding. A code affects samples of its own chunk and of
        `vocoder.context` frames around it (with the shipped codec, chunks of 0.8 s, and 0.28 s), so a piece comes once all codes
        that affect it are generated. Without a vocoder a sound comes only when complete, since Griffin-Lim needs all of it.
        """
        prefix, asked = self.processor.size_prefix(out, size), self.processor.prompt(parts, out)
        written = steps(self.decoder, self.grammar, [asked], out, Sampling.of(**sampling), prefix, self._weights)
        yield from stream_media((int(step[0]) for step in written), self.processor, prefix)

    @neutral_steps
    def stream_sound(self, ids: Iterator[int]) -> Iterator[Sound]:
        """Consume ids up to the end of a sound -> the sound in pieces, or whole without a vocoder, as `stream` explains."""
        yield from stream_sound(ids, self.processor)

    @neutral_steps
    def stream_ids(self, prompts: Sequence[Prompt], out: str = "text", size: tuple[int, int] | None = None,
                   sampling: Sampling = Sampling(), places: Sequence[int] | None = None, wanted: torch.Tensor | None = None,
                   choose: Choose = choose_engine) -> Iterator[torch.Tensor]:
        """Ids of the answers to prompts, one per prompt (B,) at a time, as in `inference.generation.steps`.

        The ids that `size` determines are included, so that each row of the batch gets a complete answer.
        """
        prefix = self.processor.size_prefix(out, size)
        for ident in prefix:
            yield torch.full((len(prompts),), ident)
        yield from steps(self.decoder, self.grammar, prompts, out, sampling, prefix, self._weights, places, choose, wanted)

    # -- Vectors ---------------------------------------------------------------------------------------------

    def embed(self, parts: Any) -> np.ndarray:
        """Text, pictures and sounds (as in `generate`) -> a unit vector (D,): the normalised mean of the final hidden states."""
        return self.embed_prompt(self.processor.prompt(parts))

    @neutral()
    def embed_prompt(self, asked: Prompt) -> np.ndarray:
        """As `embed`, for a prompt."""
        if not isinstance(asked, Prompt):
            raise InputError(f"prompt: found {type(asked).__name__}, expected a Prompt; `embed` takes text and media")
        return self._embed([asked])[0]

    @neutral()
    def embed_batch(self, prompts: Iterable[Any]) -> np.ndarray:
        """`embed` for each prompt -> unit vectors (N, D); many at once are faster than one by one."""
        given = [*iterate(prompts, "prompt")]

        def embed(chosen: Sequence[int]) -> Sequence[np.ndarray]:
            asked: list[Prompt] = []
            vectors: dict[int, np.ndarray] = {}
            for number in chosen:
                with numbered("prompt", number, len(given)):
                    asked.append(self.processor.prompt(given[number]))
            for some in by_length([len(prompt.ids) for prompt in asked]):
                vectors.update(zip(some, self._embed([asked[i] for i in some]), strict=True))
            return [vectors[i] for i in range(len(asked))]

        found = [vector for _, vector in run_batches(embed, in_order(range(len(given))), self._device)]
        return np.stack(found) if found else np.zeros((0, self.decoder.config.width), np.float32)

    def _embed(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """The normalised mean of the final hidden states of each prompt (B, D)."""
        with torch.inference_mode():
            ids, lengths, features = pad(prompts, self._device)
            places = torch.arange(ids.shape[1], device=self._device)[None]
            hidden = self.decoder(ids, places, features=features).float()
            mean = (hidden * (places < lengths[:, None])[..., None]).sum(1) / lengths[:, None]
            return torch.nn.functional.normalize(mean, dim=1).cpu().numpy()

    @neutral()
    def attention(self, parts: Any, answer: str | None = None) -> AttentionMaps:
        """What each word of an answer, and everything before it, attends to.

        Args:
            parts: as in `generate`.
            answer: the answer to explain; by default the model's own, greedy.
        """
        asked = self.processor.prompt(parts, codes=True)  # the maps show codes
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
            return [*self.processor.prompt(parts, codes=True).ids.tolist(), *self.processor.size_prefix(out, None)]
        return render(Document((Turn(None, self.processor.parts(parts)),)), self.vocabulary).ids.tolist()

    def detokenize(self, ids: Sequence[int]) -> list[Media]:
        """Ids of a document -> its text (str), pictures (PIL) and sounds (`Sound`) in order."""
        return self.processor.detokenize(ids)

    def read_medium(self, item: BaseMedium) -> ReadMedium:
        """Decode a medium, so that `encode_parts` can encode it together with others. Raises InputError if it is not valid."""
        return self.processor.read_medium(item)

    def encode_documents(self, documents: Iterable[Document], codes: bool = True) -> list[Document]:
        """Encode each `ReadMedium` in documents, with the same result as if it were encoded alone.

        Without `codes`, codes are 0 where that changes no answer: in user turns, if the decoder reads patches.
        """
        return self.processor.encode_documents(documents, codes)

    def prompt_length(self, document: Document) -> int:
        """Number of tokens of a document's prompt; its media need not be encoded yet."""
        return self.processor.prompt_length(document)

    def encode_parts(self, media: Iterable[str | BaseMedium | Part], codes: bool = True) -> list[Part]:
        """Text and media -> parts of codes and features; media of a kind are encoded in batches.

        Without `codes`, codes are 0 if the model has its own encoder, and so does not read them in a user turn.
        """
        return self.processor.encode_parts(media, codes)
