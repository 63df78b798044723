"""Pictures and sounds in and out of the server of llama.cpp, a real one of the package xllamacpp: ids go there, ids come back."""

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from servers import serving
from test_export import sharpen
from test_interop import media, save_model  # noqa: F401

from mmtx.cli import main
from mmtx.config import DecoderConfig
from mmtx.errors import InputError, escape
from mmtx.inference.sampling import Sampling
from mmtx.interop.convert import convert
from mmtx.interop.export import export
from mmtx.interop.remote import answer_in, connect, finish
from mmtx.medium import Audio
from mmtx.model import Decoder
from mmtx.pipeline import Model, load

ENGINE = """
import sys, xllamacpp
options = xllamacpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel, options.n_gpu_layers, options.warmup = sys.argv[1], 512, 2, 0, False
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(options)
print("ADDRESS", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def engine(path):
    """The address of llama.cpp's server with a GGUF file."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs the package xllamacpp, which is llama.cpp")
    pytest.importorskip("gguf")
    process = subprocess.Popen([sys.executable, "-c", ENGINE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)
    try:
        yield next(line.split()[1] for line in process.stdout if line.startswith("ADDRESS"))
    finally:
        process.stdin.close()
        process.wait(30)


@pytest.fixture(scope="module", params=["ours", "qwen3"])
def served(request, tokenizers, vocabulary, tiny_model, tmp_path_factory):
    """A model with its own tags, or in the chat format of a pretrained one; its folder, and the address of an engine that runs it."""
    folder = tmp_path_factory.mktemp("served")
    if request.param == "ours":
        model = sharpen(Model(Decoder(tiny_model.decoder.config), vocabulary, tokenizers).to("cpu"))
    else:
        save_model(folder / "in", "qwen3")
        model = convert(folder / "in", request.getfixturevalue("media"))
    model.save(folder / "model")
    export(model, "gguf", folder / "model.gguf", max_seq_len=512)
    with engine(folder / "model.gguf") as address:
        yield load(folder / "model", "cpu"), folder / "model", address


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)


def test_answers_are_those_of_the_model_here(served):
    here, folder, address = served
    there, tone = connect(address, folder), Audio(np.sin(np.arange(6000) / 7).astype(np.float32), 16000)
    seen = [picture(0), picture(1), picture(2), tone]
    captions = here.caption(seen, max_new_tokens=12)
    assert there.caption(seen, max_new_tokens=12) == captions and len({*captions}) > 1
    assert list(there.stream("a red circle", max_new_tokens=9)) == [here.generate("a red circle", max_new_tokens=9)]
    for mixed in ("any", "document"):  # of which an engine can write the text
        written = there.generate("a red circle", mixed, max_new_tokens=9)
        assert [*there.stream("a red circle", mixed, max_new_tokens=9)] == written and all(isinstance(part, str) for part in written)
        legal, _ = there._legal(mixed, Sampling(), [])
        assert legal.any() and not legal[[here.vocabulary.opening(kind) for kind in here.vocabulary.media]].any()
    for size in (None, (16, 24)):
        assert np.array_equal(there.generate("a red circle", "image", size), here.generate("a red circle", "image", size))
    assert np.array_equal(there.outpaint(picture(3), 8), here.outpaint(picture(3), 8))
    # The engine may end a sound within a time step, which is then left out; until then it is the same.
    bands = here.vocabulary.bands("audio")
    prompts = [here.processor.prompt("trumpet, C 4")]
    options = Sampling(max_new_tokens=6 * bands)
    (ours,), (theirs,) = (model._answer(prompts, "audio", options) for model in (here, there))
    assert theirs[-1] == here.vocabulary.closing("audio") and theirs[:-1] == ours[:len(theirs) - 1] and len(theirs) >= 2 + bands
    assert there.generate("trumpet, C 4", "audio", max_new_tokens=4 * bands).rate == here.tokenizers["audio"].rate
    # With a seed the engine's own choices repeat themselves.
    drawn = [there.generate("a", temperature=2.0, max_new_tokens=10, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    drawn = [there.generate("a", temperature=2.0, max_new_tokens=10, seed=2**32 - 1) for _ in range(2)]  # random to the engine
    assert drawn[0] == drawn[1]
    # Prompts of one call have random numbers of their own.
    prompts = [there.processor.prompt("a red circle")] * 2
    first, second = there._answer(prompts, "text", Sampling(max_new_tokens=10, temperature=2.0, seed=1))
    assert first != second


def complete(address: str, ids: list[int], **more) -> list[int]:
    """What any client of the engine does."""
    body = json.dumps({"prompt": ids, "temperature": 0.0, "return_tokens": True, **more}).encode()
    request = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["tokens"]


def test_commands(served, tmp_path, capsys, monkeypatch):
    here, folder, address = served
    Image.fromarray(picture(4)).save(tmp_path / "a.png")
    model = ["--model", str(folder)]
    main(["caption", str(tmp_path / "a.png"), "--server", address, *model, "--max_new_tokens", "9"])
    assert capsys.readouterr().out == escape(here.caption(picture(4), max_new_tokens=9)) + "\n"
    main(["generate", "a blue square", "--server", address, *model, "--out", "image", "--file", str(tmp_path / "out.png")])
    assert np.array_equal(Image.open(tmp_path / "out.png"), here.generate("a blue square", "image"))
    capsys.readouterr()

    # The same by hand: ids of a prompt, what any client gets for them, media of that.
    main(["tokenize", "a blue square", "--format", "chat", "--out", "image", *model, "--device", "cpu"])
    asked = list(map(int, capsys.readouterr().out.split()))
    side, v = here.tokenizers["image"].config.side // here.tokenizers["image"].config.patch, here.vocabulary
    codes = v.range("image")
    allowed = [[ident, False] for ident in range(v.size) if ident not in codes]
    answer = complete(address, asked, n_predict=side * side, logit_bias=allowed)
    main(["detokenize", *map(str, [*asked, *answer]), "--output", str(tmp_path / "made"), *model, "--device", "cpu"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "made" / "1.png")]
    assert np.array_equal(Image.open(tmp_path / "made" / "1.png"), Image.open(tmp_path / "out.png"))

    main(["tokenize", str(tmp_path / "a.png"), "what is it", "--format", "chat", *model, "--device", "cpu"])
    asked = list(map(int, capsys.readouterr().out.split()))
    answer = complete(address, asked, n_predict=7, logit_bias=[[i, False] for i in np.flatnonzero(~here.grammar.allowed(here.grammar.start(1, "text"))[0])
                                                               .tolist()])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(answer)))
    main(["detokenize", *model, "--device", "cpu"])
    expected = here.generate([Image.fromarray(picture(4)), "what is it"], max_new_tokens=7)
    assert capsys.readouterr().out == escape(expected, keep="\n\t") + "\n"


def test_what_an_engine_wrote_is_made_whole(vocabulary):
    v = vocabulary
    image, audio, bands = v.range("image"), v.range("audio"), v.bands("audio")
    text = [1, 2, 3]
    assert finish([*text, v.end, 7], v) == text
    assert finish([v.image, v.height(1), v.width(2), image[3], image[4]], v) == [v.image, v.height(1), v.width(2), image[3], image[4], v.image_end]
    whole = [v.audio, *audio[:2 * bands]]
    assert finish([*whole, audio[0]] if bands > 1 else whole, v) == [*whole, v.audio_end] == finish([*whole, v.audio_end], v)
    assert finish([*whole, v.audio_end, *text, v.end], v) == [*whole, v.audio_end, *text]
    assert answer_in([v.bos, v.user, 5, v.end, v.assistant, *text, v.end], v) == [*text, v.end] and answer_in(text, v) == text
    assert answer_in([v.bos, *text, v.eos], v) == [*text, v.eos]


def test_mistakes_are_told_in_one_line(tokenizers, vocabulary, tiny_model, tmp_path, capsys):
    tiny_model.save(tmp_path / "model")
    with pytest.raises(InputError, match="--server: found '127.0.0.1:1', expected the address of a server"):
        connect("127.0.0.1:1", tmp_path / "model")
    with pytest.raises(InputError, match="--server http://127.0.0.1:9: cannot be reached"):
        connect("http://127.0.0.1:9", tmp_path / "model")
    answers = {"/v1/models": b'{"data": [{"meta": {"n_vocab": 99}}]}'}
    with serving({"/v1/models": lambda request: request.answer(answers["/v1/models"]), "/completion": lambda request: request.answer(b"{}")}) as server:
        with pytest.raises(InputError, match=f"found a model of 99 ids, expected {vocabulary.size}, as the vocabulary has"):
            connect(server.address, tmp_path / "model")
        answers["/v1/models"] = b"[]"
        with pytest.raises(InputError, match="no object in JSON, expected the server of llama.cpp"):
            connect(server.address, tmp_path / "model")
        answers["/v1/models"] = b"{}"
        with pytest.raises(InputError, match="found no ids in its answer, expected the server of llama.cpp"):
            connect(server.address, tmp_path / "model").generate("a")
        with pytest.raises(InputError, match="guidance_scale: found 2.0 with --server"):
            connect(server.address, tmp_path / "model").generate("a", guidance_scale=2)
        remote = connect(server.address, tmp_path / "model")
        for call in (lambda: remote.embed("a"), lambda: remote.attention("a", "b"), lambda: remote.classify([], ["a", "b"]), lambda: remote.save(tmp_path / "copy"),
                     lambda: remote.stream_ids([remote.processor.prompt("a")])):
            with pytest.raises(InputError, match="answers with ids alone; expected a model that mmtx.load gives, whose weights are here"):
                call()
        assert not (tmp_path / "copy").exists()
        config = json.loads(json.dumps(tiny_model.decoder.config.to_dict()))
        config["features"] = {"image": tokenizers["image"].feature_width}
        torch.manual_seed(0)
        Model(Decoder(DecoderConfig(**config)), vocabulary, tokenizers).save(tmp_path / "continuous")
        with pytest.raises(InputError, match="--server: image given to this model enter as continuous features, which no engine computes.*"
                                             "continuous_inputs: false") as caught:
            connect(server.address, tmp_path / "continuous").caption(picture())
        assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit):
        main(["detokenize", "12", "x", "--model", str(tmp_path / "model"), "--device", "cpu"])
    assert "mmtx: error: ids: found 'x', expected whole numbers" in capsys.readouterr().err
