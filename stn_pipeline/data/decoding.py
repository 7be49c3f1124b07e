"""Image files into uint8 (N, C, H, W): which kinds, how large, how deep; and what each image is, by a hash of its pixels.

The one place where a user's image is opened. Files are untrusted: kinds that start other programs (PostScript) are never
tried, and sizes are known from the headers before a pixel is decoded.
"""

import hashlib
import io
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]  # (width, height), as PIL has it
KINDS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "PCX", "SGI")  # as PIL names them
GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16B", "I;16L"}
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras give, of which more than 8 are kept in files of 16
MAX_PIXELS = 64_000_000  # of an image
MAX_FILE_BYTES = 1_000_000_000
DECODING_BYTES = 24  # that decoding takes a pixel at its worst: PIL has four a pixel, and several copies with transparency
NARROW = 32  # of the 256 levels: images that span no more are told of
CHUNK = 64  # images a thread takes at a time
# PIL decodes without the GIL, but on smaller images most of the time is Python's and threads only contend: on 2 cores,
# 32x32 JPEG take 101 us on one thread and 149 us on two, 128x128 151 and 141, 256x256 309 and 228.
THREADED_PIXELS = 128 * 128


class Reading(NamedTuple):
    """How images are read, where it is not theirs to say: those that a trained network is scored on are read as its own were.

    bits: the depth of images that are deeper than 8 bits; 0 is what they themselves need.
    """

    channels: int
    height: int
    width: int
    bits: int


@dataclass(frozen=True)
class Decoded:
    """Images of the given files, in their order.

    images: uint8 (N, C, H, W).   ids: int64 (N,), a hash of each image's own pixels, before it was scaled or cropped.
    contents: a digest of each file.   bits: the depth that those beyond 8 bits were read with, 0 where there is none.
    notes: what the user should know.
    """

    images: npt.NDArray[np.uint8]
    ids: npt.NDArray[np.int64]
    contents: list[bytes]
    bits: int
    notes: list[str]


class BrokenError(Exception):
    """Files that cannot be decoded, and why: the first by name says it for all."""

    def __init__(self, broken: dict[int, Exception], paths: list[Path]) -> None:
        """Take each broken file's error by its index."""
        self.at = min(broken, key=lambda at: paths[at])
        self.path, self.n_more, self.cause = paths[self.at], len(broken) - 1, broken[self.at]
        super().__init__(_reason(self.cause))


class _Header(NamedTuple):
    size: Size
    is_grey: bool
    is_deep: bool


@cache
def kinds() -> tuple[str, ...]:
    """Return the kinds of images that are read: those of KINDS that this PIL can open."""
    from PIL import Image

    Image.init()
    return tuple(kind for kind in KINDS if kind in Image.OPEN)


@cache
def extensions() -> frozenset[str]:
    """Return how the names of those kinds end, with the dot, in small letters."""
    from PIL import Image

    return frozenset(extension for extension, kind in Image.registered_extensions().items() if kind in kinds())


def decode(paths: list[Path], image_size: int, reading: Reading | None, check_memory: Callable[[int], object]) -> Decoded:
    """Return the images of some files.

    All greyscale gives C = 1, anything else RGB; transparency is flattened over black; EXIF orientation is respected; greyscale of
    more than 8 bits is scaled to 8 by one factor for all. Of several frames the first is read.

    Args:
        paths: at least one.
        image_size: side in px that every image is scaled and centre-cropped to; 0 is their own, or the commonest where they differ.
        reading: overrules image_size and what the files themselves would give.
        check_memory: raises where as many bytes are not to be had.

    Raises:
        BrokenError: a file is no image, damaged, too large, or of a kind or depth that is not read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, on sizes that are refused below and on metadata that is not used
        return _decode(paths, image_size, reading, check_memory)


def _decode(paths: list[Path], image_size: int, reading: Reading | None, check_memory: Callable[[int], object]) -> Decoded:
    broken: dict[int, Exception] = {}
    headers: dict[int, _Header] = {}
    _in_threads(lambda at: headers.update({at: _header(paths[at])}), len(paths), broken, 1)
    if not headers:
        raise BrokenError(broken, paths)
    sizes = Counter(header.size for header in headers.values())
    grey = reading.channels == 1 if reading else all(header.is_grey for header in headers.values())
    commonest = max(sizes, key=lambda size: (sizes[size], size))
    size = (reading.width, reading.height) if reading else (image_size, image_size) if image_size else commonest
    images = _room((len(paths), 1 if grey else 3, size[1], size[0]), sizes, check_memory)
    ids, contents = np.empty(len(paths), dtype=np.int64), [b""] * len(paths)
    n_threads = _threads(sizes, images.nbytes, check_memory)

    deep = [at for at, header in headers.items() if header.is_deep]
    bits, peaks = reading.bits if reading else 0, [0] * len(paths)
    if deep and not bits:
        _in_threads(lambda i: peaks.__setitem__(deep[i], _peak(paths[deep[i]])), len(deep), {}, n_threads)
        bits = next((depth for depth in DEPTHS if max(peaks) < 2**depth), DEPTHS[-1])

    def fill(at: int) -> None:
        with _opened(paths[at]) as file:
            content = file.read()
        contents[at] = hashlib.blake2b(content, digest_size=16).digest()
        images[at], ids[at] = _pixels(content, grey, size, bits)

    _in_threads(fill, len(paths), broken, n_threads)
    if broken:
        raise BrokenError(broken, paths)
    return Decoded(images, ids, contents, bits if deep else 0, list(_notes(images, headers, sizes, size, grey, bits if deep else 0)))


def _room(shape: tuple[int, int, int, int], sizes: Counter[Size], check_memory: Callable[[int], object]) -> npt.NDArray[np.uint8]:
    n_bytes = shape[0] * shape[1] * shape[2] * shape[3]
    check_memory(n_bytes + DECODING_BYTES * _largest(sizes, 1))
    return np.empty(shape, dtype=np.uint8)


def _largest(sizes: Counter[Size], n: int) -> int:
    """Return the pixels of the n largest images together."""
    return sum(sorted((width * height for width, height in sizes.elements()), reverse=True)[:n])


def _threads(sizes: Counter[Size], n_bytes: int, check_memory: Callable[[int], object]) -> int:
    """Return on how many threads to decode: as many as pay, and as the memory allows."""
    if sum(width * height * n for (width, height), n in sizes.items()) < THREADED_PIXELS * sizes.total():
        return 1
    for n in range(os.cpu_count() or 1, 1, -1):
        try:
            check_memory(n_bytes + DECODING_BYTES * _largest(sizes, n))
            return n
        except ValueError:
            continue
    return 1


def _notes(
    images: npt.NDArray[np.uint8], headers: dict[int, _Header], sizes: Counter[Size], size: Size, grey: bool, bits: int
) -> "list[str]":
    notes = []
    if n_resized := len(images) - sizes[size]:
        own = f"{len(sizes)} sizes" if len(sizes) > 1 else "size {}x{}".format(*next(iter(sizes)))
        notes.append(f"{n_resized} of {len(images)} images ({own}) scaled and centre-cropped to {size[0]}x{size[1]}")
    if grey and (n_colour := sum(not header.is_grey for header in headers.values())):
        notes.append(f"{n_colour} colour images are read as greyscale, which the network was trained on")
    if 0 < bits < DEPTHS[-1]:
        notes.append(f"greyscale images of 16 bits are read as {bits} bit, since all are in the range 0..{2**bits - 1}, which is white")
    low, high = int(images.min()), int(images.max())
    if high - low < NARROW:
        notes.append(
            f"warning: all pixels are in the range {low}..{high} of 0..255, nearly one grey: rescale the images if that is not meant"
        )
    return notes


def _in_threads(work: Callable[[int], object], n: int, broken: dict[int, Exception], n_threads: int) -> None:
    """Do `work(i)` for each i below n that is not `broken`, and add those where it fails."""

    def chunk(start: int) -> None:
        for i in range(start, min(start + CHUNK, n)):
            if i not in broken:
                try:
                    work(i)
                except Exception as error:  # a damaged image makes PIL raise nearly anything
                    broken[i] = error

    with ThreadPoolExecutor(n_threads) as pool:
        for _ in pool.map(chunk, range(0, n, CHUNK)):
            pass


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def digest_file(path: Path) -> bytes:
    """Return the digest of a file's content, as decode gives it."""
    with _opened(path) as file:
        return hashlib.blake2b(file.read(), digest_size=16).digest()


def _opened(path: Path) -> BinaryIO:
    """Open a regular file; anything else (a pipe would wait for ever) is refused, though it took a listed file's place."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
        os.close(handle)
        raise ValueError(f"{found.st_size} bytes, at most {MAX_FILE_BYTES / 1e9:g} GB of a regular file are read")
    return os.fdopen(handle, "rb")


def _image(file: "BinaryIO | io.BytesIO") -> "Image.Image":
    """Open an image whose pixels are not decoded yet."""
    from PIL import Image

    try:
        image = Image.open(file, formats=kinds())
        width, height = image.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"more than {MAX_PIXELS / 1e6:g} million pixels, the most that are read: shrink it first") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} px, more than the {MAX_PIXELS / 1e6:g} million pixels that are read at most: shrink it first")
    return image


def _header(path: Path) -> _Header:
    """Return the size once upright, whether it is greyscale and whether of more than 8 bits; no pixel is decoded."""
    with _opened(path) as file, _image(file) as image:
        width, height = image.size
        size = (height, width) if 5 <= _orientation(image) <= 8 else (width, height)
        return _Header(size, image.mode in GREY_MODES, image.mode.startswith("I"))


def _peak(path: Path) -> int:
    with _opened(path) as file, _image(file) as image:
        return int(np.asarray(image).max())


def _orientation(image: "Image.Image") -> int:
    from PIL import ExifTags

    if image.format == "PNG" and not image.info.keys() & {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}:
        return 1  # getexif would decode the whole image to look behind the pixels
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata says nothing about the pixels
        return 1


def _pixels(content: bytes, grey: bool, size: Size, bits: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Return the decoded image, uint8 (C, H, W), and the hash of its own pixels."""
    from PIL import Image, ImageOps

    with _image(io.BytesIO(content)) as opened:
        opened.load()
        upright = ImageOps.exif_transpose(opened) if 2 <= _orientation(opened) <= 8 else opened
        if upright.mode.startswith("I"):
            values = np.ascontiguousarray(upright, dtype="<i4")  # (H, W)
            name = _hash(values)
            image = Image.fromarray(_eight_bits(values, bits))
        else:
            image = _flat(upright)
            name = _hash(np.asarray(image.convert("RGB")))
        image = image.convert("L" if grey else "RGB")
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return (pixels[None] if grey else pixels.transpose(2, 0, 1)), name  # (H, W) -> (1, H, W), or (H, W, C) -> (C, H, W)


def _hash(pixels: npt.NDArray[np.generic]) -> int:
    """Return 64 bits that name an image: two of a million share one once in 40 million sets."""
    name = hashlib.blake2b(f"{pixels.shape}".encode(), digest_size=8)
    name.update(np.ascontiguousarray(pixels).data)
    return int.from_bytes(name.digest(), "little", signed=True)


def _eight_bits(values: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """Return values of `bits` bits as 8: (H, W) -> (H, W)."""
    low, high, most = int(values.min()), int(values.max()), 2**bits - 1
    if low < 0 or high > most:
        raise ValueError(f"pixels are {low}..{high}, expected 0..{most}")
    scaled = values.astype(np.float32)
    scaled /= most / 255  # its error is far below 1/514, the least distance from a half
    return np.rint(scaled, out=scaled).astype(np.uint8)


def _flat(image: "Image.Image") -> "Image.Image":
    """Return the image without transparency: over black."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image
