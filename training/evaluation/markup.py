"""Write HTML as elements, so that every text is escaped by whoever writes it down."""

from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from PIL import Image

from assistant.images import encode_data_url, open_picture

THUMBNAIL = 144  # pixels of the longer side; shown at two thirds of it, so that fine screens have enough
QUALITY = 78


def element(tag: str, *children: Element | str, **attributes: str) -> Element:
    """An element with its children in order; strings are text. `class_` is written as `class`, `aria_label` as
    `aria-label`."""
    made = Element(tag, {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def document(root: Element) -> str:
    """The page whose element `html` is `root`."""
    return "<!doctype html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"


def thumbnail(content: bytes | Path | Image.Image, said: str) -> Element:
    """A small copy of the picture in the page itself, as a JPEG in a data URL; `said` is read to who cannot see it.

    Raises PictureError where it cannot be read.
    """
    picture = content.copy() if isinstance(content, Image.Image) else open_picture(content, enough=THUMBNAIL)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return element("img", src=encode_data_url(picture, QUALITY), alt=said, loading="lazy")
