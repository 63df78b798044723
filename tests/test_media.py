"""Pictures and sounds of every kind load to one form; every bad input is one InputError that names it."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageCms

from mmtx import report
from mmtx.data import media, sound_files, storage
from mmtx.data.media import load_audio, load_image
from mmtx.data.sample import kind_of, sniff
from mmtx.data.sound_files import MAX_SECONDS
from mmtx.data.sources import read
from mmtx.data.tokens import load_sample
from mmtx.errors import InputError

STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def encode(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height):
    """A PNG of this size by its header, without any pixels."""

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def pixel(image, row=0, column=0):
    return tuple(image[:, row, column].tolist())


# Pictures.


def test_image_from_bytes_path_and_objects(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)  # (H, W, C)
    wanted = torch.from_numpy(array).permute(2, 0, 1)
    picture = Image.fromarray(array)
    path = tmp_path / "x.png"
    path.write_bytes(encode(picture))
    floats = array / 255.0
    tensor_floats = (wanted / 255).requires_grad_()
    encoded = path.read_bytes()
    for data in (path, str(path), f"file://{path}", "~/x.png", encoded, bytearray(encoded), picture, array):
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


def exif_of(*entries, order="<"):
    """EXIF of one directory; entries are (tag, type, count, four bytes of value or offset)."""
    head = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
    return head + b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)


def with_exif(format, exif):
    """A picture of 16 x 32 pixels with these bytes as its EXIF, as they are."""
    picture = Image.new("RGB", (16, 32), RED)
    if format == "JPEG":
        data = encode(picture, "JPEG")
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif + data[2:]
    if format == "PNG":
        data = encode(picture)
        return data[:33] + chunk(b"eXIf", exif) + data[33:]
    return encode(picture, "WEBP", exif=exif, lossless=True)


TURNED = (0x0112, 3, 1, b"\6\0\0\0")
ODD_ENTRIES = {
    "none": (),
    "rational -1/0": ((0x011A, 10, 1, struct.pack("<I", 38)),),
    "rational 0/0": ((0x011A, 5, 1, struct.pack("<I", 50)),),
    "beyond the end": ((0x010F, 2, 100_000, struct.pack("<I", 60_000)),),
    "of unknown type": ((0x010F, 99, 1, bytes(4)),),
    "bytes that are no text": ((0x010F, 2, 4, b"\xff\xfe\xff\xfe"),),
    "a directory in itself": ((0x8769, 4, 1, struct.pack("<I", 8)),),
    "a directory beyond the end": ((0x8825, 4, 1, struct.pack("<I", 2**31)),),
    "a directory that is a text": ((0x8769, 2, 4, b"abc\0"),),
    "many times the same": ((0x010F, 7, 60_000, struct.pack("<I", 0)),) * 900,
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", ODD_ENTRIES)
@pytest.mark.filterwarnings("error")
def test_odd_exif_neither_refuses_a_picture_nor_hides_its_orientation(format, name):
    image = load_image(with_exif(format, exif_of(TURNED, *ODD_ENTRIES[name]) + struct.pack("<iiii", -1, 0, 0, 0)))
    assert image.shape == (3, 16, 32)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_orientations_that_are_none_leave_the_picture_as_it_is(format):
    none = [exif_of((0x0112, *entry)) for entry in ((3, 1, bytes(4)), (3, 1, b"\x09\0\0\0"), (2, 4, b"6\0\0\0"))]
    cut_short = exif_of((0x0112, 3, 1, b"\6\0\0\0"))[:-12]
    for exif in (*none, cut_short, b"II*\0\xff\xff\xff\xff", b"II*\0", b"MM", b"nonsense", bytes(50)):
        assert load_image(with_exif(format, exif)).shape == (3, 32, 16), exif
    big_endian = exif_of((0x0112, 3, 1, b"\0\6\0\0"), order=">")
    assert load_image(with_exif(format, big_endian)).shape == (3, 16, 32)
    assert load_image(with_exif(format, exif_of((0x0112, 4, 1, b"\6\0\0\0")))).shape == (3, 16, 32)


def test_orientation_in_other_places():
    upright, exif = Image.new("RGB", (16, 32), RED), Image.Exif()
    exif[0x0112] = 6
    profile = b"\nexif\n%8d\n" % len(exif.tobytes()) + exif.tobytes().hex().encode() + b"\n"  # as ImageMagick writes it
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    plain = encode(upright)
    for added in (chunk(b"tEXt", b"Raw profile type exif\0" + profile),
                  chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
                  chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
                  chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp))):
        assert load_image(plain[:33] + added + plain[33:]).shape == (3, 16, 32)
    jpeg = encode(upright, "JPEG", xmp=xmp)
    assert load_image(jpeg).shape == (3, 16, 32)
    assert load_image(encode(upright, "WEBP", xmp=xmp)).shape == (3, 16, 32)
    for compression in ("raw", "tiff_lzw", "jpeg"):
        for big in (False, True):
            data = encode(upright, "TIFF", compression=compression, exif=exif, big_tiff=big)
            assert load_image(data).shape == (3, 16, 32)
    odd = exif_of(TURNED, *ODD_ENTRIES["rational -1/0"]) + struct.pack("<ii", -1, 0)
    assert load_image(Image.open(io.BytesIO(with_exif("JPEG", odd)))).shape == (3, 16, 32)
    upright.getexif()[0x0112] = 6
    assert load_image(upright).shape == (3, 16, 32)


def test_an_avif_with_odd_exif_is_read_upright():
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.5
    data = encode(Image.new("RGB", (16, 32), RED), "AVIF", exif=exif)
    entry, value = struct.pack(">HHI", 0x011A, 5, 1), struct.pack(">II", 145, 2)
    assert data.count(entry) == data.count(value) == 1
    data = data.replace(entry, struct.pack(">HHI", 0x011A, 10, 1)).replace(value, struct.pack(">ii", -1, 0))
    assert load_image(data).shape == (3, 16, 32)


def test_a_tiff_with_odd_exif_is_read_upright():
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72
    data = bytearray(encode(Image.new("RGB", (16, 32), RED), "TIFF", exif=exif))
    at = data.index(struct.pack("<HHI", 0x011A, 5, 1))
    data[at : at + 8] = struct.pack("<HHI", 0x8769, 4, 1)  # a directory in its place
    for offset in (2**31, 8, len(data) - 3):
        data[at + 8 : at + 12] = struct.pack("<I", offset)
        assert load_image(bytes(data)).shape == (3, 16, 32)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_transparency_lies_on_white(mode):
    if mode in ("P", "RGB", "L"):  # one colour is the transparent one
        picture = Image.new(mode, (4, 4), 0)
        options = {"transparency": (0, 0, 0) if mode == "RGB" else 0}
        assert pixel(load_image(encode(picture, **options))) == WHITE
    else:
        picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
        assert pixel(load_image(picture)) == WHITE


def png_of(depth, colour, row, *chunks, transparent=None):
    """A PNG of one row by its packed samples; the colour that is transparent by its samples."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", len(row) * 8 // (depth * channels), 1, depth, colour, 0, 0, 0)
    chunks = [*chunks, *([chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))] if transparent else [])]
    body = chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_white_at_every_depth(depth):
    most = 2**depth - 1
    for grey in {0, 1, most // 2, most}:
        row = bytes([grey >> 8, grey & 255]) if depth == 16 else bytes([sum(grey << i for i in range(0, 8, depth))])
        shown = round(grey * 255 / most)
        assert pixel(load_image(png_of(depth, 0, row))) == (shown,) * 3
        assert pixel(load_image(png_of(depth, 0, row, transparent=[grey]))) == WHITE
        other = grey - 1 if grey else 1
        assert pixel(load_image(png_of(depth, 0, row, transparent=[other]))) == (shown,) * 3


def test_transparent_colours_of_8_and_16_bit():
    assert pixel(load_image(png_of(8, 2, b"\x12\x34\x56"))) == (0x12, 0x34, 0x56)
    assert pixel(load_image(png_of(8, 2, b"\x12\x34\x56", transparent=[0x12, 0x34, 0x56]))) == WHITE
    assert pixel(load_image(png_of(16, 2, b"\x12\x34\x56\x78\x9a\xbc"))) == (0x12, 0x56, 0x9A)
    assert pixel(load_image(png_of(16, 2, b"\x12\x34\x56\x78\x9a\xbc", transparent=[0x1234, 0x5678, 0x9ABC]))) == WHITE
    assert pixel(load_image(png_of(16, 2, b"\x12\x34\x56\x78\x9a\xbc", transparent=[0x1234, 0x5678, 0xFABC]))) != WHITE
    assert pixel(load_image(png_of(16, 4, b"\x12\x34\0\0"))) == WHITE
    assert pixel(load_image(png_of(16, 6, b"\x12\x34" * 3 + b"\xff\xff"))) == (0x12,) * 3
    palette = chunk(b"PLTE", bytes(RED + GREEN)) + chunk(b"tRNS", b"\0\x33")
    image = load_image(png_of(8, 3, b"\0\1", palette))
    assert pixel(image) == WHITE and pixel(image, 0, 1) == (204, 255, 204)


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


def test_32_bit_grey_holds_8_bits_or_16():
    """PIL's mode "I", which `Image.fromarray` makes of int32 and `convert("I")` of 8 bits, was taken for 16: nearly black."""
    values = np.array([[0, 1, 128, 255]], np.uint8)
    grey = Image.fromarray(values).convert("I")
    for picture in (grey, encode(grey, "TIFF"), Image.fromarray(values.astype(np.int32))):
        assert load_image(picture)[0, 0].tolist() == [0, 1, 128, 255]
    grey.info["transparency"] = 1
    assert load_image(grey)[0, 0].tolist() == [0, 255, 128, 255]
    with Image.open(io.BytesIO(b"P5 4 1 65535 " + np.array([0, 1, 128, 255], ">u2").tobytes())) as dark:
        assert dark.mode == "I" and load_image(dark)[0, 0].tolist() == [0, 0, 0, 1]


def test_other_modes():
    assert pixel(load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))) == RED
    near = torch.tensor(pixel(load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))))
    assert (near - torch.tensor(RED)).abs().max() < 4
    assert pixel(load_image(encode(Image.new("RGB", (4, 4), RED).convert("P")))) == RED
    assert pixel(load_image(encode(Image.new("1", (4, 4), 1)))) == WHITE
    assert pixel(load_image(encode(Image.new("L", (4, 4), 9)))) == (9, 9, 9)
    assert pixel(load_image(Image.fromarray(np.full((4, 4), 0.2, np.float32)))) == (51, 51, 51)
    assert pixel(load_image(Image.new("HSV", (4, 4), (0, 255, 255)))) == RED
    assert pixel(load_image(Image.new("YCbCr", (4, 4), (9, 128, 128)))) == (9, 9, 9)
    assert pixel(load_image(Image.new("La", (4, 4), (51, 128)))) == (178, 178, 178)  # 51 + 255 - 128
    assert pixel(load_image(Image.new("RGBa", (4, 4), (51, 0, 0, 128)))) == (178, 127, 127)
    srgb, lab = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    picture = ImageCms.profileToProfile(Image.new("RGB", (4, 4), (200, 30, 40)), srgb, lab, outputMode="LAB")
    for data in (picture, encode(picture, "TIFF")):
        assert (load_image(data)[:, 0, 0] - torch.tensor([200, 30, 40])).abs().max() <= 3
    values = np.array([[0, 257, 128 * 257, 65_535]], np.uint16)
    big = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    for data in (big, encode(big, "TIFF")):
        assert load_image(data)[0, 0].tolist() == [0, 1, 128, 255]
    assert pixel(load_image(encode(Image.fromarray(np.full((4, 4), 0.2, np.float32)), "TIFF"))) == (51, 51, 51)


def tiff(bits, photometric, data, side):
    """A little-endian grey TIFF without compression."""
    tags = {256: side, 257: side, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: side, 279: len(data)}
    return b"II*\0\x08\0\0\0\x09\0" + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()) + bytes(4) + data


def test_grey_tiffs_of_more_than_8_bits():
    """Pillow takes 12 bits for the lower ones of 16, which are nearly black, and 16 bits with 0 for white for a negative."""
    values = np.linspace(0, 4_095, 64).astype(np.uint16).reshape(8, 8)
    first, second = values.reshape(-1, 2).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    wide = values << 4 | values >> 8
    expected = torch.from_numpy((wide >> 8).astype(np.uint8)).expand(3, -1, -1)
    for data in (tiff(12, 1, packed, 8), tiff(16, 1, wide.tobytes(), 8), tiff(16, 0, (65_535 - wide).tobytes(), 8)):
        for given in (data, Image.open(io.BytesIO(data))):
            assert (load_image(given).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_several_pictures_the_first_is_taken(format):
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, GREEN)]
    image = load_image(encode(frames[0], format, save_all=True, append_images=frames[1:]))
    assert image.shape == (3, 16, 16) and (image[:, 8, 8] - torch.tensor(RED)).abs().max() <= 1
    if format == "GIF":  # a frame smaller than the canvas, whose rest has the background's colour
        data = bytearray(encode(frames[0], "GIF"))
        data[6:10] = struct.pack("<HH", 24, 20)
        assert load_image(bytes(data)).shape == (3, 20, 24) and pixel(load_image(bytes(data)), 15, 15) == RED


def test_inks_stored_inverted_as_adobe_does():
    inverted = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert b"Adobe" in inverted and (load_image(inverted)[:, 8, 8] - torch.tensor(RED)).abs().max() <= 3


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
        (torch.zeros(5, 4, 3), "(5, 4, 3), expected (H, W) or (1|3|4, H, W) (permute(2, 0, 1)?)"),
        (np.zeros((3, 5, 6), np.uint8), "(3, 5, 6), expected (H, W) or (H, W, 1|3|4) (transpose(1, 2, 0)?)"),
        (np.zeros((2, 5, 4, 3), np.uint8), "(2, 5, 4, 3), expected (H, W) or (H, W, 1|3|4) (a list of pictures?)"),
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


def progressive(picture, scans):
    """A progressive JPEG whose last scan is there again and again."""
    data = encode(picture, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + b"\xff\xd9"


def test_a_jpeg_of_many_scans_is_refused_before_decoding():
    small, large = Image.new("L", (64, 64)), Image.new("L", (4_000, 2_000))
    assert load_image(progressive(small, 100)).shape == (3, 64, 64)
    for data in (progressive(small, 501), progressive(large, 161)):
        with pytest.raises(InputError, match="x.jpg: a JPEG of (501|161) scans"):
            load_image(data, "x.jpg")
    thumbnail = progressive(small, 400)  # in the metadata, which are not decoded
    data = encode(large, "JPEG")
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + data[2:] + thumbnail
    assert load_image(data).shape == (3, 2_000, 4_000)


def gif_with(blocks):
    """A GIF with these bytes before its frame."""
    data = encode(Image.new("RGB", (4, 4), RED), "GIF")
    at = data.index(b",", 13)
    return data[:at] + blocks + data[at:]


def test_metadata_without_a_bound_is_passed_over():
    bomb = zlib.compress(bytes(80_000_000))
    plain = encode(Image.new("RGB", (4, 4), RED))
    for added in (chunk(b"zTXt", b"a\0\0" + bomb), chunk(b"iCCP", b"a\0\0" + bomb), chunk(b"eXIf", bytes(1_000_000)),
                  chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb),
                  chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb)):
        assert pixel(load_image(plain[:33] + added + plain[33:])) == RED
    for kind in (b"\xfe", b"\xff"):  # 10 MB, which Pillow adds up block by block
        assert pixel(load_image(gif_with(b"!" + kind + (b"\xff" + b"x" * 255) * 40_000 + b"\0"))) == RED


def tiff_with(tag, *entry):
    """A TIFF in which this field stands in place of the one with that tag."""
    data = bytearray(entry[4] if len(entry) > 4 else encode(Image.new("L", (4, 4)), "TIFF"))
    start = int.from_bytes(data[4:8], "little")
    for place in range(start + 2, start + 2 + 12 * int.from_bytes(data[start : start + 2], "little"), 12):
        if data[place : place + 2] == struct.pack("<H", tag):
            data[place : place + 12] = struct.pack("<HHII", *entry[:4])
            return bytes(data)
    raise AssertionError


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png_of(8, 0, b"\0", *[chunk(b"tEXt", b"")] * 2**18), "chunks"),
        (b"\xff\xd8" + b"\xff\xfe\0\2" * 2**18 + encode(Image.new("L", (4, 4)), "JPEG")[2:], "segments"),
        (gif_with(b"!\xf9\0" * (2**18 + 1)), "GIF of more"),
        (tiff_with(0x0111, 0x0111, 4, 10**6, 8), "strips"),
        (tiff_with(0x0116, 0x0142, 4, 1, 60_000, tiff_with(0x0117, 0x0143, 4, 1, 60_000)), "60000 x 60000"),
        (b"BM" + bytes(28) + b"\1\0\0\0" + bytes(9_000_000), "run-length"),
        (png(70_000, 10), "at most 65535 a side"),
    ],
    ids=["chunks", "segments", "blocks", "strips", "tiles", "runs", "side"],
)
def test_parts_without_a_bound_are_refused(data, words):
    with pytest.raises(InputError) as caught:
        load_image(data, "x")
    assert words in str(caught.value) and len(str(caught.value)) < 300


def test_names_and_reasons_are_one_short_line():
    for name in ("a\nb\x1b[31m.png", "x" * 5_000, "caf\udce9.png", "\u202egnp.exe"):
        for read, data in ((load_image, b"nothing"), (lambda data, name: load_audio(data, 16_000, name), b"nothing")):
            with pytest.raises(InputError) as caught:
                read(data, name)
            assert str(caught.value).isprintable() and len(str(caught.value)) <= 300
            str(caught.value).encode()


def test_what_is_no_damage_is_not_told_as_such(monkeypatch):
    for error in (MemoryError, KeyboardInterrupt):
        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(Image.Image, "load", fail)
        with pytest.raises(error):
            load_image(Image.new("RGB", (4, 4)))
    monkeypatch.undo()
    monkeypatch.setattr(media, "_rgb", lambda *_: 1 / 0)  # a fault of ours
    with pytest.raises(ZeroDivisionError):
        load_image(encode(Image.new("RGB", (4, 4))))


def test_a_closed_picture_is_refused():
    for picture in (Image.new("RGB", (4, 4)), Image.open(io.BytesIO(encode(Image.new("RGB", (4, 4)))))):
        picture.close()
        with pytest.raises(InputError, match="image: not a whole picture .*closed"):
            load_image(picture)


# Arrays and tensors.


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_tensors_of_every_sort_that_has_values():
    values = torch.linspace(0, 1, 24).reshape(2, 12)
    wanted = (values * 255).round()
    for data in (values.half(), values.bfloat16(), values.double(), values.T.contiguous().T, torch._neg_view(-values),
                 values.requires_grad_()):
        assert (load_image(data)[0] - wanted).abs().max() <= 1
    array = values.detach().numpy()
    for data in (array.astype(">f4"), array.astype(">f8"), array.astype(np.longdouble), np.flipud(np.flipud(array)),
                 np.ma.masked_array(array), np.matrix(array)):
        assert torch.equal(load_image(data)[0], wanted.to(torch.uint8))
    wave16 = (wave() * 32_767).astype(np.int16)
    negative = torch._neg_view(torch.from_numpy(-wave()))
    for data in (wave16.astype(">i2"), torch.from_numpy(wave16), wave().astype(">f4"), negative):
        assert torch.allclose(load_audio(data, 16_000), torch.from_numpy(wave(peak=0.7)), atol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.rand(4, 4).to_sparse(), "a sparse tensor of torch.float32"),
        (torch.rand(4, 4).to_sparse_csr(), "a sparse tensor"),
        (torch.empty(4, 4, device="meta"), "a meta tensor"),
        (torch.quantize_per_tensor(torch.rand(4, 4), 0.1, 0, torch.quint8), "a quantized tensor"),
        (torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]), "a nested tensor"),
        (torch.rand(4, 4, dtype=torch.complex64).conj(), "a tensor of torch.complex64"),
        (torch.rand(4, 4).to(torch.float8_e4m3fn), "a tensor of torch.float8_e4m3fn"),
        (np.ma.masked_array(np.zeros((4, 4)), mask=np.eye(4)), "masked values"),
        (np.zeros((4, 4), object), "of object"),
        (np.zeros((4, 4), "U1"), "of <U1"),
        (np.zeros((4, 4), [("a", "f4")]), "expected"),
        (np.zeros((), np.float32), "()"),
        (torch.tensor(1.0), "()"),
    ],
)
def test_arrays_without_plain_values_are_refused(data, words):
    for read in (load_image, lambda data, name: load_audio(data, 16_000, name)):
        with pytest.raises(InputError) as caught:
            read(data, "row 3")
        assert str(caught.value).startswith("row 3: ") and words in str(caught.value)
        assert str(caught.value).isprintable()


def test_ranges_that_are_easily_mixed_up_are_told():
    with pytest.raises(InputError, match=r"values from 0 to 255, expected floats from 0 to 1 \(divide by 255\?\)"):
        load_image(np.array([[0.0, 255.0]]))
    with pytest.raises(InputError, match=r"of uint16, expected uint8 or floats in \[0, 1\] \(divide by 65535\?\)"):
        load_image(np.zeros((4, 4), np.uint16))
    with pytest.raises(InputError, match="9000 x 9000 pixels"):
        load_image(np.broadcast_to(np.uint8(0), (9_000, 9_000)))


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
        (np.zeros((2, 16_000), np.float32), "(2, 16000), expected (S,) or (S, C) (its transpose, .T?)"),
        (torch.zeros(16_000, 2), "(16000, 2), expected (S,) or (C, S) (its transpose, .T?)"),
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
    for option in ("source_rate", "start", "seconds"):
        with pytest.raises(InputError, match=f"sound: {option} '16000', expected a number"):
            load_audio(wave(), 16_000, **{option: "16000"})
    assert len(load_audio(wave(), 16_000, source_rate=np.int64(16_000), start=np.float32(0.5))) == 8_000
    for rate in ("x", 0, -1, 16_000.5, float("nan")):
        with pytest.raises(InputError, match=rf"sound: rate {rate!r}, expected a whole number of Hz"):
            load_audio(wave(), rate)
    for rate in (0, -1, 10**9, float("nan")):
        with pytest.raises(InputError, match=f"{rate} Hz"):
            load_audio(wave(), 16_000, source_rate=rate)
    with pytest.raises(InputError, match="gone.wav: no such file"):
        load_audio(tmp_path / "gone.wav", 16_000)


ODD = {  # of which all bytes must be seen
    "a WAV without its length": lambda data: data[:40] + b"\xff" * 4 + data[44:], "with zeros for it": lambda data: data[:40] + bytes(4) + data[44:],
    "cut short": lambda data: data[:-5_000], "two in one": lambda data: data * 2, "an ID3 tag": lambda data: b"ID3\4\0\0\0\0\0\0" + data,
    "a chunk behind the samples": lambda data: data + b"LIST\4\0\0\0abcd",
}


@pytest.mark.parametrize("make", [
    lambda data: sound(data, 16_000), lambda data: sound(data, 16_000, subtype="PCM_24"), lambda data: sound(data, 16_000, subtype="FLOAT"),
    lambda data: sound(data, 16_000, format="FLAC"), lambda data: sound(data, 16_000, format="OGG"),
    *(lambda data, odd=odd: odd(sound(data, 16_000)) for odd in ODD.values()),
    lambda data: sound(data, 16_000, format="FLAC") + b"TAG" + bytes(125), lambda data: sound(data, 16_000, format="RF64"),
], ids=["WAV", "24 bits", "floats", "FLAC", "OGG", *ODD, "FLAC with a tag", "RF64"])
def test_a_cut_of_a_file_is_that_of_its_bytes(tmp_path, make):
    noise = np.random.default_rng(0).normal(0, 0.1, (16_000 * 40, 2))
    data = make(noise)
    (tmp_path / "x").write_bytes(data)

    def cut(what, start, seconds):
        try:
            return load_audio(what, 8_000, "x", start=start, seconds=seconds)
        except InputError as error:
            return str(error)

    for place in ((0, 0.5), (1.25, 0.5), (35.3, 1.1), (39, None), (39.5, 1), (45, 1)):
        of_file, of_bytes = cut(tmp_path / "x", *place), cut(data, *place)
        assert type(of_file) is type(of_bytes)
        assert of_file == of_bytes if isinstance(of_file, str) else torch.equal(of_file, of_bytes)


@pytest.mark.parametrize("name", ["x.wav", "x.flac"])
def test_of_a_long_recording_only_the_cut_is_read(tmp_path, tokenizers, monkeypatch, name):
    """Recordings may be longer and larger than a medium that is read as a whole."""
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000 * 20)
    (tmp_path / name).write_bytes(sound(np.tile(noise, 40), 16_000, format=name[2:].upper()))
    monkeypatch.setattr(storage, "MAX_BYTES", 1_000_000)
    rows = [{"audio": name, "text": "a", "offset": start, "duration": 1} for start in (0, 700.5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = read(str(tmp_path / "rows.jsonl"))
    cuts = [load_sample(one, tokenizers)[0] for one in samples]
    assert torch.allclose(cuts[1], load_audio(noise[8_000:24_000], 16_000), atol=1e-3) and len(cuts[0]) == 16_000
    assert report._features(samples[0], "audio").keys() == report.MELS.keys()  # of a control of `mmtx evaluate`
    for start in (799.5, 900):
        with pytest.raises(InputError, match=f"found a sound of 800.000 s, expected one that holds the segment from {start:g} s"):
            load_audio(tmp_path / name, 16_000, start=start, seconds=1)
    with pytest.raises(InputError, match="more than 1000000 bytes"):
        load_audio(tmp_path / name, 16_000)


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


@pytest.mark.parametrize("pixels", [1, 50, 7 * 40, 10**6])
def test_a_picture_that_is_read_in_bands_is_the_whole(pixels, monkeypatch):
    monkeypatch.setattr("mmtx.data.media.BAND", pixels)
    truth = np.random.default_rng(0).integers(0, 256, (33, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(truth).save(file, "PNG")
    assert np.array_equal(load_image(file.getvalue()).permute(1, 2, 0), truth)
