"""Conversations as messages: the prompt is the beginning of the stream that training on the same chat has."""

import json

import pytest

import mmtx
from mmtx.data.collection import DataSource, read_source
from mmtx.data.tokens import to_documents
from mmtx.errors import InputError
from mmtx.sequence import render
from mmtx.shipped_files import find_shipped

CAT = str(find_shipped("demos/examples/cat.webp").resolve())
CHAT = [{"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": CAT}, {"type": "text", "text": "What kind of thing is it?"}]},
        {"role": "assistant", "content": "animals nature, animal mammal"},
        {"role": "user", "content": "And what is it?"}]


@pytest.fixture(scope="module")
def model():
    return mmtx.load(device="cpu")


def test_a_prompt_is_the_beginning_of_what_training_sees(model, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [*CHAT, {"role": "assistant", "content": "cat"}]}))
    (sample,) = read_source(DataSource([str(tmp_path / "rows.jsonl")]))
    (document,) = to_documents([sample], model.tokenizers)
    whole = render(document, model.vocabulary).ids.tolist()
    asked = model.processor.prompt(CHAT, codes=True).ids.tolist()
    assert whole[:len(asked)] == asked and len(whole) == len(asked) + len(model.tokenizers["text"].encode("cat")) + 2


def test_all_ways_to_ask_answer_alike(model):
    marked = [*CHAT[:1], {"role": "user", "content": [mmtx.Image(CAT), "What kind of thing is it?"]}, *CHAT[2:]]
    answer = model.generate(marked)
    assert answer == model.generate(CHAT) == "".join(model.stream(CHAT)) == "cat"
    assert model.generate_batch([CHAT, [mmtx.Image(CAT)]]) == ["cat", "cat"]


@pytest.mark.parametrize("messages, message", [
    ([{"role": "robot", "content": "x"}], "role: found 'robot', expected user, assistant, system, developer"),
    ([CHAT[0], {"role": "user"}], "message 2 of 2: content: found none, expected text, media or a list of them"),
    ([{"role": "user", "content": [{"type": "video"}]}], "type: found 'video', expected text, image, audio"),
    ([{"role": "user", "content": ["a", {"type": "image"}]}], r"part 2 of 2: found \['type'\], expected type and one of image, url, path"),
    ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "text: found 3, expected text"),
    ([{"role": "user", "content": "x", "name": "y"}], "found the unknown field 'name', expected role and content"),
    ([CHAT[0], {"role": "user", "content": ["x", 3]}], "message 2 of 2: item 2 of 2: found int, expected a path"),
])
def test_what_is_no_message_is_one_clear_error(messages, message, model):
    with pytest.raises(InputError, match=message):
        model.generate(messages)


def test_a_plain_document_is_no_conversation(model):
    with pytest.raises(InputError, match="out: found 'document' with messages"):
        model.generate(CHAT, out="document")
