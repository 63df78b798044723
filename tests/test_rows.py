"""The field's forms of rows: what is read as which turn, and that no medium of a row is ever left out without a word."""

import base64
import io
import json
import pickle
import random
import re
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from mmtx.data import text_files
from mmtx.data.collection import DataSource, read_config, read_source
from mmtx.data.media import load_audio
from mmtx.data.prepare import prepare, stamp_of
from mmtx.data.sample import Text
from mmtx.data.sources import read, scan
from mmtx.data.tokens import load_sample
from mmtx.errors import InputError

FILES = ("a.png", "b.png", "a.wav", "b.wav", "a.heic", "plain")
INLINE = base64.b64encode(b"inline").decode()


@pytest.fixture
def folder(tmp_path):
    """Files that are never decoded here: each holds its own name."""
    for name in FILES:
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def rows_of(folder, *rows, name="rows.jsonl", **options):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(scan(str(path), **options))


def said(sample):
    """A sample as role and parts, media as what their bytes are."""
    if isinstance(sample, InputError):
        raise sample
    return [(turn.role, [part.text if isinstance(part, Text) else (part.kind, part.source.read().decode())
                         for part in turn.parts]) for turn in sample.turns]


A, B, W, V = ("image", "a.png"), ("image", "b.png"), ("audio", "a.wav"), ("audio", "b.wav")
INSIDE = {kind: (kind, "inline") for kind in ("image", "audio")}
ASKED = [("user", [A, "What?"]), ("assistant", ["a"])]


def chat(*texts, content="content", role="role", names=("user", "assistant")):
    return [{role: name, content: text} for name, text in zip(names, texts)]


def gpt(*texts):
    return chat(*texts, content="value", role="from", names=("human", "gpt", "human", "gpt"))


FORMS = {
    # LLaMA-Factory, ms-swift, TRL.
    "placeholder": ({"messages": chat("<image>What?", "a"), "images": ["a.png"]}, ASKED),
    "a line break behind it": ({"messages": chat("<image>\nWhat?", "a"), "images": ["a.png"]}, ASKED),
    "one path, not a list": ({"messages": chat("<image>What?", "a"), "image": "a.png"}, ASKED),
    "no placeholder": ({"messages": chat("What?", "a"), "images": ["a.png"]}, ASKED),
    "first in the user turn, not in the instruction": (
        {"messages": chat("Be brief.", "What?", "a", names=("system", "user", "assistant")), "images": ["a.png"]},
        [("user", ["Be brief."]), *ASKED]),
    "of OpenAI's developers": (
        {"messages": chat("Be brief.", "What?", "a", names=("developer", "user", "assistant")), "images": ["a.png"]},
        [("user", ["Be brief."]), *ASKED]),
    "in order, among words": (
        {"messages": chat("Is <image> or\n<image> better, <audio>?", "a"), "images": ["b.png", "a.png"], "audios": ["a.wav"]},
        [("user", ["Is ", B, " or", A, " better, ", W, "?"]), ("assistant", ["a"])]),
    "over several turns": (
        {"messages": chat("<image>One?", "a", "<image>Two?", "b", names=("user", "assistant") * 2), "images": ["a.png", "b.png"]},
        [("user", [A, "One?"]), ("assistant", ["a"]), ("user", [B, "Two?"]), ("assistant", ["b"])]),
    "one kind marked, the other first": (
        {"messages": chat("What? <image>", "a"), "images": ["a.png"], "audios": ["a.wav"]},
        [("user", [W, "What? ", A]), ("assistant", ["a"])]),
    "to be made": ({"messages": chat("Draw.", "<image>"), "images": ["a.png"]}, [("user", ["Draw."]), ("assistant", [A])]),
    "no user turn": ({"messages": chat("a", names=("assistant",)), "images": ["a.png"]}, [("user", [A]), ("assistant", ["a"])]),
    "empty lists": ({"messages": chat("Hello", "a"), "images": [], "audios": [], "videos": []},
                    [("user", ["Hello"]), ("assistant", ["a"])]),
    "parts without a value": (
        {"messages": chat([{"type": "text", "text": "What?"}, {"type": "image"}], "a"), "images": ["a.png"]},
        [("user", ["What?", A]), ("assistant", ["a"])]),
    "datasets fills parts with nulls": (
        {"messages": chat([{"type": "image", "image": "a.png", "text": None}, {"type": "text", "text": "What?", "image": None}],
                          [{"type": "text", "text": "a", "image": None}])}, ASKED),
    "prompt and completion as messages": (
        {"prompt": chat("What?"), "completion": chat("a", names=("assistant",)), "images": ["a.png"]}, ASKED),
    "structures of datasets": ({"messages": chat("What?", "a"), "images": [{"bytes": None, "path": "a.png"}]}, ASKED),
    # ShareGPT, LLaVA.
    "LLaVA": ({"id": "0", "image": "a.png", "conversations": gpt("<image>\nWhat?", "a")}, ASKED),
    "LLaVA, several": ({"image": ["a.png", "b.png"], "conversations": gpt("<image>\n<image>\nWhat?", "a")},
                       [("user", [A, B, "What?"]), ("assistant", ["a"])]),
    "ShareGPT": ({"conversations": gpt("Hi", "a"), "system": "Be brief.", "tools": "[]"},
                 [("user", ["Be brief."]), ("user", ["Hi"]), ("assistant", ["a"])]),
    "a blank instruction": ({"conversations": gpt("Hi", "a"), "system": ""}, [("user", ["Hi"]), ("assistant", ["a"])]),
    # Question and answer.
    "alpaca": ({"instruction": "Say.", "input": "x", "output": "a", "history": [["p", "q"]], "images": ["a.png"]},
               [("user", [A, "p"]), ("assistant", ["q"]), ("user", ["Say.\nx"]), ("assistant", ["a"])]),
    "alpaca without input": ({"instruction": "Say.", "input": "", "output": "a"}, [("user", ["Say."]), ("assistant", ["a"])]),
    "ms-swift": ({"system": "Be brief.", "query": "<audio>What?", "response": "a", "audios": ["a.wav"]},
                 [("user", ["Be brief."]), ("user", [W, "What?"]), ("assistant", ["a"])]),
    "no question": ({"query": "", "response": "a", "images": ["a.png"]}, [("user", [A]), ("assistant", ["a"])]),
    "VQA": ({"image": "a.png", "question": "What?", "answer": "a"}, ASKED),
    "text wins": ({"instruction": "Say.", "output": "a", "text": "all"}, [(None, ["all"])]),
    # Captions.
    "image folder": ({"file_name": "a.png", "text": "a", "additional_feature": "b"}, [("user", [A]), ("assistant", ["a"])]),
    "audio folder": ({"file_name": "a.wav", "transcription": "a"}, [("user", [W]), ("assistant", ["a"])]),
    "file_name beside a medium": ({"image": "a.png", "file_name": "b.png", "text": "a"}, [("user", [A]), ("assistant", ["a"])]),
    "file_name of a text": ({"file_name": "a.pdf", "text": "a"}, [(None, ["a"])]),
    "several": ({"images": ["a.png", "b.png"], "text": "a"}, [("user", [A, B]), ("assistant", ["a"])]),
    "NeMo": ({"audio_filepath": "a.wav", "text": "a", "duration": 1.5}, [("user", [W]), ("assistant", ["a"])]),
    "an interleaved document": ({"text": "See <image> and <image>.", "images": ["a.png", "b.png"]},
                                [(None, ["See ", A, " and ", B, "."])]),
    "a document with a sound that it does not place": (
        {"text": "<image> is a cat", "image": "a.png", "audio": "a.wav"}, [(None, [W, A, " is a cat"])]),
    "a document about tags": ({"text": "<image> is a tag"}, [(None, ["<image> is a tag"])]),
    # Parts of messages.
    "OpenAI": ({"messages": chat([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{INLINE}", "detail": "low"}},
                                  {"type": "input_audio", "input_audio": {"data": INLINE, "format": "wav"}}], "a")},
               [("user", [INSIDE["image"], INSIDE["audio"]]), ("assistant", ["a"])]),
    "OpenAI responses": ({"messages": chat([{"type": "input_image", "image_url": "a.png"}], "a")},
                         [("user", [A]), ("assistant", ["a"])]),
    "Qwen": ({"messages": chat([{"type": "image", "image": "a.png", "max_pixels": 9}, {"type": "audio", "audio_url": "a.wav"}], "a")},
             [("user", [A, W]), ("assistant", ["a"])]),
    "transformers": ({"messages": chat([{"type": "image", "url": "a.png"}, {"type": "image", "base64": INLINE},
                                        {"type": "audio", "path": "b.wav"}], "a")},
                     [("user", [A, INSIDE["image"], V]), ("assistant", ["a"])]),
    "Anthropic": ({"messages": chat([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": INLINE}}],
                                    "a")}, [("user", [INSIDE["image"]]), ("assistant", ["a"])]),
    # The answer may speak of placeholders where there are no media.
    "an answer about tags": ({"messages": chat("How?", "use <image>")}, [("user", ["How?"]), ("assistant", ["use <image>"])]),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(folder, name):
    row, expected = FORMS[name]
    (sample,) = rows_of(folder, row)
    assert said(sample) == expected


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": False}])
def test_an_answer_that_is_not_to_be_trained_on_is_refused(folder, mark):
    """OpenAI's `weight`, ms-swift's `loss`, Axolotl's `train`: without support for them, the answer would be trained on."""
    messages = chat("One?", "wrong", "Two?", "right", names=("user", "assistant") * 2)
    messages[1] |= mark
    (error,) = rows_of(folder, {"messages": messages})
    (name, value), = mark.items()
    assert f"row 1: field 'messages[1].{name}' is {value}, but every answer is trained on" in str(error)
    (sample,) = rows_of(folder, {"messages": [messages[0] | mark, messages[1] | {name: 1}, *messages[2:]]})
    assert said(sample) == [("user", ["One?"]), ("assistant", ["wrong"]), ("user", ["Two?"]), ("assistant", ["right"])]


LOST = {
    # More or fewer placeholders than media.
    "more placeholders": ({"messages": chat("<image><image>", "a"), "images": ["a.png"]}, ["2 <image> placeholders for 1 media"]),
    "fewer": ({"messages": chat("<image>", "a"), "images": ["a.png", "b.png"]}, ["1 <image> placeholders for 2 media"]),
    "no media": ({"messages": chat("<image>What?", "a")}, ["1 <image> placeholders for 0 media"]),
    "another kind": ({"messages": chat("<audio>", "a"), "images": ["a.png"]}, ["1 <audio> placeholders for 0 media"]),
    "a part without a value": ({"messages": chat([{"type": "image"}], "a")}, ["1 <image> placeholders for 0 media"]),
    "LLaVA": ({"conversations": gpt("<image>\nWhat?", "a"), "picture_id": 3}, ["1 <image> placeholders for 0 media"]),
    "query": ({"query": "<audio>What?", "response": "a"}, ["1 <audio> placeholders for 0 media"]),
    "text": ({"text": "<image><image>", "image": "a.png"}, ["2 <image> placeholders for 1 media"]),
    "a path in the text": ({"messages": chat("Picture 1: <img>a.png</img>\nWhat?", "a")}, ["messages[0].content", "<img>a.png</img>"]),
    # Fields that look like media.
    "a name": ({"text": "a", "image_path": "x"}, ["'image_path'", "'x'"]),
    "camel case": ({"text": "a", "imageUrl": "x"}, ["'imageUrl'"]),
    "a value": ({"text": "a", "where": "a.png"}, ["'where'", "a.png"]),
    "upper case": ({"text": "a", "where": "A.PNG"}, ["'where'"]),
    "a URL": ({"text": "a", "link": "https://x.org/a.JPG?size=2#top"}, ["'link'"]),
    "a fragment": ({"text": "a", "link": "https://x.org/a.jpg#top"}, ["'link'"]),
    "inline": ({"text": "a", "where": "data:image/png;base64,AA"}, ["'where'"]),
    "a list": ({"text": "a", "files": ["x", "a.wav"]}, ["'files[1]'", "a.wav"]),
    "nested": ({"text": "a", "meta": {"files": [{"at": "a.flac"}]}}, ["'meta.files[0].at'", "a.flac"]),
    "a column of a shard": ({"text": "a", "jpg": "AAAA"}, ["'jpg'"]),
    "a format that is not read": ({"text": "a", "where": "a.cr2"}, ["'where'", "a.cr2"]),
    "pixels": ({"text": "a", "img": [[0, 1], [1, 0]]}, ["'img'"]),
    "videos": ({"messages": chat("What?", "a"), "videos": ["a.mp4"]}, ["'videos'", "a video"]),
    "a video of another name": ({"image": "a.png", "text": "a", "where": "a.mp4"}, ["'where'", "a video"]),
    "a video as file_name": ({"file_name": "a.mp4", "text": "a"}, ["'file_name'", "a.mp4"]),
    "a video as a sound": ({"audio": "a.mp4", "text": "a"}, ["'audio'", "a.mp4", "a file of kind audio"]),
    "<video>": ({"messages": chat("<video>What?", "a")}, ["1 <video> placeholders for 0 media"]),
    "a second picture": ({"image": "a.png", "image_2": "b.png", "text": "a"}, ["'image_2'"]),
    "more pictures": ({"image": "a.png", "photos": ["a.png", "b.png"], "text": "a"}, ["'photos'"]),
    "another kind beside": ({"image": "a.png", "wav": "a.wav", "text": "a"}, ["'wav'"]),
    "in a message": ({"messages": [{"role": "user", "content": "What?", "images": ["a.png"]}, *chat("a", names=("assistant",))]},
                     ["messages[0].images"]),
    "in a part": ({"messages": chat([{"type": "text", "text": "What?", "image": "a.png"}], "a")}, ["messages[0].content[0].image"]),
    "of another kind in a part": ({"messages": chat([{"type": "image", "image": "a.png", "audio": "a.wav"}], "a")},
                                  ["messages[0].content[0].audio"]),
    "file_name without an extension": ({"file_name": "gone", "text": "a"}, ["'file_name'", "no such file"]),
    "both": ({"image": "a.png", "images": ["b.png"], "text": "a"}, ["'image', 'images'"]),
    "messages and conversations": ({"messages": chat("a"), "conversations": gpt("a")}, ["'messages'", "conversations"]),
    # What is read must be what it should be.
    "a path that is gone": ({"messages": chat("<image>", "a"), "images": ["gone.png"]}, ["'images[0]'", "gone.png: no such file"]),
    "the wrong kind": ({"messages": chat("<audio>", "a"), "audios": ["a.png"]}, ["'audios[0]'", "a file of kind audio"]),
    "no base64": ({"messages": chat([{"type": "input_audio", "input_audio": {"data": "?", "format": "wav"}}], "a")},
                  ["input_audio", "'?'", "base64"]),
    "a data URL without its end": ({"image": f"data:image/png;base64,{INLINE}A", "text": "a"}, ["'image'", "data:image/png;base64, expected base64"]),
    "a list in a list": ({"messages": chat("<image>", "a"), "images": [["a.png"]]}, ["'images[0]'", "a path or URL"]),
    "an unknown role": ({"conversations": [{"from": "tool", "value": "a"}]}, ["conversations[0]", "'tool'"]),
    "history": ({"query": "a", "response": "b", "history": "no"}, ["'history'", "'no'"]),
    "an answer that is none": ({"query": "a", "response": 3}, ["'response'", "3"]),
    "a call of a tool": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
                         ["'messages[1].tool_calls' is [{'id': '1'}]", "without calls of tools"]),
    "a call beside a text": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "function_call": {"name": "f"}}]},
                             ["'messages[1].function_call'", "without calls of tools"]),
    "an instruction that is none": ({"query": "a", "response": "b", "system": 3}, ["'system'", "3"]),
    "an offset below 0": ({"audio_filepath": "a.wav", "text": "a", "offset": -1, "duration": 1}, ["'offset'", "-1"]),
    "NaN": ({"audio_filepath": "a.wav", "text": "a", "offset": float("nan"), "duration": 1}, ["'offset'", "nan"]),
    "an offset below 0 in a part": ({"messages": chat([{"type": "audio", "audio": "a.wav", "offset": -1}], "a")},
                                    ["messages[0].content[0]", "'offset'", "-1"]),
    "a question without text": ({"messages": chat("What?", "a", "", names=("user", "assistant", "user"))}, ["'messages[2].content' is ''"]),
    "no seconds": ({"audio_filepath": "a.wav", "text": "a", "duration": 0}, ["'duration'", "0"]),
    "a decimal comma": ({"audio": "a.wav", "text": "a", "offset": "1,5"}, ["'offset'", "'1,5'", "with a decimal point"]),
    "no number": ({"audio_filepath": "a.wav", "text": "a", "duration": True}, ["'duration'", "True"]),
}


@pytest.mark.parametrize("name", LOST)
def test_no_medium_is_left_out(folder, name):
    row, words = LOST[name]
    (error,) = rows_of(folder, row)
    assert isinstance(error, InputError), said(error)
    assert len(str(error)) < 600 and "\n" not in str(error)
    for word in [f"{folder}/rows.jsonl row 1", *words]:
        assert word in str(error)


@pytest.mark.parametrize("mark", ["[IMG]", "<|image|>", "<|image_1|>", "<|vision_start|><|image_pad|><|vision_end|>", "<image 1>",
                                  "<image_1>", "<start_of_image>", "<image_soft_token>", "<ImageHere>", "<image_placeholder>", "<IMAGE>"])
def test_placeholders_of_other_programs_are_refused(folder, mark):
    """They stayed in the text that is learnt, and all pictures came first."""
    chats = {"messages": chat(f"Is {mark} or {mark} better?", "a"), "images": ["a.png", "b.png"]}
    pair = {"question": f"{mark} What?", "answer": "a", "image": "a.png"}
    for error in rows_of(folder, chats, pair):
        assert re.search(r"row [12]: found '[^']+' in a user turn, but no <image>, expected <image> where each", str(error))
    beside = {"messages": chat(f"<image>What does {mark} mean?", f"use {mark}"), "images": ["a.png"]}
    for sample in rows_of(folder, beside, {"messages": chat(f"What is {mark}?", "a")}, {"image": "a.png", "text": f"a {mark}"}):
        assert mark in "".join(part.text for turn in sample.turns for part in turn.parts if isinstance(part, Text))


def test_a_sound_of_another_program_is_refused(folder):
    (error,) = rows_of(folder, {"messages": chat("<|audio_bos|><|AUDIO|><|audio_eos|>What?", "a"), "audios": ["a.wav"]})
    assert "found '<|audio_bos|>' in a user turn, but no <audio>" in str(error)


@pytest.mark.parametrize("row", [
    {"text": "a", "url": "https://x.org/page", "path": "src/a.py", "source": "book.pdf", "image_id": 3, "images_count": 2,
     "audio_duration": 2.5, "voice": "low", "movie": "Jaws", "image_caption": "x", "videos": [], "title": "A.B", "video": False},
    {"image": "a.png", "text": "a", "image_url": "https://x.org/a.png", "original": "b.png", "thumbnail": {"url": "b.jpg"}},
    {"messages": chat("Hi", "a"), "tools": "[]", "score": float("inf"), "meta": {"url": "x.html", "n": [1, [2, 3]]}},
])
def test_unknown_fields_stay_metadata(folder, row):
    (sample,) = rows_of(folder, row)
    assert sample.metadata == {name: value for name, value in row.items() if name not in ("text", "image", "messages")}


def test_names_of_files_as_other_systems_write_them(folder):
    """Windows writes backslashes, macOS the dots of an umlaut as a character of their own."""
    (folder / "Bru\u0308cken").mkdir()
    for name in ("gro\u0308ßer.png", "z\\\u00fc.png"):
        Image.new("RGB", (8, 8)).save(folder / "Bru\u0308cken" / name)
    for name in ("Br\u00fccken/gr\u00f6ßer.png", "Br\u00fccken\\gr\u00f6ßer.png", "Bru\u0308cken\\gro\u0308ßer.png", ".\\Br\u00fccken/gr\u00f6ßer.png",
                 "Bru\u0308cken/z\\\u00fc.png"):
        (sample,) = rows_of(folder, {"image": name, "text": "a"})
        assert Image.open(io.BytesIO(sample.turns[0].parts[0].source.read())).size == (8, 8), name
    (error,) = rows_of(folder, {"image": "Br\u00fccken\\gone.png", "text": "a"})
    assert f"field 'image' names {folder}/Br\u00fccken\\gone.png: no such file" in str(error)


def test_a_cut_of_a_sound(folder):
    row = {"audio_filepath": "a.wav", "text": "a", "offset": 1.5, "duration": 2.25, "speaker": 4}
    rest = {"audio_filepath": "a.wav", "text": "a", "offset": 1}
    plain = {"audio": "a.wav", "text": "a", "duration": 2.25}
    samples = rows_of(folder, row, rest, plain)
    cuts = [(sample.turns[0].parts[0].start, sample.turns[0].parts[0].seconds) for sample in samples]
    assert cuts == [(1.5, 2.25), (1.0, None), (0.0, None)]
    assert samples[0].turns[0].parts[0].name == f"{folder}/rows.jsonl row 1: {folder}/a.wav (2.25 s from 1.5 s)"
    assert [sample.metadata for sample in samples] == [{"speaker": 4}, {}, {"duration": 2.25}]
    # Another cut is another sample to a run that goes on.
    assert stamp_of(rows_of(folder, row)) != stamp_of(rows_of(folder, row | {"offset": 1.25}))
    # A function of variants may change a cut of which the name does not tell.
    (sample,) = rows_of(folder, row)
    medium = next(part for part in sample.turns[0].parts if not isinstance(part, Text))
    changed = [replace(sample, turns=(replace(sample.turns[0], parts=(replace(medium, **more),)), *sample.turns[1:]))
               for more in ({}, {"seconds": 0.25}, {"speed": 2.0})]
    assert len({stamp_of([one]) for one in changed}) == 3


def test_a_cut_of_a_sound_by_its_end(folder):
    """As annotations of long recordings have it, in a table with names of its own."""
    table = [["Begin File", "Begin Time (s)", "End Time (s)", "Species"], ["a.wav", "1.5", "3.85", "owl"], ["a.wav", "0", "0.3", "owl"],
             ["a.wav", "2", "2", "owl"], ["a.wav", "2", "later", "owl"]]
    (folder / "x.tsv").write_text("\n".join(map("\t".join, table)))
    fields = {"audio": "Begin File", "offset": "Begin Time (s)", "end": "End Time (s)", "text": "Species"}
    *cuts, none, word = scan(str(folder / "x.tsv"), fields=fields)
    media = [sample.turns[0].parts[0] for sample in cuts]
    assert [(part.start, part.seconds) for part in media] == [(1.5, 2.35), (0.0, 0.3)] and not any(sample.metadata for sample in cuts)
    assert media[0].name == f"{folder}/x.tsv row 1: {folder}/a.wav (2.35 s from 1.5 s)"
    assert str(none) == f"{folder}/x.tsv row 3: field 'end' is 2, expected more than 'offset', which is 2"
    assert "row 4: field 'end' is 'later', expected a number of at least 0" in str(word)
    # A duration comes first, and an end without an offset cuts nothing.
    both, alone = rows_of(folder, {"audio": "a.wav", "text": "a", "offset": 1, "duration": 1, "end": 5},
                          {"audio": "a.wav", "text": "a", "end": 5})
    assert (both.turns[0].parts[0].seconds, both.metadata) == (1.0, {"end": 5})
    assert (alone.turns[0].parts[0].seconds, alone.metadata) == (None, {"end": 5})


@pytest.mark.parametrize("row", [
    {"messages": chat([{"type": "audio", "audio": "a.wav", "offset": 1.5, "duration": 2.25}, {"type": "audio", "audio": "b.wav"}], "a")},
    {"audios": [{"path": "a.wav", "offset": 1.5, "duration": 2.25}, "b.wav"], "text": "a"},
    {"audio": [{"data": base64.b64encode(b"a.wav").decode(), "offset": "1.5", "duration": 2.25}, {"url": "b.wav", "offset": None}], "text": "a"},
])
def test_a_cut_of_a_sound_in_an_object(folder, row):
    (sample,) = rows_of(folder, row)
    first, second = sample.turns[0].parts
    assert said(sample) == [("user", [W, V]), ("assistant", ["a"])]
    assert [(part.start, part.seconds) for part in (first, second)] == [(1.5, 2.25), (0.0, None)]


@pytest.mark.skipif("start" not in signature(load_audio).parameters, reason="load_audio reads no cuts yet")
def test_only_the_cut_is_heard(tmp_path, tokenizers):
    rate = tokenizers["audio"].rate
    silence, tone = np.zeros(rate), 0.5 * np.sin(np.arange(rate) / 7)
    soundfile.write(tmp_path / "a.wav", np.concatenate([silence, tone, silence]), rate)
    rows = [{"audio_filepath": "a.wav", "text": "a", "offset": offset, "duration": 0.5} for offset in (0.25, 1.25)]
    quiet, loud = (load_sample(sample, tokenizers)[0] for sample in rows_of(tmp_path, *rows))
    assert len(quiet) == len(loud) == rate // 2 and quiet.abs().max() == 0 and loud.abs().max() > 0.6


def test_fields_and_links_are_part_of_what_is_prepared(folder, tokenizers, tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "data" / "x.png")
    path = rows_of_file(tmp_path / "data", {"img_path": "x.png", "label": "a red square", "score": float("nan")})
    given = {"fields": {"image": "img_path", "text": "label"}}
    facts = prepare(DataSource([path], **given), tokenizers, tmp_path / "out")
    assert (facts["documents"], facts["skipped"], facts["fields"]) == (1, 0, given["fields"]) and "follow_links" not in facts
    with pytest.raises(InputError, match="was begun with fields"):
        prepare(DataSource([path], fields={"image": "img_path", "caption": "label"}), tokenizers, tmp_path / "out")
    with pytest.raises(InputError, match="'img_path'.*looks like a medium"):
        prepare(DataSource([path], fields={"text": "label"}), tokenizers, tmp_path / "other")


def test_the_command_line_takes_fields(folder, tmp_path):
    rows_of_file(folder, {"img_path": "a.png", "label": "a"})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({
        "data": {"init_args": {"tokenizers": {}, "validation": [], "train": [
            {"paths": [str(folder / "rows.jsonl")], "fields": {"image": "img_path", "text": "label"}, "follow_links": True}]}},
        "model": {"init_args": {}}}))
    (source,) = read_config(config).train
    assert said(read_source(source)[0]) == [("user", [A]), ("assistant", ["a"])] and source.follow_links


def test_values_of_a_source_are_of_their_types(folder, tmp_path, monkeypatch):
    """`mmtx prepare --config` has no parser that checks them, and text in place of a list would be taken letter by letter."""
    rows_of_file(folder, {"text": "a"}, {"text": "b"})
    monkeypatch.chdir(folder)

    def source(**values):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"tokenizers": {}, "validation": [], "train": [
            {"paths": "rows.jsonl", **values}]}}, "model": {"init_args": {}}}))
        return read_config(tmp_path / "config.yaml").train[0]

    assert source().paths == DataSource(Path("rows.jsonl")).paths == DataSource([Path("rows.jsonl")]).paths == ["rows.jsonl"]
    for values, told in (({"select": {"caption": "ab"}}, "select['caption']: found 'ab', expected a list of values"),
                         ({"limit": 1.5}, "limit: found 1.5, expected a whole number or None"),
                         ({"limit": 0}, "limit: found 0, expected a whole number of at least 1"),
                         ({"repeat": "2"}, "repeat: found '2', expected a whole number"),
                         ({"repeat": True}, "repeat: found True, expected a whole number"),
                         ({"trusted": "no"}, "trusted: found 'no', expected true or false"),
                         ({"follow_links": 1}, "follow_links: found 1, expected true or false")):
        with pytest.raises(InputError, match=f"^{re.escape(told)}$"):
            source(**values)


def test_samples_without_a_cut_have_the_stamp_that_they_had(folder):
    medium = read(rows_of_file(folder, {"image": "a.png", "text": "a"}))[0].turns[0].parts[0]
    assert repr(medium) == (f"Media(kind='image', name='{folder}/rows.jsonl row 1: {folder}/a.png', "
                            f"source={medium.source!r})")


def rows_of_file(folder, *rows, name="rows.jsonl"):
    rows_of(folder, *rows, name=name)
    return str(folder / name)


def test_fields_of_other_names(folder):
    row = {"img_path": "a.png", "label": "a", "text": "not read", "style": 3}
    source = DataSource([rows_of_file(folder, row)], fields={"image": "img_path", "text": "label"})
    (sample,) = read_source(source)
    assert said(sample) == [("user", [A]), ("assistant", ["a"])]
    assert sample.metadata == {"text": "not read", "style": 3}
    # What looks like a medium and is none is named with null.
    row = {"text": "a", "image": "ubuntu.iso", "thumbnail": "b.png"}
    assert isinstance(rows_of(folder, row)[0], InputError)
    (sample,) = rows_of(folder, row, fields={"image": None, "thumbnail": None})
    assert said(sample) == [(None, ["a"])] and sample.metadata == {"image": "ubuntu.iso", "thumbnail": "b.png"}
    (folder / "sub").mkdir()
    (folder / "sub" / "x.png").write_bytes(b"x")
    (folder / "sub" / "x.json").write_text('{"label": "a", "style": 1}')
    (sample,) = scan(str(folder / "sub"), fields={"caption": "label"})
    assert sample.caption == "a" and sample.metadata == {"style": 1}


@pytest.mark.parametrize("given, told", [({"imge": "x"}, "fields: found 'imge', expected one of image, images, audio"),
                                         ({"image": "x", "text": "x"}, "fields: found .*a different field for each")])
def test_fields_that_are_none(given, told):
    with pytest.raises(InputError, match=told):
        DataSource(["a.jsonl"], fields=given)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_name_in_fields_that_no_row_has_is_told(folder, name):
    """A blank that is missing in the name of the column with the beginnings of cuts: each was the whole recording, without a word."""
    rows = [{"File": "a.wav", "Begin (s)": "1", "Species": "robin"}, {"File": "b.wav", "Begin (s)": "2", "Species": "wren"}]
    texts = [[*rows[0]], *(row.values() for row in rows)]
    table = "".join(",".join(cells) + "\n" for cells in texts), "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(table[name == "rows.jsonl"])
    given, told = {"audio": "File", "offset": "Begin(s)", "text": "Species"}, []
    assert len(read(str(folder / name), fields=given, report=told.append)) == 2
    assert told == [f"{folder}/{name}: no row has the field 'Begin(s)', which `fields` names for offset"]
    told.clear()
    samples = read(str(folder / name), fields=given | {"offset": "Begin (s)"}, report=told.append)
    assert [sample.turns[0].parts[0].start for sample in samples] == [1, 2] and not told


def test_a_name_in_fields_that_some_rows_have_is_no_mistake(folder):
    told = []
    both = rows_of(folder, {"text": "a"}, {"img": "a.png", "text": "b"}, {"img": None, "image": "b.png", "text": "c"},
                   fields={"image": "img"}, report=told.append)
    assert len(both) == 3 and not told
    (folder / "media").mkdir()
    for name in ("a.png", "a.txt"):  # without fields
        (folder / "media" / name).write_text("a")
    assert len(read(str(folder / "media"), fields={"image": "img"}, report=told.append)) == 1 and not told


# A picture or sound that is not there.


LACKING = [({"image": None, "text": "a"}, "image"), ({"audio": None, "caption": "a", "text": "a"}, "audio"),
           ({"images": None, "text": "See <image>."}, "images"), ({"audio_filepath": None, "text": "a", "duration": 1}, "audio_filepath"),
           ({"file_name": None, "text": "a"}, "file_name"), ({"image": None, "audio": None, "text": "a"}, "image"),
           ({"image": None, "question": "What?", "answer": "a"}, "image"), ({"image": None}, "image"), ({"image": "", "text": "a"}, "image")]


@pytest.mark.parametrize("row, named", LACKING)
def test_a_row_without_its_medium_is_no_text(folder, row, named):
    before, found, after = rows_of(folder, {"image": "a.png", "text": "a"}, row, {"text": "a"})
    assert str(found) == (f"{folder}/rows.jsonl row 2: field {named!r} is empty and no other has a medium, expected one; rows of text "
                          "alone have no such field")
    assert [said(before), said(after)] == [[("user", [A]), ("assistant", ["a"])], [(None, ["a"])]]


@pytest.mark.parametrize("row", [{"path": "a.mp3", "sentence": "a"}, {"Datei": "a.png", "Titel": "a"}])
def test_a_row_in_which_neither_medium_nor_text_has_a_known_name(folder, row):
    """Of the first, with its caption in a field that is read beside media, it was said that there is no text."""
    (found,) = rows_of(folder, row)
    assert f"found neither a medium nor a 'text' in the fields {sorted(row)}; expected image, images, audio" in str(found)
    assert str(found).endswith("or in `fields` what they are called here, as in image: NAME")


@pytest.mark.parametrize("row, fields, named", [
    ({"image": "a.png", "caption": None, "style": "1"}, None, "caption"), ({"text": None, "style": "1"}, None, "text"),
    ({"image": "a.png", "label": None, "style": "1"}, {"text": "label"}, "label"),
    ({"image": "a.png", "style": "1"}, {"text": "label"}, "label"),  # a mistake in the name, or a table without this column
    ({"image": "a.png", "question": "What?", "answer": None}, None, "answer"),
    ({"messages": None, "image": "a.png"}, None, "messages")])
def test_a_row_without_its_text_names_it(folder, row, fields, named):
    """It was said that a text may have another name in `fields`, which may be where the name comes from."""
    (found,) = rows_of(folder, row, fields=fields)
    others = sorted(name for name in row if name not in ("image", named))
    assert str(found) == (f"{folder}/rows.jsonl row 1: field {named!r} is empty or missing, expected text; found the fields {others}")


def test_a_text_that_is_null_beside_another(folder):
    (sample,) = rows_of(folder, {"image": "a.png", "caption": None, "text": "a", "answer": None, "messages": None})
    assert said(sample) == [("user", [A]), ("assistant", ["a"])]


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.json"])
def test_a_cell_without_its_medium_is_counted(folder, name):
    rows = [["image", "audio", "style", "text"], ["a.png", "", "", "a"], ["", "", "1", "a"], ["", "a.wav", "", "a"]]
    between = {"x.csv": ",", "x.tsv": "\t"}.get(name)
    table = "".join(between.join(row) + "\n" for row in rows) if between else json.dumps(
        [{column: cell or None for column, cell in zip(rows[0], row)} for row in rows[1:]])
    (folder / name).write_text(table)
    told = []
    samples = read(str(folder / name), max_bad=0.5, report=told.append)
    assert [said(sample) for sample in samples] == [[("user", [A]), ("assistant", ["a"])], [("user", [W]), ("assistant", ["a"])]]
    assert [sample.metadata for sample in samples] == [{}, {}]
    (line,) = told
    assert line.startswith(f"skipped: 1 of 3 rows cannot be used; first: {folder}/{name} row 2: field 'image' is empty")
    with pytest.raises(InputError, match="1 of 3 rows cannot be used.* row 2: field 'image' is empty"):
        read(str(folder / name))


def test_a_row_without_a_medium_of_another_name(folder):
    empty, given, text = rows_of(folder, {"img": None, "image": "a.png", "label": "a"}, {"img": "b.png", "image": None, "label": "a"},
                                 {"label": "a"}, fields={"image": "img", "text": "label"})
    assert "row 1: field 'img' is empty" in str(empty)
    assert said(given) == [("user", [B]), ("assistant", ["a"])] and given.metadata == {}
    assert said(text) == [(None, ["a"])]
    (unread,) = rows_of(folder, {"image": None, "text": "a"}, fields={"image": None})
    assert said(unread) == [(None, ["a"])] and unread.metadata == {}


@pytest.mark.parametrize("row, expected", [
    ({"messages": chat("Hello", "a"), "image": None, "audios": None}, [("user", ["Hello"]), ("assistant", ["a"])]),
    ({"prompt": chat("Hello"), "completion": chat("a", names=("assistant",)), "images": None}, [("user", ["Hello"]), ("assistant", ["a"])]),
    ({"images": [], "text": "a"}, [(None, ["a"])]),  # a list of none
    ({"messages": chat("Hello", "a"), "image": ""}, [("user", ["Hello"]), ("assistant", ["a"])]),
    ({"image": "a.png", "images": None, "audio": None, "text": "a"}, [("user", [A]), ("assistant", ["a"])]),
])
def test_rows_that_need_no_medium(folder, row, expected):
    """Data sets fill columns with nulls where a chat has no pictures, and where a row has a medium of another kind."""
    (sample,) = rows_of(folder, row)
    assert said(sample) == expected


# Files of rows.


def test_a_list_of_rows(folder, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK", 7)  # rows lie over many pieces
    rows = [{"text": f"ä{n} [,{{}}]"} for n in range(5)] + [{"image": "a.png", "text": "😀" * 30}]
    (folder / "x.json").write_text("\ufeff" + json.dumps(rows, indent=1, ensure_ascii=False))
    samples = read(str(folder / "x.json"))
    assert [sample.caption for sample in samples] == [row["text"] for row in rows]
    assert samples[5].where == f"{folder}/x.json row 6" and samples[5].turns[0].parts[0].source.read() == b"a.png"
    (folder / "x.json").write_text("\n".join(json.dumps(row) for row in rows))  # lines of JSON under this name
    assert [sample.caption for sample in read(str(folder / "x.json"))] == [row["text"] for row in rows]


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_lines_over_many_pieces(folder, monkeypatch, chunk):
    monkeypatch.setattr(text_files, "CHUNK", max(chunk, 2))
    rows = [{"text": f"ä{n}" * n} for n in range(1, 12)]
    assert [sample.caption for sample in rows_of(folder, *rows)] == [row["text"] for row in rows]


@pytest.mark.parametrize("text, told", [
    ('[{"text": "a"}, {"text"', "x.json row 2: not JSON"), ('[{"text": "a"},', "x.json: ends after row 1"),
    ('[{"text": "a"}, 3]', "x.json row 2: found '3]', expected a JSON object"), ('"a"', "x.json row 1: found"),
    ('[{"text": "a"}] {"text": "b"}', "x.json: found .* after the end of the list"),
    ('[{"text": ' + "[" * 200_000 + "]" * 200_000 + "}]", "x.json row 1: not JSON"),
])
def test_a_list_that_is_none(tmp_path, text, told):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=told):
        list(scan(str(tmp_path / "x.json")))


def test_a_list_with_a_bad_row(tmp_path):
    (tmp_path / "x.json").write_text('[{"text": 5}, {"text": "b", "text": "c"}, {"text": "d"}]')
    first, second, third = scan(str(tmp_path / "x.json"))
    assert "row 1: field 'text' is 5" in str(first) and "row 2: not JSON (the field 'text' is there 2 times)" in str(second)
    assert third.caption == "d"


@pytest.mark.parametrize("name, between", [("metadata.csv", ","), ("x.tsv", "\t")])
def test_a_table(folder, name, between):
    table = [["file_name", "text", "style", "offset", "duration"], ["a.png", '"an, a"', "", "", ""], ["gone.png", "b", "", "", ""],
             ["short"], ["a.wav", '"two\nlines"', "flat", "0.5", "2"], ['"open"end', "x", "", "", ""]]
    (folder / name).write_text("\ufeff" + "\r\n".join(between.join(row) for row in table) + "\r\n\r\n")
    first, gone, short, last, quoted = scan(str(folder / name))
    assert said(first) == [("user", [A]), ("assistant", ["an, a"])] and first.metadata == {}
    assert f"{name} row 2" in str(gone) and "gone.png: no such file" in str(gone)
    assert f"{name} row 3: found 1 cells, expected 5" in str(short)
    assert said(last) == [("user", [W]), ("assistant", ["two\nlines"])] and last.metadata == {"style": "flat"}
    assert (last.turns[0].parts[0].start, last.turns[0].parts[0].seconds) == (0.5, 2.0)
    assert f"{name} row 5" in str(quoted) and ("not a row of a table" if between == "," else "no such file") in str(quoted)


def test_a_table_as_people_write_it(folder):
    """Blanks around cells count for nothing, nor do rows of nothing but commas; a caption comes before another text."""
    (folder / "x.csv").write_text('image, text, caption\na.png , alt,  a cat \n , , \n   \na.png,b,\n')
    one, two = scan(str(folder / "x.csv"))
    assert said(one) == [("user", [A]), ("assistant", ["a cat"])] and one.metadata == {"text": "alt"}
    assert said(two) == [("user", [A]), ("assistant", ["b"])]
    (folder / "x.jsonl").write_text(json.dumps({"image": "a.png", "text": "alt", "caption": "a cat"}))
    assert said(next(scan(str(folder / "x.jsonl")))) == said(one)


def test_a_quoted_cell_after_a_blank(folder):
    (folder / "x.csv").write_text('image, text\na.png, "a cat, black"\na.png, "the ""Tom"""\n')
    assert [one.caption for one in scan(str(folder / "x.csv"))] == ["a cat, black", 'the "Tom"']


@pytest.mark.parametrize("text", [
    '\ufeffimage;text;age\r\na.png;a cat, black;3,5\r\na.png;"the ""Tom""; and\nmore";\r\n;;\r\n',
    '\ufeffsep=;\r\nimage;"text";"age, in years"\r\na.png;a cat, black;3,5\r\na.png;"the ""Tom""; and\nmore";\r\n',
    '\n\n"image"; text; "age, in years"\na.png ;a cat, black;3,5\na.png; "the ""Tom""; and\nmore";""\n',
    'sep=,\nimage,text,age\na.png,"a cat, black","3,5"\na.png,"the ""Tom""; and\nmore",\n',
])
def test_a_table_as_excel_writes_it(folder, text):
    """With semicolons, where the comma is the decimal point."""
    (folder / "x.csv").write_text(text, encoding="utf-8", newline="")
    one, two = scan(str(folder / "x.csv"))
    assert said(one) == [("user", [A]), ("assistant", ["a cat, black"])] and list(one.metadata.values()) == ["3,5"]
    assert said(two) == [("user", [A]), ("assistant", ['the "Tom"; and\nmore'])]


def test_lines_of_a_table_with_semicolons_are_those_of_the_file(folder):
    (folder / "x.csv").write_text('sep=;\n\nimage;text\na.png;x\na.png;"open\n')
    first, second = scan(str(folder / "x.csv"))
    assert first.caption == "x" and "row 2: not a row of a table" in str(second)
    (folder / "x.csv").write_text("image;text\ra.png;x\r")  # of an old Macintosh
    with pytest.raises(InputError, match="x.csv: no header that can be read"):
        list(scan(str(folder / "x.csv")))


@pytest.mark.parametrize("name, between", [("x.csv", "\t"), ("x.csv", "|"), ("x.tsv", ","), ("x.tsv", ";")])
def test_a_table_with_other_separators(folder, name, between):
    (folder / name).write_text("\n".join([between.join(["image", "text"]), between.join(["a.png", "a cat, black"])]))
    expected = "commas or semicolons" if name == "x.csv" else "tabs"
    with pytest.raises(InputError, match=f"{name}: found the header .'image.*text'., expected columns separated by {expected}$"):
        list(scan(str(folder / name)))


def test_rows_behind_a_quote_that_is_not_closed_are_counted(folder):
    rows = [f"a.png,thing {k}" for k in range(40)]
    rows[12] = 'a.png,"thing 12'
    (folder / "x.csv").write_text("\n".join(["file_name,text", *rows]))
    found = list(scan(str(folder / "x.csv")))
    assert len(found) == 40 and all(isinstance(one, InputError) == (k >= 12) for k, one in enumerate(found))
    assert "row 13: not a row of a table" in str(found[12])
    assert "row 40: not a row of a table (a quote is open since line 14)" in str(found[39])


def test_quotes_between_tabs_are_those_of_the_text(folder):
    texts = ["plain", '"Hello there.', 'she said "no"', 'Goodbye."', '"quoted ""whole"""', '"two\nlines"', "last"]
    (folder / "x.tsv").write_text("\n".join(["file_name\ttext", *(f"a.png\t{text}" for text in texts)]) + "\n")
    expected = ["plain", '"Hello there.', 'she said "no"', 'Goodbye."', 'quoted "whole"']
    assert [one.caption for one in scan(str(folder / "x.tsv"))] == [*expected, "two\nlines", "last"]
    (folder / "x.tsv").write_text('file_name\ttext\na.png\t"open\nnothing closes it\na.png\tlast\n')
    first, second, last = scan(str(folder / "x.tsv"))
    assert (first.caption, last.caption) == ('"open', "last") and "row 2: not a row of a table (a quote that is not" in str(second)


@pytest.mark.parametrize("text, expected", [
    ('text\tlabel\n"two\nlines"\t3\nlast\t4\n', ["two\nlines", "last"]),  # the cell goes on in front of tabs
    ('text\tlabel\n"two\n\nlines"\t3\nlast\t4\n', ["two\n\nlines", "last"]),
    ('\ntext\tlabel\n"Hello\t3\nlast\t4\nx\t"open\n', ['"Hello', "last", "x"]),  # a blank line is no header
    ('text\tlabel\n"a\t"\nshort\nlast\t4\n', ['"a', None, "last"]),  # one row is whole without the line held with it
])
def test_no_line_between_tabs_is_lost(tmp_path, text, expected):
    (tmp_path / "x.tsv").write_text(text)
    assert [None if isinstance(one, InputError) else one.caption for one in scan(str(tmp_path / "x.tsv"))] == expected


def test_a_row_of_a_table_may_hold_a_picture(folder):
    (folder / "x.csv").write_text(f"image,text\ndata:image/png;base64,{'A' * 200_000},large\n")
    (one,) = scan(str(folder / "x.csv"))
    assert "field larger" not in str(one)


@pytest.mark.parametrize("text, told", [("file_name,file_name\na,b\n", "found the header .*, expected a different name"),
                                        ("file_name,,text\n", "found the header"), ("file_name,text\n", "no samples in it"),
                                        ('file_name,"te"xt\n', "no header")])
def test_a_table_without_a_header(tmp_path, text, told):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=f"x.csv: {told}"):
        list(scan(str(tmp_path / "x.csv")))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
@pytest.mark.parametrize("data, found", [
    ('{"text": "a"}\n'.encode("utf-16"), "UTF-16"), ('{"text": "a"}\n'.encode("utf-16-be"), "UTF-16"),
    ('{"text": "a"}\n'.encode("utf-16-le"), "UTF-16"), ('{"text": "a"}\n'.encode("utf-32"), "UTF-32"),
    ('{"text": "a"}\n'.encode("utf-32-be"), "UTF-32"), (b"\x1f\x8b\x08\0rest", "gzip"), (b"\x28\xb5\x2f\xfdrest", "Zstandard"),
    (b"PK\x03\x04rest", "a zip archive"), (b"PAR1rest", "Parquet"),
])
def test_other_encodings_are_named(tmp_path, name, data, found):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: found {found}.*expected UTF-8"):
        list(scan(str(tmp_path / name)))


def test_bytes_that_are_no_utf8_name_their_place(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[{"text": "\xff"}]')
    with pytest.raises(InputError, match="x.json.*not UTF-8"):
        list(scan(str(tmp_path / "x.json")))


@pytest.mark.parametrize("row, words", [
    ('{"text": "a", "text": "b"}', ["'text'", "2 times"]), ('{"text": "a", "meta": {"x": 1, "x": 2}}', ["'x'", "2 times"]),
    ('{"text": "a", "meta": ' + "[" * 40 + "]" * 40 + "}", ["more than 32"]),
    ('{"text": "a", "meta": ' + '{"x": ' * 500 + "1" + "}" * 500 + "}", ["more than 32"]),
    ("[" * 500 + "]" * 500, ["more than 32"]), ('{"text": "a", "n": ' + "9" * 5000 + "}", ["not JSON"]),
    ('{"text": "a", "b": "\\ud800", "caption": 3, "text2": "' + "x" * 3000 + '"}', None),
    ('{"text": "a", "score": NaN, "brackets": "' + "[" * 500 + '"}', None),
])
def test_what_rows_may_hold(tmp_path, row, words):
    path = tmp_path / "x.jsonl"
    path.write_text(row + '\n{"text": "after"}\n')
    first, after = scan(str(path))
    assert after.caption == "after"
    if words is None:
        assert first.caption == "a" and stamp_of([first])
        return
    for word in [f"{path} row 1", *words]:
        assert word in str(first)
    assert len(str(first)) < 600


def test_long_rows_are_left_out_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_ROW", 100)
    monkeypatch.setattr("mmtx.data.manifest.MAX_ROW", 100)
    for chunk in (16, 64, 101, 1000):
        monkeypatch.setattr(text_files, "CHUNK", chunk)
        long = json.dumps({"text": "x" * 150})
        path = tmp_path / "x.jsonl"
        path.write_text(f'{long}\n{{"text": "b"}}\n{long}{long}{long}\n\n{{"text": "c"}}\n{long}')
        rows = list(scan(str(path)))
        assert [row.caption if not isinstance(row, InputError) else re.search(r"row (\d): (.*),", str(row)).groups() for row in rows] == [
            ("1", "found more than 100 bytes"), "b", ("3", "found more than 100 bytes"), "c", ("6", "found more than 100 bytes")]
    (tmp_path / "x.json").write_text(f'[{long}, {{"text": "b"}}]')
    first, second = scan(str(tmp_path / "x.json"))
    assert "x.json row 1: found more than 100 bytes" in str(first) and second.caption == "b"
    (tmp_path / "x.json").write_text('[{"text": "' + "x" * 9000)
    with pytest.raises(InputError, match="x.json row 1: not JSON"):
        list(scan(str(tmp_path / "x.json")))


ODD = [None, "", " ", "x", "a.png", "<image>", "<audio><video>", 0, -1, 1e400, True, [], {}, [[]], [None], ["a.png"], [{}], {"url": None},
       {"path": 3}, {"data": "AA=="}, {"data": 3}, {"type": "image"}, {"type": ["text"]}, {"role": "user"}, "data:,", "\0", "\ud800", "a" * 400]


def mutated(value, chance):
    """A value with one part of it replaced, left out, doubled or renamed."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        name = chance.choice(list(value))
        changed = dict(value)
        inner = changed.pop(name)
        if chance.random() < 0.15:
            return changed | {chance.choice(["image", "audios", "system", "history", "offset", "input", "video"]): chance.choice(ODD)}
        return changed | {name: mutated(inner, chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        return [*value[:place], mutated(value[place], chance), *value[place + chance.randrange(2):]]
    return chance.choice(ODD)


def test_mutated_rows_are_samples_or_one_line(folder):
    chance, seeds = random.Random(0), [row for row, _ in FORMS.values()]
    for _ in range(0, 3000, 500):
        rows = [mutated(chance.choice(seeds), chance) for _ in range(500)]
        rows = [mutated(row, chance) if n % 3 == 0 and isinstance(row, dict) else row for n, row in enumerate(rows)]
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = list(scan(str(path)))
        assert len(found) == 500 and stamp_of(found) and pickle.loads(pickle.dumps(found[:-1]))
        for number, row in enumerate(found, 1):
            if isinstance(row, InputError):
                assert f"{path} row {number}" in str(row) and len(str(row)) < 1000 and "\n" not in str(row)
            else:
                assert row.turns and row.where == f"{path} row {number}"
                assert "<video>" not in row.caption or row.turns[0].role is None or row.turns[-1].role == "assistant"
