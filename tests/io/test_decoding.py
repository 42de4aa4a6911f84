import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, TiffImagePlugin

from ddim_fast.data.images import load_images
from ddim_fast.io.decoding import decode_image, image_suffixes

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)


def png(depth, colour, rows, transparency):
    """A PNG of rows of bytes, with a tRNS chunk."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 8, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    parts = ((b"IHDR", header), (b"tRNS", transparency), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def saved(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def half_transparent(mode, format="PNG", **options):
    """Black, its left half transparent."""
    image = Image.new(mode, (8, 8))
    if mode in ("RGBA", "LA", "RGBa"):
        image.paste((0,) * (len(mode) - 1) + (255,), (4, 0, 8, 8))
    else:
        image.paste(1, (4, 0, 8, 8))
        image.putpalette(bytes(6))
    return saved(image, format, **options)


# Eight pixels a row, of which the first four have the transparent colour and the others differ from it as little as they can.
TRANSPARENT = {
    "RGBA": half_transparent("RGBA"),
    "grey and alpha": half_transparent("LA"),
    "a colour of the palette": half_transparent("P", transparency=0),
    "opacities of the palette": half_transparent("P", transparency=b"\0\xff"),
    "a palette with opacities": half_transparent("RGBA", "TGA"),
    "GIF": half_transparent("P", "GIF", transparency=0),
    "TIFF": half_transparent("RGBA", "TIFF"),
    "WebP": half_transparent("RGBA", "WEBP", lossless=True),
    "1 bit": png(1, 0, [[0b11110000]] * 8, b"\0\1"),
    "2 bits": png(2, 0, [[0b11111111, 0]] * 8, b"\0\3"),
    "4 bits": png(4, 0, [[0x33] * 2 + [0x22] * 2] * 8, b"\0\3"),
    "8 bits": png(8, 0, [[7] * 4 + [8] * 4] * 8, b"\0\7"),
    "16 bits": png(16, 0, [[0, 7] * 4 + [0, 8] * 4] * 8, b"\0\7"),
    "24 bits": png(8, 2, [[1, 2, 3] * 4 + [1, 2, 4] * 4] * 8, b"\0\1\0\2\0\3"),
    "48 bits": png(16, 2, [[0, 1, 0, 2, 0, 3] * 4 + [0, 1, 0, 2, 0, 4] * 4] * 8, b"\0\1\0\2\0\3"),
}


@pytest.mark.parametrize("background,value", [("white", 255), ("black", 0)])
@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_transparent_shows_the_background(kind, background, value):
    image = np.asarray(decode_image("a", TRANSPARENT[kind], background).convert("L").resize((8, 8)))
    assert (image[:, :4] == value).all()
    assert (image[:, 4:] < 40).all()


def test_what_is_half_transparent_is_mixed():
    image = Image.new("RGBA", (4, 4), (200, 100, 0, 51))
    assert decode_image("a", saved(image)).getpixel((0, 0)) == (244, 224, 204)
    assert decode_image("a", saved(image), "black").getpixel((0, 0)) == (40, 20, 0)
    assert decode_image("a", saved(image.convert("LA"))).mode == "L"


@pytest.mark.parametrize("format", ["PNG", "TIFF", "TGA", "WEBP"])
def test_opaque_pictures_are_what_they_were(format, tmp_path):
    pixels = PIXELS.copy()
    pixels[..., 3] = 255
    options = {"lossless": True} if format == "WEBP" else {}
    image = decode_image("a", saved(Image.fromarray(pixels), format, **options))
    np.testing.assert_array_equal(np.asarray(image), pixels[..., :3])


@pytest.mark.parametrize("format", ["PNG", "PPM", "TIFF"])
def test_of_sixteen_bits_the_upper_eight_are_kept(format):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = decode_image("a", saved(Image.fromarray(ramp), format))
    np.testing.assert_array_equal(np.asarray(image), ramp >> 8)


@pytest.mark.parametrize("scale,kind", [(1, np.float32), (700, np.float32), (70_000, np.int32), (-5, np.int32)])
def test_numbers_that_are_no_colours_are_refused(scale, kind):
    data = saved(Image.fromarray((np.linspace(0, 1, 64).reshape(8, 8) * scale).astype(kind)), "TIFF")
    with pytest.raises(ValueError, match=r"a\.tif: not a readable image \(its pixels are 32-bit numbers from .* 8 or 16 bits"):
        decode_image("a.tif", data)


def test_numbers_that_are_colours_are_read():
    image = decode_image("a", saved(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"))
    np.testing.assert_array_equal(np.asarray(image), PIXELS[..., 0])


def photograph(format, **tags):
    """On its side, with an odd tag."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "Camera"
    data = bytearray(exif.tobytes())
    for old, new in tags.values():
        assert bytes(old) in data
        data = bytearray(bytes(data).replace(bytes(old), bytes(new)))
    return saved(Image.fromarray(PIXELS[:, :6, :3]), format, exif=bytes(data))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "tag,turned",
    [
        ({}, True),
        ({"type": (struct.pack(">HHI", 0x010F, 2, 7), struct.pack(">HHI", 0x010F, 5, 1))}, True),  # a name that is a fraction
        (
            {"type": (struct.pack(">HHI", 0x010F, 2, 7), struct.pack(">HHI", 0x011A, 2, 7))},
            True,
        ),  # and a resolution that is a text
        ({"order": (b"MM\0*", b"XX\0*")}, False),
    ],
)
def test_a_photograph_with_an_odd_tag_is_read(format, tag, turned):
    image = decode_image("a", photograph(format, **tag))
    assert image.size == ((8, 6) if turned else (6, 8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_all_orientations(orientation, format):
    array = np.kron(np.array([[0, 60, 120], [180, 240, 90]], np.uint8), np.ones((8, 8), np.uint8))
    turned = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.T,
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].T,
        8: np.rot90(array),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = np.asarray(decode_image("a", saved(Image.fromarray(array), format, exif=exif)))
    np.testing.assert_allclose(image.astype(int), turned, atol=8)


@pytest.mark.parametrize("chunk", ["text", "profile"])
def test_a_png_with_more_beside_the_picture_than_pillow_reads_is_named(chunk, tmp_path):
    info = PngImagePlugin.PngInfo()
    if chunk == "text":
        info.add_text("Comment", "x" * 2**21, zip=True)
    Image.new("L", (8, 8)).save(tmp_path / "a.png", pnginfo=info, icc_profile=bytes(2**21) if chunk == "profile" else None)
    with pytest.raises(ValueError, match=r"a\.png: not a readable image \(Decompressed data too large"):
        load_images(str(tmp_path), 1, 8)


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".ppm", ".jfif", ".gif", ".jp2", ".tga", ".ico", ".avif", ".mpo", ".JPE"])
def test_every_format_of_pillows_is_read(suffix, tmp_path):
    assert suffix.lower() in image_suffixes()
    formats = {".jfif": "JPEG", ".JPE": "JPEG"}
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / f"a{suffix}", formats.get(suffix))
    for spec in (tmp_path, tmp_path / f"a{suffix}"):
        colours = load_images(str(spec), 3, 16).images[0].float().mean(dim=(1, 2))
        torch.testing.assert_close(colours, torch.tensor([200.0, 100.0, 50.0]), atol=4, rtol=0)


def test_formats_that_pillow_hands_to_other_programs_are_no_pictures():
    assert not image_suffixes() & {".eps", ".ps", ".pdf", ".wmf", ".h5", ".mpg", ".txt", ".json"}
    with pytest.raises(ValueError, match=r"a\.png: not a readable image \(of no format that Pillow decodes\)"):
        decode_image("a.png", saved(Image.new("RGB", (8, 8)), "EPS"))


@pytest.mark.parametrize("transparency", [b"\0" + b"\xff" * 255 + b"\x01", b"\xff" * 300 + b"\0"])
def test_opacities_of_colours_that_a_palette_has_not_are_none(transparency):
    data = half_transparent("P", transparency=b"\0\xff")
    at = data.index(b"tRNS")
    chunk = b"tRNS" + transparency
    damaged = struct.pack(">I", len(transparency)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    image = decode_image("a", data[: at - 4] + damaged + data[at + 10 :]).convert("L")
    assert image.getpixel((0, 0)) == (255 if transparency[0] == 0 else 0) and image.getpixel((7, 0)) == 0


def test_a_decompression_bomb_is_named(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    for format, side in (
        ("PNG", 64),
        ("WEBP", 64),
        ("JPEG2000", 45),
    ):  # as large as they may be, by the memory that decoding takes
        assert decode_image("a", saved(Image.new("L", (side, side)), format)).size == (side, side)
        with pytest.raises(ValueError, match=r"a: not a readable image \(.* the most that are decoded\); .* save it smaller"):
            decode_image("a", saved(Image.new("L", (side, side + 2)), format))


def test_pillows_warning_of_a_bomb_is_not_shown(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.raises(ValueError, match="10x10 pixels are more than 64"):
        decode_image("a", saved(Image.new("L", (10, 10)), "PNG"))
    assert not recwarn.list


def test_tags_of_a_tiff_are_not_damaged_by_reading_it():
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[0x0112] = 8
    data = saved(Image.fromarray(PIXELS[:, :6, :3]), "TIFF", tiffinfo=info)
    assert decode_image("a", data).size == (8, 6)
