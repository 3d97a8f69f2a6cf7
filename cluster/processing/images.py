"""Turn PNG and JPEG files from strangers into numbers.

Knows nothing of models. Limits are checked on the header, before any pixel is unpacked.

    decode_image(png_bytes, ImageInput(target="pixels", width=8, height=8), param="image")
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from cluster.errors import InputError, PayloadTooLargeError
from cluster.processing.specification import ImageInput
from cluster.processing.tensors import Array

MAX_FILE_BYTES = 20 * 1024**2
MAX_PIXELS = 24_000_000
_FORMATS = ("PNG", "JPEG")


def decode_image(data: bytes, spec: ImageInput, *, param: str) -> Array:
    """Values of one image as float32, `height * width * channels` of them, flat.

    Raises:
        InputError: not a whole PNG or JPEG file.
        PayloadTooLargeError: more bytes or pixels than the limits.
    """
    if len(data) > MAX_FILE_BYTES:
        raise PayloadTooLargeError(
            f"input '{param}': the image file has {len(data)} bytes",
            hint=f"send at most {MAX_FILE_BYTES}",
            param=param,
        )
    picture = _flatten(_open(data, param))
    if picture.size != (spec.width, spec.height):
        picture = picture.resize((spec.width, spec.height), Image.Resampling.BOX)
    picture = picture.convert(spec.mode)
    if spec.invert:
        picture = ImageOps.invert(picture)
    values = np.asarray(picture, dtype=np.float32) * np.float32(spec.scale) + np.float32(
        spec.offset
    )
    if values.ndim == 3 and spec.layout == "CHW":
        values = values.transpose(2, 0, 1)
    return np.ascontiguousarray(values).reshape(-1)


def _open(data: bytes, param: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Our own limit is lower than the one Pillow warns at.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
            if picture.width * picture.height > MAX_PIXELS:
                raise PayloadTooLargeError(
                    f"input '{param}': the image has {picture.width}x{picture.height} pixels",
                    hint=f"send at most {MAX_PIXELS} pixels",
                    param=param,
                )
            picture.load()
            return ImageOps.exif_transpose(picture)
    except PayloadTooLargeError:
        raise
    # Pillow's decoders raise many types on broken files, and a wrong file is always the client's.
    except Exception as error:
        raise InputError(
            f"input '{param}' is not a readable PNG or JPEG image ({type(error).__name__})",
            hint="send the bytes of the whole file, base64-encoded where the protocol is JSON",
            param=param,
        ) from None


def _flatten(picture: Image.Image) -> Image.Image:
    """RGB or L; transparent parts become white, 16-bit greys become 8-bit."""
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture, dtype=np.float32) / 257
        return Image.fromarray(grey.round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
