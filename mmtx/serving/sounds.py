"""Sounds that are sent while they are made."""

import asyncio
import io
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any, TypeVar

import soundfile

from mmtx.medium import Sound

KINDS = {"mp3": "audio/mpeg", "wav": "audio/wav", "flac": "audio/flac", "opus": "audio/ogg", "pcm": "audio/pcm"}
FORMATS = {"mp3": ("MP3", None), "flac": ("FLAC", None), "opus": ("OGG", "OPUS"), "wav": ("RAW", "PCM_16"), "pcm": ("RAW", "PCM_16")}
UNKNOWN = 2 ** 32 - 1  # the length of a WAV that is not known yet, as readers take it

Given = TypeVar("Given")
Made = TypeVar("Made")


def encoded(sounds: Iterable[Sound], form: str) -> Iterator[bytes]:
    """A sound in pieces -> its file in pieces. Those of mp3 and flac begin with what is known at the end alone, and come whole."""
    file, sent = io.BytesIO(), 0
    format, subtype = FORMATS[form]
    sink = None
    for sound in sounds:
        if sink is None:
            sink = soundfile.SoundFile(file, "w", sound.rate, 1, subtype, "LITTLE" if format == "RAW" else None, format)
            if form == "wav":
                yield struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", UNKNOWN, b"WAVE", b"fmt ", 16, 1, 1, sound.rate, 2 * sound.rate,
                                  2, 16, b"data", UNKNOWN)
        sink.write(sound.samples)
        if form not in ("mp3", "flac"):
            sink.flush()
            if piece := file.getvalue()[sent:]:
                yield piece
                sent += len(piece)
    if sink is not None:
        sink.close()
    yield file.getvalue()[sent:]


async def in_thread(threads: Executor, given: AsyncIterator[Given], make: Callable[[Iterator[Given]], Iterator[Made]],
                    end: Callable[[], None]) -> AsyncIterator[Made]:
    """What `make` makes of what is given, in threads that may wait for it. `end` ends what is given where nobody waits any more."""
    loop = asyncio.get_running_loop()
    over: Any = object()

    async def following():
        return await anext(given, over)

    def waiting() -> Iterator[Given]:
        while (item := asyncio.run_coroutine_threadsafe(following(), loop).result()) is not over:
            yield item

    made = make(waiting())
    try:
        while (item := await loop.run_in_executor(threads, next, made, over)) is not over:
            yield item
    finally:
        end()
