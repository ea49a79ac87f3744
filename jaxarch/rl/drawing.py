"""Pictures of environments: classic control, MinAtar, grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from jaxarch.rl.environments import Environment
from jaxarch.rl.tables import Table
from jaxarch.run import ConfigError

FINE = 3  # pixels drawn for each that is kept, along either axis
WIDTH = 400  # pixels of a picture
INK, GREY, BLUE, ORANGE, GREEN, SAND = "#222222", "#999999", "#4c78a8", "#f58518", "#54a24b", "#cfae82"
TILES = {"H": "#223344", "C": "#553333", "#": "#444455", "G": "#54a24b", "S": "#f2e3b3", "F": "#dbeaf5", ".": "#eeeeee"}


class Drawing(NamedTuple):
    """picture: `state -> ` the picture. seconds: that a step takes in the picture."""

    picture: Callable[[Any], Image.Image]
    seconds: float


def drawing_of(environment: Environment) -> Drawing:
    """How an environment is drawn. Raises ConfigError where it cannot be."""
    if environment.source is not None:
        source, params = environment.source
        if isinstance(source, Table) and source.grid:
            return Drawing(lambda state: tiles(source.grid, int(state.position)), 0.3)
        if environment.name in DRAWN:
            draw, seconds = DRAWN[environment.name]
            return Drawing(lambda state: draw(source, params, state), seconds)
    raise ConfigError(f"{environment.name} cannot be drawn; these can: {', '.join((*DRAWN, 'CliffWalking'))}.")


class Canvas:
    """Of a part of the plane; lines and discs in its own measures, y upwards."""

    def __init__(self, left: float, right: float, low: float, high: float):
        self.left, self.high = left, high
        self.scale = WIDTH * FINE / (right - left)
        self.size = WIDTH, round(WIDTH * (high - low) / (right - left))
        self.image = Image.new("RGB", (self.size[0] * FINE, self.size[1] * FINE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def _at(self, points: Any) -> list[tuple[float, float]]:
        return [((float(x) - self.left) * self.scale, (self.high - float(y)) * self.scale) for x, y in points]

    def line(self, points: Any, color: str, width: float) -> None:
        """With round ends; its width in the plane's measure."""
        self.draw.line(self._at(points), fill=color, width=max(1, round(width * self.scale)), joint="curve")
        for point in points:
            self.disc(point, width / 2, color)

    def disc(self, centre: Any, radius: float, color: str) -> None:
        (x, y), reach = self._at([centre])[0], radius * self.scale
        self.draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=color)

    def area(self, points: Any, color: str) -> None:
        self.draw.polygon(self._at(points), fill=color)

    def done(self) -> Image.Image:
        return self.image.resize(self.size, Image.Resampling.LANCZOS)


# --- classic control ------------------------------------------------------------------------------


def cart_pole(source: Any, params: Any, state: Any) -> Image.Image:
    """Angles are from upright, to the right."""
    reach = 1.1 * float(params.x_threshold)
    canvas = Canvas(-reach, reach, -0.5, 1.6)
    x, theta, length = float(state.x), float(state.theta), 2 * float(params.length)
    canvas.line([(-reach, 0), (reach, 0)], GREY, 0.02)
    for end in (-float(params.x_threshold), float(params.x_threshold)):
        canvas.line([(end, -0.12), (end, 0.12)], GREY, 0.02)
    canvas.area([(x - 0.25, -0.15), (x + 0.25, -0.15), (x + 0.25, 0.15), (x - 0.25, 0.15)], INK)
    canvas.line([(x, 0.1), (x + length * np.sin(theta), 0.1 + length * np.cos(theta))], SAND, 0.1)
    canvas.disc((x, 0.1), 0.05, BLUE)
    return canvas.done()


def acrobot(source: Any, params: Any, state: Any) -> Image.Image:
    """The first angle is from hanging down, the second from the first; the goal is the line."""
    lengths = float(params.link_length_1), float(params.link_length_2)
    reach = 1.15 * sum(lengths)
    canvas = Canvas(-reach, reach, -reach, reach)
    canvas.line([(-reach, lengths[0]), (reach, lengths[0])], GREEN, 0.02)
    at, angle = np.zeros(2), 0.0
    for length, turn in zip(lengths, (state.joint_angle1, state.joint_angle2), strict=True):
        angle += float(turn)
        end = at + length * np.array([np.sin(angle), -np.cos(angle)])
        canvas.line([at, end], BLUE, 0.14)
        canvas.disc(at, 0.09, ORANGE)
        at = end
    return canvas.done()


def pendulum(source: Any, params: Any, state: Any) -> Image.Image:
    """The angle is from upright, to the left; the bar below is the torque, to the left where it turns so."""
    length = float(params.l)
    canvas = Canvas(-1.4 * length, 1.4 * length, -1.4 * length, 1.4 * length)
    theta = float(state.theta)
    canvas.line([(0, 0), (-length * np.sin(theta), length * np.cos(theta))], ORANGE, 0.2 * length)
    canvas.disc((0, 0), 0.05 * length, INK)
    share = float(np.reshape(state.last_u, ())) / float(params.max_torque)
    canvas.line([(0, -1.3 * length), (-share * length, -1.3 * length)], BLUE, 0.06 * length)
    return canvas.done()


def mountain_car(source: Any, params: Any, state: Any) -> Image.Image:
    def height(x: Any) -> Any:
        return 0.45 * np.sin(3 * x) + 0.55

    left, right = float(params.min_position), float(params.max_position)
    canvas = Canvas(left, right, 0.0, 1.25)
    xs = np.linspace(left, right, 100)
    canvas.area([(left, 0.0), *zip(xs, height(xs), strict=True), (right, 0.0)], "#e8e0d0")
    canvas.line(list(zip(xs, height(xs), strict=True)), INK, 0.01)
    goal, x = float(params.goal_position), float(state.position)
    canvas.line([(goal, height(goal)), (goal, height(goal) + 0.2)], INK, 0.01)
    canvas.area([(goal, height(goal) + 0.2), (goal, height(goal) + 0.12), (goal + 0.08, height(goal) + 0.16)], GREEN)
    slope = np.arctan(1.35 * np.cos(3 * x))
    along, up = np.array([np.cos(slope), np.sin(slope)]), np.array([-np.sin(slope), np.cos(slope)])
    at = np.array([x, height(x)]) + 0.035 * up
    canvas.area([at + a * along + b * up for a, b in ((-0.07, 0), (0.07, 0), (0.05, 0.06), (-0.05, 0.06))], BLUE)
    for wheel in (-0.045, 0.045):
        canvas.disc(at + wheel * along, 0.025, INK)
    return canvas.done()


# --- cells ----------------------------------------------------------------------------------------


def cells(colors: Float[np.ndarray, "rows columns 3"], gap: int = 1) -> Image.Image:
    """Squares of these colours, 0 to 1."""
    rows, columns = colors.shape[:2]
    side = max(WIDTH // max(rows, columns), 4)
    pixels = np.repeat(np.repeat(np.uint8(np.round(255 * colors)), side, axis=0), side, axis=1)
    for edge in range(gap):
        pixels[edge::side] = pixels[:, edge::side] = 190
    return Image.fromarray(pixels)


def minatar(source: Any, params: Any, state: Any) -> Image.Image:
    """Each of the channels in a colour of its own, later ones above."""
    seen = np.asarray(source.observe(jax.random.key(0), state, None, params), bool)
    from matplotlib import colormaps

    palette = np.array([colormaps["rainbow"](i / max(seen.shape[-1] - 1, 1))[:3] for i in range(seen.shape[-1])])
    colors = np.full((*seen.shape[:2], 3), 0.08)
    for channel in range(seen.shape[-1]):
        colors[seen[..., channel]] = palette[channel]
    return cells(colors, gap=0)


def tiles(grid: Sequence[str], position: int) -> Image.Image:
    """A map of letters, and who stands at this number of a tile."""
    columns = len(grid[0])
    canvas = Canvas(0.0, float(columns), -float(len(grid)), 0.0)
    for row, letters in enumerate(grid):
        for column, letter in enumerate(letters):
            corners = [(column + x, -row - y) for x, y in ((0.03, 0.03), (0.97, 0.03), (0.97, 0.97), (0.03, 0.97))]
            canvas.area(corners, TILES[letter])
    row, column = divmod(position, columns)
    canvas.disc((column + 0.5, -row - 0.5), 0.3, ORANGE)
    return canvas.done()


def frozen_lake(source: Any, params: Any, state: Any) -> Image.Image:
    grid = ["".join("SFHG"[tile] for tile in row) for row in np.asarray(source.desc)]
    return tiles(grid, int(state.position))


def maze(source: Any, params: Any, state: Any) -> Image.Image:
    """Walls dark, the goal green."""
    walls = np.asarray(source.occupied_map, bool)
    rows = [["#" if wall else "." for wall in row] for row in walls]
    goal, place = (np.asarray(x).astype(int) for x in (state.goal, state.pos))
    rows[goal[0]][goal[1]] = "G"
    return tiles(["".join(row) for row in rows], int(place[0] * walls.shape[1] + place[1]))


def catch(source: Any, params: Any, state: Any) -> Image.Image:
    colors = np.full((source.rows, source.columns, 3), 0.93)
    colors[int(state.paddle_y), int(state.paddle_x)] = (0.3, 0.47, 0.66)
    colors[min(int(state.ball_y), source.rows - 1), int(state.ball_x)] = (0.96, 0.52, 0.09)
    return cells(colors)


def deep_sea(source: Any, params: Any, state: Any) -> Image.Image:
    colors = np.full((source.size, source.size, 3), 0.93)
    colors[-1, -1] = (0.33, 0.64, 0.29)
    colors[min(int(state.row), source.size - 1), min(int(state.column), source.size - 1)] = (0.96, 0.52, 0.09)
    return cells(colors)


DRAWN: dict[str, tuple[Callable[[Any, Any, Any], Image.Image], float]] = {
    "CartPole-v1": (cart_pole, 0.02),
    "Acrobot-v1": (acrobot, 0.06),
    "Pendulum-v1": (pendulum, 0.05),
    "MountainCar-v0": (mountain_car, 0.03),
    "MountainCarContinuous-v0": (mountain_car, 0.03),
    **{f"{game}-MinAtar": (minatar, 0.06) for game in ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")},
    "FrozenLake-misc": (frozen_lake, 0.3),
    "FourRooms-misc": (maze, 0.2),
    "MetaMaze-misc": (maze, 0.2),
    "Catch-bsuite": (catch, 0.2),
    "DeepSea-bsuite": (deep_sea, 0.3),
}
