"""Sentences spoken by many synthetic voices, with exact transcripts: a part of build_starter.py.

    python build_starter.py --work WORKDIR --out OUTDIR --only synthetic_speech --speech-hours 10

Three speech synthesizers read usage examples of WordNet and names of images. Training clip i is the same for any requested length,
so that the shipped clips are the beginning of any longer set. Two voices and a twentieth of the sentences are held out for testing,
whatever the length.
"""
import collections
import hashlib
import json
import multiprocessing
import os
import random
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from build_starter import RATE, SEED, encode_ogg, write_shards, write_tar

DEB = ["wordnet-base"]
# Packages of the synthesizers and those of their dependencies that not every Debian has, unpacked into one folder.
ENGINES = ["espeak-ng", "espeak-ng-data", "libespeak-ng1", "libsonic0", "libpcaudio0", "flite", "libflite1", "festival",
           "libestools2.5", "festlex-cmu", "festlex-poslex", "festvox-kallpc16k", "festvox-kdlpc16k", "festvox-us-slt-hts",
           "libasound2", "libgomp1",
           "libpulse0", "libasyncns0", "libsndfile1", "libflac12", "libmp3lame0", "libmpg123-0", "libogg0", "libopus0", "libvorbis0a",
           "libvorbisenc2", "libdbus-1-3", "libx11-6", "libx11-xcb1", "libxcb1", "libxau6", "libxdmcp6", "libbsd0", "libmd0"]


class Voice(NamedTuple):
    engine: str
    name: str

    def __str__(self):
        return f"{self.engine} {self.name}"


RECORDED = [Voice("flite", "kal16"), Voice("flite", "rms"), Voice("flite", "slt"), Voice("festival", "kal_diphone"),
            Voice("festival", "ked_diphone"), Voice("festival", "cmu_us_slt_arctic_hts")]  # built from recordings of people
FORMANTS = [Voice("espeak-ng", name) for name in (
    "en-us", "en-us+f2", "en-us+m3", "en-us+f4", "en-us+m7", "en-us+steph", "en-us+max", "en-us+edward", "en-us+linda", "en-us+adam",
    "en-us+Andrea", "en-us+klatt3", "en-us-nyc+m2", "en-us-nyc+f1", "en-gb", "en-gb+f3", "en-gb+m1", "en-gb+victor",
    "en-gb+belinda", "en-gb-x-rp+f5", "en-gb-x-rp+m8", "en-gb-x-gbclan+m4", "en-gb-x-gbcwmd+m6", "en-029+m5")]
# Neither speaker nor accent occurs in training. slt and kal are one speaker each in two voices, so training covers both speakers.
UNSEEN_VOICES = [Voice("flite", "awb"), Voice("espeak-ng", "en-gb-scotland+Annie")]
SHIPPED_HOURS, TEST_CLIPS, PER_SHARD = 0.5, 150, 750
COMMON_WORDS, SECONDS = 3000, (0.5, 6.0)
LEFT_OUT = re.compile(r"\b(sex\w*|rap(e|ed|es|ing|ist)|whore\w*|bitch\w*|nazi\w*|jew\w*|negro\w*|slut\w*|naked|"
                      r"breasts?|shit|prostitut\w*)\b", re.I)


def words(text):
    return re.findall(r"[a-z']+", text.lower())


def wordnet_examples(work):
    """Examples of three to ten words without digits, abbreviations or symbols, which each synthesizer would read differently."""
    found = set()
    for part in ("noun", "verb", "adj", "adv"):
        path = work / "deb/wordnet-base/usr/share/wordnet" / f"data.{part}"
        for line in path.read_text(encoding="latin-1").splitlines():
            for text in re.findall(r'"([^"]+)"', line.partition(" | ")[2]):
                text = text.strip().rstrip(",").strip()
                if re.fullmatch(r"[A-Za-z' ,]+", text) and 3 <= len(words(text)) <= 10 and not re.search("[A-Z]{2}", text):
                    if not LEFT_OUT.search(text):
                        found.add(text)
    return sorted(found)


def picture_names(out):
    """Names of training images with two or three words, built before this part or shipped next to this file."""
    names = set()
    shards = sorted(out.glob("images-train-*.tar.gz")) or sorted(Path(__file__).parent.glob("starter/images-train-*.tar.gz"))
    for path in shards:
        with tarfile.open(path) as tar:
            names |= {json.load(tar.extractfile(member))["caption"] for member in tar if member.name.endswith("json")}
    return sorted(name for name in names if re.fullmatch(r"[a-z' -]+", name) and 2 <= len(words(name)) <= 3)


def is_test(text):
    """Whether a sentence is in the held-out twentieth: depends on its words alone, so other data do not change the split."""
    return hashlib.sha256(" ".join(words(text)).encode()).digest()[0] % 20 == 0


def choose_sentences(examples, names):
    """(training sentences in order, candidates for tests), examples with rare words left out."""
    uses = collections.Counter(word for text in examples for word in set(words(text)))
    common = set(sorted(uses, key=lambda word: (-uses[word], word))[:COMMON_WORDS])
    kept = {" ".join(words(text)): text for text in examples if common.issuperset(words(text))}
    train = [text for text in [*kept.values(), *names] if not is_test(text)]
    test = [text for text in kept.values() if is_test(text)]
    random.Random(SEED).shuffle(train)
    random.Random(SEED).shuffle(test)
    return train, test


def training_clip(number, sentences):
    """Sentence, voice, tempo and pitch of clip `number`; half of the clips use voices built from recordings."""
    rng = random.Random(f"{SEED} speech {number}")
    voice = rng.choice(RECORDED if rng.random() < 0.5 else FORMANTS)
    return sentences[number % len(sentences)], voice, rng.choice((0.88, 1.0, 1.0, 1.15)), rng.choice((40, 50, 60))


def speak(clips, work):
    """[(text, voice, stretch, pitch)] -> waves at RATE: peak 0.7, silence at both ends trimmed to 50 ms."""
    import soundfile
    from scipy.signal import resample_poly
    root = work / "deb/speech-engines"
    lib = root / "usr/lib/x86_64-linux-gnu"
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{lib}:{lib}/pulseaudio"}
    waves = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.wav" for i in range(len(clips))]
        festival = []
        for (text, voice, stretch, pitch), path in zip(clips, paths):
            if voice.engine == "espeak-ng":
                command = [root / "usr/bin/espeak-ng", f"--path={lib}/espeak-ng-data", "-v", voice.name, "-s",
                           str(round(160 / stretch)), "-p", str(pitch), "-w", path, text]
            elif voice.engine == "flite":
                command = [root / "usr/bin/flite", "-voice", voice.name, "--setf", f"duration_stretch={stretch}", "-t", text,
                           "-o", path]
            else:
                festival.append(f'(voice_{voice.name}) (utt.save.wave (utt.synth (Utterance Text "{text}")) "{path}")')
                continue
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        if festival:
            script = Path(folder) / "all.scm"
            script.write_text("\n".join(festival))
            home = root / "usr/share/festival"
            command = [root / "usr/bin/festival", "--libdir", home, "--datadir", home, "-b", script]
            subprocess.run(command, env=environment, check=True)
        for path in paths:
            wave, rate = soundfile.read(path, dtype="float32")
            wave = resample_poly(wave, RATE, rate) if rate != RATE else wave
            loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
            wave = wave[max(0, loud[0] - RATE // 20):loud[-1] + RATE // 20]
            waves.append((0.7 * wave / np.abs(wave).max()).astype(np.float32))
    return waves


def _samples(arguments):
    """[(key, clip)] -> samples; clips that are too long or too short are dropped."""
    clips, work = arguments
    samples = []
    for (key, (text, voice, _, _)), wave in zip(clips, speak([clip for _, clip in clips], work)):
        seconds = len(wave) / RATE
        if SECONDS[0] <= seconds <= SECONDS[1]:
            meta = {"caption": text, "speaker": str(voice), "engine": voice.engine, "synthetic": True, "seconds": round(seconds, 3)}
            samples.append((key, "ogg", encode_ogg(wave, quality=0.9), meta))
    return samples


def build_synthetic_speech(work, out, hours=SHIPPED_HOURS):
    train, candidates = choose_sentences(wordnet_examples(work), picture_names(out))
    samples, seconds, number = [], 0.0, 0
    batch = 100 * max(4, os.cpu_count())
    with multiprocessing.Pool(os.cpu_count()) as pool:
        while seconds < 3600 * hours:
            parts = [[(f"speech-{i:06d}", training_clip(i, train)) for i in range(start, start + 100)]
                     for start in range(number, number + batch, 100)]
            number += batch
            for sample in (s for part in pool.imap(_samples, [(part, work) for part in parts]) for s in part):
                if seconds < 3600 * hours:
                    samples.append(sample)
                    seconds += sample[3]["seconds"]
        # Every word of a test sentence occurs in the shipped clips, which are the beginning of any longer set.
        heard, passed = set(), 0.0
        for sample in samples:
            passed += sample[3]["seconds"]
            heard.update(words(sample[3]["caption"]) if passed <= 3600 * SHIPPED_HOURS else ())
        test = [text for text in candidates if heard.issuperset(words(text))][:TEST_CLIPS]
        files = write_shards(out, "speech-synthetic-train", samples, PER_SHARD)
        for name, prefix, voices in (("sentences", "sentence", None), ("voices", "voice", UNSEEN_VOICES)):
            clips = []
            for i, text in enumerate(test):
                rng = random.Random(f"{SEED} speech test {i}")
                known = rng.choice(RECORDED if rng.random() < 0.5 else FORMANTS)
                clips.append((f"speech-{prefix}-{i:03d}", (text, voices[i % len(voices)] if voices else known, 1.0, 50)))
            parts = [(clips[at:at + 50], work) for at in range(0, len(clips), 50)]
            spoken = [sample for part in pool.imap(_samples, parts) for sample in part]
            file = f"speech-synthetic-test-{name}.tar.gz"
            files[file] = write_tar(out / file, spoken)
    return {"files": files, "seconds": round(seconds), "voices": [str(v) for v in RECORDED + FORMANTS],
            "unseen_voices": [str(v) for v in UNSEEN_VOICES], "training_sentences": len({s[3]["caption"] for s in samples}),
            "sentences_to_train_on": len(train), "test_sentences": test}
