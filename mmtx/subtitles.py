"""Transcripts with times, and their files: subtitles in SRT and WebVTT (https://www.w3.org/TR/webvtt1/), JSON, and plain text."""

import json
from collections.abc import Callable, Sequence
from typing import TypedDict


class Chunk(TypedDict):
    """A part of a transcript, and when it is spoken: begin and end in seconds."""

    timestamp: tuple[float, float]
    text: str


class Transcript(TypedDict):
    """A transcript in the form of transformers' pipeline for speech recognition."""

    text: str
    chunks: list[Chunk]


def srt(chunks: Sequence[Chunk]) -> str:
    return "\n".join(f"{number}\n{_times(chunk, ',')}\n{chunk['text']}\n" for number, chunk in enumerate(chunks, 1))


def vtt(chunks: Sequence[Chunk]) -> str:
    escaped = lambda text: text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "WEBVTT\n" + "".join(f"\n{_times(chunk, '.')}\n{escaped(chunk['text'])}\n" for chunk in chunks)


def _times(chunk: Chunk, point: str) -> str:
    return " --> ".join(_time(seconds, point) for seconds in chunk["timestamp"])


def _time(seconds: float, point: str) -> str:
    whole, milliseconds = divmod(round(1000 * seconds), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{milliseconds:03}"


FORMATS: dict[str, Callable[[Transcript], str]] = {
    "srt": lambda transcript: srt(transcript["chunks"]),
    "vtt": lambda transcript: vtt(transcript["chunks"]),
    "txt": lambda transcript: transcript["text"] + "\n",
    "json": lambda transcript: json.dumps(transcript, ensure_ascii=False, indent=1) + "\n",
}
