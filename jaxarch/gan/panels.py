"""Pictures of pictures: grids, rows with names, and GIFs, large enough to be looked at.

Pictures are `[..., height, width, channels]` of 1 (grey), 3 (colours) or 4 channels (the last is opacity): bytes, or
numbers in [-1, 1] as networks have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxarch.data.images import unscaled
from jaxarch.run.protocol import ConfigError

if TYPE_CHECKING:
    from PIL import Image

SEEN = 512  # pixels that the longer side of a saved picture has at least
FAKES = "fakes.png"  # what a GAN's reports call their pictures over the same latents
MOST_FRAMES = 120

Pixels = UInt8[np.ndarray, "_ _ _"]  # height, width, channels


def grid(
    pictures: UInt8[np.ndarray, "pictures height width channels"]
    | Float[Array | np.ndarray, "pictures height width channels"],
    columns: int = 0,
    gap: int = 1,
) -> Pixels:
    """The pictures row by row, `gap` white pixels between them (of no opacity where they have that).

    columns: 0: as many as rows, or one more.
    """
    pixels = _bytes(pictures)
    count, height, width, channels = pixels.shape
    columns = min(columns or -int(-(count**0.5) // 1), count)
    rows = -(-count // columns) if count else 0
    ground = np.array([255, 255, 255, 0] if channels == 4 else [255] * channels, np.uint8)
    out = np.tile(ground, (max(rows * (height + gap) - gap, 0), max(columns * (width + gap) - gap, 0), 1))
    for number, one in enumerate(pixels):
        y, x = (number // columns) * (height + gap), (number % columns) * (width + gap)
        out[y : y + height, x : x + width] = one
    return out


def named_rows(
    names: Sequence[str],
    pictures: UInt8[np.ndarray, "rows columns height width channels"]
    | Float[Array | np.ndarray, "rows columns height width channels"],
    scale: int = 0,
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Each row of pictures with its name before it, enlarged `scale` times (0: to some 64 pixels of height each)."""
    from PIL import Image, ImageDraw, ImageFont

    pixels = _bytes(pictures)
    scale = scale or max(1, round(64 / pixels.shape[2]))
    rows = [enlarged(_white(grid(row, len(row))), scale) for row in pixels]
    font = ImageFont.load_default(max(10, min(16, rows[0].shape[0] // 3)))
    margin = 8 + int(max(font.getlength(name) for name in names))
    gap = max(2, scale)
    height = rows[0].shape[0] + gap
    out = Image.new("RGB", (margin + rows[0].shape[1], height * len(rows) - gap), "white")
    draw = ImageDraw.Draw(out)
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        draw.text((2, number * height + row.shape[0] // 2), name, "black", font, anchor="lm")
        out.paste(Image.fromarray(row), (margin, number * height))
    return np.asarray(out)


def enlarged(picture: Pixels, scale: int) -> Pixels:
    """Each pixel as `scale` times `scale` of them."""
    return picture.repeat(scale, 0).repeat(scale, 1)


def save(picture: Pixels, path: Path, scale: int = 0) -> None:
    """Writes a PNG, each pixel enlarged `scale` times (0: so that the longer side has 512 pixels at least)."""
    scale = scale or -(-SEEN // max(picture.shape[:2]))
    _image(enlarged(picture, scale)).save(path)


def gif(frames: Sequence[Pixels], path: Path, seconds: float = 0.2, hold: float = 2.0, scale: int = 0) -> None:
    """Writes a GIF without end, whose last frame is held. What is transparent becomes white: a GIF has no half opacity.

    seconds: that each frame is shown; hold: the last.
    Raises ConfigError where there is no frame.
    """
    if not frames:
        raise ConfigError(f"{path} would have no frame.")
    scale = scale or -(-SEEN // max(frames[0].shape[:2]))
    images = [_image(enlarged(_white(frame), scale)) for frame in frames]
    durations = [round(1000 * seconds)] * (len(images) - 1) + [round(1000 * hold)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False)


def training_gif(folder: Path, name: str = FAKES) -> Path | None:
    """Of a run's reports so far, the pictures called `name` with their steps: `training.gif` beside the steps' folders.

    To be called in a report once it has written its picture; folder: the report's own, `samples/<step>` or, of a run of
    several members, `samples/<step>/member-<n>`. None, and nothing written, where the folder has no such name.
    """
    member = folder.name if folder.name.startswith("member-") else ""
    step = folder.parent if member else folder
    if not step.name.isdigit():
        return None
    found = [
        one / member / name for one in step.parent.iterdir() if one.name.isdigit() and int(one.name) <= int(step.name)
    ]
    paths = sorted((path for path in found if path.exists()), key=lambda path: int(path.parts[len(step.parts) - 1]))
    if not paths:
        return None
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), MOST_FRAMES)).round().astype(int))
    frames = [_titled(paths[number], len(step.parts) - 1) for number in chosen]
    frames = [frame for frame in frames if frame.shape == frames[-1].shape]  # another --columns after a resume
    out = step.parent / (f"training-{member}.gif" if member else "training.gif")
    gif(frames, out, seconds=float(np.clip(8 / len(frames), 0.06, 0.5)), scale=1)
    return out


def _titled(path: Path, part: int) -> UInt8[np.ndarray, "_ _ 3"]:
    """The picture above its step, which is that part of its path."""
    from PIL import Image, ImageDraw, ImageFont

    with Image.open(path) as opened:
        picture = np.asarray(opened.convert("RGBA"))
    height, width = picture.shape[:2]
    out = Image.new("RGB", (width, height + 24), "white")
    out.paste(Image.fromarray(_white(picture)))
    font = ImageFont.load_default(14)
    ImageDraw.Draw(out).text((width // 2, height + 12), f"step {int(path.parts[part]):,}", "black", font, anchor="mm")
    return np.asarray(out)


def _bytes(pictures: np.ndarray | Array) -> np.ndarray:
    pixels = np.asarray(pictures)
    return pixels if pixels.dtype == np.uint8 else unscaled(pixels)


def _white(picture: np.ndarray) -> UInt8[np.ndarray, "_ _ 3"]:
    """Red, green and blue, on white."""
    picture = picture if picture.shape[-1] > 1 else picture.repeat(3, -1)
    if picture.shape[-1] == 3:
        return picture
    opacity = picture[..., 3:] / np.float32(255)
    return np.round(picture[..., :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)


def _image(picture: np.ndarray) -> Image.Image:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(picture[..., 0] if picture.shape[-1] == 1 else picture))
