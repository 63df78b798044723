"""Streaming of sounds while they are generated."""

import asyncio
import io
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any, TypeVar

import soundfile

from mmtx.medium import Sound

MEDIA_TYPES = {"mp3": "audio/mpeg", "wav": "audio/wav", "flac": "audio/flac", "opus": "audio/ogg", "pcm": "audio/pcm"}
FORMATS = {"mp3": ("MP3", None), "flac": ("FLAC", None), "opus": ("OGG", "OPUS"), "wav": ("RAW", "PCM_16"), "pcm": ("RAW", "PCM_16")}
UNKNOWN_LENGTH = 2 ** 32 - 1  # the length that WAV readers take as not known yet

Given = TypeVar("Given")
Made = TypeVar("Made")


def encoded(sounds: Iterable[Sound], form: str) -> Iterator[bytes]:
    """Pieces of a sound -> pieces of its file; mp3 and flac come whole, since their headers are known only at the end."""
    file, sent = io.BytesIO(), 0
    format, subtype = FORMATS[form]
    sink = None
    for sound in sounds:
        if sink is None:
            sink = soundfile.SoundFile(file, "w", sound.rate, 1, subtype, "LITTLE" if format == "RAW" else None, format)
            if form == "wav":
                yield struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", UNKNOWN_LENGTH, b"WAVE", b"fmt ", 16, 1, 1, sound.rate,
                                  2 * sound.rate, 2, 16, b"data", UNKNOWN_LENGTH)
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
    """Run `make` on items of `given` in a thread of `threads`, which may block; `end` is called at the end, also an early one."""
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
