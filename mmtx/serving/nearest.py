"""Which training samples a model finds most alike to a medium: the nearest by the cosine of its own vectors (`Model.embed`)."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmtx.ambient import one_thread
from mmtx.data.collection import DataSource, read_sources
from mmtx.data.media import load_audio, load_image
from mmtx.data.sample import Media, Sample
from mmtx.data.sources import MAX_BAD
from mmtx.data.tokens import usable
from mmtx.document import Document, MediaPart, Turn
from mmtx.errors import InputError
from mmtx.pipeline import BATCH, Model
from mmtx.sequence import prompt

SIDE, RATE, EXCERPT = 128, 16_000, 10.0  # pixels, Hz and seconds of what is shown of a sample


class Neighbour(NamedTuple):
    sample: Sample
    alike: float     # cosine, 1 for the same


class Nearest:
    """The first medium of each training sample by its vector. `read` makes them, one after another, and may take minutes."""

    def __init__(self, model: Model, sources: Sequence[DataSource], max_bad: float = MAX_BAD):
        """Raises InputError where the sources cannot be read."""
        self.model, self.found, self.ended = model, read_sources(sources, max_bad), False
        self.samples: list[Sample] = []
        self.vectors: list[np.ndarray] = []

    def read(self) -> None:
        """Add the vectors of all samples, until `ended` is set; those that cannot be read are left out."""
        one_thread()
        samples, counters = self.found.samples, self.found.counters
        for first in range(0, len(samples), BATCH):
            chunk = samples[first:first + BATCH]
            for sample, document in usable(chunk, self.model.tokenizers, counters[first], patches=self.model.decoder.config.encoders):
                if self.ended:
                    return
                if (vector := self._vector(document)) is not None:
                    self.vectors.append(vector)
                    self.samples.append(sample)

    def find(self, document: Document, count: int = 4) -> list[Neighbour]:
        """The samples that are most alike to the first medium of a document, nearest first; none where it has none."""
        if (asked := self._vector(document)) is None or not (known := len(self.samples)):
            return []
        alike = np.stack(self.vectors[:known]) @ asked
        return [Neighbour(self.samples[place], float(alike[place])) for place in np.argsort(-alike, kind="stable")[:count]]

    def _vector(self, document: Document) -> np.ndarray | None:
        media = (part for turn in document.turns for part in turn.parts if isinstance(part, MediaPart))
        if (part := next(media, None)) is None:
            return None
        return self.model.embed_prompt(prompt(Document((Turn("user", (part,)),)), self.model.vocabulary))


def shown(sample: Sample) -> tuple[str, str | None]:
    """The kind of a sample's first medium, and a small picture or an excerpt of the sound as a data URL: None if it has gone."""
    medium = next(part for turn in sample.turns for part in turn.parts if isinstance(part, Media))
    try:
        if medium.kind == "image":
            picture = Image.fromarray(load_image(medium.source.read(), medium.name).permute(1, 2, 0).numpy())
            picture.thumbnail((SIDE, SIDE))
            return medium.kind, picture_url(picture)
        if medium.kind == "audio":
            sound = load_audio(medium.source.read(), RATE, medium.name, **medium.cut)
            return medium.kind, sound_url(sound[:int(EXCERPT * RATE)].numpy(), RATE)
    except InputError:
        pass
    return medium.kind, None


def picture_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def sound_url(samples: np.ndarray, rate: int) -> str:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()
