"""How good is the sound of the audio tokenizer compared with Codec2 and Opus, and at which bit rates?

    python benchmarks/classic_sounds.py
    python benchmarks/classic_sounds.py --limit 6 --no_write

Speech: intelligibility (STOI, Taal et al. 2011), PESQ (ITU-T P.862, narrow band, since the voice is from a telephone), DNSMOS (P.835,
Reddy et al. 2022; the only metric without the original as reference) and Whisper-base's character errors. Notes: whether pYIN's pitch
is within 50 cents of the original's, and the distance of mel spectrograms in dB. Codec2 is made for speech at 8 kHz; Opus runs at
6 kbit/s, its minimum. Its bits are those of the file without its two headers, which are as large as a second and a half of
sound.
Needs what audio_quality.py needs, `pip install pystoi pesq speechmos`, and the programs c2enc and c2dec (Debian's package codec2).
Writes results/classic_sounds.json.
"""

import argparse
import io
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from datetime import date

import numpy as np
import soundfile
import torch
import torchaudio.functional as AF
from audio_quality import NOTES, SPEECH, cents, character_error_rate, near, pitch, read, transcript, whisper
from measure import require, write_result
from torch import Tensor
from tqdm import tqdm

from mmtx.modality.audio import AudioTokenizer
from mmtx.modality.base import load_tokenizer

RATE = 16_000
Coded = Callable[[Tensor], tuple[Tensor, float]]  # a waveform (S,) -> the decoded sound, and bits per second
CODEC2 = ("1200", "3200")  # modes, in bit/s
OPUS = (6,)                # kbit/s


def codec2(mode: str) -> Coded:
    def coded(waveform: Tensor) -> tuple[Tensor, float]:
        samples = (AF.resample(waveform, RATE, 8000).clamp(-1, 1) * 32767).short().numpy()
        frame = 320  # 40 ms, a multiple of the frame of every mode
        raw = np.pad(samples, (0, -len(samples) % frame)).tobytes()
        bits = subprocess.run(["c2enc", mode, "-", "-"], input=raw, capture_output=True, check=True).stdout
        out = subprocess.run(["c2dec", mode, "-", "-"], input=bits, capture_output=True, check=True).stdout
        sound = torch.from_numpy(np.frombuffer(out, np.int16).astype(np.float32) / 32768)
        return AF.resample(sound, 8000, RATE), 8 * len(bits) / (len(raw) / 2 / 8000)
    return coded


def opus(kilobits: int) -> Coded:
    def written(samples: np.ndarray) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, samples, RATE, format="OGG", subtype="OPUS", compression_level=1 - (kilobits - 6) / 250)
        return file.getvalue()

    headers = len(written(np.zeros(1, np.float32)))

    def coded(waveform: Tensor) -> tuple[Tensor, float]:
        content = written(waveform.numpy())
        sound, rate = soundfile.read(io.BytesIO(content), dtype="float32")
        found = AF.resample(torch.from_numpy(sound), rate, RATE)
        return found, 8 * (len(content) - headers) / (len(waveform) / RATE)
    return coded


def ours(tokenizer: AudioTokenizer) -> Coded:
    def coded(waveform: Tensor) -> tuple[Tensor, float]:
        codes = tokenizer.encode_batch([waveform])[0]
        return tokenizer.decode(codes), codes.size * math.log2(tokenizer.size) / (len(waveform) / RATE)
    return coded


def aligned(sound: Tensor, waveform: Tensor) -> Tensor:
    """A sound cut to the length of the original and shifted by up to 60 ms to the best correlation: codecs add delay."""
    most = round(0.06 * RATE)
    padded = torch.nn.functional.pad(sound, (0, max(0, len(waveform) + most - len(sound))))
    agreement = torch.nn.functional.conv1d(padded[None, None, :len(waveform) + most], waveform[None, None])[0, 0]
    at = int(agreement.argmax())
    return padded[at:at + len(waveform)]


def judged_speech(pairs: list[tuple[Tensor, Tensor]], texts: list[str]) -> dict[str, float]:
    """Metrics of sentences, from pairs (sound, original)."""
    from pesq import pesq
    from pystoi import stoi
    from speechmos import dnsmos

    found: dict[str, list[float]] = {"STOI": [], "PESQ": [], "DNSMOS": []}
    for sound, waveform in pairs:
        one, other = sound.numpy(), waveform.numpy()
        found["STOI"].append(stoi(other, one, RATE))
        narrow, wanted = (AF.resample(x, RATE, 8000).numpy() for x in (sound, waveform))
        found["PESQ"].append(pesq(8000, wanted, narrow, "nb"))
        found["DNSMOS"].append(dnsmos.run(one / max(1e-6, np.abs(one).max()), RATE)["ovrl_mos"])
    with tempfile.TemporaryDirectory() as folder:
        model = whisper(folder)
        heard = [transcript(model, sound.numpy(), RATE) for sound, _ in pairs]
    return {**{name: round(float(np.mean(values)), 3) for name, values in found.items()},
            "characters wrong": round(character_error_rate(list(zip(heard, texts, strict=True))), 3)}


def judged_notes(pairs: list[tuple[Tensor, Tensor]], tokenizer: AudioTokenizer) -> dict[str, float]:
    """Metrics of notes, from pairs (sound, original)."""
    kept, decibels = [], []
    for sound, waveform in pairs:
        decibels.append(float(tokenizer.decibels((tokenizer.log_mel(sound) - tokenizer.log_mel(waveform)).abs().mean())))
        if (wanted := pitch(waveform.numpy(), RATE)) is not None:
            kept.append(near(cents(pitch(sound.numpy(), RATE), wanted)))
    return {"pitch kept": round(float(np.mean(kept)), 3), "mel distance, dB": round(float(np.mean(decibels)), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="tokenizers/audio")
    parser.add_argument("--limit", type=int, default=96, help="of notes and of sentences, default: 96")
    parser.add_argument("--no_write", action="store_true")
    options = parser.parse_args()
    for name in ("pystoi", "pesq", "speechmos"):
        require(name, name)
    if shutil.which("c2enc") is None:
        raise SystemExit("c2enc is not installed, expected Debian's package codec2")
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(options.tokenizer)
    sets = {name: read(path, tokenizer, options.limit) for name, path in (("speech", SPEECH), ("notes", NOTES))}
    codecs: dict[str, Coded] = {
        "original": lambda waveform: (waveform, 16.0 * RATE), "ours": ours(tokenizer),
        **{f"Codec2 {mode}": codec2(mode) for mode in CODEC2}, **{f"Opus {rate}": opus(rate) for rate in OPUS}}
    result: dict = {"name": "classic_sounds", "date": date.today().isoformat(),
                    **{name: len(samples) for name, samples in sets.items()}, "codecs": {}}
    for name, coded in codecs.items():
        row: dict[str, dict[str, float]] = {}
        for kind, samples in sets.items():
            pairs, rates = [], []
            for _, waveform in tqdm(samples, desc=f"{name}, {kind}", leave=False):
                sound, bits = coded(waveform)
                pairs.append((aligned(sound, waveform), waveform))
                rates.append(bits)
            judged = (judged_speech(pairs, [sample.caption for sample, _ in samples]) if kind == "speech"
                      else judged_notes(pairs, tokenizer))
            row[kind] = {"bit/s": round(float(np.mean(rates))), **judged}
            print(f"{name}, {kind}: {row[kind]}", flush=True)
        result["codecs"][name] = row
    if not options.no_write:
        write_result(result)


if __name__ == "__main__":
    main()
