"""Models of ours in transformers and in llama.cpp: equal scores, equal greedy ids, for text and for codes of media."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_interop import CASES, CHATML, LLAMA3, conversation, full, media, messages, save_model  # noqa: F401

from mmtx.cli import main
from mmtx.config import DecoderConfig
from mmtx.document import Document, MediaPart, TextPart, Turn
from mmtx.errors import InputError
from mmtx.interop.chat import chat_format_of
from mmtx.interop.convert import convert, read_folder
from mmtx.interop.export import export
from mmtx.interop.families import read_weights
from mmtx.interop.gguf_files import read_gguf
from mmtx.modality.pretrained_text import PretrainedText
from mmtx.model import Decoder
from mmtx.pipeline import Model, load
from mmtx.sequence import prompt, render
from mmtx.vocabulary import Vocabulary

transformers = pytest.importorskip("transformers")
SAID = ("hello", "What is 12+3?", "a red  circle\näöü 🙂", "trumpet, C 4")


def sharpen(model: Model, seed: int = 0) -> Model:
    """Weights large enough for a mix-up of two to show."""
    torch.manual_seed(seed)
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


@pytest.fixture(scope="module")
def models(media, tokenizers, vocabulary, tiny_model, tmp_path_factory):  # noqa: F811
    """A grown model of each family, and one of ours with its own text tokenizer and tags."""
    made = {"ours": sharpen(Model(Decoder(tiny_model.decoder.config), vocabulary, tokenizers).to("cpu"))}
    for name in CASES:
        folder = tmp_path_factory.mktemp("pretrained")
        save_model(folder, name, LLAMA3 if name == "llama scaled" else CHATML)
        made[name] = convert(folder, media)
    return made


@pytest.mark.parametrize("name", ["ours", *CASES])
def test_transformers_gives_the_same_scores_and_answers(models, name, tmp_path):
    model = models[name]
    assert export(model, "transformers", tmp_path / "out", max_seq_len=512) == []
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    v, rng = model.vocabulary, np.random.default_rng(0)
    assert theirs.config.vocab_size == v.size and len(text) == v.size
    ids = rng.permutation(v.size)[:60]  # of all kinds
    with torch.no_grad():
        expected, found = full(model, ids), theirs(torch.from_numpy(ids)[None]).logits[0]
    assert expected.std() > 0.1 and torch.allclose(expected, found, atol=1e-4)

    for said in SAID:
        assert text(said, add_special_tokens=False).input_ids == list(model.tokenizers["text"].encode(said))
        asked = prompt(conversation(model, said), v).ids
        if name != "llama scaled" or said.strip() == said:
            assert text.apply_chat_template(messages(said), add_generation_prompt=True, return_dict=False) == asked.tolist()
    # A picture in, as ids of the stream, and whatever comes best, codes too.
    image = MediaPart("image", rng.integers(0, model.tokenizers["image"].size, (2, 2)))
    question = TextPart(model.tokenizers["text"].encode("what is it"))
    asked = torch.from_numpy(prompt(Document((Turn("user", (image, question)),)), v).ids).long()[None]
    found = theirs.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=10, do_sample=False, eos_token_id=v.size + 1,
                            pad_token_id=0)[0].tolist()
    written = asked[0].tolist()
    for _ in range(10):
        written.append(int(full(model, written)[-1].argmax()))
    assert found == written
    assert text.convert_ids_to_tokens(v.image) == "<image>" and text.decode([v.range("image").start]) == "<image:0>"
    assert theirs.generation_config.eos_token_id == v.end


def read_back(path):
    """A model of text alone that has the weights of an exported one: what was a composed id there is a row of text here."""
    config, found, text = read_gguf(path) if path.suffix == ".gguf" else read_folder(path)
    text = PretrainedText(text.content, text.size, chat_format_of(text, path), text.chat_template, text.specials, path)
    decoder = Decoder(config)
    decoder.load_state_dict(read_weights(config, found, path, path.suffix == ".gguf"))
    return SimpleNamespace(decoder=decoder, tokenizers={"text": text}, vocabulary=Vocabulary.build({"text": text}))


def test_a_model_goes_out_and_comes_back(models, tmp_path):
    export(models["qwen2"], "transformers", tmp_path / "out")
    ids = list(range(0, models["qwen2"].vocabulary.size, 7))
    assert torch.allclose(full(read_back(tmp_path / "out"), ids), full(models["qwen2"], ids), atol=1e-4)


@pytest.mark.parametrize("to", ["transformers", "gguf"])
@pytest.mark.parametrize("name", ["ours", "qwen3"])
def test_an_exported_model_is_no_pretrained_one(models, media, name, to, tmp_path):  # noqa: F811
    """Its codes would be pieces of text, and those of --image others."""
    path = tmp_path / ("out" if to == "transformers" else "out.gguf")
    export(models[name], to, path)
    told = "found a text tokenizer 'llama'" if (name, to) == ("ours", "gguf") else "mmtx exported, with codes of image and audio"
    for given in ({}, media):
        with pytest.raises(InputError, match=told):
            convert(path, given)


def test_an_exported_model_of_text_alone_is_converted(tmp_path):
    save_model(tmp_path / "in", "qwen3")
    export(convert(tmp_path / "in"), "transformers", tmp_path / "out")
    assert convert(tmp_path / "out").vocabulary.kinds == ("text",)


@pytest.mark.parametrize("name", ["ours", *CASES])
def test_gguf_holds_the_same_model(models, name, tmp_path):
    """Read back, and by transformers, whose reader knows neither head widths nor divisors of RoPE."""
    model, path = models[name], tmp_path / "out.gguf"
    export(model, "gguf", path, max_seq_len=512)
    ids = np.random.default_rng(0).permutation(model.vocabulary.size)[:60]
    if name in ("llama", "qwen2"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32).eval()
        with torch.no_grad():
            found = theirs(torch.from_numpy(ids)[None]).logits[0]
        assert torch.allclose(full(model, ids), found, atol=1e-4)
    if name != "ours":
        back = read_back(path)
        assert torch.allclose(full(back, ids), full(model, ids), atol=1e-4)
        assert back.tokenizers["text"].encode(SAID[2]) == model.tokenizers["text"].encode(SAID[2])
        assert prompt(conversation(back, "hi"), back.vocabulary).ids.tolist() == prompt(conversation(model, "hi"), model.vocabulary).ids.tolist()


LLAMA_CPP = """
import json, sys, urllib.request, xllamacpp
path, rows, ids = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
options = xllamacpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel, options.n_gpu_layers, options.warmup = path, 256, 1, 0, False
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server, answers = xllamacpp.Server(options), []
for row in rows:
    body = {"prompt": row, "n_predict": 8, "temperature": 0.0, "n_probs": ids, "cache_prompt": False, "return_tokens": True}
    request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
    answer = json.load(urllib.request.urlopen(request))
    answers.append({"ids": answer["tokens"], "steps": [[(top["id"], top["logprob"]) for top in step["top_logprobs"]]
                                                        for step in answer.get("completion_probabilities", ())]})
print("ANSWERS" + json.dumps(answers), flush=True)
"""


@pytest.mark.parametrize("name", ["ours", *CASES])
def test_llama_cpp_gives_the_same_scores_and_answers(models, name, tmp_path):
    """The server of llama.cpp, to which prompts are ids; what it tells of scores are their logarithms of shares."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs the package xllamacpp, which is llama.cpp")
    model, path = models[name], tmp_path / "out.gguf"
    export(model, "gguf", path, max_seq_len=256)
    size, rng = model.vocabulary.size, np.random.default_rng(0)
    rows = [rng.permutation(size)[:length].tolist() for length in (2, 7, 40)]  # ids of all kinds
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP, path, json.dumps(rows), str(size)], capture_output=True, text=True, timeout=100)
    assert "ANSWERS" in done.stdout, done.stderr[-2000:]
    answers = json.loads(done.stdout.split("ANSWERS")[1].splitlines()[0])
    compared = 0
    for row, answer in zip(rows, answers, strict=True):
        written = list(row)
        # The server tells no scores of a step whose token is part of a character.
        if answer["steps"] and answer["steps"][0][0][0] == answer["ids"][0]:
            compared += 1
            ids, scores = zip(*answer["steps"][0])
            assert len(ids) == size
            assert (torch.tensor(scores) - full(model, row)[-1].log_softmax(-1)[list(ids)]).abs().max() < 2e-3
        for ident in answer["ids"]:
            best = full(model, written)[-1]
            assert best.max() - best[ident] < 1e-4
            written.append(ident)
    assert compared


def test_what_an_engine_cannot_do_is_said(tokenizers, vocabulary, tiny_model, tmp_path, capsys):
    config = json.loads(json.dumps(tiny_model.decoder.config.to_dict()))
    config["features"] = {"image": tokenizers["image"].feature_width}
    model = Model(Decoder(DecoderConfig(**config)), vocabulary, tokenizers)
    model.save(tmp_path / "model")
    main(["export", "--model", str(tmp_path / "model"), "--to", "transformers", "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert "image given to this model enter as continuous features, which no engine computes" in capsys.readouterr().err
    with pytest.raises(InputError, match="out: exists, expected a new folder"):
        export(model, "transformers", tmp_path / "out")
    config["qkv_bias"] = True
    with pytest.raises(InputError, match="found qk_norm=True with qkv_bias=True, which no family of llama, qwen2, qwen3 has"):
        export(Model(Decoder(DecoderConfig(**config)), vocabulary, tokenizers), "transformers", tmp_path / "none")


def test_commands(models, media, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "in"
    save_model(folder, "qwen3")
    main(["convert", "--from", str(folder), "--output", str(tmp_path / "model"), "--image", str(media["image"])])
    assert "text 336, special 256, image 36; turns by its chat template" in capsys.readouterr().out
    main(["convert", "--from", str(folder), "--output", str(tmp_path / "model")])  # over what it wrote
    assert load(tmp_path / "model", "cpu").vocabulary.kinds == ("text",)
    with pytest.raises(SystemExit):
        main(["convert", "--from", str(folder), "--output", str(tmp_path / "none"), "--image", str(media["audio"])])
    assert "holds a tokenizer for audio" in capsys.readouterr().err
    assert len(render(conversation(models["qwen3"], "a", "b"), models["qwen3"].vocabulary).ids) > 10


@pytest.mark.parametrize("to", ["transformers", "gguf"])
@pytest.mark.parametrize("name, told", [("n" * 300, "File name too long"), ("file/x", "Not a directory")])
def test_an_output_that_cannot_be_is_one_line(models, to, name, told, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=f"cannot be written .{told}"):
        export(models["ours"], to, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_output_that_is_not_ours_is_told_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(["convert", "--from", "user/model", "--output", str(tmp_path)])
    assert "holds 'notes.txt', which mmtx did not write" in capsys.readouterr().err
