"""Is one decoder as good as specialised networks? The same data, views and minutes on one core for each.

    python benchmarks/specialists.py --minutes 4
    python benchmarks/specialists.py --config configs/starter/decoder.yaml --minutes 10 --tasks pictures
    python benchmarks/specialists.py --tasks pictures --image_encoder runs/efficientnet-lite0 --only pretrained

Pictures: a small ResNet classifier over the names, and the architecture of transformers' VisionEncoderDecoder (ViT and GPT-2). Notes:
a convolutional net on log-mel spectrograms with one head for instruments and one for notes, and Whisper's architecture. Sentences:
convolutions and an LSTM with CTC, and Whisper's architecture. Ours is the decoder of the configuration with jointly trained encoders,
on one kind of data alone. All start from scratch, except that our encoders start from those of the shipped tokenizers, which were
trained on the same data. Ours also runs with features of the frozen encoder, with discrete codes alone, which text engines can serve,
and with either at random, so that one model takes both. "Merged": a token of a picture is 2 x 2 features, one of a sound 4. All read
their media once, before the minutes begin; learning rates decay to zero at their end. With `--image_encoder`, ours and a classifier
also start from the same pretrained encoder.

Shapes: B batch, C channels, H height, W width, F frames, M mels, T time steps.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import yaml
from torch import Tensor, nn
from torchaudio.functional import edit_distance
from torchaudio.transforms import MelSpectrogram

from mmtx.config import CodeRange, DecoderConfig
from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.collection import Collected, read_config, read_sources
from mmtx.data.documents import Documents
from mmtx.data.packing import Batch, PackedBatches
from mmtx.data.sample import Media, Sample
from mmtx.data.tokens import Augmentation, load_media, load_sample, to_documents
from mmtx.document import Document, MediaPart
from mmtx.loss import next_token_loss
from mmtx.modality.base import load_tokenizer
from mmtx.modality.encoder import build_encoder
from mmtx.modality.pretrained_encoder import PretrainedEncoder
from mmtx.model import Decoder
from mmtx.pipeline import Model
from mmtx.sequence import Rendered
from mmtx.shipped_files import find_shipped
from mmtx.training.initial_decoder import pretrained_encoder
from mmtx.training.optimizer import OptimizerConfig, configure
from mmtx.vocabulary import Vocabulary

RATE, MELS = 16_000, 80
BATCH = {"pictures": 32, "notes": 32, "sentences": 8}
TASKS = {"pictures": "image", "notes": "audio", "sentences": "audio"}


def task_of(sample: Sample) -> str:
    """The task that a sample belongs to."""
    if medium(sample).kind == "image":
        return "pictures"
    return "notes" if "instrument" in sample.metadata else "sentences"


def medium(sample: Sample) -> Media:
    return next(part for turn in sample.turns for part in turn.parts if isinstance(part, Media))


class Views:
    """Media of one task, read once and augmented anew on each access."""

    def __init__(self, samples: Sequence[Sample], repeats: Sequence[int], tokenizers: dict, augment: Callable):
        self.media = [load_media(medium(sample), tokenizers) for sample in samples]
        self.captions = [sample.caption for sample in samples]
        self.share = torch.tensor(repeats, dtype=torch.float)
        self.augment = augment
        self.generator = torch.Generator().manual_seed(0)

    def batches(self, size: int) -> Iterator[tuple[list[Tensor], list[str]]]:
        """Batches of media and captions, in a new order each epoch."""
        while True:
            order = torch.multinomial(self.share, len(self.media), replacement=True, generator=self.generator)
            for chosen in order.split(size):
                yield [self.augment(self.media[i], self.generator) for i in chosen], [self.captions[i] for i in chosen]


def train(module: nn.Module, minutes: float, batches: Iterator, loss: Callable[..., Tensor], rate: float = 2e-3) -> int:
    """Train in bfloat16 with AdamW, warm-up and linear decay over `minutes` -> number of steps."""
    return train_groups([{"params": [*module.parameters()], "lr": rate}], module, minutes, batches, loss)


def train_groups(groups: Sequence[dict], module: nn.Module, minutes: float, batches: Iterator, loss: Callable[..., Tensor]) -> int:
    """`train` with a learning rate per group of parameters."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return _run(optimizer, [group["lr"] for group in groups], module, minutes, batches, loss)


def _run(optimizer, rates: Sequence[float], module: nn.Module, minutes: float, batches: Iterator, loss: Callable) -> int:
    module.train()
    start, step = time.process_time(), 0  # processor time: other load on the machine costs none of them anything
    while (passed := (time.process_time() - start) / (60 * minutes)) < 1:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / 50) * (1 - passed)
        batch = next(batches)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(*batch)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        step += 1
    module.eval()
    return step


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016)."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _ in range(2))
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.first(x)).relu()
        return (self.norms[1](self.second(y)) + self.shortcut(x)).relu()


def convolutions(channels: int, classes: int, widths: Sequence[int] = (32, 64, 128, 192)) -> nn.Sequential:
    """(B, C, H, W) -> logits (B, classes): a stem, a residual block per width, and global average pooling."""
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, 1, 1), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    layers += [Residual(width, out, 2) for width, out in zip((widths[0], *widths), widths)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)).to(
        memory_format=torch.channels_last)


def to_pixels(media: Sequence[Tensor]) -> Tensor:
    """Images, uint8 (3, H, W) each -> (B, 3, H, W) in [-1, 1]."""
    return (torch.stack(list(media)).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


class LogMel:
    """Waveforms -> log-mel (B, M, F) of about unit scale, cut or padded with silence to `seconds`."""

    def __init__(self, seconds: float):
        self.samples = round(seconds * RATE)
        self.mel = MelSpectrogram(RATE, 512, hop_length=160, n_mels=MELS)

    def __call__(self, media: Sequence[Tensor]) -> Tensor:
        waves = torch.stack([F.pad(wave[:self.samples], (0, max(0, self.samples - len(wave)))) for wave in media])
        return (self.mel(waves)[..., :self.samples // 160].clamp_min(1e-5).log() + 5) / 4


def resnet(views: Views, held_out: Sequence[Tensor], minutes: float):
    """Classify an image as one of the names in the training data."""
    names = sorted(set(views.captions))
    number = {name: i for i, name in enumerate(names)}
    network = convolutions(3, len(names))
    batches = ((to_pixels(media), torch.tensor([number[caption] for caption in captions]))
               for media, captions in views.batches(BATCH["pictures"]))
    steps = train(network, minutes, batches, lambda pixels, targets: F.cross_entropy(network(pixels), targets))
    return [names[i] for part in chunks(held_out) for i in network(to_pixels(part)).argmax(-1)], steps, size_of(network)


def mel_net(views: Views, held_out: Sequence[Tensor], minutes: float):
    """Classify a note as one of the instruments and one of the notes in the training data."""
    pairs = [caption.rsplit(", ", 1) for caption in views.captions]
    labels = [sorted({pair[i] for pair in pairs}) for i in range(2)]
    numbers = [{name: i for i, name in enumerate(names)} for names in labels]
    network, mel = convolutions(1, sum(map(len, labels)), (16, 32, 64, 128)), LogMel(1.5)
    scores = lambda mels: network(mels[:, None]).split([len(names) for names in labels], -1)
    batches = ((mel(media), [torch.tensor([number[name] for name in names]) for number, names in
                             zip(numbers, zip(*(caption.rsplit(", ", 1) for caption in captions), strict=True), strict=True)])
               for media, captions in views.batches(BATCH["notes"]))
    steps = train(network, minutes, batches, lambda mels, targets: sum(map(F.cross_entropy, scores(mels), targets)))
    said = []
    for part in chunks(held_out):
        said += [f"{labels[0][a]}, {labels[1][b]}" for a, b in zip(*(score.argmax(-1) for score in scores(mel(part))), strict=True)]
    return said, steps, size_of(network)


class Classifier(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> logits (B, classes): a pretrained encoder and global average pooling."""

    def __init__(self, pretrained: PretrainedEncoder, classes: int):
        super().__init__()
        self.encoder = build_encoder(pretrained.config)
        self.encoder.load_state_dict(pretrained.weights)
        self.out = nn.Linear(pretrained.config.width, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.out(self.encoder.features(pictures).mean((2, 3)))


def classifier(pretrained: PretrainedEncoder, rates: tuple[float, float], views: Views, held_out: Sequence[Tensor], minutes: float):
    """Classify an image as one of the names in the training data; `rates` are those of the encoder and of the new layers."""
    names = sorted(set(views.captions))
    number = {name: i for i, name in enumerate(names)}
    network = Classifier(pretrained, len(names))
    batches = ((to_pixels(media), torch.tensor([number[caption] for caption in captions]))
               for media, captions in views.batches(BATCH["pictures"]))
    groups = [{"params": [*part.parameters()], "lr": rate} for part, rate in zip((network.encoder, network.out), rates, strict=True)]
    steps = train_groups(groups, network, minutes, batches, lambda pixels, targets: F.cross_entropy(network(pixels), targets))
    return [names[i] for part in chunks(held_out) for i in network(to_pixels(part)).argmax(-1)], steps, size_of(network)


class ConvCTC(nn.Module):
    """Log-mel (B, M, F) -> logits of characters (T, B, classes), T = F / 2 (CTC: Graves et al. 2006)."""

    def __init__(self, classes: int, width: int = 192):
        super().__init__()
        self.convolve = nn.Sequential(nn.Conv1d(MELS, width, 5, 2, 2), nn.BatchNorm1d(width), nn.ReLU(),
                                      nn.Conv1d(width, width, 5, 1, 2), nn.BatchNorm1d(width), nn.ReLU())
        self.recur = nn.LSTM(width, width // 2, num_layers=2, bidirectional=True)
        self.out = nn.Linear(width, classes)

    def forward(self, mel: Tensor) -> Tensor:
        return self.out(self.recur(self.convolve(mel).permute(2, 0, 1))[0])


def ctc(views: Views, held_out: Sequence[Tensor], minutes: float):
    """Transcribe a sentence by characters."""
    letters = ["", *sorted(set("".join(views.captions)))]
    number = {letter: i for i, letter in enumerate(letters)}
    network, mel = ConvCTC(len(letters)), LogMel(6)

    def loss(mels: Tensor, captions: list[str]) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # an LSTM in bfloat16 is slower here
            scores = network(mels).log_softmax(-1)
        targets = torch.tensor([number[letter] for caption in captions for letter in caption])
        return F.ctc_loss(scores, targets, torch.full((len(captions),), len(scores)),
                          torch.tensor([len(caption) for caption in captions]), zero_infinity=True)

    batches = ((mel(media), captions) for media, captions in views.batches(BATCH["sentences"]))
    steps = train(network, minutes, batches, loss, 1e-3)
    said = []
    for part in chunks(held_out):
        best = network(mel(part)).argmax(-1).T
        said += ["".join(letters[i] for i in line.unique_consecutive()) for line in best]
    return said, steps, size_of(network)


def written(network: nn.Module, text, key: str, inputs: Callable, views: Views, held_out, minutes: float, batch: int):
    """Train a network of transformers on captions in our text pieces, and caption the held-out media."""
    end = text.size + 1

    def labels(captions: list[str]) -> Tensor:
        pieces = [[*text.encode(caption), end] for caption in captions]
        rows = torch.full((len(pieces), max(map(len, pieces))), -100)
        for row, ids in zip(rows, pieces, strict=True):
            row[:len(ids)] = torch.tensor(ids)
        return rows

    batches = ((inputs(media), labels(captions)) for media, captions in views.batches(batch))
    steps = train(network, minutes, batches, lambda given, targets: network(**{key: given}, labels=targets).loss, 1e-3)
    said = []
    for part in chunks(held_out):
        ids = network.generate(**{key: inputs(part)}, max_new_tokens=100, num_beams=1, do_sample=False)
        said += [text.decode([i for i in row.tolist() if i < text.size]) for row in ids]
    return said, steps, size_of(network)


def vit_gpt2(text, views: Views, held_out, minutes: float):
    """transformers' VisionEncoderDecoder."""
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    vision = ViTConfig(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, image_size=64,
                       patch_size=8)
    words = GPT2Config(vocab_size=text.size + 2, n_embd=128, n_layer=2, n_head=4, n_positions=128, bos_token_id=text.size,
                       eos_token_id=text.size + 1)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, words)
    config.decoder_start_token_id, config.pad_token_id = text.size, text.size + 1
    network = VisionEncoderDecoderModel(config=config)
    set_tokens(network.generation_config, text)
    return written(network, text, "pixel_values", to_pixels, views, held_out, minutes, BATCH["pictures"])


def whisper(text, seconds: float, batch: int, views: Views, held_out, minutes: float):
    """Whisper's architecture: two convolutions, an encoder and a decoder with cross-attention."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(vocab_size=text.size + 2, num_mel_bins=MELS, d_model=128, encoder_layers=3, decoder_layers=2,
                           encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=512, decoder_ffn_dim=512,
                           max_source_positions=round(seconds * 50), max_target_positions=128,
                           decoder_start_token_id=text.size, bos_token_id=text.size, eos_token_id=text.size + 1,
                           pad_token_id=text.size + 1, suppress_tokens=None, begin_suppress_tokens=None)
    network = WhisperForConditionalGeneration(config)
    set_tokens(network.generation_config, text)
    return written(network, text, "input_features", LogMel(seconds), views, held_out, minutes, batch)


def set_tokens(config, text) -> None:
    config.decoder_start_token_id = config.bos_token_id = text.size
    config.eos_token_id = config.pad_token_id = text.size + 1


WAYS = ("codes", "features", "either", "encoder", "features merged", "encoder merged")
MERGE_SIZE = {"image": (2, 2), "audio": (4, 1)}
MERGED_TOKENS = 1024  # of a batch, in which as many media fit as in 2,560 to 4,096 tokens that are not merged


class LoadedDocuments(Documents):
    """Media are read once and before training, as in `Views`; each view is augmented and encoded anew."""

    def keep(self) -> None:
        self.loaded = {medium(sample): load_sample(sample, self.tokenizers) for sample in self.samples}

    def load(self, sample: Sample) -> list[Tensor]:
        return self.loaded[medium(sample)]


class EitherDocuments(LoadedDocuments):
    """Half of the documents have the features of their media, the others only codes."""

    def render(self, chosen: Sequence[tuple[int, int]]) -> list[Rendered]:
        return [document if np.random.default_rng(pair).random() < 0.5 else document._replace(spans=())
                for pair, document in zip(chosen, super().render(chosen), strict=True)]


def without_features(document: Document) -> Document:
    """The document with only codes."""
    return Document(tuple(replace(turn, parts=tuple(replace(part, features=None) if isinstance(part, MediaPart) else part
                                                    for part in turn.parts)) for turn in document.turns))


def options_of(path: str) -> tuple[dict, dict]:
    """The decoder and data sections of a configuration."""
    whole = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return whole["model"]["init_args"], whole["data"]["init_args"]


def new_decoder(options: dict, vocabulary: Vocabulary, tokenizers: dict, way: str,
                pretrained: PretrainedEncoder | None = None) -> Decoder:
    """A decoder with random weights, of the shape in a configuration; its encoders start from those of the tokenizers, or from a
    pretrained image encoder."""
    codecs = {kind: tokenizer for kind, tokenizer in tokenizers.items() if kind != "text"}
    composed = tuple(CodeRange(vocabulary.range(kind).start, codec.levels) for kind, codec in codecs.items())
    features = {} if way == "codes" else {kind: codec.feature_width for kind, codec in codecs.items()}
    encoders = {kind: codec.encoder_config for kind, codec in codecs.items()} if way.startswith("encoder") else {}
    if pretrained is not None:
        features["image"], encoders["image"] = pretrained.config.width, pretrained.config
    features = {kind: math.prod(vocabulary.merge(kind)) * width for kind, width in features.items()}
    decoder = Decoder(DecoderConfig(vocabulary.size, composed=composed, features=features, encoders=encoders,
                                    **options["decoder"]), build_encoder)
    for kind, encoder in decoder.encoders.items():
        weights = codecs[kind].network.state_dict() if pretrained is None else pretrained.weights
        encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    return decoder


def learn(decoder: Decoder, options: dict, batches: PackedBatches, minutes: float, encoder_rate: float | None = None) -> int:
    """Train a decoder with the optimizer of a configuration -> number of steps; `encoder_rate` is that of its image encoder."""
    def loss(*fields) -> Tensor:
        batch = Batch(*fields)
        hidden = decoder(batch.ids, batch.positions, batch.packing, batch.features).flatten(0, 1)[batch.supervised]
        return next_token_loss(decoder.embedding, hidden, batch.targets, batch.plain, None, 1e-5).total / len(batch.targets)

    more = [] if encoder_rate is None else [{"params": [*decoder.encoders["image"].parameters()], "lr": encoder_rate}]
    optimizer = configure(decoder, OptimizerConfig(**options["optimizer"]), 1, more)["optimizer"]
    return _run(optimizer, [group["initial_lr"] for group in optimizer.param_groups], decoder, minutes,
                (batches[k] for k in range(len(batches))), loss)


def ours(path: str, samples: Sequence[Sample], repeats: Sequence[int], tokenizers: dict, augmentation: Augmentation,
         held_out: Sequence[Sample], minutes: float, way: str = "encoder", pretrained: PretrainedEncoder | None = None):
    """Train the decoder of a configuration on these samples alone, from codes, features of the codec's encoder, either, or patches.

    If it is trained on either, captions are returned for both kinds of input.
    """
    options, data = options_of(path)
    kind = medium(samples[0]).kind
    tokenizers = {name: tokenizers[name] for name in ("text", kind)}
    vocabulary = Vocabulary.build(tokenizers).merging({kind: MERGE_SIZE[kind]} if way.endswith("merged") else {})
    decoder = new_decoder(options, vocabulary, tokenizers, way, pretrained)
    patches = tuple(decoder.encoders)
    make = EitherDocuments if way == "either" else LoadedDocuments
    documents = make(samples, tokenizers, vocabulary, max_seq_len=data["max_seq_len"], augmentation=augmentation, patches=patches)
    documents.keep()
    tokens = MERGED_TOKENS if way.endswith("merged") else data["tokens_per_batch"]
    batches = PackedBatches(documents, vocabulary, tokens, repeats=repeats, steps=10**6)
    steps = learn(decoder, options, batches, minutes, None if pretrained is None else options["image_encoder_lr"])
    model = Model(decoder, vocabulary, tokenizers)
    asked = to_documents(held_out, tokenizers, patches=patches)
    said: Any = model.caption_documents(asked)
    if way == "either":
        said = {"features": said, "codes": model.caption_documents(list(map(without_features, asked)))}
    return said, steps, size_of(decoder)


def chunks(items: Sequence, size: int = 64) -> Iterator[Sequence]:
    return (items[first:first + size] for first in range(0, len(items), size))


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def figures(task: str, said: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """Accuracies, or the character error rate of sentences."""
    if task == "sentences":
        errors = sum(edit_distance(a.lower(), b.lower()) for a, b in zip(said, true, strict=True))
        return {"character error rate": errors / sum(map(len, true))}
    if task == "pictures":
        return {"exact name": float(np.mean([a == b for a, b in zip(said, true, strict=True)]))}
    parts = [[caption.rpartition(", ")[i] for caption in some] for some in (said, true) for i in (0, 2)]
    return {"instrument": float(np.mean([a == b for a, b in zip(parts[0], parts[2], strict=True)])),
            "note": float(np.mean([a == b for a, b in zip(parts[1], parts[3], strict=True)]))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart/decoder.yaml")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="default: those that the data of --config have")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image_encoder", help="folder of a pretrained encoder of pictures to begin with, too")
    parser.add_argument("--only", help="the networks whose names begin so")
    parser.add_argument("--short", action="store_true", help="see that all run, on a few samples")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # each call of `generate` warns about its arguments
    tokenizers = {kind: load_tokenizer(find_shipped(f"tokenizers/{kind}")) for kind in ("text", "image", "audio")}
    text, config = tokenizers["text"], read_config(options.config)
    data = yaml.safe_load(Path(options.config).read_text(encoding="utf-8"))["data"]["init_args"]
    image, audio = (make(**data.get(name) or {}) for make, name in
                    ((ImageAugmentation, "image_augmentation"), (AudioAugmentation, "audio_augmentation")))
    augments = {"image": image, "audio": lambda wave, generator: audio(wave, RATE, generator)}
    known, held_out = read_sources(config.train, 0.0), read_sources(config.validation, 0.0)
    candidates = {
        "pictures": {"ResNet": resnet, "ViT + GPT-2": lambda *rest: vit_gpt2(text, *rest)},
        "notes": {"net on log-mel": mel_net, "Whisper's": lambda *rest: whisper(text, 1.5, BATCH["notes"], *rest)},
        "sentences": {"CTC": ctc, "Whisper's": lambda *rest: whisper(text, 6, BATCH["sentences"], *rest)},
    }
    pretrained = None if options.image_encoder is None else pretrained_encoder(options.image_encoder, "image",
                                                                                tokenizers["image"])
    if pretrained is not None:
        known_options = options_of(options.config)[0]
        rates = known_options["image_encoder_lr"], known_options["optimizer"]["learning_rate"]
        candidates["pictures"]["pretrained, classifier"] = lambda *rest: classifier(pretrained, rates, *rest)
    minutes, few = (0.02, 8) if options.short else (options.minutes, None)
    results = []
    for task in options.tasks or [task for task in TASKS if any(task_of(s) == task for s in held_out.samples)]:
        pairs = [(s, repeat) for s, repeat in zip(known.samples, known.repeats, strict=True) if task_of(s) == task][:few]
        samples, repeats = map(list, zip(*pairs, strict=True))
        # The first held-out source of a task: for images, the unseen style.
        tests = next(some for some in by_source(held_out) if task_of(some[0]) == task)[:few]
        true, media = [s.caption for s in tests], [load_media(medium(s), tokenizers) for s in tests]
        runs = {name: lambda run=run: run(Views(samples, repeats, tokenizers, augments[TASKS[task]]), media, minutes)
                for name, run in candidates[task].items()}
        for way in WAYS:
            runs[f"ours, {way}"] = lambda way=way: ours(options.config, samples, repeats, tokenizers,
                                                        Augmentation(image=image, audio=audio), tests, minutes, way)
        if task == "pictures" and pretrained is not None:
            runs["pretrained, ours"] = lambda: ours(options.config, samples, repeats, tokenizers, Augmentation(image, audio), tests,
                                                    minutes, "encoder", pretrained)
        for name, run in runs.items():
            if options.only and not name.startswith(options.only):
                continue
            torch.manual_seed(options.seed)
            with torch.random.fork_rng():
                said, steps, parameters = run()
            for given, answers in said.items() if isinstance(said, dict) else [(None, said)]:
                network, found = name if given is None else f"{name}: {given}", figures(task, answers, true)
                results.append({"task": task, "network": network, "parameters": parameters, "steps": steps, "n": len(true), **found})
                print(f"{task:10} {network:22} {parameters / 1e6:5.2f} M {steps:6} steps  "
                      + "  ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"config": options.config, "minutes": minutes, "seed": options.seed, "results": results},
                                          indent=1) + "\n", encoding="utf-8")


def by_source(found: Collected) -> list[list[Sample]]:
    """Samples grouped by source; those of one source share a counter."""
    groups: dict[int, list[Sample]] = {}
    for sample, counter in zip(found.samples, found.counters, strict=True):
        groups.setdefault(id(counter), []).append(sample)
    return list(groups.values())


if __name__ == "__main__":
    main()
