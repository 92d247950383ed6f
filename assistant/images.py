"""Open any picture safely: limits before decoding, EXIF rotation, known formats only, data URLs."""

import binascii
import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import pybase64
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# Pillow lets the compressed texts of one PNG unpack to 64 MiB. Nobody here reads them, and several such pictures at
# once would fill the memory; 4 MiB still passes every honest picture.
PngImagePlugin.MAX_TEXT_MEMORY = 4 * 2**20

# Pillow warns on the console of pictures that our own limits refuse anyway.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# What Pillow's decoders raise on damaged bytes (found by flipping and cutting bytes in all five formats).
DECODER_FAILURES = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    MemoryError,
    AttributeError,
    struct.error,
    zlib.error,
)

# EXIF orientation -> what to do to see the picture upright (CIPA DC-008, tag 0x0112; 1 is upright already).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PictureLimits:
    """What a picture may cost. `max_bytes` counts the file, `max_pixels` and `max_side` the picture it unpacks to.

    A picture whose longer side is over `working_side` pixels is shrunk to it once it is open: no tower sees more, and
    a photograph of 20 megapixels would otherwise be carried about as 60 MB. `None` keeps every pixel.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 20_000_000
    max_side: int = 16_384
    working_side: int | None = 2_048


DEFAULT_LIMITS = PictureLimits()
# A PNG that is made to be read once, next door: level 6 costs five times the time for a fifth less.
NEIGHBOURLY = 1


class PictureError(ValueError):
    """A picture that cannot be used. The message may be shown to people.

    `status` is the HTTP status that says the same: 400 damaged, 404 not there, 413 too large, 415 not a format we read.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def open_picture(
    source: bytes | str | Path,
    limits: PictureLimits = DEFAULT_LIMITS,
    name: str | None = None,
    enough: int | None = None,
) -> Image.Image:
    """Open a picture from bytes or a file, upright and in RGB; transparency lies on white, animations show frame one.

    The content decides the format, never the file's name. `name` is what error messages call the picture.

    With `enough`, a JPEG that is much larger may be decoded at a half, a quarter or an eighth of its size, several
    times as fast, and no side comes out under `enough` pixels for it. The limits count the whole picture all the same.

    Raises:
        PictureError: the file is missing, too large, damaged or not PNG, JPEG, WebP, GIF or BMP.
    """
    if isinstance(source, bytes):
        name = name or "the picture"
        _check_bytes(len(source), limits, name)
    else:
        name = name or str(source)
        source = read_picture(Path(source), limits, name)
    if not source:
        raise PictureError(f"{name}: the file is empty.")
    image = _open_header(source, name)
    _check_size(image.size, limits, name)
    try:
        if enough is not None:
            image.draft(None, (enough, enough))  # the decoder's own scaling; no other format of ours has one
        image.load()
        orientation = _orientation(image)
        # One of the largest takes 80 MB: no copy is made of it before it is shrunk.
        is_rgb = image.mode == "RGB" and not image.has_transparency_data
        picture: Image.Image = image if is_rgb else to_rgb(image)
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(limits, name) from error
    except DECODER_FAILURES as error:
        raise PictureError(f"{name}: damaged or cut off; it cannot be read.") from error
    if orientation in UPRIGHT:
        picture = picture.transpose(UPRIGHT[orientation])
    if limits.working_side is not None:
        picture.thumbnail((limits.working_side, limits.working_side), Image.Resampling.BICUBIC)
    if picture is image:
        picture = image.copy()  # the file's object holds the file
    # Profiles and comments of the file would otherwise travel on with every copy that is saved.
    picture.info = {}
    return picture


@dataclass(frozen=True)
class PictureHeader:
    """What the header alone tells: how many pixels, and whether decoding is all that `open_picture` would do."""

    pixels: int
    is_plain_jpeg: bool


def read_header(content: bytes, limits: PictureLimits = DEFAULT_LIMITS, name: str = "the picture") -> PictureHeader:
    """Read the header and no pixel. Raises PictureError as `open_picture` does for a header."""
    _check_bytes(len(content), limits, name)
    image = _open_header(content, name)
    _check_size(image.size, limits, name)
    keeps_its_size = limits.working_side is None or max(image.size) <= limits.working_side
    is_plain = image.format == "JPEG" and image.mode == "RGB" and keeps_its_size and _orientation(image) == 1
    return PictureHeader(image.width * image.height, is_plain)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture in any mode that our formats hold to RGB: deep greys scaled, transparency laid on white."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would clip 16 bits at 255, which makes nearly every pixel white. PNG has no deeper greys than these.
        return image.convert("I").point([value // 257 for value in range(65_536)], "L").convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(layer, mask=layer.getchannel("A"))
    return white


def decode_data_url(url: str, limits: PictureLimits = DEFAULT_LIMITS, name: str = "the picture") -> bytes:
    """The bytes of `data:image/...;base64,...`. Strict: nothing but base64, and its length is checked before decoding.

    Raises:
        PictureError: it is no data URL of a picture, is empty, too large, or not base64.
    """
    header, comma, data = url.partition(",")
    if not comma or not header.lower().startswith("data:"):
        raise PictureError(f"{name}: send pictures as data URLs (data:image/png;base64,...); no address is fetched.")
    kind, *parameters = header[len("data:") :].lower().split(";")
    if not kind.startswith("image/"):
        raise PictureError(f"{name}: a data URL of a picture starts with data:image/, this one does not.", 415)
    if not parameters or parameters[-1] != "base64":
        raise PictureError(f"{name}: the data URL must be in base64 (data:{kind};base64,...).")
    if not data:
        raise PictureError(f"{name}: the data URL is empty.")
    _check_bytes(len(data) // 4 * 3 - 2, limits, name)
    try:
        return pybase64.b64decode(data, validate=True)  # fifty times as fast as Python's own
    except (binascii.Error, ValueError) as error:
        raise PictureError(f"{name}: the data URL is not valid base64.") from error


def encode_data_url(image: Image.Image, jpeg_quality: int | None = None) -> str:
    """A picture as a PNG data URL: every pixel as it is (`image` in a mode that PNG holds, such as RGB).

    With `jpeg_quality` as a JPEG instead, some ten times as small: for pages that people look at.
    """
    buffer = io.BytesIO()
    if jpeg_quality is not None:
        image.save(buffer, "JPEG", quality=jpeg_quality)
        return "data:image/jpeg;base64," + pybase64.b64encode_as_string(buffer.getvalue())
    image.save(buffer, "PNG", compress_level=NEIGHBOURLY)
    return "data:image/png;base64," + pybase64.b64encode_as_string(buffer.getvalue())


def encode_bitmap_url(image: Image.Image) -> str:
    """An RGB picture as a BMP data URL: every pixel as it is, three bytes each, written and read at no cost of time."""
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return "data:image/bmp;base64," + pybase64.b64encode_as_string(buffer.getvalue())


def save_for_neighbour(image: Image.Image, file: Path) -> None:
    """Write a picture with every pixel as it is, to be read once: `file` ends in `.bmp` or `.png`. Raises OSError."""
    image.save(file, compress_level=NEIGHBOURLY)


def read_picture(path: Path, limits: PictureLimits = DEFAULT_LIMITS, name: str | None = None) -> bytes:
    """The bytes of the file `path`, not looked into. Raises PictureError where it is missing, too large or no file."""
    name = name or str(path)
    if path.is_dir():
        raise PictureError(f"{name}: this is a folder, not a picture.")
    # Only a plain file has an end: a device or a pipe could be read for ever.
    if path.exists() and not path.is_file():
        raise PictureError(f"{name}: this is not a plain file.")
    try:
        with path.open("rb") as file:
            content = file.read(limits.max_bytes + 1)
    except FileNotFoundError as error:
        raise PictureError(f"{name}: there is no such file.", 404) from error
    except PermissionError as error:
        raise PictureError(f"{name}: you have no permission to read this file.") from error
    except (OSError, ValueError) as error:
        raise PictureError(f"{name}: the file cannot be read.") from error
    _check_bytes(len(content), limits, name)
    return content


def _open_header(content: bytes, name: str) -> Image.Image:
    """Read the header alone: Pillow decodes pixels only at `load`."""
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name}: too many pixels. Make it smaller and try again.", 413) from error
    except UnidentifiedImageError as error:
        message = f"{name}: not a picture that can be read. Use PNG, JPEG, WebP, GIF or BMP."
        raise PictureError(message, 415) from error
    except DECODER_FAILURES as error:
        raise PictureError(f"{name}: damaged; it cannot be read.") from error


def _check_bytes(count: int, limits: PictureLimits, name: str) -> None:
    if count > limits.max_bytes:
        raise PictureError(f"{name}: the file is over the limit of {limits.max_bytes / 2**20:.3g} MiB.", 413)


def _check_size(size: tuple[int, int], limits: PictureLimits, name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise PictureError(f"{name}: it has no pixels.")
    if width * height > limits.max_pixels:
        raise _too_many_pixels(limits, f"{name} ({width} x {height})")
    if max(width, height) > limits.max_side:
        message = f"{name} ({width} x {height}): no side may be over {limits.max_side:,} pixels."
        raise PictureError(message, 413)


def _too_many_pixels(limits: PictureLimits, name: str) -> PictureError:
    return PictureError(f"{name}: too many pixels; the limit is {limits.max_pixels / 1e6:.3g} megapixels.", 413)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 where none is stated or the EXIF block is damaged (the pixels are good all the same)."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODER_FAILURES:
        return 1
