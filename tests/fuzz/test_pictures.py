"""Damaged pictures of every format that Pillow writes and reads."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

from ddim_fast.data.images import load_images
from ddim_fast.jobs.video_files import _write_mp4, frame_rate, read_frames
from tests.helpers.fuzzing import Fuzzer, main, mutate_bytes

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F")


def picture(mode="RGB", size=(24, 20)):
    values = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    if mode in ("I", "I;16", "F"):
        return Image.fromarray(values[..., 0].astype({"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]))
    return Image.fromarray(values, "RGBA" if mode == "RGBA" else "RGBX").convert(mode)


def read_as_pillow_does(path):
    """What Pillow decodes is read, but for numbers that are no colours."""
    try:
        load_images(str(path), 3, 8)
    except ValueError as error:
        assert "32-bit numbers" in str(error) or not pillow_decodes(path.read_bytes()), (
            f"Pillow decodes what is refused: {error}"
        )
        raise


def pillow_decodes(data):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # from there on it is refused
            Image.open(io.BytesIO(data)).load()
    except Exception:
        return False
    return True


def write_all(folder):
    """A file of each format and mode."""
    paths = []
    Image.init()
    suffixes = {format: suffix for suffix, format in Image.registered_extensions().items()}
    for format in sorted(Image.SAVE.keys() & suffixes.keys()):
        for mode in MODES:
            path = folder / f"{format}-{mode.replace(';', '-')}{suffixes[format]}"
            try:
                picture(mode).save(path, format)
                read_as_pillow_does(path)
            except (OSError, ValueError, KeyError, AttributeError):  # a mode that it has not, or what is not read
                path.unlink(missing_ok=True)
            else:
                paths.append(path)
    compressions = ("tiff_lzw", "packbits", "jpeg", "tiff_deflate", "group4", "zstd", "lzma")
    for compression in compressions:
        path = folder / f"{compression}.tif"
        picture("1" if compression == "group4" else "RGB").save(path, compression=compression)
        paths.append(path)
    return paths


def exif():
    """Of a photograph that lies on its side: tags of every type, and folders of tags in it."""
    tags = Image.Exif()
    tags[0x0112] = 6
    tags[0x010F], tags[0x011A], tags[0x0102], tags[0x9286] = "Camera", TiffImagePlugin.IFDRational(72, 1), (8, 8, 8), b"\0" * 12
    tags.get_ifd(0x8769).update(
        {0x829A: TiffImagePlugin.IFDRational(1, 60), 0x9003: "2024:01:01 00:00:00", 0x927C: b"note" * 9}
    )
    tags.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0), 29: "2024:01:01"})
    return tags.tobytes()


EXIF = exif()


def write_photos(folder):
    paths = [folder / name for name in ("a.jpg", "a.png", "a.webp", "a.tif", "a.avif")]
    for path in paths:
        picture(size=(8, 6)).save(path, exif=EXIF)
    return paths


def damage_exif(random, data):
    """The same file with damaged EXIF, all around it being right."""
    damaged = mutate_bytes(random, EXIF)[:60_000]
    at = data.find(EXIF)
    if data.startswith(b"\xff\xd8") and at >= 0:
        return data[: at - 2] + struct.pack(">H", len(damaged) + 2) + damaged + data[at + len(EXIF) :]
    if data.startswith(b"\x89PNG"):
        return b"".join(
            chunk(name, damaged.removeprefix(b"Exif\0\0") if name == b"eXIf" else content) for name, content in chunks(data)
        )
    return mutate_bytes(random, data)


def write_pngs(folder):
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "a picture" * 20, zip=True)
    info.add_itxt("Author", "somebody", "en", "Autor", zip=True)
    info.add_text("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    paths = []
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        transparency = {"P": bytes(range(256)), "RGB": (3, 4, 5), "1": 0, "L": 7, "I;16": 9}.get(mode)
        options = {} if transparency is None else {"transparency": transparency}
        paths.append(folder / f"{mode.replace(';', '-')}.png")
        picture(mode, (8, 6)).save(paths[-1], pnginfo=info, icc_profile=b"profile" * 40, exif=EXIF, dpi=(72, 72), **options)
    paths.append(folder / "animated.png")
    picture().save(paths[-1], save_all=True, append_images=[picture("RGBA", (24, 20))])
    return paths


def chunks(data):
    at = 8
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length


def chunk(name, content):
    start = b"\x89PNG\r\n\x1a\n" if name == b"IHDR" else b""
    return start + struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def damage_chunk(random, data):
    """One part of a PNG damaged, blown up or put elsewhere, its checksum being right."""
    parts = list(chunks(data))
    at = random.randrange(len(parts))
    name, content = parts[at]
    change = random.randrange(8)
    if change == 0:
        parts.insert(random.randrange(len(parts)), parts.pop(at))
    elif change == 1:
        parts.insert(1, (random.choice((b"zTXt", b"iCCP")), b"x\0\0" + zlib.compress(bytes(random.choice((10**4, 10**7))))))
    elif change == 2 and name == b"IHDR":
        parts[at] = name, struct.pack(">II", *(2 ** random.randrange(32) for _ in range(2))) + content[8:]
    else:
        parts[at] = name, mutate_bytes(random, content)
    return b"".join(chunk(name, content) for name, content in parts)


def write_films(folder):
    frames = [picture(mode, (12, 10)) for mode in ("P", "RGB", "L", "P")]
    for name, extra in (("a.gif", {}), ("b.gif", {"transparency": 3, "disposal": 2})):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:], duration=50, **extra)
    return [folder / "a.gif", folder / "b.gif"]


def write_video(folder):
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    _write_mp4(folder / "a.mp4", frames, (16, 16, 3), 5)
    return [folder / "a.mp4"]


def read_film(path):
    return frame_rate(path), [frame.size for frame in read_frames(path)]


PICTURES = Fuzzer("pictures", write_all, read_as_pillow_does, mutate_bytes)
PHOTOS = Fuzzer("EXIF", write_photos, read_as_pillow_does, damage_exif)
PNGS = Fuzzer("PNG", write_pngs, read_as_pillow_does, damage_chunk)
FILMS = Fuzzer("GIF", write_films, read_film, mutate_bytes)
VIDEOS = Fuzzer("MP4", write_video, read_film, mutate_bytes)


def test_a_damaged_picture_is_refused_by_name():
    PICTURES.check(300)


def test_a_photograph_with_odd_tags_is_read():
    PHOTOS.check(400)


def test_a_png_with_odd_chunks_is_refused_by_name_at_most():
    PNGS.check(250)


def test_a_picture_of_so_many_pixels_that_pillow_warns_is_refused(tmp_path):
    parts = dict(chunks(chunk(b"IHDR", struct.pack(">IIBBBBB", 2**24, 8, 1, 0, 0, 0, 0))))
    parts |= {b"IDAT": zlib.compress(bytes(8 * (1 + 2**21))), b"IEND": b""}
    (tmp_path / "a.png").write_bytes(b"".join(chunk(*part) for part in parts.items()))
    with pytest.raises(ValueError, match="the most that are decoded"):
        read_as_pillow_does(tmp_path / "a.png")


def test_a_damaged_film_is_refused_by_name():
    FILMS.check(200)


def test_a_damaged_video_is_refused_by_name():
    VIDEOS.check(12)


if __name__ == "__main__":
    main(PICTURES, PHOTOS, PNGS, FILMS, VIDEOS)
