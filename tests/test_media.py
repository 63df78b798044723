"""Pictures and sounds of every kind load to one form; every bad input is one InputError that names it."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmtx.data import sound_files
from mmtx.data.media import kind_of, load_audio, load_image, sniff
from mmtx.data.sound_files import MAX_SECONDS
from mmtx.data.sources import read
from mmtx.errors import InputError

STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def encode(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def png(width, height):
    """A PNG of this size by its header, without any pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def pixel(image, row=0, column=0):
    return tuple(image[:, row, column].tolist())


# Pictures.


def test_image_from_bytes_path_and_objects(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)  # (H, W, C)
    wanted = torch.from_numpy(array).permute(2, 0, 1)
    picture = Image.fromarray(array)
    path = tmp_path / "x.png"
    path.write_bytes(encode(picture))
    floats = array / 255.0
    tensor_floats = (wanted / 255).requires_grad_()
    encoded = path.read_bytes()
    for data in (path, str(path), f"file://{path}", encoded, bytearray(encoded), picture, array):
        assert torch.equal(load_image(data), wanted)
    for data in (wanted, floats, floats.astype(np.float32), tensor_floats, array[:, ::-1][:, ::-1]):
        assert torch.equal(load_image(data), wanted)
    image = load_image(path)
    assert image.dtype == torch.uint8 and image.shape == (3, 5, 7) and image.is_contiguous()


def test_every_orientation_comes_out_upright():
    upright = Image.new("RGB", (16, 32), RED)
    upright.paste(GREEN, (0, 0, 8, 8))  # top left
    turn = Image.Transpose
    stored_as = {  # EXIF orientation -> how such a camera stores the upright picture
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    for orientation in range(1, 9):
        stored = upright if orientation == 1 else upright.transpose(stored_as[orientation])
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = load_image(encode(stored, exif=exif))
        assert image.shape == (3, 32, 16)
        assert pixel(image, 2, 2) == GREEN and pixel(image, 2, 13) == pixel(image, 29, 2) == RED


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_transparency_lies_on_white(mode):
    if mode in ("P", "RGB", "L"):  # one colour is the transparent one
        picture = Image.new(mode, (4, 4), 0)
        options = {"transparency": (0, 0, 0) if mode == "RGB" else 0}
        assert pixel(load_image(encode(picture, **options))) == WHITE
    else:
        picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
        assert pixel(load_image(picture)) == WHITE


def test_half_transparency_is_blended():
    array = np.full((2, 2, 4), (255, 0, 0, 51), np.uint8)
    for data in (array, encode(Image.fromarray(array)), torch.from_numpy(array).permute(2, 0, 1)):
        assert pixel(load_image(data)) == (255, 204, 204)


def test_16_bit_is_scaled_not_clipped():
    values = np.array([[0, 257, 128 * 257, 65_535, 300]], np.uint16)
    for format in ("PNG", "TIFF"):
        assert load_image(encode(Image.fromarray(values), format))[0, 0].tolist() == [0, 1, 128, 255, 1]
    assert load_image(Image.fromarray(values.astype(np.int32)))[1, 0].tolist() == [0, 1, 128, 255, 1]
    with pytest.raises(InputError, match="70000.*16 bit"):
        load_image(Image.fromarray(np.array([[70_000]], np.int32)))


def test_other_modes():
    assert pixel(load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))) == RED
    near = torch.tensor(pixel(load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))))
    assert (near - torch.tensor(RED)).abs().max() < 4
    assert pixel(load_image(encode(Image.new("RGB", (4, 4), RED).convert("P")))) == RED
    assert pixel(load_image(encode(Image.new("1", (4, 4), 1)))) == WHITE
    assert pixel(load_image(encode(Image.new("L", (4, 4), 9)))) == (9, 9, 9)
    assert pixel(load_image(Image.fromarray(np.full((4, 4), 0.2, np.float32)))) == (51, 51, 51)
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, GREEN)]
    assert pixel(load_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))) == RED


def test_array_layouts():
    assert load_image(np.zeros((4, 5), np.uint8)).shape == (3, 4, 5)
    assert load_image(np.zeros((4, 5, 1), np.uint8)).shape == (3, 4, 5)
    assert load_image(torch.zeros(4, 5)).shape == (3, 4, 5)
    assert load_image(torch.zeros(1, 4, 5, dtype=torch.bfloat16)).shape == (3, 4, 5)
    assert load_image(torch.zeros(3, 4, 3)).shape == (3, 4, 3)
    assert pixel(load_image(np.full((4, 5), 0.5))) == (128, 128, 128)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros((3, 4, 5), np.uint8), "(3, 4, 5), expected (H, W)"),
        (torch.zeros(5, 4, 3), "(5, 4, 3), expected (H, W) or (1|3|4, H, W)"),
        (np.zeros((1, 4, 5, 3), np.uint8), "(1, 4, 5, 3)"),
        (np.zeros(4, np.uint8), "(4,)"),
        (np.zeros((0, 5, 3), np.uint8), "(0, 5, 3)"),
        (np.full((4, 5), 255.0), "255"),
        (np.full((4, 5), -0.1), "-0.1"),
        (np.full((4, 5), np.nan), "nan"),
        (np.zeros((4, 5), np.int64), "int64"),
        (np.zeros((4, 5), bool), "bool"),
        (torch.zeros(4, 5, dtype=torch.int16), "int16"),
        (np.zeros((4, 5), complex), "complex128"),
        (Image.new("RGB", (0, 3)), "0 x 3 pixels"),
        (None, "NoneType"),
        (5, "int"),
    ],
)
def test_bad_image_objects(data, words):
    with pytest.raises(InputError) as caught:
        load_image(data, "row 3")
    assert str(caught.value).startswith("row 3: ") and words in str(caught.value)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_bad_image_files(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        whole = encode(noise, format)
        for cut in (len(whole) // 2, 40, 10):
            with pytest.raises(InputError, match="x.img: not a whole picture"):
                load_image(whole[:cut], "x.img")
    damaged = bytearray(encode(noise))
    damaged[200] ^= 255
    unwanted = encode(noise, "PPM")  # whole, but of a format whose decoder we do not open to the world
    for data in (bytes(damaged), unwanted, b"<svg/>", b"\0" * 100):
        with pytest.raises(InputError, match="x.img: not a whole picture"):
            load_image(data, "x.img")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match="empty.png: the file is empty"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(InputError, match="gone.png: no such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(InputError, match="cannot be read"):
        load_image(tmp_path)


@pytest.mark.parametrize("side", [8_001, 13_000, 100_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixels_are_counted_before_decoding(side):
    # There are no pixels to decode: an error about them would mean that decoding was tried.
    with pytest.raises(InputError, match=r"bomb.png: .*pixels"):
        load_image(png(side, side), "bomb.png")
    with pytest.raises(InputError, match="not a whole picture"):
        load_image(png(8_000, 8_000))


# Sounds.


def wave(seconds=1.0, rate=16_000, frequency=440.0, peak=0.5):
    return (peak * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def sound(samples, rate=16_000, format="WAV", **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("format", "subtype"),
    [("WAV", None), ("WAV", "FLOAT"), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)],
)
def test_audio_formats(tmp_path, format, subtype):
    path = tmp_path / "x.snd"
    path.write_bytes(sound(wave(), format=format, subtype=subtype))
    for data in (path, str(path), path.read_bytes(), memoryview(path.read_bytes())):
        audio = load_audio(data, 16_000)
        assert audio.dtype == torch.float32 and audio.shape == (16_000,)
        assert audio.abs().max() == pytest.approx(0.7)
    middle = slice(4_000, 12_000)
    cosine = torch.cosine_similarity(audio[middle], torch.from_numpy(wave()[middle]), dim=0)
    assert cosine > 0.99


def test_long_sounds_are_read_whole():
    samples = wave(10)
    audio = load_audio(sound(samples, subtype="FLOAT"), 16_000)
    assert torch.allclose(audio, torch.from_numpy(samples) * 1.4, atol=1e-5)


@pytest.mark.parametrize("source_rate", [8_000, 22_050, 44_100, 44_101, 48_000, 11_127])
def test_resampling_keeps_the_pitch(source_rate):
    samples = wave(rate=source_rate)
    from_array = load_audio(samples, 16_000, source_rate=source_rate)
    for audio in (from_array, load_audio(sound(samples, source_rate), 16_000)):
        assert abs(len(audio) - 16_000) < 8
        assert audio.abs().max() == pytest.approx(0.7)
        assert torch.fft.rfft(audio, 16_000).abs().argmax() == 440


@pytest.mark.parametrize("loud", [0, 1])
def test_the_louder_channel_is_taken(loud):
    stereo = np.zeros((16_000, 2), np.float32)  # (S, C)
    stereo[:, loud] = wave(peak=0.2)
    stereo[0, 1 - loud] = 0.9  # a click: a higher peak, but not louder
    wanted = torch.from_numpy(wave(peak=0.7))
    for data in (stereo, torch.from_numpy(stereo).T, sound(stereo, subtype="FLOAT")):
        assert torch.allclose(load_audio(data, 16_000), wanted, atol=1e-5)


def test_array_types():
    wanted = torch.from_numpy(wave(peak=0.7))
    for data in (
        wave(),
        wave().astype(np.float64),
        (wave() * 32_767).astype(np.int16),
        (wave().astype(np.float64) * 2**31).astype(np.int32),
        torch.from_numpy(wave()).requires_grad_(),
        wave()[::-1][::-1],
        wave() * 1e20,
    ):
        audio = load_audio(data, 16_000)
        assert not audio.requires_grad and torch.allclose(audio, wanted, atol=1e-3)


def test_silence_stays_silence():
    assert torch.equal(load_audio(np.zeros(100, np.float32), 16_000), torch.zeros(100))
    dither = np.random.default_rng(0).integers(-1, 2, 16_000).astype(np.int16)
    assert load_audio(dither, 16_000).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros((0, 2), np.float32), "no samples"),
        (np.zeros((5, 0), np.float32), "0 channels"),
        (np.array([0.1, np.nan]), "NaN"),
        (torch.tensor([0.1, float("inf")]), "infinite"),
        (np.array([0.1, 1e300]), "infinite"),
        (np.array([[0.1, np.nan], [0.1, 0.0]]), "NaN"),
        (np.zeros((2, 16_000), np.float32), "(2, 16000), expected (S,) or (S, C)"),
        (torch.zeros(16_000, 2), "(16000, 2), expected (S,) or (C, S)"),
        (np.zeros((1, 2, 3)), "(1, 2, 3)"),
        (np.float32(3), "float32"),
        (np.zeros(5, np.uint8), "uint8"),
        (np.zeros(5, complex), "complex128"),
        (np.zeros(MAX_SECONDS * 16_000 + 1, np.int16), "601 seconds"),
        (b"", "empty"),
        (b"not a sound at all", "no sound that can be decoded"),
        (sound(np.zeros(0, np.float32)), "no samples"),
        (sound(np.zeros((10, 9), np.float32)), "9 channels"),
        (sound(np.zeros(10, np.float32), 500), "500 Hz"),
        (sound(np.array([0, np.nan], np.float32), subtype="FLOAT"), "NaN"),
        (sound(wave(), format="FLAC")[:5_000], "cut short"),
        (sound(wave(), format="OGG")[:200], "cut short"),
        (None, "NoneType"),
        ([0.0], "list"),
    ],
)
def test_bad_sounds(data, words):
    with pytest.raises(InputError) as caught:
        load_audio(data, 16_000, "row 3")
    assert str(caught.value).startswith("row 3: ") and words in str(caught.value)


def test_bad_source_rate_and_missing_file(tmp_path):
    for rate in (0, -1, 10**9):
        with pytest.raises(InputError, match=f"{rate} Hz"):
            load_audio(wave(), 16_000, source_rate=rate)
    with pytest.raises(InputError, match="gone.wav: no such file"):
        load_audio(tmp_path / "gone.wav", 16_000)


def test_seconds_are_counted_before_decoding(monkeypatch):
    long = sound(np.zeros(1_000 * (MAX_SECONDS + 1), np.int16), 1_000, format="FLAC")

    def read(*_, **__):
        raise AssertionError("decoding was tried")

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    with pytest.raises(InputError, match="long.flac: 601 seconds"):
        load_audio(long, 16_000, "long.flac")


def test_a_header_that_does_not_know_the_length_does_not_exhaust_memory(monkeypatch):
    data = bytearray(sound(np.zeros(100_000, np.int16), format="FLAC"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # the number of samples: unknown
    monkeypatch.setattr(sound_files, "MAX_SECONDS", 3)
    with pytest.raises(InputError, match="at most 3 seconds"):
        load_audio(bytes(data), 16_000)


# Kinds.


def test_kinds(tmp_path):
    picture = Image.new("RGB", (8, 8))
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        assert sniff(encode(picture, format)) == "image"
    for format in ("WAV", "FLAC", "OGG", "MP3"):
        assert sniff(sound(wave(0.1), format=format)) == "audio"
    assert sniff(b"") is sniff(b"RIFF") is sniff(b"BMW is a car") is None
    assert kind_of("a/b.c/X.JPG") == "image" and kind_of("x.ogg") == "audio"
    assert kind_of("https://host/x.wav?sig=a.png") == "audio"
    assert kind_of("x.txt") is kind_of("png") is None
    assert kind_of("upload", encode(picture)) == "image"


def test_starter_media():
    for sample in read(f"{STARTER}/images-train-004.tar.gz")[:200]:
        medium = sample.turns[0].parts[0]
        assert load_image(medium.source.read(), medium.name).shape == (3, 64, 64)
    for sample in read(f"{STARTER}/sounds-test-unseen-notes.tar.gz")[:50]:
        medium = sample.turns[0].parts[0]
        audio = load_audio(medium.source.read(), 16_000, medium.name)
        assert len(audio) == 24_000 and audio.abs().max() == pytest.approx(0.7)
