"""Models whose decoder is in half precision: all that a model can do, and what it says."""

import pytest
import torch
from test_files import ROOT

import mmtx
from mmtx.cli import main
from mmtx.errors import InputError

EXAMPLES = ROOT / "demos" / "examples"
CAPTIONS = {"apple.webp": "red apple", "cat.webp": "cat", "penguin.webp": "penguin", "trumpet.ogg": "trumpet, A 4"}
halves = pytest.mark.parametrize("dtype", ["bfloat16", torch.float16], ids=str)


@pytest.fixture(scope="module")
def loaded():
    found = {}
    return lambda name, dtype: found.setdefault((name, dtype), mmtx.load(name, "cpu", dtype=dtype))


@halves
def test_captions_are_those_of_float32(loaded, dtype):
    model, files = loaded("demos/starter", dtype), [str(EXAMPLES / name) for name in CAPTIONS]
    assert {parameter.dtype for parameter in model.decoder.parameters()} == {getattr(torch, str(dtype).removeprefix("torch."))}
    assert model.caption(files) == [model.caption(file) for file in files] == list(CAPTIONS.values())
    assert "".join(model.stream([mmtx.Image(files[1])])) == "cat"
    assert model.caption(files[1], temperature=0.5, top_k=5, seed=0)


@halves
def test_what_a_model_tells_in_numbers_is_float32(loaded, dtype):
    model = loaded("demos/starter", dtype)
    vector = model.embed([mmtx.Image(EXAMPLES / "cat.webp")])
    exact = loaded("demos/starter", "float32").embed([mmtx.Image(EXAMPLES / "cat.webp")])
    assert vector.dtype == exact.dtype and abs(vector - exact).max() < 0.05 * abs(exact).max()
    maps = model.attention([mmtx.Image(EXAMPLES / "cat.webp")])
    assert [word.text for word in maps.words] == ["cat"] and maps.weights.dtype == torch.float32


@halves
def test_pictures_sounds_and_transcripts(loaded, dtype):
    assert loaded("demos/speech", dtype).transcribe(str(EXAMPLES / "speech.ogg")) == "it is high time you went to work"
    model = loaded("demos/generate", dtype)
    assert model.generate("red apple", out="image", guidance_scale=2.0).size == (64, 64)
    assert model.generate("trumpet, C 5", out="audio").rate == 16_000


def test_a_saved_model_keeps_its_numbers(loaded, tmp_path):
    model = loaded("demos/starter", "bfloat16")
    model.save(tmp_path / "model")
    again = mmtx.load(tmp_path / "model", "cpu")
    for one, two in zip(again.decoder.parameters(), model.decoder.parameters(), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, two.float())


@pytest.mark.parametrize("dtype", ["int8", torch.float64, 5, None, "torch.torch.float32", "f" * 1000])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(InputError, match="dtype: found .*, expected one of float32, bfloat16, float16") as error:
        mmtx.load(dtype=dtype)
    assert len(str(error.value)) < 150


def test_the_commands_take_it(capsys):
    main(["caption", "--device", "cpu", "--dtype", "bfloat16", str(EXAMPLES / "cat.webp")])
    assert capsys.readouterr().out == "cat\n"
    with pytest.raises(SystemExit):
        main(["transcribe", "--dtype", "float8", str(EXAMPLES / "speech.ogg")])
    assert capsys.readouterr().err == "mmtx: error: dtype: found 'float8', expected one of float32, bfloat16, float16\n"
    with pytest.raises(SystemExit):  # what would do nothing is no option: the decoder's own blocks write transcripts
        main(["transcribe", "--load_in_8bit", str(EXAMPLES / "speech.ogg")])
    assert "--load_in_8bit" in capsys.readouterr().err
