"""What became of the text of a pretrained language model that learnt to see and hear: held-out prose, and answers to 20 prompts.

    python benchmarks/text_quality.py START MODEL --text prose.txt --output answers.json

Bits per byte of the prose in windows of --window tokens, each token behind those before it in its window, among all ids of the model;
those of media are among them, where it may waste probability. Then each model answers 20 prompts greedily: how many answers are the
same as the first model's, and after how many tokens they part; all answers go into the JSON, to be read.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import mmtx
from mmtx.pipeline import Model

PROMPTS = (
    "What is the capital of France?", "Name three colours of the rainbow.", "How many legs does a spider have?",
    "Write one sentence about the sea.", "What do bees make?", "Translate 'good morning' into Spanish.", "What is 7 plus 5?",
    "Which planet is closest to the sun?", "Give a synonym of 'happy'.", "Why is the sky blue?", "Who wrote Romeo and Juliet?",
    "What is the opposite of 'cold'?", "List two animals that can fly.", "How do I boil an egg?", "What is a violin?",
    "Finish the sentence: The cat sat on the", "What language is spoken in Brazil?", "What does a doctor do?",
    "Tell me a short joke.", "Explain in one sentence what a computer is.")


def bits_per_byte(model: Model, text: str, window: int) -> float:
    """Bits that the model needs for a byte of a text; the first token of each window is given."""
    tokenizer, decoder = model.tokenizers["text"], model.decoder
    ids, bits, size = tokenizer.encode(text), 0.0, 0
    table = decoder.output_matrix()
    for first in tqdm(range(0, len(ids) - 1, window), "prose", leave=False):
        part = torch.tensor(ids[first:first + window])
        if len(part) < 2:
            break
        with torch.inference_mode():
            hidden = decoder(part[None, :-1], torch.arange(len(part) - 1)[None])[0]
            bits += F.cross_entropy(decoder.logits(hidden, table).float(), part[1:].long(), reduction="sum").item() / math.log(2)
        size += len(tokenizer.decode(part[1:].tolist()).encode())
    return bits / size


def compare(folders: list[str], text: str, window: int, tokens: int) -> list[dict]:
    found, first = [], None
    for folder in folders:
        model = mmtx.load(folder, "cpu")
        answers = model.generate_batch(list(PROMPTS), max_new_tokens=tokens)
        coded = [model.tokenizers["text"].encode(answer) for answer in answers]
        first = first or coded
        shared = [next((k for k, (a, b) in enumerate(zip(x, y)) if a != b), min(len(x), len(y))) for x, y in zip(first, coded)]
        found.append({"model": folder, "bits per byte": round(bits_per_byte(model, text, window), 4),
                      "answers as of the first": sum(x == y for x, y in zip(first, coded)),
                      "tokens until they part, mean": round(sum(shared) / len(shared), 1), "answers": dict(zip(PROMPTS, answers))})
        print({name: value for name, value in found[-1].items() if name != "answers"}, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", help="folders; the others are compared with the first")
    parser.add_argument("--text", required=True, help="a file of prose")
    parser.add_argument("--bytes", type=int, default=50_000, help="of the prose, from its start")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--output", help="JSON with all answers")
    options = parser.parse_args()
    text = Path(options.text).read_bytes()[:options.bytes].decode(errors="ignore")
    found = compare(options.models, text, options.window, options.max_new_tokens)
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
