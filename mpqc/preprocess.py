"""From uint8 pictures to what a model takes; the schema of ``--preprocess FILE.toml``."""

import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mpqc.errors import DataError, EnvironmentLacks
from mpqc.graph import Array

Extent = Annotated[int, Field(ge=1, le=16384)]


class Preprocess(BaseModel):
    """Steps in this order: resize, crop, invert, channel order, scale, mean and std, layout.

    ``x = (pixel * scale - mean) / std`` in float32.

    Attributes:
        layout: of the stored pictures; ``NHW`` are grey without a channel axis.
        resize: the shorter side, or [height, width], bilinear; needs Pillow.
        crop: [height, width] of the centre.
        invert: 255 - pixel, for black on white where the model wants white on black.
        channels: order that the model wants; pictures are stored RGB.
        scale: multiplied first, for example 0.00392156862745098 for 1 / 255.
        mean: subtracted after ``scale``: one number, or one a channel in the model's order.
        std: divided by; likewise.
        output_layout: of the model's input; ``NC`` flattens each picture.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal["NHWC", "NCHW", "NHW"] = "NHWC"
    resize: Extent | tuple[Extent, Extent] | None = None
    crop: tuple[Extent, Extent] | None = None
    invert: bool = False
    channels: Literal["RGB", "BGR"] = "RGB"
    scale: float = 1.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    output_layout: Literal["NCHW", "NHWC", "NC"] = "NCHW"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the TOML file.

        Raises:
            DataError: missing, not TOML, an unknown key, a std of zero.
        """
        try:
            made = cls.model_validate(tomllib.loads(Path(path).read_text("utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise DataError(f"cannot read the preprocessing {path}: {error}") from error
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise DataError(
                f"preprocessing {path}: {where}: {problem['msg']}; "
                f"keys are {', '.join(cls.model_fields)}"
            ) from error
        numbers = [made.scale, *np.atleast_1d(made.mean), *np.atleast_1d(made.std)]
        if not np.isfinite(numbers).all() or not np.all(made.std):
            raise DataError(f"preprocessing {path}: scale, mean and std are finite, std is not 0")
        return made

    def __call__(self, pictures: Array) -> Array:
        """uint8 in ``layout`` -> float32 in ``output_layout``."""
        if self.layout == "NHW":
            pictures = pictures[..., None]
        elif self.layout == "NCHW":
            pictures = pictures.transpose(0, 2, 3, 1)
        if self.resize is not None:
            pictures = np.stack([self._resized(picture) for picture in pictures])
        if self.crop is not None:
            pictures = _cropped(pictures, self.crop)
        if self.invert:
            pictures = 255 - pictures
        if self.channels == "BGR":
            pictures = pictures[..., ::-1]
        mean, std = self._per_channel
        if mean.size not in (1, pictures.shape[-1]) or std.size not in (1, pictures.shape[-1]):
            raise DataError(
                f"preprocessing: mean and std have {mean.size} and {std.size} values for pictures "
                f"of {pictures.shape[-1]} channels"
            )
        x = (pictures.astype(np.float32) * np.float32(self.scale) - mean) / std
        if self.output_layout == "NHWC":
            return x
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        return x if self.output_layout == "NCHW" else x.reshape(x.shape[0], -1)

    @cached_property
    def _per_channel(self) -> tuple[Array, Array]:
        return np.array(self.mean, np.float32, ndmin=1), np.array(self.std, np.float32, ndmin=1)

    def _resized(self, picture: Array) -> Array:
        image = pillow()
        height, width = picture.shape[:2]
        if isinstance(self.resize, tuple):
            size = self.resize[::-1]
        else:
            ratio = (self.resize or 1) / min(height, width)
            size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
        grey = picture.shape[2] == 1
        resized = image.fromarray(picture[..., 0] if grey else picture).resize(
            size, image.Resampling.BILINEAR
        )
        pixels = np.asarray(resized, np.uint8)
        return pixels[..., None] if grey else pixels


def decode_jpeg(stream: bytes) -> Array:
    """uint8 [H, W, 3], RGB.

    Raises:
        DataError: not a picture.
        EnvironmentLacks: Pillow is missing.
    """
    import io

    image = pillow()
    try:
        return np.asarray(image.open(io.BytesIO(stream)).convert("RGB"), np.uint8)
    except (OSError, ValueError, image.DecompressionBombError) as error:
        raise DataError(f"not a readable picture: {error}") from error


def pillow() -> Any:
    """The module ``PIL.Image``.

    Raises:
        EnvironmentLacks: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise EnvironmentLacks(
            "decoding and resizing pictures needs Pillow: pip install pillow"
        ) from error
    return Image


def _cropped(pictures: Array, crop: tuple[int, int]) -> Array:
    height, width = pictures.shape[1:3]
    if height < crop[0] or width < crop[1]:
        raise DataError(
            f"preprocessing: a crop of {list(crop)} does not fit pictures of {[height, width]}"
        )
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    return pictures[:, top : top + crop[0], left : left + crop[1]]
