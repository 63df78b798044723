"""The grammar: streams and documents invert each other, the mask is exact, generated ids always parse."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtx.document import Document, MediaPart, TextPart, Turn
from mmtx.errors import InputError
from mmtx.grammar import Grammar
from mmtx.sequence import Rendered, loss_mask, parse, prompt, render
from mmtx.vocabulary import Vocabulary


@dataclass
class FakeTokenizer:
    kind: str
    size: int
    levels: tuple[int, ...] | None = None
    bands: int | None = None
    fingerprint: str = "0123456789abcdef"
    chat_format: None = None


TEXT, IMAGE = FakeTokenizer("text", 20), FakeTokenizer("image", 8, (2, 2, 2))
VOCABULARIES = {
    bands: Vocabulary.build({"text": TEXT, "image": IMAGE, "audio": FakeTokenizer("audio", 9, (3, 3), bands)})
    for bands in (1, 2, 3)
}
V = VOCABULARIES[2]
TEXT_ONLY = Vocabulary.build({"text": TEXT})


def documents(bands: int) -> st.SearchStrategy[Document]:
    def array(size: int, *shape: int) -> st.SearchStrategy:
        count = int(np.prod(shape))
        codes = st.lists(st.integers(0, size - 1), min_size=count, max_size=count)
        return codes.map(lambda x: np.reshape(x, shape))

    text = st.integers(0, 5).flatmap(lambda n: array(20, n)).map(TextPart)
    side = st.integers(1, 4)
    image = st.tuples(side, side).flatmap(lambda shape: array(8, *shape)).map(partial(MediaPart, "image"))
    audio = st.integers(1, 4).flatmap(lambda t: array(9, t, bands)).map(partial(MediaPart, "audio"))
    parts = st.lists(text | image | audio, max_size=4).map(tuple)
    turn = st.builds(Turn, st.sampled_from(["user", "assistant", None]), parts)
    return st.lists(turn, max_size=4).map(lambda turns: Document(tuple(turns)))


CHAT = Document(
    (
        Turn("user", (TextPart([3, 4]), MediaPart("image", [[5, 6, 7]]))),
        Turn("assistant", (MediaPart("audio", [[0, 1], [2, 3]]), TextPart([9]))),
    )
)
PLAIN = Document((Turn(None, (TextPart([1]), MediaPart("image", [[0], [7]]))),))


# -- Documents -----------------------------------------------------------------------------------------------


def test_parts_are_equal_by_content():
    assert TextPart([1, 2]) == TextPart(np.array([1, 2], np.int32)) != TextPart([1, 3])
    assert MediaPart("image", [[1]]) != MediaPart("audio", [[1]])
    assert MediaPart("image", [[1, 2]]) != MediaPart("image", [[1], [2]])
    assert len({TextPart([1]), TextPart([1]), TextPart([2])}) == 2
    codes = np.zeros((2, 2), np.int64)
    part = MediaPart("image", codes)
    codes[0, 0] = 1
    assert part.codes[0, 0] == 0
    with pytest.raises(ValueError):
        part.codes[0, 0] = 1
    with pytest.raises(InputError, match="shape \\(1,\\), expected 2"):
        MediaPart("image", [1])


def test_documents_normalise():
    assert Turn(None, (TextPart([1]), TextPart([]), TextPart([2]))) == Turn(None, (TextPart([1, 2]),))
    split = Document((Turn(None, (TextPart([1]),)), Turn(None, ()), Turn(None, (TextPart([2]),))))
    assert split == Document((Turn(None, (TextPart([1, 2]),)),))
    assert Document((Turn("user", ()),)).turns == (Turn("user", ()),)
    with pytest.raises(InputError, match="role 'system'"):
        Turn("system", ())


# -- Documents to ids and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("make, told", [
    (lambda: Turn("user", ("hello",)), "turn: found a part of type str, expected TextPart or MediaPart"),
    (lambda: Turn("user", "hello"), "turn: found str, expected a tuple of parts"),
    (lambda: Turn("user", TextPart([1])), "turn: found TextPart, expected a tuple of parts"),
    (lambda: Document(("hello",)), "document: found a turn of type str, expected Turn"),
    (lambda: Document(Turn("user", ())), "document: found Turn, expected a tuple of turns"),
    (lambda: TextPart([1.5]), "text part: found float64, expected whole numbers"),
    (lambda: TextPart([float("inf")]), "text part: found float64, expected whole numbers"),
    (lambda: TextPart([1e30]), "text part: found float64, expected whole numbers"),
    (lambda: TextPart([2**63]), "text part: found uint64, expected whole numbers"),
    (lambda: TextPart("ab"), r"text part: found shape \(\), expected 1 dimensions"),
    (lambda: TextPart(["a"]), "text part: found <U1, expected whole numbers"),
    (lambda: MediaPart("image", [[1, 2], [3]]), "image part: found rows of different lengths, expected 2 dimensions"),
    (lambda: MediaPart("image", [[1]], torch.zeros(2, 1, 5)), r"image part: found features of shape \(2, 1, 5\), expected \(1, 1, D\)"),
])
def test_documents_refuse_what_is_none(make, told):
    with pytest.raises(InputError, match=told):
        make()
    assert TextPart([]).ids.dtype == TextPart([1.0]).ids.dtype == np.int64


def test_chat_by_hand():
    v = V
    image, audio = v.range("image").start, v.range("audio").start
    expected = [
        (v.bos, False),
        (v.user, False), (3, False), (4, False),
        (v.image, False), (v.height(1), False), (v.width(3), False),
        (image + 5, False), (image + 6, False), (image + 7, False), (v.image_end, False), (v.end, False),
        (v.assistant, False),
        (v.audio, True), (audio, True), (audio + 1, True), (audio + 2, True), (audio + 3, True),
        (v.audio_end, True),
        (9, True), (v.end, True),
        (v.eos, False),
    ]  # fmt: skip
    rendered = render(CHAT, v)
    assert list(zip(rendered.ids.tolist(), rendered.loss_mask.tolist(), strict=True)) == expected
    assert rendered.ids.dtype == np.int32 and rendered.loss_mask.dtype == np.bool_


def test_plain_by_hand():
    v = V
    image = v.range("image").start
    rendered = render(PLAIN, v)
    ids = [v.bos, 1, v.image, v.height(2), v.width(1), image, image + 7, v.image_end, v.eos]
    assert rendered.ids.tolist() == ids
    assert rendered.loss_mask.tolist() == [False] + [True] * 8


def test_mixed_turns_by_hand():
    """Plain content beside role turns; <eos> counts only behind plain content."""
    plain = TextPart([3])
    user, assistant = Turn("user", (TextPart([1]),)), Turn("assistant", (TextPart([2]),))
    mask = render(Document((Turn(None, (plain,)), user, assistant)), V).loss_mask
    #                 <bos>  3  <user>  1  <end> <assistant> 2 <end> <eos>
    assert mask.tolist() == [0, 1, 0, 0, 0, 0, 1, 1, 0]
    mask = render(Document((user, assistant, Turn(None, (plain,)))), V).loss_mask
    #                 <bos> <user> 1 <end> <assistant> 2 <end> 3 <eos>
    assert mask.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    mask = render(Document((assistant, user)), V).loss_mask
    assert mask.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert render(Document(()), V).loss_mask.tolist() == [False, False]


def test_mask_of_packed_and_padded_streams():
    chat, plain = render(CHAT, V), render(PLAIN, V)
    packed = np.concatenate([chat.ids, plain.ids, chat.ids, [V.pad] * 3])
    expected = np.concatenate([chat.loss_mask, plain.loss_mask, chat.loss_mask, [False] * 3])
    assert np.array_equal(loss_mask(packed, V), expected)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), bands=st.sampled_from([1, 2, 3]))
def test_parse_is_the_inverse_of_render(data, bands):
    document = data.draw(documents(bands))
    rendered = render(document, VOCABULARIES[bands])
    assert isinstance(rendered, Rendered)
    assert parse(rendered.ids, VOCABULARIES[bands]) == document


def test_render_refuses_what_has_no_ids():
    for part, message in (
        (MediaPart("image", np.zeros((65, 1))), "65 patch rows"),
        (MediaPart("image", np.zeros((0, 1))), "0 patch rows"),
        (MediaPart("image", [[8]]), "image codes"),
        (TextPart([20]), "text codes"),
        (MediaPart("audio", np.zeros((2, 3))), "expected \\(t, 2\\)"),
        (MediaPart("audio", np.zeros((0, 2))), "t > 0"),
    ):
        with pytest.raises(InputError, match=message):
            render(Document((Turn("user", (part,)),)), V)
    with pytest.raises(InputError, match="no image ids"):
        render(PLAIN, TEXT_ONLY)


def test_parse_names_the_position():
    v = V
    image, audio = v.range("image").start, v.range("audio").start
    opened = [v.bos, v.image, v.height(1), v.width(2)]
    for ids, message in (
        ([], "position 0: found the end, expected <bos>"),
        ([v.bos], "position 1: found the end, expected <eos>"),
        ([v.bos, v.eos, v.eos], "position 2: found <eos>, expected the end of the stream"),
        ([v.bos, v.end], "position 1: found <end>, expected a turn"),
        ([v.bos, 1, v.end], "position 2: found <end>, expected a turn"),
        ([v.bos, v.user, 1, v.eos], "position 3: found <eos>, expected <end>"),
        ([v.bos, v.user, v.assistant], "position 2: found <assistant>, expected <end>"),
        ([v.bos, v.pad], "position 1: found <pad>, expected text codes"),
        ([v.bos, image], "position 1: found image:0, expected text codes"),
        ([*opened, image, v.image_end], "position 5: found </image>, expected image codes"),
        ([*opened, image, image, image], "position 6: found image:0, expected </image>"),
        ([v.bos, v.image, v.width(1)], "position 2: found <w:1>, expected <h:1> to <h:64>"),
        ([v.bos, v.image, v.height(1), v.height(2)], "position 3: found <h:2>, expected <w:1>"),
        ([v.bos, v.audio, v.audio_end], "position 2: found </audio>, expected audio codes"),
        ([v.bos, v.audio, audio, v.audio_end], "position 3: found </audio>, expected 2 audio codes"),
        ([v.bos, 1, v.size], f"position 2: found id {v.size}"),
        ([-1], "position 0: found id -1"),
    ):
        with pytest.raises(InputError, match=message):
            parse(ids, v)
    with pytest.raises(InputError, match="position 1: found <image>"):
        parse([TEXT_ONLY.bos, TEXT_ONLY.image], TEXT_ONLY)


def test_prompts():
    v = V
    user = Document(CHAT.turns[:1])
    assert prompt(user, v).ids.tolist() == [*render(user, v).ids[:-1], v.assistant]
    assert prompt(CHAT, v).ids.tolist() == render(CHAT, v).ids[:-2].tolist()  # the answer goes on: no <end> <eos>
    assert prompt(PLAIN, v).ids.tolist() == render(PLAIN, v).ids[:-1].tolist()
    assert prompt(Document(()), v).ids.tolist() == [v.bos]
    assert prompt(user, v).ids.dtype == np.int32


# -- Generation ----------------------------------------------------------------------------------------------


def sample(grammar: Grammar, state, generator: torch.Generator, steps: int = 600) -> torch.Tensor:
    """Random legal ids (B, steps): first a kind of id, then one id of it, and only small pictures."""
    v = grammar.vocabulary
    classes = grammar._tables[torch.device("cpu")].classes.long()
    usual = torch.ones(v.size, dtype=torch.bool)
    usual[v.height(5) : v.height(64) + 1] = False
    usual[v.width(5) : v.width(64) + 1] = False
    rows = []
    for _ in range(steps):
        allowed = grammar.allowed(state)
        assert allowed.any(1).all()
        allowed &= usual
        counts = torch.zeros(len(allowed), 64).index_add_(1, classes, allowed.float())
        weights = allowed / counts[:, classes].clamp(min=1)
        ids = torch.multinomial(weights, 1, generator=generator)[:, 0]
        state = grammar.advance(state, ids)
        rows.append(ids)
    assert grammar.finished(state).all()
    return torch.stack(rows, 1)


def parse_answer(ids: torch.Tensor, v: Vocabulary) -> tuple:
    """The parts of one generated row, which ends with <end> and padding."""
    ids = ids.tolist()
    length = ids.index(v.end) + 1
    assert set(ids[length:]) <= {v.pad}
    document = parse([v.bos, v.assistant, *ids[:length], v.eos], v)
    assert len(document.turns) == 1
    return document.turns[0].parts


@pytest.mark.parametrize("bands", [1, 2, 3])
@pytest.mark.parametrize("out", ["text", "image", "audio", "any"])
def test_random_legal_ids_parse(out, bands):
    v = VOCABULARIES[bands]
    grammar = Grammar(v)
    ids = sample(grammar, grammar.start(64, out), torch.Generator().manual_seed(bands))
    kinds = [tuple(part.kind for part in parse_answer(row, v)) for row in ids]
    if out == "any":
        assert {kind for row in kinds for kind in row} == {"text", "image", "audio"}
        assert max(map(len, kinds)) > 2
    elif out == "text":
        assert set(kinds) == {(), ("text",)}
    else:
        assert set(kinds) == {(out,)}


def test_rows_in_different_phases():
    grammar = Grammar(V)
    outs = ["text", "image", "audio", "any"] * 16
    ids = sample(grammar, grammar.start(64, outs), torch.Generator().manual_seed(0))
    kinds = [tuple(part.kind for part in parse_answer(row, V)) for row in ids]
    assert set(kinds[1::4]) == {("image",)} and set(kinds[2::4]) == {("audio",)}
    assert set(kinds[0::4]) <= {(), ("text",)}


def test_plain_documents_end_with_eos():
    grammar = Grammar(V)
    for row in sample(grammar, grammar.start(32, "document"), torch.Generator().manual_seed(0)).tolist():
        stream = [*prompt(PLAIN, V).ids.tolist(), *row[: row.index(V.eos) + 1]]
        assert parse(stream, V).turns[0].parts[0].ids[0] == 1


@settings(deadline=None, max_examples=200)
@given(data=st.data(), bands=st.sampled_from([1, 2, 3]))
def test_every_answer_can_be_generated(data, bands):
    """Each id of a rendered turn is allowed where it stands: the grammar rules out no legal answer."""
    v = VOCABULARIES[bands]
    parts = tuple(part for turn in data.draw(documents(bands)).turns for part in turn.parts)
    answer = Turn("assistant", parts)
    ids = render(Document((answer,)), v).ids[2:-1]
    outs = ["any"]
    if all(part.kind == "text" for part in answer.parts):
        outs.append("text")
    if len(answer.parts) == 1:
        outs.append(answer.parts[0].kind)
    grammar = Grammar(v)
    state = grammar.start(len(outs), outs)
    for id in ids.tolist():
        assert not grammar.finished(state).any()
        assert grammar.allowed(state)[:, id].all()
        state = grammar.advance(state, torch.full((len(outs),), id))
    assert grammar.finished(state).all()


def names(grammar: Grammar, state) -> set[str]:
    """What one row may write next, without numbers."""
    ids = grammar.allowed(state)[0].nonzero()[:, 0].tolist()
    return {grammar.vocabulary.name(id).split(":")[0].strip("<>") for id in ids}


def test_allowed_by_hand():
    v, grammar = V, Grammar(V)
    image, audio = v.range("image").start, v.range("audio").start
    state = grammar.start(1, "any")
    for id, after in (
        (4, {"text", "image", "audio", "end"}),
        (v.image, {"h"}),
        (v.height(1), {"w"}),
        (v.width(2), {"image"}),
        (image, {"image"}),
        (image + 7, {"/image"}),
        (v.image_end, {"text", "image", "audio", "end"}),
        (v.audio, {"audio"}),
        (audio, {"audio"}),
        (audio, {"audio", "/audio"}),
        (audio, {"audio"}),
        (audio + 8, {"audio", "/audio"}),
        (v.audio_end, {"text", "image", "audio", "end"}),
        (v.end, {"pad"}),
        (v.pad, {"pad"}),
    ):
        state = grammar.advance(state, torch.tensor([id]))
        assert names(grammar, state) == after, v.name(id)
    state = grammar.start(1, "any")
    assert grammar.allowed(state)[0, [v.image, v.audio, v.end, 0, 19]].all()
    assert not grammar.allowed(state)[0, [v.bos, v.eos, v.user, v.assistant, v.pad, image, audio]].any()


def test_prefix_completes_a_picture():
    v, grammar = V, Grammar(V)
    first = v.range("image").start
    prefix = [v.image, v.height(2), v.width(3), first, first + 1]
    ids = sample(grammar, grammar.start(3, "image", prefix=prefix), torch.Generator().manual_seed(0), steps=8)
    for row in ids:
        (part,) = parse_answer(torch.cat([torch.tensor(prefix), row]), v)
        assert part.codes.shape == (2, 3) and part.codes[0, :2].tolist() == [0, 1]
    rows = np.array([prefix, [v.image, v.height(1), v.width(1), first, v.image_end]])
    state = grammar.start(2, "any", prefix=rows)
    assert state.remaining[0] == 4 and grammar.allowed(state)[1, 0]
    assert torch.equal(grammar.start(2, "any", prefix=[]).phase, grammar.start(2, "any").phase)


def test_start_refuses():
    grammar = Grammar(V)
    with pytest.raises(InputError, match="found 'video'"):
        grammar.start(1, "video")
    with pytest.raises(InputError, match="found 1 kinds, expected 2"):
        grammar.start(2, ["any"])
    with pytest.raises(InputError, match="prefix"):
        grammar.start(1, "image", prefix=[3])
    with pytest.raises(InputError, match="expected one of text"):
        Grammar(TEXT_ONLY).start(1, "image")


def test_absent_modalities_cannot_be_opened():
    grammar = Grammar(TEXT_ONLY)
    assert names(grammar, grammar.start(1, "any")) == {"text", "end"}
    assert names(grammar, grammar.start(1, "document")) == {"text", "eos"}


def test_an_illegal_id_never_comes_back():
    grammar = Grammar(V)
    state = grammar.advance(grammar.start(2, "text"), torch.tensor([V.image, 3]))
    assert grammar.finished(state).tolist() == [True, False]
    state = grammar.advance(state, torch.tensor([V.pad, 3]))
    assert names(grammar, state) == {"pad"}


def test_steps_never_look_at_values():
    """Tensors on the meta device have none: .item(), branches on tensors, boolean indexing all fail."""
    grammar = Grammar(V)
    state = grammar.start(4, "any", device="meta")
    for _ in range(3):
        assert grammar.allowed(state).shape == (4, V.size)
        state = grammar.advance(state, torch.zeros(4, dtype=torch.int64, device="meta"))
    assert grammar.finished(state).shape == (4,)
    assert {tensor.device.type for tensor in state} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu_equal_the_cpu_without_waiting():
    grammar = Grammar(V)
    ids = sample(grammar, grammar.start(8, "any"), torch.Generator().manual_seed(0), steps=600)
    on_gpu, cpu, gpu = ids.cuda(), grammar.start(8, "any"), grammar.start(8, "any", device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        states = []
        for step in on_gpu[:, :50].unbind(1):
            gpu = grammar.advance(gpu, step)
            states.append((gpu, grammar.allowed(gpu), grammar.finished(gpu)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (gpu, allowed, finished), step in zip(states, ids.unbind(1), strict=False):
        cpu = grammar.advance(cpu, step)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu, gpu, strict=True))
        assert torch.equal(grammar.allowed(cpu), allowed.cpu())
        assert torch.equal(grammar.finished(cpu), finished.cpu())
