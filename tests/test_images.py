"""Pictures are opened safely: every format and mode, upright, and nothing damaged, huge or foreign gets through."""

import base64
import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from assistant.images import FORMATS, PictureError, PictureLimits, decode_data_url, encode_data_url, open_picture

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int = 50, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def four_corners() -> Image.Image:
    """24 x 16: red top left, green top right, blue bottom left, white bottom right."""
    image = Image.new("RGB", (24, 16), WHITE)
    image.paste(RED, (0, 0, 12, 8))
    image.paste(GREEN, (12, 0, 24, 8))
    image.paste(BLUE, (0, 8, 12, 16))
    return image


def assert_near(pixel: object, colour: tuple[int, int, int], slack: int = 40) -> None:
    assert isinstance(pixel, tuple)
    assert all(abs(a - b) <= slack for a, b in zip(pixel, colour, strict=True)), (pixel, colour)


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_opens_by_its_content_whatever_its_name(format: str, tmp_path: Path) -> None:
    path = tmp_path / "holiday.txt"
    path.write_bytes(encode(four_corners(), format, **({"quality": 95} if format in ("JPEG", "WEBP") else {})))
    picture = open_picture(path)
    assert picture.mode == "RGB"
    assert picture.size == (24, 16)
    for corner, colour in {(2, 2): RED, (21, 2): GREEN, (2, 13): BLUE, (21, 13): WHITE}.items():
        assert_near(picture.getpixel(corner), colour)


@pytest.mark.parametrize("format", ["TIFF", "PDF", "PPM", "ICO", "TGA", "EPS"])
def test_other_formats_are_refused_as_such(format: str) -> None:
    with pytest.raises(PictureError, match="Use PNG, JPEG, WebP, GIF or BMP") as caught:
        open_picture(encode(noise(), format))
    assert caught.value.status == 415


@pytest.mark.parametrize("content", [b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html>", bytes(1000)])
def test_what_is_no_picture_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    with pytest.raises(PictureError, match=r"cat\.png: not a picture") as caught:
        open_picture(path)
    assert caught.value.status == 415


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_every_exif_orientation_comes_out_upright(orientation: int, format: str) -> None:
    stored_from_upright = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = four_corners() if stored_from_upright is None else four_corners().transpose(stored_from_upright)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = open_picture(encode(stored, format, exif=exif))
    assert picture.size == (24, 16)
    for corner, colour in {(2, 2): RED, (21, 2): GREEN, (2, 13): BLUE, (21, 13): WHITE}.items():
        assert_near(picture.getpixel(corner), colour, slack=60)
    assert not picture.getexif()


def test_a_damaged_exif_block_does_not_lose_the_picture() -> None:
    exif = b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\xff\xff\x01\x12\x00\x03"
    assert open_picture(encode(noise(), "JPEG", exif=exif)).size == (50, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_a_png_becomes_rgb(mode: str) -> None:
    light_and_dark = Image.new("RGB", (20, 10), WHITE)
    light_and_dark.paste((0, 0, 0), (0, 0, 10, 10))
    picture = open_picture(encode(light_and_dark.convert(mode), "PNG"))
    assert picture.mode == "RGB"
    assert_near(picture.getpixel((2, 5)), (0, 0, 0), slack=0)
    assert_near(picture.getpixel((17, 5)), WHITE, slack=0)


def test_cmyk_keeps_its_colours() -> None:
    picture = open_picture(encode(four_corners().convert("CMYK"), "JPEG", quality=95))
    assert_near(picture.getpixel((2, 2)), RED)
    assert_near(picture.getpixel((21, 13)), WHITE)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    greys = np.linspace(0, 65_535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    row = np.asarray(open_picture(encode(Image.fromarray(greys), "PNG")))[0, :, 0]
    assert row[0] == 0
    assert row[-1] == 255
    assert np.abs(row.astype(int) - np.arange(256)).max() <= 1


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    pixels = np.asarray(open_picture(encode(image, "PNG")))[0].tolist()
    assert pixels == [[255, 255, 255], [255, 0, 0], [127, 127, 127]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert np.asarray(open_picture(encode(palette, "PNG", transparency=0)))[0].tolist() == [[255] * 3, [0, 0, 255]]


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_an_animation_shows_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    content = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert_near(open_picture(content).getpixel((4, 4)), RED)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_picture_that_was_cut_off_is_refused(format: str, kept: float) -> None:
    content = encode(noise(), format)
    with pytest.raises(PictureError, match=r"photo 3: (damaged|not a picture)") as caught:
        open_picture(content[: int(len(content) * kept)], name="photo 3")
    assert caught.value.status in (400, 415)


@pytest.mark.parametrize("format", FORMATS)
def test_flipped_bytes_never_escape_as_another_error(format: str) -> None:
    random_source = random.Random(format)
    content = encode(noise(), format)
    refused = 0
    for trial in range(400):
        damaged = bytearray(content)
        reach = random_source.choice([60, 200, len(content)])
        for _ in range(random_source.choice([1, 2, 5, 20])):
            damaged[random_source.randrange(min(reach, len(damaged)))] = random_source.randrange(256)
        if trial % 5 == 0:
            del damaged[random_source.randrange(len(damaged)) :]
        try:
            open_picture(bytes(damaged))
        except PictureError as error:
            refused += 1
            assert "0x" not in str(error)
            assert error.status in (400, 413, 415)
    assert refused > 50


@pytest.mark.parametrize(
    ("format", "size"), [("PNG", (30_000, 30_000)), ("PNG", (13_000, 13_000)), ("WEBP", (13_000, 13_000))]
)
def test_a_bomb_is_refused_from_its_header(format: str, size: tuple[int, int], tmp_path: Path) -> None:
    """In a process of its own, so that its peak memory is the refusal's and not the making of the picture's."""
    image = Image.new("1" if format == "PNG" else "RGB", size)
    (tmp_path / "bomb").write_bytes(encode(image, format, **({"lossless": True} if format == "WEBP" else {})))
    program = """
import resource, sys, time
from assistant.images import PictureError, open_picture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
try:
    open_picture("bomb")
except PictureError as error:
    seconds = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(error.status, seconds < 1, grown < 50, "too many pixels" in str(error))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["413", "True", "True", "True"]


def test_limits_on_bytes_pixels_and_sides() -> None:
    content = encode(noise(), "PNG")
    for limits in (PictureLimits(max_bytes=1000), PictureLimits(max_pixels=1999), PictureLimits(max_side=49)):
        with pytest.raises(PictureError) as caught:
            open_picture(content, limits)
        assert caught.value.status == 413
    exact = PictureLimits(max_bytes=len(content), max_pixels=2000, max_side=50)
    assert open_picture(content, exact).size == (50, 40)


def test_compressed_texts_in_a_png_do_not_fill_the_memory() -> None:
    texts = PngImagePlugin.PngInfo()
    for number in range(60):
        texts.add_text(f"note {number}", "a" * 1_000_000, zip=True)
    content = encode(noise(), "PNG", pnginfo=texts)
    assert len(content) < 100_000
    with pytest.raises(PictureError, match="damaged"):
        open_picture(content)


def test_a_large_photograph_is_shrunk_and_a_small_one_is_not() -> None:
    large = encode(Image.new("RGB", (4000, 1000), RED), "JPEG")
    assert open_picture(large).size == (2048, 512)
    assert open_picture(large, PictureLimits(working_side=None)).size == (4000, 1000)
    assert open_picture(encode(Image.new("RGB", (1, 16_000)), "PNG")).size == (1, 2048)
    assert open_picture(encode(Image.new("RGB", (1, 1)), "PNG")).size == (1, 1)


def test_pixels_are_kept_exactly() -> None:
    image = noise()
    opened = open_picture(encode(image, "PNG", dpi=(300, 300)))
    assert opened.tobytes() == image.tobytes()
    assert opened.info == {}
    assert open_picture(decode_data_url(encode_data_url(opened))).tobytes() == image.tobytes()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"gone\.png: there is no such file") as caught:
        open_picture(tmp_path / "gone.png")
    assert caught.value.status == 404
    with pytest.raises(PictureError, match="this is a folder"):
        open_picture(str(tmp_path))
    os.mkfifo(tmp_path / "pipe.png")
    started = time.perf_counter()
    with pytest.raises(PictureError, match="not a plain file"):
        open_picture(tmp_path / "pipe.png")
    assert time.perf_counter() - started < 1
    (tmp_path / "empty.png").touch()
    with pytest.raises(PictureError, match="empty"):
        open_picture(tmp_path / "empty.png")
    with pytest.raises(PictureError, match="cannot be read"):
        open_picture("nul\0.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encode(noise(), "PNG"))
    path.chmod(0)
    with pytest.raises(PictureError, match="no permission"):
        open_picture(path)


GOOD = base64.b64encode(encode(Image.new("RGB", (2, 2)), "PNG")).decode()


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("", 400, "data URLs"),
        ("http://127.0.0.1/cat.png", 400, "no address is fetched"),
        ("file:///etc/passwd", 400, "no address is fetched"),
        ("/etc/passwd", 400, "no address is fetched"),
        ("data:image/png;base64", 400, "data URLs"),
        ("data:image/png;base64,", 400, "empty"),
        ("data:,", 415, "data:image/"),
        ("data:text/plain;base64,aGVsbG8=", 415, "data:image/"),
        (f"data:image/png,{GOOD}", 400, "base64"),
        (f"data:image/png;base64,{GOOD[:-3]}", 400, "not valid base64"),
        (f"data:image/png;base64, {GOOD}", 400, "not valid base64"),
        ("data:image/png;base64,!!!!", 400, "not valid base64"),
        ("data:image/png;base64,é", 400, "not valid base64"),
        ("data:image/png;base64," + "A" * 30_000_000, 413, "20 MiB"),
    ],
)
def test_data_urls_are_read_strictly(url: str, status: int, message: str) -> None:
    with pytest.raises(PictureError, match=message) as caught:
        decode_data_url(url)
    assert caught.value.status == status
    assert len(str(caught.value)) < 200


def test_a_good_data_url() -> None:
    assert open_picture(decode_data_url(f"data:image/png;base64,{GOOD}")).size == (2, 2)
    assert decode_data_url(f"DATA:image/jpeg;name=cat.png;base64,{GOOD}") == base64.b64decode(GOOD)
