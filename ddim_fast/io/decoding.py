"""Pictures from encoded files of any format of Pillow: upright, 8 bits, without transparency."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .files import one_line

__all__ = ["check_size", "decode_image", "image_suffixes", "opaque", "reason_of"]

# Formats that Pillow lists but does not decode itself: it has no decoder, only one on Windows, or runs Ghostscript.
_UNDECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# The transposition of each EXIF orientation.
_TURNS: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's modes with an alpha channel, modes without colour, and modes that it converts to grey and to RGB.
_TRANSPARENT = {"LA", "La", "PA", "RGBA", "RGBa"}
_GREY = {"1", "L", "LA", "La"}
_PLAIN = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"}

# Bits per pixel of PNGs that Pillow stretches to 8, by Pillow's raw mode.
_DEPTHS = {"L;2": 2, "L;4": 4}

# Memory per pixel of these decoders, relative to the others.
_COPIES: dict[str | None, int] = {"JPEG2000": 2, "ICNS": 2}


def image_suffixes() -> set[str]:
    """The file name endings of pictures, such as ".png", for every format that Pillow decodes here, plugins included."""
    decoded = {*_decoders(), "MPO"}  # Pillow opens it as a JPEG
    return {suffix for suffix, format in Image.registered_extensions().items() if format in decoded}


def decode_image(name: str, data: bytes, background: str = "white") -> Image.Image:
    """The first picture of an encoded file, as :func:`opaque` returns it, turned by its EXIF orientation. An unreadable
    orientation is ignored.

    Args:
        name: the file's name in errors.
        data: the encoded file.
        background: the colour of transparent pixels.

    Raises:
        ValueError: Pillow cannot decode it.
    """
    # Pillow's decoders of some forty formats raise any exception for a damaged file.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            image: Any = Image.open(io.BytesIO(data), formats=_decoders())
        check_size(image, _COPIES.get(image.format, 1))
        tiles = image.tile
        image.load()
        turn = _turn(image)
        image = opaque(_keyed(image, tiles, data), background)
        return image if turn is None else image.transpose(turn)
    except Exception as error:
        raise ValueError(
            f"{name}: not a readable image ({reason_of(error)}); copy or download it again, or save it smaller, as PNG"
        ) from None


def check_size(image: Image.Image, copies: int) -> None:
    """Check that a picture is no decompression bomb: it has at most ``Image.MAX_IMAGE_PIXELS`` (89 million, from where Pillow
    warns), divided by ``copies``, the memory factor of its decoder.

    Raises:
        ValueError: it has more pixels.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit // copies:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {limit // copies:,}, the most that are decoded")


def opaque(image: Image.Image, background: str = "white") -> Image.Image:
    """A decoded picture over a background, where its alpha channel, palette or transparent colour makes it transparent.
    Channels of 16 bits keep the upper 8. Grey pictures stay grey, of mode "1" or "L".

    Raises:
        ValueError: it has 32 bits per pixel and values outside 0..255.
    """
    image.load()
    _fit_transparency(image)
    key, grey = image.info.get("transparency"), image.mode in _GREY
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values, grey = np.asarray(image), True
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if key is not None:
            image.putalpha(_alpha(values != key))
    elif image.mode in ("I", "F"):
        image = _of_8_bits(image)
    elif key is not None or image.mode in _TRANSPARENT or getattr(image.palette, "mode", "").endswith("A"):
        with_alpha = "LA" if grey else "RGBA"
        image = image if image.mode == with_alpha else image.convert(with_alpha)
    elif image.mode not in _PLAIN:
        image = image.convert("RGB")
    if image.mode not in _TRANSPARENT:
        return image
    over = Image.new("L" if grey else "RGB", image.size, background)
    over.paste(image, mask=image)
    return over


def reason_of(error: Exception) -> str:
    """Pillow's message about a file that it cannot decode, in one line."""
    if isinstance(error, UnidentifiedImageError):  # its text names an object in memory
        return "of no format that Pillow decodes"
    return one_line(error) or type(error).__name__


def _decoders() -> list[str]:
    Image.init()
    return [name for name in Image.OPEN if name not in _UNDECODED]


def _fit_transparency(image: Image.Image) -> None:
    """Drop opacities beyond the 256 colours of a palette; with them Pillow would not convert the picture."""
    key = image.info.get("transparency")
    if image.mode == "P" and isinstance(key, bytes):
        image.info["transparency"] = key[:256]
    elif image.mode == "P" and key is not None and key > 255:
        del image.info["transparency"]


def _keyed(image: Image.Image, tiles: list[Any], data: bytes) -> Image.Image:
    """A decoded PNG with an alpha channel in place of its transparent colour. That colour has the bits of the file's pixels,
    but Pillow compares it with pixels of 8 bits."""
    key = image.info.get("transparency")
    if image.format != "PNG" or image.mode not in ("L", "RGB") or key is None:
        return image
    stored, parts = tiles[0][3], [image]
    key = [key] if image.mode == "L" else key
    if stored == "RGB;16B":
        lower: Any = Image.open(io.BytesIO(data), formats=["PNG"])
        lower.tile = [(*tile[:3], "RGB;16L") for tile in tiles]
        parts = [image, lower]
        key = [value >> 8 for value in key] + [value & 255 for value in key]
    else:
        largest = 2 ** _DEPTHS.get(stored, 8) - 1
        key = [(value & largest) * 255 // largest for value in key]
    bands = (part.getchannel(band) for part in parts for band in part.getbands())
    differs = np.zeros(image.size[::-1], bool)
    for band, value in zip(bands, key, strict=True):
        differs |= np.asarray(band) != value
    image.putalpha(_alpha(differs))
    return image


def _alpha(seen: np.ndarray) -> Image.Image:
    """Opaque where (H, W) booleans are true, transparent elsewhere."""
    return Image.fromarray(seen.astype(np.uint8) * np.uint8(255))


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Grey, of 32 bits a pixel."""
    extrema: Any = image.getextrema()
    low, high = extrema
    if not (low >= 0 and high <= 255) or (image.mode == "F" and 0 < high <= 1):
        raise ValueError(
            f"its pixels are 32-bit numbers from {low:g} to {high:g}; save it with 8 or 16 bits, in 0..255 or 0..65535"
        )
    return image.convert("L")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The picture turned by its EXIF orientation. Nothing else in EXIF is read, as it may be damaged."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged data raise any exception
        return None
