"""The training samples most similar to a medium: nearest neighbours by cosine of the model's embeddings (`Model.embed`)."""

import base64
import io
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import soundfile
from PIL import Image

from mmtx.ambient import one_thread
from mmtx.batching import BATCH
from mmtx.data.collection import DataSource, read_sources
from mmtx.data.media import load_audio, load_image
from mmtx.data.sample import Media, Sample
from mmtx.data.skip_counter import MAX_BAD
from mmtx.data.tokens import usable
from mmtx.document import Document, MediaPart, Turn
from mmtx.errors import InputError
from mmtx.medium import Sound
from mmtx.pipeline import Model
from mmtx.sequence import prompt

SIDE, RATE, EXCERPT = 128, 16_000, 10.0  # pixels, Hz and seconds of a sample's preview


class Neighbour(NamedTuple):
    sample: Sample
    similarity: float  # cosine similarity

    @property
    def medium(self) -> Media:
        """The first picture or sound, by which it was found."""
        return next(part for turn in self.sample.turns for part in turn.parts if isinstance(part, Media))

    def preview(self) -> str | None:
        """A thumbnail, or an excerpt of the sound, as a data URL; None if its file is unreadable, or it is of another kind."""
        medium = self.medium
        try:
            if medium.kind == "image":
                picture = Image.fromarray(load_image(medium.source.read(), medium.name).permute(1, 2, 0).numpy())
                picture.thumbnail((SIDE, SIDE))
                return data_url(picture)
            if medium.kind == "audio":
                sound = load_audio(medium.source.read(), RATE, medium.name, **medium.options)
                return data_url(Sound(sound[:int(EXCERPT * RATE)].numpy(), RATE))
        except InputError:
            pass
        return None


class NearestNeighbours:
    """An index of training samples by the embedding of their first medium; `read` fills it, which may take minutes."""

    def __init__(self, model: Model, sources: Sequence[DataSource]):
        """Raises InputError if the sources cannot be read."""
        self.model, self.found = model, read_sources(sources, MAX_BAD)
        self.samples: list[Sample] = []
        self.vectors: list[np.ndarray] = []

    def read(self) -> None:
        """Add the embeddings of all samples, unless the program ends first; samples that cannot be read are skipped."""
        one_thread()
        samples, counters = self.found.samples, self.found.counters
        for first in range(0, len(samples), BATCH):
            chunk = samples[first:first + BATCH]
            for sample, document in usable(chunk, self.model.tokenizers, counters[first], patches=self.model.decoder.config.encoders):
                if not threading.main_thread().is_alive():
                    return
                if (vector := self._vector(document)) is not None:
                    self.vectors.append(vector)
                    self.samples.append(sample)

    def find(self, document: Document, count: int = 4) -> list[Neighbour]:
        """The samples most similar to the first medium of a document, nearest first; none if it has no media."""
        if (asked := self._vector(document)) is None or not (known := len(self.samples)):
            return []
        similarity = np.stack(self.vectors[:known]) @ asked
        return [Neighbour(self.samples[place], float(similarity[place])) for place in np.argsort(-similarity, kind="stable")[:count]]

    def _vector(self, document: Document) -> np.ndarray | None:
        medium = next((part for turn in document.turns for part in turn.parts if isinstance(part, MediaPart)), None)
        if medium is None:
            return None
        return self.model.embed_prompt(prompt(Document((Turn("user", (medium,)),)), self.model.vocabulary))


def data_url(made: Image.Image | Sound) -> str:
    """A picture or a sound as a data URL (PNG, WAV)."""
    file, kind = io.BytesIO(), "audio/wav" if isinstance(made, Sound) else "image/png"
    if isinstance(made, Sound):
        soundfile.write(file, *made, format="WAV", subtype="PCM_16")
    else:
        made.save(file, "PNG")
    return f"data:{kind};base64," + base64.b64encode(file.getvalue()).decode()
