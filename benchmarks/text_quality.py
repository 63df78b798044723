"""How well does a pretrained language model still handle text after multimodal training? Held-out prose, and answers to 20 prompts.

    python benchmarks/text_quality.py runs/smollm2/start runs/smollm2/adapters/model --output answers.json

Bits per byte of the first --rows of each file of --test (see benchmarks/text_bits.py). Then each model answers 20 prompts greedily:
how many answers are the same as the first model's, and after how many tokens they diverge; the JSON has all answers, to be read.
"""

import argparse
import json
from pathlib import Path

from text_bits import STARTER, decoder_bits

import mmtx
from mmtx.data.collection import DataSource, read_source

PROMPTS = (
    "What is the capital of France?", "Name three colours of the rainbow.", "How many legs does a spider have?",
    "Write one sentence about the sea.", "What do bees make?", "Translate 'good morning' into Spanish.", "What is 7 plus 5?",
    "Which planet is closest to the sun?", "Give a synonym of 'happy'.", "Why is the sky blue?", "Who wrote Romeo and Juliet?",
    "What is the opposite of 'cold'?", "List two animals that can fly.", "How do I boil an egg?", "What is a violin?",
    "Finish the sentence: The cat sat on the", "What language is spoken in Brazil?", "What does a doctor do?",
    "Tell me a short joke.", "Explain in one sentence what a computer is.")


def compare(folders: list[str], tests: list[str], rows: int, tokens: int) -> list[dict]:
    found, first = [], None
    for folder in folders:
        model = mmtx.load(folder, "cpu")
        answers = model.generate_batch(list(PROMPTS), max_new_tokens=tokens)
        coded = [model.tokenizers["text"].encode(answer) for answer in answers]
        first = first or coded
        shared = [next((k for k, (a, b) in enumerate(zip(x, y)) if a != b), min(len(x), len(y))) for x, y in zip(first, coded)]
        bits = {}
        for test in tests:
            samples = read_source(DataSource([test]))[:rows]
            bits[Path(test).name] = round(decoder_bits(model, samples, [sample.caption for sample in samples]), 4)
        found.append({"model": folder, "bits per byte": bits,
                      "answers as of the first": sum(x == y for x, y in zip(first, coded)),
                      "tokens until they part, mean": round(sum(shared) / len(shared), 1), "answers": dict(zip(PROMPTS, answers))})
        print({name: value for name, value in found[-1].items() if name != "answers"}, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", help="folders; the others are compared with the first")
    parser.add_argument("--test", nargs="+", default=[str(path) for path in sorted(STARTER.glob("text-test-*.jsonl"))])
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--output", help="JSON with all answers")
    options = parser.parse_args()
    found = compare(options.models, options.test, options.rows, options.max_new_tokens)
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
