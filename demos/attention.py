"""Which noun does a verb attend to? In "The dog that chased the cat was tired." the dog was tired, but the cat is nearer.

    mmtx convert --from HuggingFaceTB/SmolLM2-135M-Instruct --output smollm2
    python demos/attention.py --model smollm2 --plot tired-dog.png tired-cat.png

Sentences of this form with some animals select the head whose weights favour the first noun most. Sentences with other animals
test how well that head, the mean of all heads and attention rollout do; and sentences in which the second noun is the subject
test whether the head follows the subject or just the first noun.
"""

import argparse
import itertools
import random
import sys

import mmtx
from mmtx.evaluation import confidence_interval

ANIMALS = (("dog", "cat", "fox", "horse", "goat", "bear", "wolf", "cow"),
           ("lion", "rabbit", "mouse", "pig", "duck", "sheep", "tiger", "bird"))
FIRST, SECOND = "The {} that chased the {} was tired.", "The {} chased the {} that was tired."  # which noun was tired
VERB = "was"


def main() -> None:
    parser = argparse.ArgumentParser(description="Which noun does a verb read?")
    parser.add_argument("--model", required=True, help="folder of a text model, as mmtx convert writes it")
    parser.add_argument("--pairs", type=int, default=28, help="sentences to choose by, and as many to judge by")
    parser.add_argument("--plot", nargs=2, default=(), metavar="FILE", help="write the weights of the chosen head for the dog and "
                        "the cat, who was tired in the first file and in the second")
    options = parser.parse_args()
    try:
        model = mmtx.load(options.model, "cpu")
        chosen_by, judged_by = (sample(animals, options.pairs) for animals in ANIMALS)
        votes = [subject_first(model, pair) for pair in chosen_by]
        layers, heads = votes[0].shape[:2]
        margin = sum(vote[..., 0] - vote[..., 1] for vote in votes) / len(votes)                     # (L, H)
        layer, head = divmod(int(margin.argmax()), heads)
        print(f"layer {layer} of 0 to {layers - 1}, head {head} of 0 to {heads - 1}; {len(judged_by)} sentences with other animals:")
        ways = {"this head": lambda found: found.rows(layer, head), "mean of all heads": lambda found: found.rows(),
                "rollout": lambda found: found.rollout()}
        for sentence in (FIRST, SECOND):
            read: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for pair in judged_by:
                found, (first, second, verb) = places_of(model, pair, sentence)
                for way, rows in ways.items():
                    read[way].append((float(rows(found)[verb, first]), float(rows(found)[verb, second])))
            print(sentence.format("A", "B"))
            for way, pairs in read.items():
                share = confidence_interval([float(first > second) for first, second in pairs])
                first, second = (sum(weights) / len(pairs) for weights in zip(*pairs))
                print(f"  {way:18} A {first:.2g}, B {second:.2g}; A more than B: {share.value:.2f} "
                      f"[{share.low:.2f}, {share.high:.2f}]")
        for sentence, file in zip((FIRST, SECOND), options.plot):
            found, _ = places_of(model, ("dog", "cat"), sentence)
            found.plot(file, layer, head, places=[place for word in found.words for place in word.places])
    except mmtx.InputError as error:
        sys.exit(f"error: {error}")


def sample(animals: tuple[str, ...], count: int) -> list[tuple[str, str]]:
    """Ordered pairs of different animals, the same in every run."""
    pairs = list(itertools.permutations(animals, 2))
    return random.Random(0).sample(pairs, min(count, len(pairs)))


def subject_first(model: mmtx.Model, pair: tuple[str, str]):
    """The attention weights (L, H, 2) from the verb to the first noun, its subject, and to the second."""
    found, (first, second, verb) = places_of(model, pair, FIRST)
    return found.weights[:, :, verb][:, :, [first, second]]


def places_of(model: mmtx.Model, pair: tuple[str, str], sentence: str):
    """The attention over a sentence, and the positions of its nouns and its verb, of the last piece of each."""
    found = model.attention("", sentence.format(*pair))
    words = {word.text.strip(" ."): word.places[-1] for word in found.words}
    return found, (words[pair[0]], words[pair[1]], words[VERB])


if __name__ == "__main__":
    main()
