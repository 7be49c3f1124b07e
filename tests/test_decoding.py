"""Strangers' files: what a camera stores, what is too large, what is no image, what must never be opened; and a cache that is one's own."""

import hashlib
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stn_pipeline.data import Reading, decoding, folder
from stn_pipeline.data import cache as cache_room
from stn_pipeline.data.listing import list_folder
from stn_pipeline.data.splits import RawData
from stn_pipeline.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/stn_pipeline"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with 5 greyscale images each, 8 wide and 6 high, that differ."""
    for label, name in enumerate(("cat", "dog")):
        for i in range(5):
            put(tmp_path / "set", f"{name}/{i}.png", Image.new("L", (8, 6), 100 * label + i))
    return tmp_path / "set"


def put(root: Path, name: str, content: Image.Image | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path)


def read(root: Path, **options: object) -> tuple[RawData, list[str]]:
    lines: list[str] = []
    raw = folder.read(str(root), 0, lines.append, **options)
    return raw, [line.removeprefix(f"folder:{root}: ") for line in lines]


def error_of(root: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read(root, **options)
    text = str(caught.value)
    assert text.isprintable()
    return text


# Numbers


@pytest.mark.parametrize(
    ("most", "bits"), [(200, 8), (300, 10), (1023, 10), (1024, 12), (4095, 12), (10_000, 14), (16_384, 16), (65_535, 16)]
)
@pytest.mark.parametrize("suffix", ["png", "tif", "be.tif"])
def test_a_camera_of_few_bits_is_scaled_by_one_factor_for_all(tmp_path: Path, most: int, bits: int, suffix: str) -> None:
    values = np.random.default_rng(0).integers(0, most, (10, 6, 8))
    values[3, 0, 0] = most
    for i in range(10):
        image = Image.fromarray(values[i].astype(np.uint16))
        if suffix == "be.tif":
            image = Image.frombytes("I;16B", image.size, values[i].astype(">u2").tobytes())
        put(tmp_path, f"set/{'ab'[i % 2]}/{i}.{suffix}", image)
    raw, lines = read(tmp_path / "set")
    expected = np.round(values / ((2**bits - 1) / 255)).astype(np.uint8)
    assert torch.equal(raw.train.images[:5, 0], torch.from_numpy(expected[::2]))
    assert raw.bits == bits
    told = [line for line in lines if "decoding" not in line]
    assert told == (
        []
        if bits == 16
        else [f"greyscale images of 16 bits are read as {bits} bit, since all are in the range 0..{2**bits - 1}, which is white"]
    )
    assert [line for line in read(tmp_path / "set")[1] if "decoding" not in line] == told  # from the cache too


def test_images_to_be_scored_are_read_as_those_of_the_network_were(tmp_path: Path) -> None:
    for label in "ab":
        for i in range(5):
            put(tmp_path, f"set/{label}/{i}.png", Image.fromarray(np.full((6, 8), 100 + i, dtype=np.uint16)))
    raw, _ = read(tmp_path / "set", to_score="test", reading=Reading(3, 4, 4, 10))
    assert raw.train.images.shape == (10, 3, 4, 4)
    assert raw.train.images[0].unique().tolist() == [round(100 / 1023 * 255)]
    put(tmp_path, "set/a/9.png", Image.fromarray(np.full((6, 8), 2000, dtype=np.uint16)))
    assert "cannot decode a/9.png (pixels are 2000..2000, expected 0..1023)" in error_of(tmp_path / "set", reading=Reading(1, 4, 4, 10))


def test_colour_read_as_greyscale_is_told(root: Path) -> None:
    put(root, "cat/9.png", Image.new("RGB", (8, 6), (10, 20, 30)))
    assert "1 colour images are read as greyscale, which the network was trained on" in read(root, reading=Reading(1, 6, 8, 0))[1]


def test_pixels_that_are_nearly_one_grey_are_told(tmp_path: Path) -> None:
    for at in range(10):
        deep = np.full((6, 8, 3), at, dtype=">u2")  # a camera of 10 bits in colour: PIL keeps the upper 8 of 16
        rows = b"".join(b"\0" + row.tobytes() for row in deep)
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 6, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        png = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
        put(tmp_path, f"set/{'ab'[at % 2]}/{at}.png", b"\x89PNG\r\n\x1a\n" + png)
    assert "warning: all pixels are in the range 0..0 of 0..255, nearly one grey" in read(tmp_path / "set")[1][-1]


# What an image is


def test_an_id_is_that_of_the_pixels_whatever_holds_them(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    for name, image in (("a/0.png", grey), ("a/1.bmp", grey), ("b/2.tif", grey.convert("RGB")), ("b/3.png", Image.new("L", (16, 12)))):
        put(tmp_path, f"set/{name}", image)
    for i in range(3):
        put(tmp_path, f"set/a/{i}x.png", Image.new("L", (8, 6), i))
        put(tmp_path, f"set/b/{i}x.png", Image.new("L", (6, 8), i))
    ids = {
        file.path: int(name)
        for file, name in zip(list_folder("", tmp_path / "set").files, read(tmp_path / "set")[0].train.ids, strict=True)
    }
    assert ids["a/0.png"] == ids["a/1.bmp"] == ids["b/2.tif"]
    assert len(set(ids.values())) == len(ids) - 2  # another shape is another image
    again = folder.read(str(tmp_path / "set"), 24, lambda line: None).train.ids
    assert again.tolist() == list(ids.values())  # whatever they are scaled to


# What is too large, or no image


def png_header(width: int, height: int) -> bytes:
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content)) + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize("side", [8_001, 13_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(root: Path, side: int, recwarn: pytest.WarningsRecorder) -> None:
    put(root, "cat/9.png", png_header(side, side))
    text = error_of(root)
    assert "cannot decode cat/9.png (" in text and "64 million pixels" in text and "shrink it first" in text
    assert not recwarn.list


def test_the_pixels_that_are_decoded_at_once_must_fit_in_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, "cat/9.png", png_header(7_000, 7_000))
    monkeypatch.setattr(folder, "free_bytes", lambda device: 2_000_000_000)
    monkeypatch.setattr(decoding, "_pixels", pytest.fail)
    assert "its images take 1.18 GB, must be at most half of the 2 GB free" in error_of(root)


@pytest.mark.parametrize(("free", "n_threads"), [(10**9, 4), (24 * 200 * 200 * 6, 3), (24 * 200 * 200 * 2, 1), (100, 1)])
def test_as_many_threads_decode_as_the_memory_allows(free: int, n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import Counter

    monkeypatch.setattr(os, "cpu_count", lambda: 4)

    def afford(n_bytes: int) -> None:
        if n_bytes > free / 2:
            raise DataError("too much")

    assert decoding._threads(Counter({(200, 200): 9}), 0, afford) == n_threads


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif"])
def test_postscript_starts_no_program(root: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: pytest.fail("Ghostscript was started"))
    put(root, f"cat/{name}", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n")
    assert f"cannot decode cat/{name} (not an image)" in error_of(root)


def test_the_kinds_are_those_meant_and_an_ending_belongs_to_one_of_them() -> None:
    assert {"PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"} <= set(decoding.kinds()) <= set(decoding.KINDS)
    assert {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"} <= decoding.extensions()
    assert not {".eps", ".ps", ".wmf", ".emf", ".pdf", ".mpg", ".fits", ".psd", ".ico"} & decoding.extensions()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"<html>404</html>", b"\xff\xd8\xff\xe0" + bytes(20), bytes(500)])
def test_what_is_no_image_is_one_line(root: Path, content: bytes) -> None:
    put(root, "dog/x.jpg", content)
    assert "cannot decode dog/x.jpg (" in error_of(root)


def test_a_mislabelled_kind_is_read_as_what_it_is(root: Path) -> None:
    Image.new("L", (8, 6), 50).save(root / "cat/9.png", format="JPEG")
    assert 50 in read(root)[0].train.images.flatten().tolist()


def test_what_is_no_regular_file_is_never_opened(root: Path) -> None:
    os.mkfifo(root / "cat/pipe.png")
    (root / "cat/device.png").symlink_to("/dev/zero")
    (root / "cat/loop.png").symlink_to("loop.png")
    (root / "cat/gone.png").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    (root / "cat/up").symlink_to("..")
    here = os.getcwd()
    os.chdir(root / "cat")  # a socket's name may have 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.png")
        os.chdir(here)
        raw, lines = read(root)
    assert len(raw.train) == 10
    assert lines[0] == "ignored 7 that are no images or not in a class: cat/device.png, cat/gone.png, cat/loop.png, ..."


def test_a_pipe_that_takes_a_listed_files_place_is_not_waited_for(root: Path) -> None:
    os.mkfifo(root / "pipe")
    with pytest.raises(ValueError, match="of a regular file are read"):
        decoding.digest_file(root / "pipe")


def test_names_are_escaped_and_classes_checked_before_anything_is_decoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, "cat/\x1b]0;mine\x07\nerror: fake.txt", b"")
    (root / "cat" / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"")
    (line, *_) = read(root)[1]
    assert line == r"ignored 2 that are no images or not in a class: cat/\x1b]0;mine\x07\nerror: fake.txt, cat/caf\udce9.txt"
    put(root, "cat/\x1b[2J\n.png", b"x")
    assert r"cannot decode cat/\x1b[2J\n.png (not an image)" in error_of(root)
    (root / "cat/\x1b[2J\n.png").unlink()
    monkeypatch.setattr(folder, "decode", pytest.fail)
    for name in ("a\nb", os.fsdecode(b"caf\xe9"), "\x1b[31mred"):
        put(root, f"{name}/0.png", Image.new("L", (8, 6)))
        assert f"class {ascii(name)}: its name holds control characters, or bytes that are not UTF-8" in error_of(root)
        (root / name / "0.png").unlink()
        (root / name).rmdir()


# The cache


def seen(root: Path) -> bool:
    """Read, and return whether the images came from the cache."""
    return not any("decoding" in line for line in read(root)[1])


def test_other_pixels_under_the_same_length_and_time_are_seen(tmp_path: Path) -> None:
    """As rsync -t, cp -p and tar leave them; whether or not the first files had rested when they were read."""
    for rested in (False, True):
        root = tmp_path / f"set{rested}"
        for value in (0, 128):
            for i in range(10):
                put(root, f"{'ab'[i % 2]}/{i}.bmp", Image.new("L", (8, 6), value + i))
                os.utime(root / f"{'ab'[i % 2]}/{i}.bmp", (1_600_000_000, 1_600_000_000))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cache_room, "SETTLED_S", -60.0 if rested else 60.0)
                assert sorted(read(root)[0].train.images.flatten(1)[:, 0].tolist()) == [value + i for i in range(10)]
                assert seen(root)


def test_files_that_have_rested_are_known_by_their_stamps_and_others_by_their_content(root: Path, cache: Path, monkeypatch) -> None:
    read_again: list[Path] = []

    def digest(path: Path) -> bytes:
        read_again.append(path)
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()

    monkeypatch.setattr(cache_room, "digest_file", digest)
    read(root)
    assert seen(root) and len(read_again) == 10  # just written: one could be written again within a tick of the clock
    monkeypatch.setattr(cache_room, "SETTLED_S", -60.0)
    assert seen(root) and len(read_again) == 20
    assert seen(root) and len(read_again) == 20
    (note,) = cache.glob("*.seen")
    note.write_text("damaged")
    assert seen(root) and len(read_again) == 30
    assert seen(root) and len(read_again) == 30


def test_the_cache_is_the_users_own(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True, mode=0o777)
    cache.chmod(0o777)
    read(root)
    assert cache.stat().st_mode & 0o777 == 0o700
    (kept,) = cache.glob("*.npz")
    assert kept.stat().st_mode & 0o777 == 0o600
    assert seen(root)
    kept.chmod(0o666)
    assert not seen(root)  # another could have written it
    target = kept.rename(cache / "elsewhere")
    kept.symlink_to(target)
    assert not seen(root)
    assert seen(root)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    lines = read(root)[1]
    assert lines == ["decoding 10 images, not kept: there is no cache folder of your own"]
