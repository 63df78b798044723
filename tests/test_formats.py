"""Files of every format are read whole, or a cut of them, or refused by name: short, joined and piped ones too."""

import io
import struct
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import soundfile
import torch
from fuzz import ffmpeg_sound, picture_seeds, seed_picture, sound_seeds
from PIL import Image

from mmtx.data import sound_files
from mmtx.data.formats import AUDIO_FORMATS, IMAGE_FORMATS, format_of
from mmtx.data.media import load_audio, load_image
from mmtx.data.mpeg import frame_at, mpeg_sound
from mmtx.data.sample import kind_of, sniff
from mmtx.data.sound_files import read_sound
from mmtx.errors import InputError
from mmtx.modality.registry import MODALITIES

RATE = 16_000
SOUNDS, PICTURES = sound_seeds(), picture_seeds()
FFMPEG = [("ipod", "aac"), ("ipod", "alac"), ("mp4", "flac"), ("mp4", "libmp3lame"), ("3gp", "aac"), ("adts", "aac"),
          ("webm", "libopus"), ("matroska", "flac")]


def tone(seconds, frequency=440.0, rate=RATE):
    return 0.3 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def noise(seconds):
    return np.random.default_rng(0).normal(0, 0.3, round(seconds * RATE)).clip(-1, 1)


def sound(samples, rate=RATE, format="WAV", **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, **options)
    return file.getvalue()


def mp3(samples, index=True):
    """Variable bit rate, with or without the first frame, which counts the others."""
    data = sound(samples, format="MP3", bitrate_mode="VARIABLE", compression_level=0.2)
    assert data[13:17] == b"Xing"
    return data if index else data[frame_at(data[:4]).length :]


def same(audio, samples, least=0.99):
    """Whether a sound of at least this length is these samples, but for its loudness and a coder's delay."""
    wanted = torch.from_numpy(np.asarray(samples, np.float32))
    assert len(wanted) <= len(audio) < len(wanted) + 2_500, (len(audio), len(wanted))
    spectra = [torch.fft.rfft(x, 2**20) for x in (audio, wanted)]
    match = torch.fft.irfft(spectra[0] * spectra[1].conj()).max() / (audio.norm() * wanted.norm())
    assert match > least, match


def refused(data, *words, name="x.snd", read=lambda data, name: load_audio(data, RATE, name), **options):
    with pytest.raises(InputError) as caught:
        read(data, name, **options)
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and message.isprintable() and len(message) <= 300
    for word in words:
        assert word in message, message


# What a file is.


@pytest.mark.parametrize("name", [*PICTURES, *SOUNDS])
def test_formats_are_told_by_their_first_bytes(name):
    data = {**PICTURES, **SOUNDS}[name]
    wanted = {"RF64": "WAV", "ipod": "MP4", "mp4": "MP4", "adts": "AAC", "webm": "WEBM", "mp2": "MP3"}
    format = name.split()[0].rstrip(",")
    assert format_of(data[:64]) == format_of(data) == wanted.get(format, format)
    assert sniff(data[:64]) == ("image" if name in PICTURES else "audio")
    assert format_of(data) in (IMAGE_FORMATS if name in PICTURES else AUDIO_FORMATS)


def test_what_is_neither_a_picture_nor_a_sound():
    for data in (b"", b"RIFF", b"RIFF\0\0\0\0AVI ", b"BMW is a car", b"\xff\xfea\0b\0c\0", b"\xff\xff\xff\xff",
                 b"%PDF-1.7", b"\0\0\0\x0cjP  \r\n\x87\n", b"8BPS\0\1", b"%!PS-Adobe", b"<svg/>",
                 b"FORM\0\0\0\0ILBM", b"\xff\xff\x00"):
        assert format_of(data) is sniff(data) is None
    assert sniff(b"ID3\4\0\0\0\0\0\0fLaC") == "audio" and format_of(b"ID3\4\0\0\0\0\0\0fLaC") == "FLAC"
    assert all(kind_of("x" + suffix) == kind for kind, modality in MODALITIES.items() for suffix in modality.extensions)
    assert kind_of("x.mp4") is None and kind_of("x.mp4", SOUNDS["ipod aac"]) == "audio"


# Sounds.


@pytest.mark.parametrize(("container", "codec"), FFMPEG)
def test_what_phones_and_browsers_record(monkeypatch, container, codec):
    samples = np.concatenate([tone(1), tone(1, 620)])
    data = ffmpeg_sound(samples, RATE, container, codec)
    same(load_audio(data, RATE), samples)
    refused(data[: len(data) // 2], "cut short")
    refused(data[:-5], "cut short")
    assert len(load_audio(data, RATE, start=0.25, seconds=0.5)) == 8_000
    whole, rate = read_sound(data, "x")
    for distance in (30, 0.1):
        monkeypatch.setattr(sound_files, "SEEK_DISTANCE", distance)
        assert np.abs(read_sound(data, "x", 1.5, 0.25)[0] - whole[rate * 3 // 2 : rate * 7 // 4]).max() < 1e-5


def test_a_video_two_sounds_and_other_codecs_are_refused():
    import av

    def file_of(*streams, container="matroska"):
        file = io.BytesIO()
        with av.open(file, "w", format=container) as output:
            made = []
            for codec in streams:
                if codec == "mpeg4":
                    stream = output.add_stream(codec, rate=10)
                    stream.width = stream.height = 16
                    frames = [av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")]
                    frames[0].time_base = Fraction(1, 10)
                else:
                    stream = output.add_stream(codec, rate=RATE, layout="mono")
                    frames = [av.AudioFrame.from_ndarray(np.zeros((1, 1_024), np.int16), format="s16", layout="mono")]
                    frames[0].sample_rate, frames[0].time_base = RATE, Fraction(1, RATE)
                frames[0].pts = 0
                made.append((stream, frames))
            for stream, frames in made:
                for frame in (*frames, None):
                    output.mux(stream.encode(frame))
        return file.getvalue()

    refused(file_of("mpeg4"), "a video")
    refused(file_of("flac", "flac"), "2 sounds in one")
    refused(file_of("pcm_s16le"), "of another kind than aac")


@pytest.mark.parametrize(
    ("name", "package"), [("ipod aac", "av"), ("adts aac", "av"), ("webm libopus", "av"), ("HEIC", "pillow_heif")]
)
def test_without_the_extra_its_name_is_told(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    how = {"read": load_image} if name == "HEIC" else {}
    refused({**SOUNDS, **PICTURES}[name], 'pip install "mmtx[media]"', **how)


def test_the_core_reads_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert len(load_audio(SOUNDS["MP3 MPEG_LAYER_III"], RATE)) == 4_000
    assert load_image(PICTURES["AVIF"]).shape[0] == 3


def test_mp3_of_variable_bit_rate_is_read_to_its_end():
    for samples in (np.concatenate([noise(0.5), tone(10)]), np.concatenate([noise(3), np.zeros(12 * RATE)]),
                    np.concatenate([np.zeros(12 * RATE), noise(3)])):
        for index in (True, False):
            same(load_audio(mp3(samples, index), RATE), samples, least=0.85)
    assert len(load_audio(mp3(tone(3)), RATE)) == 3 * RATE  # the coder's delay is taken off where it is known


def test_mp3_in_a_row_and_with_tags_between():
    first, second = tone(3), tone(2, 620)
    body = mp3(tone(1, 1_000))  # a tag may hold anything
    id3 = b"ID3\4\0\0" + bytes(len(body) >> shift & 127 for shift in (21, 14, 7, 0)) + body
    for data in (mp3(first) + mp3(second), mp3(first, False) + mp3(second, False), id3 + mp3(first) + id3 + mp3(second),
                 mp3(first) + b"TAG".ljust(128, b"x") + mp3(second) + b"TAG".ljust(128, b"x"),
                 mp3(first) + bytes(1_000) + mp3(second) + bytes(1_000)):
        audio = load_audio(data, RATE)
        assert 5 * RATE <= len(audio) < 5.25 * RATE
        for start, frequency in ((1, 440), (4, 620)):
            part = audio[start * RATE : start * RATE + RATE // 2]
            assert torch.fft.rfft(part, RATE).abs().argmax() == frequency
    stereo = sound(np.stack([first, first], 1), format="MP3")
    refused(mp3(first) + stereo, "from 1 channels at 16000 Hz to 2 at 16000 Hz")
    refused(mp3(first) + sound(tone(3, rate=22_050), 22_050, format="MP3"), "at 22050 Hz")


def test_mp3_that_is_cut_short_is_refused():
    data = mp3(tone(3))
    refused(data[:-1], "cut short", "last frame")
    refused(data[: len(data) // 2], "cut short")
    places = [0]
    while places[-1] < len(data):
        places.append(places[-1] + frame_at(data[places[-1] :][:4]).length)
    refused(data[: places[50]], "49 frames of 86")  # between two frames; the first is the index
    refused(data[: places[1]], "0 frames of 86")
    refused(data[:3], "no frames")
    without = mp3(tone(3), False)
    refused(without[:-1], "cut short")


def test_mp3_frames_of_every_version_and_layer():
    for header, wanted in {
        "fffb9064": (417, 1152, 44_100, 2, 3),  # version 1, layer III, 128 kbit/s
        "fffb9264": (418, 1152, 44_100, 2, 3),  # padded
        "fff388c4": (288, 576, 16_000, 1, 3),  # version 2
        "ffe388c4": (576, 576, 8_000, 1, 3),  # version 2.5
        "fffd8400": (384, 1152, 48_000, 2, 2),  # layer II
        "fffe1000": (32, 384, 44_100, 2, 1),  # layer I
    }.items():
        assert frame_at(bytes.fromhex(header))[:5] == wanted, header
    for header in ("fffbf064", "fffb0064", "fffb9c64", "ffeb9064", "fff99064", "fefb9064", "ff"):
        assert frame_at(bytes.fromhex(header)) is None
    same(load_audio(ffmpeg_sound(tone(2), RATE, "mp2", "mp2"), RATE), tone(2))


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_that_are_cut_short_are_refused(name):
    data = SOUNDS[name]
    assert 4_000 <= len(load_audio(data, RATE)) < 6_400
    for kept in (len(data) - 2, len(data) * 2 // 3):
        refused(data[:kept], "cut short")
    if name.split()[0] not in ("MP3", "OGG", "mp2", "adts", "FLAC"):  # where two are one sound, or the checksum tells
        refused(data + data, "follows at byte" if name.split()[0] != "webm" else "another WEBM file")
    if name.split()[0] != "FLAC":
        assert torch.equal(load_audio(data + bytes(100), RATE), load_audio(data, RATE))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_in_a_row_is_one_sound_and_damage_is_found(subtype):
    first, second = (sound(tone(1, f), format="OGG", subtype=subtype) for f in (440, 620))
    audio = load_audio(first + second, RATE)
    assert len(audio) == 2 * RATE
    for start, frequency in ((0, 440), (1, 620)):
        assert torch.fft.rfft(audio[start * RATE :][:RATE]).abs().argmax() == frequency
    whole = read_sound(first + second, "x")[0]
    assert np.array_equal(read_sound(first + second, "x", 0.5, 1.0)[0], whole[8_000:24_000])
    stereo = sound(np.stack([tone(1)] * 2, 1), format="OGG", subtype=subtype)
    refused(first + stereo, "from 1 channels at 16000 Hz to 2 at 16000 Hz")
    pages = [b"OggS" + page for page in first.split(b"OggS")[1:]]
    refused(b"".join(pages[:-1]), "no end")
    refused(b"".join([*pages[:1], *pages[2:]]), "a page is missing")
    damaged = bytearray(first)
    damaged[-100] ^= 1
    refused(bytes(damaged), "checksum")
    refused(pages[0] + second, "before the first ends")


def test_flac_and_wav_from_a_pipe_are_read_to_their_end():
    flac = bytearray(sound(tone(3), format="FLAC"))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)  # the number of samples: unknown
    wanted = load_audio(sound(tone(3), format="FLAC"), RATE)
    assert torch.equal(load_audio(bytes(flac), RATE), wanted)
    refused(bytes(flac[: len(flac) // 2]), "damaged or cut short")
    assert torch.equal(load_audio(bytes(flac), RATE, start=1, seconds=1), wanted[RATE : 2 * RATE])
    wav = sound(tone(3))
    wanted = load_audio(wav, RATE)
    unknown = ((0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (8, 0), (36, 0), (0x7FFFF024, 0x7FFFF000), (0x80000024, 0x80000000))
    for riff, size in unknown:
        piped = wav[:4] + struct.pack("<I", riff) + wav[8:40] + struct.pack("<I", size) + wav[44:]
        assert torch.equal(load_audio(piped, RATE), wanted), (riff, size)
    au = sound(tone(3), format="AU")
    assert torch.equal(load_audio(au[:8] + b"\xff" * 4 + au[12:], RATE), wanted)


@pytest.mark.parametrize(
    ("format", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "GSM610"), ("WAV", "MS_ADPCM"), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"),
     ("MP3", None)],
)
def test_a_cut_is_what_the_whole_has_there(monkeypatch, format, subtype):
    monkeypatch.setattr(sound_files, "SEEK_DISTANCE", 2)
    data = sound(np.concatenate([noise(3), tone(3)]), format=format, subtype=subtype)
    whole = read_sound(data, "x")[0]
    for start, seconds in ((0.0, 1.0), (1.5, 1.25), (2.5, 1.0), (3.123, 0.5), (5.5, None)):
        piece, rate = read_sound(data, "x", start, seconds)
        first = round(start * rate)
        assert np.abs(piece - whole[first : first + len(piece)]).max() < 1e-6
        assert len(piece) == (len(whole) - first if seconds is None else seconds * rate)


def test_a_cut_of_a_long_sound_is_read_and_the_whole_is_not():
    samples = np.concatenate([np.zeros(1_000 * 700), tone(5, 100, 1_000)])
    long = sound(samples, 1_000, format="FLAC")
    refused(long, "705 seconds", "at most 600")
    audio = load_audio(long, 1_000, start=700, seconds=5)
    assert len(audio) == 5_000 and audio.abs().max() == pytest.approx(0.7)
    with pytest.raises(InputError, match="x: 601 seconds"):
        load_audio(long, 1_000, "x", start=50, seconds=601)


@pytest.mark.parametrize("format", ["WAV", "FLAC", "MP3"])
def test_a_cut_from_the_beginning_of_a_long_sound(format):
    """As the first row of a NeMo manifest of a long recording: offset 0, duration 5."""
    long = sound(np.concatenate([tone(5, 500, 8_000), np.zeros(8_000 * 700)]), 8_000, format=format)
    assert len(load_audio(long, 8_000, start=0, seconds=5)) == 5 * 8_000
    refused(long, "at most 600")


def test_a_cut_from_the_beginning_of_a_long_m4a():
    long = ffmpeg_sound(np.concatenate([tone(2), np.zeros(RATE * 700)]), RATE, "mp4", "aac")
    assert len(load_audio(long, RATE, start=0, seconds=2)) == 2 * RATE
    refused(long, "702 seconds", "at most 600")


def test_cuts_of_files_and_arrays_agree_and_ends_are_clipped():
    samples = tone(3).astype(np.float32)
    stereo = np.stack([samples, samples / 2], 1)
    for data in (sound(stereo, subtype="FLOAT"), stereo, torch.from_numpy(stereo).T):
        read = lambda start, seconds: load_audio(data, RATE, "x.snd", start=start, seconds=seconds)
        wanted = torch.from_numpy(samples[RATE : 2 * RATE])
        assert torch.allclose(read(1, 1), wanted * (0.7 / wanted.abs().max()), atol=1e-5)
        assert len(read(1, 2.2)) == len(read(1, None)) == 2 * RATE  # what a manifest rounds is clipped
        with pytest.raises(InputError, match="x.snd: no samples in it"):
            read(1, 1e-6)
        for start, seconds in ((1, 2.3), (3, None), (3, 0.01), (100, 1)):
            with pytest.raises(InputError, match=r"x.snd: found a sound of 3\.000 s, expected one that holds the segment from .* s to"):
                read(start, seconds)
        for start, seconds in ((-1, 1), (float("nan"), 1), (0, 0), (0, -1),
                               (0, float("nan")), (float("inf"), 1),
                               (0, float("inf")), (86_401, 1)):
            with pytest.raises(InputError, match="x.snd: found start="):
                read(start, seconds)
    assert len(load_audio(samples, 8_000, source_rate=RATE, start=0.5, seconds=1)) == 8_000


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_a_manifest_may_count_the_padding_of_an_mp3(rate):
    """As programs do that read the headers of frames: up to 0.17 s more than there is to hear."""
    whole = sound(tone(2, 440, rate), rate, format="MP3")
    counted = mpeg_sound(whole, "x").samples / rate
    assert counted > 2.03 and len(load_audio(whole, rate, start=0, seconds=counted)) == 2 * rate


@pytest.mark.parametrize("samples", [tone(3), np.zeros(1), tone(3)[:70_000]])
def test_flac_with_the_tag_of_mp3(samples):
    """ID3v1, which some taggers append to any file."""
    plain = sound(samples, format="FLAC")
    assert torch.equal(load_audio(plain + b"TAG".ljust(128, b"x"), RATE), load_audio(plain, RATE))
    refused(plain + b"TAG", "damaged or cut short")


# Pictures.


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_format_has_its_pixels(name):
    image = load_image(PICTURES[name]).permute(1, 2, 0).float()  # (H, W, C)
    if name == "BMP of runs":
        assert image[:, 0, 0].tolist() == [7, 6, 5, 4, 3, 2, 1, 0] and image[0, 7].tolist() == [248] * 3
        return
    rgba = torch.from_numpy(np.array(seed_picture())).float()
    wanted, alpha = rgba[..., :3], rgba[..., 3:] / 255
    if name in ("PNG", "WEBP, lossless"):
        wanted = (wanted * alpha + 255 * (1 - alpha)).round()
    if name in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
        wanted = wanted.rot90(-1)  # as EXIF says
    if name == "PNG of 16 bit":
        wanted = torch.from_numpy(np.array(seed_picture().convert("RGB").convert("L").convert("RGB"))).float()
    if name == "GIF":
        wanted = torch.from_numpy(np.array(seed_picture().convert("RGB").quantize(16).convert("RGB"))).float()
    assert image.shape == wanted.shape
    if name in ("PNG with a palette", "TIFF group4"):  # of sixteen colours, one of them transparent; of two
        assert torch.cosine_similarity(image.flatten(), wanted.flatten(), 0) > 0.7
        return
    lossless = (name in ("PNG", "PNG of 16 bit", "WEBP, lossless", "BMP", "GIF")
                or name.startswith("TIFF") and "jpeg" not in name)
    difference = (image - wanted).abs()
    assert difference.max() <= (1 if lossless else 100) and difference.mean() < (0.1 if lossless else 16)


@pytest.mark.parametrize("format", ["HEIC", "AVIF"])
def test_pictures_of_phones(format):
    import pillow_heif

    def made(picture, **options):
        file = io.BytesIO()
        if format == "HEIC":
            pillow_heif.from_pillow(picture).save(file, quality=95, **options)
        else:
            picture.save(file, "AVIF", quality=95, **options)
        return file.getvalue()

    upright = Image.new("RGB", (32, 64), (255, 0, 0))
    upright.paste((0, 255, 0), (0, 0, 16, 16))
    turns = Image.Transpose
    for orientation, turn in {1: None, 3: turns.ROTATE_180, 6: turns.ROTATE_90, 8: turns.ROTATE_270}.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = made(upright.transpose(turn) if turn is not None else upright, exif=exif.tobytes())
        image = load_image(data).float()
        assert image.shape == (3, 64, 32)
        assert (image[:, 4, 4] - torch.tensor([0.0, 255, 0])).abs().max() < 16
        assert (image[:, 60, 28] - torch.tensor([255.0, 0, 0])).abs().max() < 16
    assert load_image(made(Image.new("RGBA", (16, 16), (0, 0, 0, 0))))[:, 8, 8].tolist() == [255, 255, 255]
    data = made(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
    for kept in (len(data) // 2, len(data) - 10, 40):
        refused(data[:kept], "not a whole picture", read=load_image)


def test_formats_that_are_not_opened():
    picture = Image.new("RGB", (8, 8))
    for format in ("PPM", "PCX", "TGA", "SGI", "EPS", "JPEG2000", "ICO", "PDF"):
        file = io.BytesIO()
        picture.save(file, format)
        refused(file.getvalue(), "expected PNG, JPEG", read=load_image)
    for format in ("VOC", "SVX", "PVF", "IRCAM", "MAT4", "AVR"):
        refused(sound(tone(0.1), format=format), "expected WAV, FLAC")


def test_reading_prints_nothing(tmp_path):
    """Decoders write to the standard error of their own accord: also to that of a service."""
    for name, data in {**PICTURES, **SOUNDS, "joined": mp3(tone(1)) + mp3(tone(1))}.items():
        (tmp_path / name).write_bytes(data)
    code = """
import sys
from pathlib import Path
from mmtx.data.media import load_audio, load_image
from mmtx.data.sample import sniff
for path in sorted(Path(sys.argv[1]).iterdir()):
    load_image(path) if sniff(path.read_bytes()) == "image" else load_audio(path, 16_000)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
