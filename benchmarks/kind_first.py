"""Does it help to ask what kind of thing an image shows before asking what it is? Names with and without, on the starter data.

    python benchmarks/kind_first.py
"""

import argparse
import importlib.util
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import mmtx
from mmtx.data.collection import DataSource, progress, read_source
from mmtx.data.sample import Media
from mmtx.shipped_files import find_shipped

DATA = find_shipped("demos/data/starter")
SETS = {"images-test-unseen-emoji": 1, "images-test-unseen-style": 2, "images-drawings-test": 1}  # every n-th sample


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a captioner that was trained on kinds, default: the one that comes with mmtx")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("starter_captions", DATA.with_name("starter_captions.py"))
    starter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(starter)
    train = read_source(DataSource([str(DATA / "images-train-*.tar.gz"), str(DATA / "images-more-*.tar.gz")]))
    fields_of = starter.names([{**sample.metadata, "caption": sample.caption} for sample in train]).read
    model = mmtx.load(options.model, "cpu")
    for name, step in SETS.items():
        samples = read_source(DataSource([str(DATA / f"{name}.tar.gz")]))[::step]
        images = [mmtx.Image(part.source.read()) for sample in samples for turn in sample.turns for part in turn.parts
                  if isinstance(part, Media)]
        asked = [{"role": "user", "content": [image, starter.WHAT_KIND]} for image in images]
        kinds = model.generate_batch([[message] for message in asked])
        again = {"role": "user", "content": starter.WHAT}
        after = model.generate_batch([[message, {"role": "assistant", "content": kind}, again]
                                      for message, kind in zip(progress(name)(asked), kinds, strict=True)])
        print(f"{name}, {len(samples)} images")
        for way, said in (("at once", model.caption(images)), ("kind first", after)):
            shares = {field: sum(fields_of(text).get(field) == (sample.caption if field == "caption" else sample.metadata[field])
                                 for text, sample in zip(said, samples, strict=True)) / len(samples) for field in starter.NAME_FIELDS}
            print(f"  {way:10}", ", ".join(f"{field} {share:.4f}" for field, share in shares.items()))


if __name__ == "__main__":
    try:
        main()
    except mmtx.InputError as error:
        sys.exit(f"error: {error}")
