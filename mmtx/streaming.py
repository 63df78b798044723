"""Streaming: text, pictures and sounds in pieces, from ids that come one by one."""

from collections.abc import Iterator, Sequence

import numpy as np

from mmtx.medium import Media, Sound, to_sound
from mmtx.processor import Processor


def stream_media(ids: Iterator[int], processor: Processor, prefix: Sequence[int] = ()) -> Iterator[Media]:
    """The media of an answer that begins with `prefix`: text and sounds in pieces, pictures when they are complete."""
    v, decode = processor.vocabulary, processor.tokenizers["text"].decode
    pending, shown, closing = list(prefix), 0, {v.closing(kind) for kind in v.media}
    begins = v.opening("audio") if "audio" in v.media and _has_vocoder(processor) else None
    for ident in ids:
        writing = bool(pending) and v.kind(pending[0]) == "text"
        if writing and (v.kind(ident) != "text" or ident == v.end):  # in a chat format <end> is text, too
            # Bytes of an incomplete character were held back.
            if rest := decode(pending)[shown:]:
                yield rest
            pending, shown = [], 0
        if ident in (v.end, v.eos, v.pad):
            break
        if ident == begins:
            yield from stream_sound(ids, processor)
            continue
        pending.append(ident)
        if v.kind(pending[0]) == "text":
            text = decode(pending)
            # A character may need several byte pieces: wait until it is complete.
            if not text.endswith("\ufffd") and len(text) > shown:
                yield text[shown:]
                shown = len(text)
        elif ident in closing:
            yield from processor.to_media(pending)
            pending = []


def stream_sound(ids: Iterator[int], processor: Processor) -> Iterator[Sound]:
    """Consume ids up to the end of a sound -> the sound in pieces, or whole without a vocoder."""
    processor.check_kind("audio")
    decoder, steps = processor.sound_decoder, _time_steps(ids, processor)
    if _has_vocoder(processor):
        for samples in decoder.decode_stream(steps):
            yield Sound(samples.numpy(), decoder.rate)
    else:
        yield to_sound(decoder, np.concatenate([*steps]))


def _has_vocoder(processor: Processor) -> bool:
    return getattr(processor.sound_decoder, "vocoder", None) is not None


def _time_steps(ids: Iterator[int], processor: Processor) -> Iterator[np.ndarray]:
    """Consume ids up to the end of a sound -> its codes, one time step (1, bands) at a time."""
    v, step = processor.vocabulary, []
    for ident in ids:
        if ident == v.closing("audio"):
            return
        if ident != v.opening("audio"):
            step.append(ident)
        if len(step) == v.bands("audio"):
            yield v.to_local("audio", np.array(step))[None]
            step = []
