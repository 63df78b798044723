"""The second loss of sounds: the sum over all ways to write an answer along the time steps, for each sound alone."""

import itertools
import math

import numpy as np
import pytest
import runs
import torch

import mmtx
from mmtx.config import CodeRange, DecoderConfig
from mmtx.data.collection import DataSource, read_source
from mmtx.data.packing import PackedBatches
from mmtx.data.tokens import to_documents
from mmtx.document import Document, MediaPart, TextPart, Turn
from mmtx.embedding import TokenEmbedding
from mmtx.errors import InputError
from mmtx.evaluation import character_errors
from mmtx.model import Decoder, rotary_embedding
from mmtx.sequence import Rendered, render
from mmtx.training.ctc import CTCConfig, ctc_loss
from mmtx.training.decoder import DecoderModule
from mmtx.vocabulary import Vocabulary

WIDTH, BANDS = 8, 2
random = np.random.default_rng(0)


def sound(steps: int) -> MediaPart:
    return MediaPart("audio", random.integers(36, size=(steps, BANDS)), torch.zeros(steps, BANDS, 4))


def document(part: MediaPart, *pieces: int) -> Document:
    return Document((Turn("user", (part,)), Turn("assistant", (TextPart(np.array(pieces)),))))


PICTURE = MediaPart("image", random.integers(36, size=(2, 2)), torch.zeros(2, 2, 4))
DOCUMENTS = [document(sound(3), 5, 6), document(PICTURE, 7), document(sound(4), 5, 5), document(sound(1), 5, 6)]


class Store:
    """Documents as they are."""

    def __init__(self, documents: list[Document], vocabulary: Vocabulary):
        self.rendered = [render(each, vocabulary) for each in documents]
        self.lengths = np.array([len(each.ids) for each in self.rendered])

    def render(self, chosen) -> list[Rendered]:
        return [self.rendered[number] for number, _ in chosen]


@pytest.fixture(scope="module")
def output(vocabulary) -> TokenEmbedding:
    torch.manual_seed(0)
    ranges = tuple(CodeRange(vocabulary.range(kind).start, vocabulary.levels(kind)) for kind in ("image", "audio"))
    made = TokenEmbedding(DecoderConfig(vocabulary.size, width=WIDTH, depth=1, heads=1, kv_heads=1, head_dim=8, mlp_dim=8,
                                        composed=ranges))
    torch.nn.init.normal_(made.weight)
    return made


def batch_of(documents: list[Document], vocabulary: Vocabulary):
    store = Store(documents, vocabulary)
    return PackedBatches(store, vocabulary, int(store.lengths.sum()) + 5, shuffle=False)[0]


def written(path: tuple[int, ...]) -> tuple[int, ...]:
    """What a way to write says: one of each run, without blanks (0)."""
    return tuple(piece for piece, _ in itertools.groupby(path) if piece)


def by_hand(output: TokenEmbedding, states: torch.Tensor, pieces: tuple[int, ...], vocabulary: Vocabulary) -> float:
    """-log of the sum over all ways, at the states behind each step (S, D); ways through other pieces say something else."""
    matrix = output.matrix(plain=True).detach()
    text = vocabulary.range("text")
    rows = torch.cat([matrix[[vocabulary.pad]], matrix[text.start:text.stop]])
    shares = (states @ rows.T).softmax(-1)
    own = [0, *sorted({piece + 1 for piece in pieces})]
    total = sum(math.prod(float(shares[step, id]) for step, id in enumerate(path))
                for path in itertools.product(own, repeat=len(states)) if written(path) == tuple(piece + 1 for piece in pieces))
    return -math.log(total)


def test_it_is_the_sum_over_all_ways_to_write_an_answer(output, vocabulary):
    batch = batch_of(DOCUMENTS, vocabulary)
    torch.manual_seed(1)
    hidden = torch.randn(batch.ids.numel(), WIDTH, requires_grad=True)
    total = ctc_loss(output, hidden, batch, vocabulary)
    codes = vocabulary.range("audio")
    heard = torch.isin(batch.ids[0], torch.arange(codes.start, codes.stop)).nonzero().squeeze(1)
    told = {len(steps): steps for steps in heard[BANDS - 1::BANDS].split([3, 4, 1])}
    expected = sum(by_hand(output, hidden[told[steps]].detach(), pieces, vocabulary) for steps, pieces in ((3, (5, 6)), (4, (5, 5))))
    assert total.item() == pytest.approx(expected, rel=1e-5)
    total.backward()
    moved = hidden.grad.abs().sum(1).nonzero().squeeze(1).tolist()
    assert moved == sorted([*told[3].tolist(), *told[4].tolist()])  # neither the picture, nor a sound too short for its answer


@pytest.mark.parametrize("documents", [[document(PICTURE, 7)], [document(sound(3))]], ids=["no sound", "no text"])
def test_where_no_sound_is_answered_by_text_it_is_0(documents, output, vocabulary):
    hidden = torch.randn(200, WIDTH, requires_grad=True)
    batch = batch_of(documents, vocabulary)
    total = ctc_loss(output, hidden[:batch.ids.numel()], batch, vocabulary)
    assert total.item() == 0
    total.backward()  # a rank without sounds takes its step with the others


def module(vocabulary: Vocabulary, ctc: CTCConfig | None, **options) -> DecoderModule:
    config = DecoderConfig(vocabulary.size, width=WIDTH, depth=2, heads=1, kv_heads=1, head_dim=8, mlp_dim=8,
                           features={"image": 4, "audio": 4})
    made = DecoderModule(config, ctc=ctc, **{"continuous_inputs": True, **options})
    torch.manual_seed(0)
    made.decoder, made.vocabulary = Decoder(config), vocabulary
    return made


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_training_counts_it_behind_a_block_and_validation_does_not(blocks, vocabulary):
    batch = batch_of([document(PICTURE, 7), document(sound(3), 5, 6)], vocabulary)
    plain, both = module(vocabulary, None), module(vocabulary, CTCConfig(blocks, 2.0))
    decoder = plain.decoder
    x = decoder.embed(batch.ids, batch.features)
    for block in decoder.blocks[:blocks]:
        x = block(x, rotary_embedding(batch.positions, 8, decoder.config.rope_theta), batch.packing)
    second = ctc_loss(decoder.embedding, decoder.norm(x).flatten(0, 1), batch, vocabulary).item()
    expected = plain.train()._losses(batch).total.item()
    assert second > 0 and both.train()._losses(batch).total.item() == pytest.approx(expected + 2 * second)
    assert both.eval()._losses(batch).total.item() == plain.eval()._losses(batch).total.item() == expected
    assert not any(part._forward_pre_hooks for part in both.decoder.modules())  # nothing stays in what is saved or sharded


@pytest.mark.parametrize("make, message", [
    (lambda _: CTCConfig(-1), "ctc.blocks: found -1, expected 0 or more"),
    (lambda _: CTCConfig(1, 0.0), "ctc.weight: found 0.0, expected a finite number of more than 0"),
    (lambda _: CTCConfig(1, math.nan), "ctc.weight: found nan"),
    (lambda v: module(v, CTCConfig(1), continuous_inputs=False), "ctc: found one with continuous_inputs: false"),
    (lambda v: module(v, CTCConfig(3)), "ctc.blocks: found 3, expected at most 2, decoder.depth"),
])
def test_what_cannot_be_is_one_clear_error(make, message, vocabulary):
    with pytest.raises(InputError, match=message):
        make(vocabulary)


@pytest.mark.slow
def test_the_model_for_speech_writes_down_sentences_that_it_never_heard():
    model = mmtx.load("demos/speech", device="cpu")
    samples = read_source(DataSource([str(runs.STARTER / "speech-synthetic-test-sentences.tar.gz")], limit=50))
    said = model.caption_documents(to_documents(samples, model.tokenizers, patches=model.decoder.config.encoders))
    errors, characters = character_errors(said, [sample.caption for sample in samples])
    assert sum(errors) / sum(characters) < 0.35
