"""Samples to stores to batches: what is supervised, what a batch is a function of, and the loss by hand."""

import io
import math
import os
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mmtx.config import CodeRange, DecoderConfig
from mmtx.data import packing
from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.collection import DataSource, read_source
from mmtx.data.documents import Documents
from mmtx.data.packing import PackedBatches, best_fit, fill, in_order, pack
from mmtx.data.sample import Media, Sample, SampleTurn, Text
from mmtx.data.skip_counter import SkipCounter
from mmtx.data.sources import read
from mmtx.data.storage import MemorySource
from mmtx.data.tokens import Augmentation, load_media, seed_of, to_documents
from mmtx.document import Document, MediaPart, TextPart, Turn
from mmtx.errors import InputError
from mmtx.modality.base import load_tokenizer
from mmtx.model import Decoder
from mmtx.sequence import Rendered, render
from mmtx.vocabulary import NUMBERED, Vocabulary

SHIPPED = Path(__file__).parents[1] / "tokenizers"
STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"


class Ready(Documents):
    """Documents that need no media: `views` views of each sample, neighbours in the list."""

    def __init__(self, rendered: list[Rendered], views: int):
        self.rendered, self.views = rendered, views
        self.samples = rendered[::views]
        self.lengths = np.array([len(r.ids) for r in self.samples])

    def render(self, chosen):
        return [self.rendered[sample * self.views + view % self.views] for sample, view in chosen]


def store_of(documents: list[Document], vocabulary, views: int = 1) -> Ready:
    return Ready([render(document, vocabulary) for document in documents], views)


def text(length: int, first: int = 0) -> Document:
    """A plain text of `length` pieces, so of `length` + 1 tokens in a batch."""
    return Document((Turn(None, (TextPart((np.arange(length) + first) % 20),)),))


def question(length: int, answer: int, picture: bool = True) -> Document:
    """A user turn with text, and a picture of 2 x 2 codes or a sound, then an answer."""
    medium = MediaPart("image", [[0, 5], [2, 3]]) if picture else MediaPart("audio", [[0, 3, 2]])
    turns = Turn("user", (TextPart(np.arange(length)), medium)), Turn("assistant", (TextPart([answer] * 3),))
    return Document(turns)


@pytest.fixture(scope="module")
def documents():
    random = np.random.default_rng(0)
    return [text(int(random.integers(1, 9)), n) if n % 2 else question(n % 5, n % 20, n % 4 == 0) for n in range(23)]


@pytest.fixture(scope="module")
def store(documents, small_vocabulary):
    return store_of(documents, small_vocabulary)


def members(batches: PackedBatches) -> list[int]:
    """Samples of all batches, in order."""
    return [sample for batch in batches for sample in batch.samples.tolist()]


def same(left, right) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


# -- What a batch holds --------------------------------------------------------------------------------------


def test_a_batch_by_hand(small_vocabulary):
    v = small_vocabulary
    documents = [
        Document((Turn("user", (MediaPart("image", [[4]]),)), Turn("assistant", (TextPart([7]),)))),
        Document((Turn(None, (TextPart([3]), MediaPart("audio", [[1, 0, 2]]))),)),
    ]
    batch = PackedBatches(store_of(documents, v), v, 20, shuffle=False)[0]
    code = v.range("audio").start
    first = [v.bos, v.user, v.image, v.height(1), v.width(1), v.range("image")[4], v.image_end, v.end, v.assistant, 7,
             v.end]
    second = [v.bos, 3, v.audio, code + 1, code, code + 2, v.audio_end]
    assert batch.ids.tolist() == [first + second + [v.pad] * 2]
    assert batch.positions.tolist() == [[*range(11), *range(7), 0, 0]]
    assert batch.samples.tolist() == [0, 1]
    # Of the first document "7 <end>" is learned, of the second all; behind <audio> and codes, codes may come.
    no_code = {8: 7, 9: v.end, 11: 3, 12: v.audio, 17: v.eos}
    coded = {13: code + 1, 14: code, 15: code + 2, 16: v.audio_end}
    assert batch.plain == 5
    assert batch.supervised.tolist() == [*no_code, *coded]
    assert batch.targets.tolist() == [*no_code.values(), *coded.values()]
    kinds = [NUMBERED[number] for number in batch.modality.tolist()]
    assert kinds == ["text", "special", "text", "special", "special", "audio", "audio", "audio", "special"]
    assert torch.equal(batch.packing.gather[batch.packing.scatter], torch.arange(20))


def test_targets_are_shifted_once(store, small_vocabulary):
    v = small_vocabulary
    for batch in PackedBatches(store, v, 40):
        found = dict(zip(batch.supervised.tolist(), batch.targets.tolist(), strict=True))
        assert len(found) == len(batch.targets)
        place = 0
        for sample in batch.samples.tolist():
            ((ids, trained, _),) = store.render([(sample, 0)])
            expected = {place + i: int(ids[i + 1]) for i in range(len(ids) - 1) if trained[i + 1]}
            assert {k: t for k, t in found.items() if place <= k < place + len(ids) - 1} == expected
            assert batch.ids[0, place:place + len(ids) - 1].tolist() == ids[:-1].tolist()
            assert batch.positions[0, place:place + len(ids) - 1].tolist() == list(range(len(ids) - 1))
            place += len(ids) - 1
        assert all(k < place for k in found), "padding is never supervised"
        assert (batch.ids[0, place:] == v.pad).all() and v.pad not in batch.targets


def test_the_split_follows_the_grammar(store, small_vocabulary):
    v = small_vocabulary
    codes = {*v.range("image"), *v.range("audio")}
    counts = Counter()
    for batch in PackedBatches(store, v, 40):
        assert not codes & set(batch.targets[:batch.plain].tolist())
        assert set(batch.targets[batch.plain:].tolist()) <= codes | {v.image_end, v.audio_end}
        counts.update(batch.ids[0, batch.supervised[batch.plain:]].tolist())
    assert not counts  # only answers in text are learned here
    whole = [Document((Turn("assistant", (MediaPart("image", [[1, 2]]), MediaPart("audio", [[1, 2, 3]]))),))]
    batch = PackedBatches(store_of(whole, v), v, 40)[0]
    assert set(batch.targets[batch.plain:].tolist()) >= {v.image_end, v.audio_end} and len(batch.targets) == 12
    assert len(batch.targets) - batch.plain == 3 + 4


def test_the_loss_of_six_tokens_by_hand(small_vocabulary):
    from mmtx.training.decoder import DecoderModule

    v = small_vocabulary
    document = Document((Turn(None, (MediaPart("image", [[4]]),)),))  # <bos> <image> <h:1> <w:1> code </image> <eos>
    ranges = tuple(CodeRange(v.range(kind).start, v.levels(kind)) for kind in ("image", "audio"))
    config = DecoderConfig(v.size, width=16, depth=1, heads=2, kv_heads=1, head_dim=8, mlp_dim=16, composed=ranges)
    torch.manual_seed(0)
    module = DecoderModule(config)
    module.decoder = Decoder(config)
    torch.nn.init.normal_(module.decoder.embedding.weight)
    # A neighbour in front and padding behind must not matter.
    batch = PackedBatches(store_of([text(3), document], v), v, 16, shuffle=False)[0]
    with torch.no_grad():
        _, losses, sums = module._losses(batch)

    ids = render(document, v).ids.tolist()
    with torch.no_grad():
        scores = module.decoder.logits(module.decoder(torch.tensor([ids]), torch.arange(7)[None]))[0].tolist()
    expected = {}
    for place in range(6):
        # Behind <w:1> and the code the whole vocabulary competes, elsewhere all but the codes.
        rivals = scores[place] if place in (3, 4) else scores[place][:v.range("image").start]
        log_sum = math.log(sum(math.exp(score) for score in rivals))
        expected[4 + place] = (log_sum - scores[place][ids[place + 1]], log_sum)
    found = {k: pair for k, *pair in zip(batch.supervised.tolist(), losses.tolist(), sums.tolist(), strict=True)}
    assert len(found) == 4 + 6
    for place, pair in expected.items():
        assert found[place] == pytest.approx(pair, abs=1e-4)
    assert sum(found[place][0] for place in expected) == pytest.approx(sum(p[0] for p in expected.values()), abs=1e-4)


# -- What a batch is a function of ---------------------------------------------------------------------------


def test_two_instances_agree_whatever_the_order_of_asking(store, small_vocabulary):
    first, second = (PackedBatches(store, small_vocabulary, 40, seed=3, steps=60) for _ in range(2))
    expected = [first[k] for k in range(60)]
    for k in [59, 0, 31, 58, 30, 1, 59, 7]:
        assert same(second[k], expected[k])
    assert not same(PackedBatches(store, small_vocabulary, 40, seed=4, steps=60)[0], expected[0])
    with pytest.raises(IndexError):
        first[60]


def test_batches_travel_to_workers_that_are_spawned(store, small_vocabulary):
    batches = PackedBatches(store, small_vocabulary, 40, seed=3, steps=60)
    expected = batches[17]
    assert same(pickle.loads(pickle.dumps(batches))[17], expected)


def test_a_window_is_planned_once(store, small_vocabulary, monkeypatch):
    planned = []
    original = PackedBatches._plan
    monkeypatch.setattr(PackedBatches, "_plan", lambda self, *where: planned.append(where) or original(self, *where))
    monkeypatch.setattr(packing, "WINDOW", 8)
    monkeypatch.setattr(packing, "IN_WINDOW", 1)
    batches = PackedBatches(store, small_vocabulary, 40, steps=100)
    assert batches.windows == 2 and not planned
    for k in range(100):
        batches[k]
    assert planned == [divmod(window, 2) for window in range(len(planned))] and len(planned) > 10


@pytest.mark.parametrize("shuffle", [True, False])
def test_windows_cut_an_epoch_into_parts(store, small_vocabulary, monkeypatch, shuffle):
    monkeypatch.setattr(packing, "WINDOW", 5)
    monkeypatch.setattr(packing, "IN_WINDOW", 1)
    repeats = [n % 3 + 1 for n in range(len(store))]
    batches = PackedBatches(store, small_vocabulary, 40, repeats=repeats, shuffle=shuffle, seed=2)
    assert batches.windows == sum(repeats) // 5 == 9
    epochs = [[pair for window in range(9) for batch in batches.plan(9 * epoch + window) for pair in batch] for epoch in range(2)]
    for epoch, pairs in enumerate(epochs):
        assert sorted(pairs) == [(n, epoch * count + copy) for n, count in enumerate(repeats) for copy in range(count)]
        documents = [document for document, _ in pairs]
        windows = [sorted(documents[5 * window:5 * window + 3]) for window in range(9)]
        assert (windows == sorted(windows)) is not shuffle  # windows are not of neighbours, unless order is asked for
    assert sum(len(batches.plan(window)) for window in range(9)) == len(batches)
    # Asked for from the middle, as by a run that is resumed: the same.
    fresh = PackedBatches(store, small_vocabulary, 40, repeats=repeats, shuffle=shuffle, seed=2, steps=40)
    assert same(fresh[31], PackedBatches(store, small_vocabulary, 40, repeats=repeats, shuffle=shuffle, seed=2, steps=32)[31])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_partition_the_batches(store, small_vocabulary, world):
    whole = list(PackedBatches(store, small_vocabulary, 40, seed=1, steps=6 * world))
    for rank in range(world):
        part = PackedBatches(store, small_vocabulary, 40, seed=1, steps=6, rank=rank, world=world)
        assert all(same(part[k], whole[k * world + rank]) for k in range(6))


def test_every_sample_appears_as_often_as_it_repeats(store, small_vocabulary):
    repeats = [n % 3 + 1 for n in range(len(store))]
    batches = PackedBatches(store, small_vocabulary, 40, repeats=repeats)  # one epoch
    assert Counter(members(batches)) == dict(enumerate(repeats))
    assert members(batches) != sorted(members(batches))
    ordered = PackedBatches(store, small_vocabulary, 40, shuffle=False)
    assert sorted(members(ordered)) == list(range(len(store)))
    assert members(ordered) == members(PackedBatches(store, small_vocabulary, 40, shuffle=False, seed=5))


def test_epochs_differ_and_each_holds_everything(store, small_vocabulary):
    batches = PackedBatches(store, small_vocabulary, 40, steps=1000)
    order = members([batches[k] for k in range(sum(len(batches.plan(epoch)) for epoch in range(3)))])
    epochs = [order[i:i + 23] for i in (0, 23, 46)]
    assert len(order) == 69 and all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # Not only the order of the batches: others meet in them.
    together = [{tuple(sorted(document for document, _ in batch)) for batch in batches.plan(epoch)} for epoch in range(3)]
    assert together[0] != together[1] != together[2]


def test_a_sample_goes_through_its_views(small_vocabulary):
    v = small_vocabulary
    views = 4
    documents = [text(3, first=5 * sample + view) for sample in range(3) for view in range(views)]
    batches = PackedBatches(store_of(documents, v, views), v, 12, steps=views)  # an epoch is a batch
    seen = {sample: set() for sample in range(3)}
    for k in range(views):
        batch = batches[k]
        for place, sample in enumerate(batch.samples.tolist()):
            seen[sample].add(tuple(batch.ids[0, 4 * place + 1:4 * place + 4].tolist()))
    assert seen == {s: {tuple((np.arange(3) + 5 * s + view) % 20) for view in range(views)} for s in range(3)}


@pytest.mark.parametrize("way", [best_fit, in_order, pack])
@pytest.mark.parametrize("seed", range(4))
def test_packing_loses_nothing_and_overfills_nothing(way, seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, [10, 64, 65, 30][seed], [1, 300, 50, 1000][seed])
    groups = way(lengths, 64)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(0 < lengths[group].sum() <= 64 for group in groups)


MIXES = {
    "uniform": (4096, lambda random, count: random.integers(1, 4097, count)),
    "lognormal": (4096, lambda random, count: np.clip(random.lognormal(5.5, 1, count), 4, 4096).astype(int)),
    "captions": (1536, lambda random, count: np.where(random.random(count) < 0.8, random.integers(74, 84, count),
                                                      random.integers(100, 400, count))),
    "alike": (1536, lambda random, count: random.integers(74, 84, count)),
    "many in a batch": (32_768, lambda random, count: random.integers(74, 84, 10 * count)),
}


@pytest.mark.parametrize("mix", MIXES)
def test_nearly_all_tokens_of_batches_are_real(mix):
    room, draw = MIXES[mix]
    lengths = draw(np.random.default_rng(0), 4000)
    assert lengths.sum() / (len(pack(lengths, room)) * room) >= (0.98 if mix == "many in a batch" else 0.99)


@pytest.mark.parametrize("mix", MIXES)
def test_nearly_all_tokens_of_windows_are_real(mix, small_vocabulary):
    room, draw = MIXES[mix]
    documents = Ready([], 1)
    documents.lengths = 1 + draw(np.random.default_rng(1), 2 * packing.WINDOW)
    batches = PackedBatches(documents, small_vocabulary, room)
    assert batches.windows > 1 and (documents.lengths - 1).sum() / (len(batches) * room) >= 0.99


def test_a_choice_among_many_documents_is_bounded(monkeypatch):
    """Thousands in a batch of a million tokens would take gigabytes."""
    lengths, chosen = np.random.default_rng(0).integers(5, 50, 4000), []
    monkeypatch.setattr(packing, "CHOICES", 100)
    monkeypatch.setattr(packing, "fill", lambda sizes, room: chosen.append(len(sizes)) or fill(sizes, room))
    groups = in_order(lengths, 16_384)
    assert sorted(index for group in groups for index in group) == list(range(4000))
    assert max(chosen) <= 100 and [int(lengths[group].sum()) for group in groups[:-1]] == [16_384] * (len(groups) - 1)


def test_a_rest_is_filled_as_well_as_it_can_be():
    random = np.random.default_rng(0)
    for _ in range(200):
        sizes = random.integers(1, 30, random.integers(0, 9)).tolist()
        room = int(random.integers(0, 80))
        sums = [sum(size for n, size in enumerate(sizes) if mask >> n & 1) for mask in range(2 ** len(sizes))]
        places = fill(sizes, room)
        assert len(set(places)) == len(places)
        assert sum(sizes[place] for place in places) == max(total for total in sums if total <= room)


def test_a_batch_that_is_too_small(store, small_vocabulary):
    longest = int(store.lengths.max()) - 1
    PackedBatches(store, small_vocabulary, longest)
    with pytest.raises(InputError, match=f"tokens of a batch: found {longest - 1}, expected at least {longest}"):
        PackedBatches(store, small_vocabulary, longest - 1)


@pytest.mark.parametrize("field", ["repeat", "limit"])
def test_a_source_that_gives_nothing_is_refused(field):
    with pytest.raises(InputError, match=f"{field}: found 0"):
        DataSource(["a.jsonl"], **{field: 0})


# -- Samples to stores ---------------------------------------------------------------------------------------


def png(seed: int, change: int = 0) -> bytes:
    """A picture of noise, in one of whose bytes the bits `change` are other ones."""
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
    pixels[11, 11, 1] ^= change
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    return file.getvalue()


def wav(seed: int, samples: int = 3000, change: int = 0) -> bytes:
    """Noise, one of whose numbers is changed by `change`."""
    import soundfile

    noise = np.random.default_rng(seed).normal(0, 0.1, samples)
    noise[samples // 2] += 0.2 * change
    soundfile.write(file := io.BytesIO(), noise, 16_000, format="wav")
    return file.getvalue()


def captioned(kind: str, data: bytes, caption: str, row: int = 0) -> Sample:
    media = Media(kind, f"rows.jsonl row {row}", MemorySource(data))
    turns = (SampleTurn("user", (media,)), SampleTurn("assistant", (Text(caption),)))
    return Sample(str(row), turns, {}, f"rows.jsonl row {row}")


@pytest.fixture(scope="module")
def samples():
    return [captioned("image", png(0), "a red circle", 0), captioned("audio", wav(1), "trumpet", 1),
            Sample("2", (SampleTurn(None, (Text("a blue square"),)),), {}, "rows.jsonl row 2")]


AUGMENTATION = Augmentation(ImageAugmentation(), AudioAugmentation())


def test_documents_are_those_of_the_samples(samples, tokenizers, vocabulary):
    documents = Documents(samples, tokenizers, vocabulary, max_seq_len=200)
    assert len(documents) == 3 and documents.numbers == [0, 1, 2]
    for n, (sample, found) in enumerate(zip(samples, documents.render([(0, 0), (1, 0), (2, 0)]), strict=True)):
        expected = render(to_documents([sample], tokenizers)[0], vocabulary)
        assert np.array_equal(found.ids, expected.ids) and np.array_equal(found.loss_mask, expected.loss_mask)
        assert documents.lengths[n] == len(found.ids)
    picture = to_documents(samples, tokenizers)[0]
    image = tokenizers["image"].encode(load_media(samples[0].turns[0].parts[0], tokenizers))
    words = TextPart(tokenizers["text"].encode("a red circle"))
    assert picture == Document((Turn("user", (MediaPart("image", image),)), Turn("assistant", (words,))))


def test_views_are_augmented_and_fixed_by_the_seed(samples, tokenizers, vocabulary):
    def ids(seed: int, sample: int, augmentation=AUGMENTATION) -> list[tuple[int, ...]]:
        documents = Documents(samples, tokenizers, vocabulary, augmentation=augmentation, max_seq_len=200, seed=seed)
        return [tuple(found.ids.tolist()) for found in documents.render([(sample, view) for view in range(24)])]

    for sample in range(2):
        plain = ids(1, sample, Augmentation())[0]
        views = ids(1, sample)
        assert views == ids(1, sample) and views != ids(2, sample)
        assert len(set(views)) > 4 and len(set(map(len, views))) == 1
        assert 0 < views.count(plain) < 12  # some are as the sample is
    assert len(set(ids(1, 2))) == 1  # text stays as it is


def test_spans_lie_over_the_codes_of_user_turns(samples, tokenizers, vocabulary):
    documents = Documents(samples, tokenizers, vocabulary, max_seq_len=200)
    batch = PackedBatches(documents, vocabulary, 400, shuffle=False)[0]
    starts = np.cumsum([0, *(documents.lengths[batch.samples] - 1)])
    for n, kind in enumerate(("image", "audio")):
        given = batch.features[kind]
        span = vocabulary.range(kind)
        ids = batch.ids[0].numpy()
        assert given.places.tolist() == np.flatnonzero((ids >= span.start) & (ids < span.stop)).tolist()
        assert starts[batch.samples.tolist().index(n)] < given.places[0]
        medium = load_media(samples[n].turns[0].parts[0], tokenizers)
        (encoding,) = tokenizers[kind].embed_batch([medium])
        assert torch.allclose(given.values, encoding.features.flatten(0, 1), atol=1e-6)
        assert np.array_equal(vocabulary.to_local(kind, ids[given.places]), encoding.codes.ravel())
    # What is to be generated enters as codes.
    answer = Sample("9", (SampleTurn("assistant", samples[0].turns[0].parts),), {}, "rows.jsonl row 9")
    assert Documents([answer], tokenizers, vocabulary, max_seq_len=200).render([(0, 0)])[0].spans == ()


def test_nearly_all_tokens_are_real_on_starter_data():
    tokenizers = {kind: load_tokenizer(SHIPPED / kind) for kind in ("text", "image", "audio")}
    shards = ("images-train-004", "sounds-train-001", "speech-train-000")
    samples = [sample for name in shards for sample in read_source(DataSource([str(STARTER / f"{name}.tar.gz")], limit=40))]
    vocabulary = Vocabulary.build(tokenizers)
    documents = Documents(samples, tokenizers, vocabulary, max_seq_len=640)
    batches = PackedBatches(documents, vocabulary, 2048, repeats=[24] * len(samples))
    assert len(batches) > 100 and 24 * (documents.lengths - 1).sum() / (len(batches) * 2048) >= 0.99


# -- What documents of a batch see of each other -------------------------------------------------------------

TOGETHER = {
    "picture": lambda byte: captioned("image", png(0, 99 * byte), "a red circle", 0),
    "sound": lambda byte: captioned("audio", wav(1, change=byte), "trumpet", 1),
    "long text": lambda byte: plain_text(f"{'xyz'[byte]} violin, D sharp 5" + " a blue square" * 40),
    "picture as an answer": lambda byte: Sample("3", (
        SampleTurn("user", (Text(f"{'xyz'[byte]} circle"),)),
        SampleTurn("assistant", captioned("image", png(3, 99 * byte), "", 3).turns[0].parts)), {}, "rows.jsonl row 3"),
    "text": lambda byte: plain_text(f"a blue {'xyz'[byte]}"),
    "other picture": lambda byte: captioned("image", png(5, 99 * byte), f"a red {'xyz'[byte]}", 5),
}


def plain_text(text: str) -> Sample:
    return Sample("2", (SampleTurn(None, (Text(text),)),), {}, "rows.jsonl row 2")


@pytest.mark.parametrize("changed", TOGETHER)
def test_a_changed_byte_changes_no_logit_of_another_document(changed, tokenizers, vocabulary):
    ranges = tuple(CodeRange(vocabulary.range(kind).start, vocabulary.levels(kind)) for kind in ("image", "audio"))
    widths = {kind: tokenizers[kind].feature_width for kind in ("image", "audio")}
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocabulary.size, width=32, depth=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=48,
                                    composed=ranges, features=widths))

    def logits(byte: int) -> tuple[torch.Tensor, torch.Tensor]:
        samples = [make(byte if name == changed else 0) for name, make in TOGETHER.items()]
        documents = Documents(samples, tokenizers, vocabulary, max_seq_len=400)
        batch = PackedBatches(documents, vocabulary, 1024, shuffle=False)[0]
        lengths = torch.from_numpy(documents.lengths)[batch.samples] - 1
        assert lengths.max() > 128 and len(lengths) == len(samples)  # attention over long documents goes in blocks
        owners = torch.full((1024,), -1)
        owners[:int(lengths.sum())] = batch.samples.repeat_interleave(lengths)
        with torch.no_grad():
            return decoder.logits(decoder(batch.ids, batch.positions, batch.packing, batch.features))[0], owners

    expected, owners = logits(0)
    for byte in (1, 2):
        found, same_owners = logits(byte)
        assert torch.equal(owners, same_owners)
        difference, own = (found - expected).abs().amax(-1), owners == list(TOGETHER).index(changed)
        assert difference[own].amax() > 1e-4 and difference[~own].eq(0).all()


BAD = {
    "not a picture": captioned("image", b"GIF89a, or so it says", "broken", 7),
    "too long": captioned("image", png(0), "violin " * 200, 7),
    "nothing to learn": Sample("7", (SampleTurn("user", (Text("hello"),)),), {}, "rows.jsonl row 7"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_samples_are_skipped_up_to_the_limit(bad, samples, tokenizers, vocabulary):
    mixed = [samples[0], BAD[bad], *samples[1:]]
    def made(samples, limit):
        counters = [SkipCounter(limit, len(samples))] * len(samples)
        return Documents(samples, tokenizers, vocabulary, max_seq_len=200, counters=counters)

    documents = made(mixed, 0.25)
    assert documents.numbers == [0, 2, 3] and documents.samples == samples
    with pytest.raises(InputError, match=r"1 of 4 rows cannot be used; first: rows.jsonl row 7.*at most 24.000%"):
        made(mixed, 0.24)
    with pytest.raises(InputError, match="no sample can be used"):
        made([BAD[bad]], 1.0)


def test_a_file_that_grew_since_it_was_measured_is_named(tokenizers, tmp_path):
    tokenizers = {**tokenizers, "image": tokenizers["image"].at(None)}
    vocabulary = Vocabulary.build(tokenizers)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    documents = Documents(read(str(tmp_path)), tokenizers, vocabulary, max_seq_len=600)
    batches = PackedBatches(documents, vocabulary, int(documents.lengths.max()) - 1)
    assert batches[0].samples.tolist() == [0]
    Image.new("RGB", (128, 128)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"/a: found \d+ tokens, expected \d+ as at the start of the run; its file has changed"):
        batches[0]


def test_processes_measure_as_one_does(samples, tokenizers, vocabulary, monkeypatch):
    monkeypatch.setattr("mmtx.data.documents.BLOCK", 2)
    monkeypatch.setattr("mmtx.data.documents.MIN_FOR_WORKERS", 4)
    mixed = [samples[0], *BAD.values(), *samples[1:]] * 3

    def made(num_workers):
        counters = [SkipCounter(1.0, len(mixed))] * len(mixed)
        return Documents(mixed, tokenizers, vocabulary, max_seq_len=200, counters=counters, first=5, num_workers=num_workers), counters[0]

    (one, first), (several, second) = made(0), made(2)
    assert one.numbers == several.numbers and one.samples == several.samples and len(one) == 9
    assert np.array_equal(one.lengths, several.lengths) and np.array_equal(one.digests, several.digests)
    assert first.summary() == second.summary()


class Deadly(MemorySource):
    def read(self) -> bytes:
        os._exit(1)


@pytest.mark.timeout(120)
def test_the_end_of_a_process_that_measures_is_told(samples, tokenizers, vocabulary, monkeypatch):
    monkeypatch.setattr("mmtx.data.documents.MIN_FOR_WORKERS", 4)
    deadly = captioned("image", b"", "deadly", 5)
    turn = deadly.turns[0]
    parts = tuple(replace(part, source=Deadly(b"")) if isinstance(part, Media) else part for part in turn.parts)
    mixed = [*samples, replace(deadly, turns=(replace(turn, parts=parts), *deadly.turns[1:]))]
    with pytest.raises(InputError, match=r"data.num_workers: one of the 2 worker processes that read the samples died with status 1, see above"):
        Documents(mixed, tokenizers, vocabulary, max_seq_len=200, num_workers=2)


def test_context_counts_what_a_batch_holds(samples, tokenizers, vocabulary):
    length = int(Documents(samples[:1], tokenizers, vocabulary, max_seq_len=200).lengths[0])
    Documents(samples[:1], tokenizers, vocabulary, max_seq_len=length - 1)
    with pytest.raises(InputError, match=f"row 0: found {length} tokens, expected at most max_seq_len . 1 = {length - 1}"):
        Documents(samples[:1], tokenizers, vocabulary, max_seq_len=length - 2)


def test_a_kind_without_a_tokenizer_is_named(samples, tokenizers, vocabulary):
    with pytest.raises(InputError, match="rows.jsonl row 1: found audio, but there is no audio tokenizer"):
        load_media(samples[1].turns[0].parts[0], {"text": tokenizers["text"], "image": tokenizers["image"]})


def test_seeds_depend_on_every_number():
    seeds = {seed_of(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64 and all(0 <= seed < 2 ** 63 for seed in seeds)
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3)


# -- Augmentation --------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_augmentation_of_a_picture():
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 24), np.uint8))
    augment = ImageAugmentation()
    first = augment(picture, generator())
    assert first.shape == picture.shape and first.dtype == torch.uint8
    assert torch.equal(first, augment(picture, generator())) and not torch.equal(first, augment(picture, generator(1)))
    off = ImageAugmentation(scale=0, stretch=0, translate=0, degrees=0, color_jitter=0)
    assert torch.equal(off(picture, generator()), picture)
    white = torch.full_like(picture, 255)
    assert torch.equal(augment(white, generator()), white)
    shifted = ImageAugmentation(scale=0, stretch=0, translate=1, degrees=0, color_jitter=0)(picture * 0, generator())
    assert set(shifted.unique().tolist()) >= {0, 255}  # what comes in from outside is white


def test_augmentation_of_a_sound():
    sound = torch.randn(4000, generator=generator(5)) * 0.1
    augment = AudioAugmentation()
    first = augment(sound, 16_000, generator())
    assert first.shape == sound.shape
    assert torch.equal(first, augment(sound, 16_000, generator()))
    assert not torch.equal(first, augment(sound, 16_000, generator(1)))
    assert torch.equal(AudioAugmentation(shift=0, tilt=0, noise=0, gain=0)(sound, 16_000, generator()), sound)
    for seed in range(6):  # forwards and back, also by more than the sound is long
        moved = AudioAugmentation(shift=0.1, tilt=0, noise=0, gain=0)(sound, 16_000, generator(seed))
        by = round((2 * torch.rand(4, generator=generator(seed))[0].item() - 1) * 1600)
        kept = sound[:4000 - by] if by >= 0 else sound[-by:]
        assert torch.equal(moved[max(by, 0):max(by, 0) + len(kept)], kept)
        assert moved.count_nonzero() == kept.count_nonzero()
        assert AudioAugmentation()(sound[:50], 16_000, generator(seed)).shape == (50,)
        assert AudioAugmentation(speed=24)(sound[:1], 16_000, generator(seed)).shape == (1,)
    still = AudioAugmentation(shift=0, tilt=0, noise=0, gain=0, speed=5)
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(4000) / 16_000)
    peaks = []
    for seed in range(6):  # another pitch, the same length
        played = still(tone, 16_000, generator(seed))
        assert played.shape == tone.shape
        peaks.append(torch.fft.rfft(played[:2900]).abs().argmax().item() * 16_000 / 2900)
    assert 440 * 2 ** (-5 / 12) - 6 < min(peaks) < 430 < 450 < max(peaks) < 440 * 2 ** (5 / 12) + 6


@pytest.mark.parametrize("height, width", [(64, 128), (128, 64), (96, 96)])
def test_a_picture_is_turned_as_a_whole(height, width):
    """Lines stay at right angles, whatever the shape of the picture."""
    still = dict(scale=0, stretch=0, translate=0, color_jitter=0)
    angles = []
    for upright in (False, True):
        line = torch.full((3, height, width), 255, dtype=torch.uint8)
        if upright:
            line[:, :, width // 2 - 1:width // 2 + 1] = 0
        else:
            line[:, height // 2 - 1:height // 2 + 1] = 0
        dark = 255 - ImageAugmentation(**still, degrees=20)(line, generator(6))[0].double()
        y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
        inside = (x - width / 2).hypot(y - height / 2) < 28
        dark = dark * inside
        x, y = x - (dark * x).sum() / dark.sum(), y - (dark * y).sum() / dark.sum()
        turned = 0.5 * torch.atan2(2 * (dark * x * y).sum(), (dark * (x * x - y * y)).sum())
        angles.append(float(turned.rad2deg()) % 180)
    assert (angles[1] - angles[0]) % 180 == pytest.approx(90, abs=1)
    assert angles[0] == pytest.approx(10.6, abs=0.5) or angles[0] == pytest.approx(169.4, abs=0.5)


STILL = dict(scale=0, stretch=0, translate=0, degrees=0, color_jitter=0)
QUIET = dict(shift=0, tilt=0, noise=0, gain=0)


def views(augment, *given, count: int = 40) -> list[torch.Tensor]:
    return [augment(*given, generator(seed)) for seed in range(count)]


def test_other_renderings_of_a_picture():
    picture = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    picture[:, 8:24, 8:24] = torch.tensor([200, 40, 40], dtype=torch.uint8)[:, None, None]
    (grey,) = {tuple(view[:, 16, 16].tolist()) for view in views(ImageAugmentation(**STILL, grayscale=1), picture)}
    assert grey == (93, 93, 93)
    for view in views(ImageAugmentation(**STILL, outline=1), picture):  # dark lines where the square ends
        assert view[0, 16, 16] == view[0, 2, 2] == 255 and view[0, 16, 8] < 110 and view[0, 8, 16] < 110
        assert torch.equal(view[0], view[1])
    assert all(torch.equal(view, 255 - picture) for view in views(ImageAugmentation(**STILL, invert=1), picture))
    changed = [not torch.equal(view, picture) for view in views(ImageAugmentation(**STILL, grayscale=0.2, outline=0.2), picture, count=200)]
    assert 50 < sum(changed) < 110  # shares
    for view in views(ImageAugmentation(**STILL, hue=30), picture):  # white stays white, and so does the light of the rest
        assert view[:, 2, 2].tolist() == [255, 255, 255] and abs(int(view[:, 16, 16].int().sum()) - 280) <= 40
    assert len({tuple(view[:, 16, 16].tolist()) for view in views(ImageAugmentation(**STILL, hue=30), picture)}) > 20
    hidden = [(view != picture).any(0).float().mean().item() for view in views(ImageAugmentation(**STILL, erase=0.5), picture)]
    assert max(hidden) <= 0.25 and 8 < sum(share == 0 for share in hidden) < 36
    for view in views(ImageAugmentation(**STILL, tint=0.4), picture):
        assert 0.6 * 255 - 1 <= view[:, 2, 2].min() <= 255
    soft = views(ImageAugmentation(**STILL, blur=3), picture)
    assert all(view[0, 16, 16] == 200 and view[1, 2, 2] == 255 for view in soft)
    assert sum(not torch.equal(view, picture) for view in soft) > 20
    slanted = views(ImageAugmentation(**STILL, shear=0.4), picture)
    assert all(view[0, 16, 16] == 200 for view in slanted) and sum(not torch.equal(view, picture) for view in slanted) > 30
    with pytest.raises(InputError, match="image_augmentation.grayscale: found 2"):
        ImageAugmentation(grayscale=2)


def test_other_rooms_and_instruments_of_a_sound():
    rate = 16_000
    sound = torch.randn(rate // 2, generator=generator(5)) * 0.1
    for view in views(AudioAugmentation(**QUIET, fade=12), sound, rate):
        ratio = view[-100:].norm() / sound[-100:].norm()
        assert torch.equal(view[:1], sound[:1]) and 10 ** (-12.1 / 20) < ratio < 10 ** (12.1 / 20)
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(rate // 2) / rate)
    both = tone + torch.sin(2 * torch.pi * 3000 * torch.arange(rate // 2) / rate)
    place = lambda hertz: hertz // 2  # of a spectrum with a line every 2 Hz
    ratios = []
    for view in views(AudioAugmentation(**QUIET, equalizer=6), both, rate):
        spectrum = torch.fft.rfft(view).abs()
        ratios.append(20 * math.log10(spectrum[place(440)] / spectrum[place(3000)]))
    assert -12.1 < min(ratios) < -3 and 3 < max(ratios) < 12.1
    lost = [torch.fft.rfft(view).abs()[[place(440), place(3000)]].min() < 1 for view in views(AudioAugmentation(**QUIET, band_stop=3), both, rate)]
    assert 2 < sum(lost) < 24
    gaps = [(view == 0).sum().item() for view in views(AudioAugmentation(**QUIET, time_mask=0.2), sound, rate)]
    assert max(gaps) <= 0.2 * rate and min(gaps) == 0 and 8 < sum(gap > 0 for gap in gaps) < 32
    # An echo goes on where the sound has ended, and no note gets another pitch.
    click = F.pad(torch.ones(1), (0, rate // 2 - 1))
    after = [view[200:2000].norm().item() for view in views(AudioAugmentation(**QUIET, reverb=0.4), click, rate)]
    assert sorted(after)[20] > 0.01
    for view in views(AudioAugmentation(**QUIET, reverb=0.4, equalizer=6, fade=6), tone, rate, count=8):
        assert torch.fft.rfft(view).abs().argmax() == place(440) and view.shape == tone.shape
    assert AudioAugmentation(reverb=0.4, equalizer=6, band_stop=1, time_mask=0.2, fade=6)(sound[:50], rate, generator()).shape == (50,)
    assert torch.isfinite(AudioAugmentation(reverb=0.4, equalizer=6, band_stop=1)(torch.zeros(100), rate, generator())).all()
    for length in (1, 2, 3):
        heard = AudioAugmentation(equalizer=6)(torch.ones(length), rate, generator())
        assert heard.shape == (length,) and torch.isfinite(heard).all()
