"""Direct preference optimization: the loss and its gradient are those of the paper, and rows with two answers are read as written."""

import json
import re

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

import mmtx
from mmtx.cli import main
from mmtx.config import CodeRange, DecoderConfig
from mmtx.data.collection import DataSource, read_source
from mmtx.data.packing import PackedBatches
from mmtx.data.sample import Codes, Media, Sample
from mmtx.data.tokens import document_of
from mmtx.document import Document, Turn
from mmtx.errors import InputError
from mmtx.modality.base import load_tokenizer
from mmtx.model import Decoder
from mmtx.sequence import Pair, Rendered, render
from mmtx.training.dpo import DPOConfig, pair_loss, reference_of
from mmtx.vocabulary import Vocabulary

SIZES = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_dim": 32}
WORDS = ("a red circle", "a blue square", "trumpet, C 4", "violin, D sharp 5")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[dict, str]:
    """A configuration of a tiny run, and the folder of an untrained model that fits it."""
    root = tmp_path_factory.mktemp("start")
    config = runs.prepare(root, steps=4)
    tokenizers = {kind: load_tokenizer(root / kind) for kind in ("text", "image", "audio")}
    vocabulary = Vocabulary.build(tokenizers)
    torch.manual_seed(0)
    ranges = tuple(CodeRange(vocabulary.range(kind).start, vocabulary.levels(kind)) for kind in ("image", "audio"))
    decoder = Decoder(DecoderConfig(vocabulary.size, composed=ranges, **SIZES))
    mmtx.Model(decoder, vocabulary, tokenizers).save(root / "model")
    return config, str(root / "model")


def rows(path, *items: dict) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def preferring(*words: str) -> list[dict]:
    """Rows that prefer the last two words to the others, whatever is asked: an untrained model prefers shorter answers."""
    return [{"prompt": f"{word}?", "chosen": words[2 + number % 2], "rejected": words[number % 2]}
            for number, word in enumerate(WORDS)]


def configured(start, path: str, dpo: dict | None = {}, **model) -> dict:  # noqa: B006
    config, folder = start
    arguments = {**config["model"]["init_args"], "init_from": folder, "dpo": dpo,
                 "optimizer": {"learning_rate": 1e-2, "muon_lr": 1e-2, "warmup_steps": 0}, **model}
    data = {**config["data"]["init_args"], "train": [{"paths": [path]}], "validation": [{"paths": [path]}], "num_workers": 0}
    return {**config, "samples": 0, "ema": None, "model": {**config["model"], "init_args": arguments},
            "data": {**config["data"], "init_args": data}}


# -- The loss ------------------------------------------------------------------------------------------------


class Pairs:
    """Pairs of rendered documents."""

    def __init__(self, pairs: list[Pair]):
        self.pairs = pairs
        self.lengths = np.array([len(pair.chosen.ids) + len(pair.rejected.ids) - 1 for pair in pairs])

    def render(self, chosen) -> list[Pair]:
        return [self.pairs[number] for number, _ in chosen]


def log_probability(decoder: Decoder, vocabulary: Vocabulary, one: Rendered) -> torch.Tensor:
    """Of the answer of one document alone, from a softmax over all ids that may come where text is written."""
    ids = torch.from_numpy(one.ids).long()
    hidden = decoder(ids[None, :-1], torch.arange(len(ids) - 1)[None])[0]
    logits = (hidden @ decoder.embedding.matrix().T)[:, :vocabulary.range("image").start]
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]][torch.from_numpy(one.loss_mask[1:])].sum()


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_loss_and_gradient_of_a_packed_batch_are_those_of_the_paper_pair_by_pair(start, tmp_path, sft_weight):
    model = mmtx.load(start[1], "cpu")
    decoder, vocabulary = model.decoder.double().train(), model.vocabulary
    samples = read_source(DataSource([rows(tmp_path / "rows.jsonl", *preferring(*WORDS))]))
    documents = [[render(document(model, answer), vocabulary) for answer in sample.pair]
                 for sample in samples]
    pairs = [Pair(*two) for two in documents]
    store = Pairs(pairs)
    batch = PackedBatches(store, vocabulary, int(store.lengths.sum()) + 7, shuffle=False)[0]
    reference = reference_of(decoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # it has moved away from the reference
    found = pair_loss(DPOConfig(0.3, sft_weight), decoder, reference, batch, torch.ones(len(batch.targets), dtype=torch.double))
    found.total.backward()
    gradients = [parameter.grad.clone() for parameter in decoder.parameters()]
    decoder.zero_grad()
    losses = []
    for number in batch.samples.tolist():
        gained = [log_probability(decoder, vocabulary, one) - log_probability(reference, vocabulary, one).detach()
                  for one in pairs[number]]
        chosen = pairs[number].chosen
        likely = -log_probability(decoder, vocabulary, chosen) / chosen.loss_mask[1:].sum()
        losses.append(-F.logsigmoid(0.3 * (gained[0] - gained[1])) + sft_weight * likely)
    expected = torch.stack(losses)
    assert len(losses) == 4 and expected.std() > 0
    torch.testing.assert_close(found.loss, expected.detach())
    torch.testing.assert_close(found.total, expected.sum())
    expected.sum().backward()
    for ours, parameter in zip(gradients, decoder.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


def document(model: mmtx.Model, sample: Sample) -> Document:
    return document_of(sample, model.tokenizers, {})


def test_the_reference_shares_what_is_frozen_and_keeps_what_the_decoder_changes(start):
    decoder = mmtx.load(start[1], "cpu").decoder
    decoder.blocks.requires_grad_(False)
    reference = reference_of(decoder)
    before = decoder.embedding.weight.detach().clone()
    with torch.no_grad():
        decoder.embedding.weight.add_(1)
    assert torch.equal(reference.embedding.weight, before) and not any(p.requires_grad for p in reference.parameters())
    assert all(ours is theirs for ours, theirs in zip(reference.blocks.parameters(), decoder.blocks.parameters(), strict=True))


# -- Rows ----------------------------------------------------------------------------------------------------

ASKED = {"role": "user", "content": "Name it."}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("red apple", "blue pear"))
SAID = {"from": "human", "value": "Name it."}
FORMS = {
    "prompt, texts": {"prompt": "Name it.", "chosen": "red apple", "rejected": "blue pear"},
    "prompt, messages": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "prompt a text, answers messages": {"prompt": "Name it.", "chosen": [GOOD], "rejected": [BAD]},
    "prompt messages, answers texts": {"prompt": [ASKED], "chosen": "red apple", "rejected": "blue pear"},
    "question": {"question": "Name it.", "chosen": "red apple", "rejected": "blue pear"},
    "instruction": {"instruction": "Name it.", "input": "", "chosen": "red apple", "rejected": "blue pear"},
    "two chats": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "chat": {"conversations": [SAID], "chosen": {"from": "gpt", "value": "red apple"}, "rejected": {"from": "gpt", "value": "blue pear"}},
    "answered chat": {"messages": [ASKED, GOOD], "rejected_response": "blue pear"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_rows_gives_the_same_two_answers(form, tmp_path):
    (sample,) = read_source(DataSource([rows(tmp_path / "rows.jsonl", {**FORMS[form], "id": 7, "origin": "here"})]))
    said = [[(turn.role, [part.text for part in turn.parts]) for turn in turns] for turns in (sample.turns, sample.rejected)]
    assert said == [[("user", ["Name it."]), ("assistant", [text])] for text in ("red apple", "blue pear")]
    assert sample.metadata == {"origin": "here"} and sample.caption == "red apple"


def test_both_answers_see_the_media_of_the_row(tmp_path):
    path = rows(tmp_path / "rows.jsonl", {"image": "cat.webp", "prompt": "<image>\nWhat?", "chosen": "cat", "rejected": "dog"},
                {"image": "cat.webp", "chosen": "cat", "rejected": "dog"})
    (tmp_path / "cat.webp").write_bytes((runs.STARTER.parents[1] / "examples" / "cat.webp").read_bytes())
    for sample in read_source(DataSource([path])):
        assert sample.turns[0] == sample.rejected[0] and [part.kind for part in sample.turns[0].parts if isinstance(part, Media)] == ["image"]
        assert [turns[1].parts[0].text for turns in (sample.turns, sample.rejected)] == ["cat", "dog"]


@pytest.mark.parametrize("row, message", [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "row 1: found the same answer preferred and rejected, expected two"),
    ({"prompt": "a", "chosen": "b", "rejected": [{"role": "robot", "content": "c"}]}, "has role 'robot'"),
    ({"prompt": "a", "chosen": "", "rejected": "c"}, "expected text"),
    ({"chosen": "b", "rejected": "c"}, "row 1: found 'chosen' and 'rejected' without what they answer"),
])
def test_a_row_whose_answers_cannot_be_read_is_a_bad_row(row, message, tmp_path):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        read_source(DataSource([rows(tmp_path / "rows.jsonl", row)]))


def test_flags_with_the_names_of_answers_stay_metadata(tmp_path):
    (sample,) = read_source(DataSource([rows(tmp_path / "rows.jsonl", {"text": "a", "chosen": True, "rejected": False})]))
    assert sample.rejected is None and sample.metadata == {"chosen": True, "rejected": False}


def coded(codes) -> dict:
    return {"messages": [{"role": "user", "content": "trumpet, C 4"},
                         {"role": "assistant", "content": [{"type": "audio", "codes": codes}]}]}


def test_codes_in_a_row_are_the_answer(start, tmp_path):
    model = mmtx.load(start[1], "cpu")
    (sample,) = read_source(DataSource([rows(tmp_path / "rows.jsonl", coded([[5], [7], [0]]))]))
    assert isinstance(sample.turns[1].parts[0], Codes)
    part = document(model, sample).turns[1].parts[0]
    assert part.kind == "audio" and part.codes.tolist() == [[5], [7], [0]]


@pytest.mark.parametrize("codes", [[], [[]], [[1], [2, 3]], [[-1]], [[1.5]], [["1"]], "17", [1, 2], [[2**31]]])
def test_what_is_no_grid_of_codes_is_a_bad_row(codes, tmp_path):
    with pytest.raises(InputError, match=r"row 1: field 'messages\[1\].content\[0\].codes' is .*, expected the codes of audio"):
        read_source(DataSource([rows(tmp_path / "rows.jsonl", coded(codes))]))


def shares(folder) -> list[float]:
    """The share of the preferred answer of each row among its two, as the model in the folder sees it."""
    model = mmtx.load(folder, "cpu")
    found = []
    for row in preferring(*WORDS):
        asked = Document((Turn("user", tuple(model.encode_parts([row["prompt"]]))),))
        found.append(model.classify_documents([asked], [row["chosen"], row["rejected"]])[0][row["chosen"]])
    return found


# -- Runs ----------------------------------------------------------------------------------------------------


def test_a_run_learns_to_prefer_and_is_validated_against_what_it_began_with(start, tmp_path, capsys):
    path = rows(tmp_path / "rows.jsonl", *preferring(*WORDS))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**configured(start, path), "output": str(tmp_path / "run")}))
    main(["fit", "--config", str(tmp_path / "run.yaml"), "--trainer.max_steps", "8"])
    made, before = (load_file(f"{folder}/model.safetensors") for folder in (tmp_path / "run" / "model", start[1]))
    assert {*made} == {*before} and not torch.equal(made["embedding.weight"], before["embedding.weight"])
    after, first = (shares(folder) for folder in (tmp_path / "run" / "model", start[1]))
    assert all(now > then + 0.1 for now, then in zip(after, first, strict=True))
    capsys.readouterr()
    main(["validate", "--config", str(tmp_path / "run.yaml")])
    figures = dict(re.findall(r"val/(\w+) +\S? *([\d.-]+)", capsys.readouterr().out))
    assert float(figures["accuracy"]) == 1 and float(figures["margin"]) > 0.1


def test_a_killed_run_goes_on_bit_by_bit(start, tmp_path):
    config = configured(start, rows(tmp_path / "rows.jsonl", *preferring(*WORDS)))
    assert runs.fit(config, tmp_path / "whole") == [0], (tmp_path / "whole.log").read_text()
    processes = runs.start(config, tmp_path / "killed")
    runs.wait_for(lambda: runs.latest(tmp_path / "killed") >= 2, processes)
    runs.kill(processes)
    assert runs.fit(config, tmp_path / "killed", "--ckpt_path", "last") == [0], (tmp_path / "killed.log").read_text()
    assert runs.results(tmp_path / "killed") == runs.results(tmp_path / "whole")


@pytest.mark.parametrize("row, model, message", [
    ({"prompt": "a", "completion": "b"}, {}, "row 1: found one answer, expected two, in fields 'chosen' and 'rejected', for model.dpo"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"init_from": None}, "init_from: found none with dpo"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"ctc": {"blocks": 1}}, "ctc: found one with dpo, expected none"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"dpo": {"beta": 0.0}}, "dpo.beta: found 0.0, expected a finite number"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"dpo": {"sft_weight": -1.0}}, "dpo.sft_weight: found -1.0"),
    (coded([[99], [1]]), {"dpo": None}, "row 1: audio codes: found 1..99, expected 0..35"),
    (coded([[9, 9], [1, 9]]), {"dpo": None}, r"row 1: audio codes: found shape (2, 2), expected (t, 1)"),
])
def test_what_cannot_be_trained_on_is_one_clear_error(row, model, message, start, tmp_path, capsys):
    config = configured(start, rows(tmp_path / "rows.jsonl", row), **model)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "output": str(tmp_path / "run")}))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(tmp_path / "run.yaml")])
    *_, error = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and error.startswith("mmtx: error: ") and message in error


def test_prepared_shards_have_no_pairs(start, tmp_path, capsys):
    path = rows(tmp_path / "rows.jsonl", *preferring(*WORDS))
    main(["prepare", path, "--tokenizers", *start[0]["data"]["init_args"]["tokenizers"].values(), "--output", str(tmp_path / "shards")])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**configured(start, str(tmp_path / "shards")), "output": str(tmp_path / "run")}))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(tmp_path / "run.yaml")])
    *_, error = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and "shards, which is prepared, expected rows with a preferred and a rejected answer" in error


def test_without_dpo_the_preferred_answers_are_learned_and_the_others_are_told_of(start, tmp_path, capsys):
    config = configured(start, rows(tmp_path / "rows.jsonl", *preferring(*WORDS)), dpo=None)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "output": str(tmp_path / "run")}))
    main(["fit", "--config", str(tmp_path / "run.yaml"), "--trainer.max_steps", "1"])
    assert "4 rows have a rejected answer, which only training with model.dpo reads" in capsys.readouterr().err


def test_adapters_learn_preferences_beside_a_base_that_stays(start, tmp_path):
    pytest.importorskip("peft")
    lora = {"rank": 4, "parts": ["attention"]}
    config = configured(start, rows(tmp_path / "rows.jsonl", *preferring(*WORDS)), lora=lora)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "output": str(tmp_path / "run")}))
    main(["fit", "--config", str(tmp_path / "run.yaml"), "--trainer.max_steps", "8", "--trainer.precision", "bf16-true"])
    after, first = (shares(folder) for folder in (tmp_path / "run" / "model", start[1]))
    assert all(now > then for now, then in zip(after, first, strict=True))


def test_two_ranks_with_two_pairs_and_one_take_the_step_of_one_rank_with_three(start, tmp_path):
    config = configured(start, rows(tmp_path / "rows.jsonl", *preferring(*WORDS)[:3]))
    weights = []
    for ranks, tokens in ((1, 128), (2, 85)):
        data = {**config["data"]["init_args"], "tokens_per_batch": tokens, "max_seq_len": 64}
        trainer = {**config["trainer"], "max_steps": 2, "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
        one = {**config, "data": {**config["data"], "init_args": data}, "trainer": trainer}
        assert runs.fit(one, tmp_path / f"of{ranks}", ranks=ranks) == [0] * ranks, (tmp_path / f"of{ranks}.log").read_text()
        weights.append(load_file(tmp_path / f"of{ranks}" / "model" / "model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_inspect_shows_both_answers(start, tmp_path, capsys):
    main(["inspect", rows(tmp_path / "rows.jsonl", *preferring(*WORDS)), "--model", start[1], "--rows", "1"])
    said = capsys.readouterr().out
    assert re.findall(r"rows.jsonl row (\d+)(, rejected)?:", said) == [("1", ""), ("1", ", rejected")]
