"""Pictures of pictures: where each stands, how large, and what a GIF shows when."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxarch.gan import panels
from jaxarch.run.protocol import ConfigError


def numbered(count: int, height: int, width: int, channels: int) -> np.ndarray:
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, channels))


def test_a_grid_by_hand():
    found = panels.grid(numbered(5, 1, 2, 1), columns=3)[..., 0]
    assert found.tolist() == [
        [0, 0, 255, 1, 1, 255, 2, 2],
        [255] * 8,
        [3, 3, 255, 4, 4, 255, 255, 255],
    ]
    assert panels.grid(numbered(4, 1, 1, 1), columns=2, gap=0)[..., 0].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    "count, columns, expected", [(1, 0, (2, 3)), (5, 0, (5, 11)), (64, 0, (23, 31)), (2, 8, (2, 7))]
)
def test_the_shape_of_a_grid(count, columns, expected):
    assert panels.grid(numbered(count, 2, 3, 3), columns).shape == (*expected, 3)


def test_numbers_of_a_network_become_bytes():
    pictures = jnp.array([-1.0, 0.2, 1.0, 7.0])[:, None, None, None]
    assert panels.grid(pictures, columns=4, gap=0).tolist() == [[[0], [153], [255], [255]]]


def test_what_is_empty_in_a_grid_with_opacity_is_transparent():
    found = panels.grid(numbered(3, 1, 1, 4), columns=2)
    assert found[:, 1, 3].tolist() == [0, 0, 0] and found[2, 2].tolist() == [255, 255, 255, 0]


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_saved_and_read_again(channels, mode, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (3, 2, channels), np.uint8)
    panels.save(picture, tmp_path / "a.png", scale=2)
    with Image.open(tmp_path / "a.png") as found:
        assert found.mode == mode and found.size == (4, 6)
        pixels = np.asarray(found).reshape(6, 4, channels)
    for y, x in np.ndindex(6, 4):
        assert pixels[y, x].tolist() == picture[y // 2, x // 2].tolist()
    panels.save(picture, tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as found:
        assert found.size == (342, 513)  # 171 times


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_gif_shows_each_frame_for_its_time(channels, tmp_path):
    frames = [np.full((4, 6, channels), level, np.uint8) for level in (0, 255, 100)]
    frames[0][..., 3:] = 255
    panels.gif(frames, tmp_path / "a.gif", seconds=0.1, hold=1.5, scale=3)
    with Image.open(tmp_path / "a.gif") as found:
        assert found.n_frames == 3 and found.info["loop"] == 0
        shown = []
        for number in range(3):
            found.seek(number)
            shown.append((found.convert("RGB").getpixel((17, 11)), found.info["duration"]))
    last = 255 - 100 + round(100 * 100 / 255) if channels == 4 else 100  # of opacity 100, on white
    levels = (0, 255, last)
    for (pixel, duration), level, expected in zip(shown, levels, (100, 100, 1500)):
        assert duration == expected and np.abs(np.array(pixel) - level).max() <= 2
    with pytest.raises(ConfigError, match="would have no frame"):
        panels.gif([], tmp_path / "b.gif")


def test_named_rows():
    pictures = np.zeros((2, 3, 8, 8, 4), np.uint8)
    pictures[1] = 255
    pictures[..., 3] = 255
    found = panels.named_rows(["a", "a much longer name"], pictures)
    height = 8 * 8
    assert found.shape[0] == 2 * height + 8 and found.shape[2] == 3
    cells = found[:, -(3 * 8 + 2) * 8 :]
    assert (cells[:height, : 8 * 8] == 0).all() and (cells[height:] == 255).all()
    margin = found[:, : -cells.shape[1]]
    assert (margin[:height] < 128).any() and (margin[height + 8 :] < 128).sum() > (margin[:height] < 128).sum()


@pytest.mark.parametrize("member, name", [("", "training.gif"), ("member-1", "training-member-1.gif")])
def test_a_gif_of_training(member, name, tmp_path):
    """The steps in their order, up to the report's own."""
    for step, level in ((1000, 200), (20, 100), (0, 0), (5000, 50)):
        folder = tmp_path / "samples" / f"{step:07d}" / member
        folder.mkdir(parents=True)
        panels.save(np.full((8, 8, 3), level, np.uint8), folder / "fakes.png")
    (tmp_path / "samples" / "0000030").mkdir()
    out = panels.training_gif(tmp_path / "samples" / "0001000" / member)
    assert out == tmp_path / "samples" / name
    with Image.open(out) as found:
        assert found.n_frames == 3 and found.size == (512, 512 + 24)
        for number, level in enumerate((0, 100, 200)):
            found.seek(number)
            frame = np.asarray(found.convert("RGB")).astype(int)
            assert np.abs(frame[:512] - level).max() <= 2 and (frame[512:] < 128).any()
    with Image.open(panels.training_gif(tmp_path / "samples" / "0000000" / member)) as found:
        assert found.n_frames == 1


def test_no_gif_outside_of_a_run(tmp_path):
    panels.save(np.zeros((8, 8, 1), np.uint8), tmp_path / "fakes.png")
    assert panels.training_gif(tmp_path) is None and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "0000010").mkdir()
    assert panels.training_gif(tmp_path / "0000010") is None
