"""Pictures of environments, and GIFs of finished runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import tabular
from jaxarch.rl import drawing, play
from jaxarch.rl.environments import centered, make, stacked
from jaxarch.rl.tables import make_table
from tests.run.running import run
from tests.run.sketches import line


def color(name):
    return np.array([int(name[i : i + 2], 16) for i in (1, 3, 5)])


def pixel(picture, x, y):
    """At these shares of its width and height."""
    return np.array(picture.convert("RGB").getpixel((int(x * picture.width), int(y * picture.height)))).astype(int)


def near(found, name):
    return np.abs(found - color(name)).max() < 25


@pytest.mark.parametrize("name", drawing.DRAWN)
def test_every_drawn_environment_is_seen_to_move(name):
    environment = make(name)
    start = jax.jit(environment.reset)(jax.random.key(0))
    picture = drawing.drawing_of(environment).picture
    before = np.asarray(picture(environment.inner(start[1])).convert("RGB"))
    assert len(np.unique(before.reshape(-1, 3), axis=0)) > 1
    step, state = jax.jit(environment.step), start[1]
    discrete = hasattr(environment.action_space, "n")
    for t in range(12):
        action = jnp.int32(t % environment.action_space.n) if discrete else jnp.ones(1)
        made = step(jax.random.key(t), state, action, start)
        state = made.state if made.next_state is None else made.next_state
        after = np.asarray(picture(environment.inner(state)).convert("RGB"))
        if (after != before).any():
            return
    raise AssertionError(f"{name} looks the same after every step")


def test_a_pole_leans_to_where_its_angle_says():
    environment = make("CartPole-v1")
    picture = drawing.drawing_of(environment).picture
    _, state = environment.reset(jax.random.key(0))
    for theta in (0.0, 0.6, -0.6):
        shown = picture(state.replace(x=0.0, theta=theta))
        # The plane is 5.28 wide; a tip at height 1 above the hinge, of which nine tenths are looked at.
        x, y = 0.9 * np.sin(theta), 0.1 + 0.9 * np.cos(theta)
        assert near(pixel(shown, 0.5 + x / 5.28, (1.6 - y) / 2.1), drawing.SAND)


def test_a_pendulum_and_an_acrobot_hang_and_stand():
    environment = make("Pendulum-v1")
    picture = drawing.drawing_of(environment).picture
    _, state = environment.reset(jax.random.key(0))
    state = state.replace(last_u=jnp.float32(0))
    for theta, place in ((0.0, (0.5, 0.2)), (np.pi, (0.5, 0.8)), (np.pi / 2, (0.2, 0.5))):
        assert near(pixel(picture(state.replace(theta=theta)), *place), drawing.ORANGE)
    environment = make("Acrobot-v1")
    picture = drawing.drawing_of(environment).picture
    _, state = environment.reset(jax.random.key(0))
    for first, second, end in ((0.0, 0.0, (0.5, 0.8)), (np.pi, 0.0, (0.5, 0.2)), (np.pi / 2, -np.pi / 2, (0.717, 0.6))):
        shown = picture(state.replace(joint_angle1=first, joint_angle2=second))
        assert near(pixel(shown, *end), drawing.BLUE)


def test_a_car_stands_on_the_hill():
    environment = make("MountainCar-v0")
    picture = drawing.drawing_of(environment).picture
    _, state = environment.reset(jax.random.key(0))
    for x in (-np.pi / 6, 0.2):
        hill = [0.45 * np.sin(3 * (x + d)) + 0.55 for d in (-1e-4, 0, 1e-4)]
        slope = np.arctan((hill[2] - hill[0]) / 2e-4)
        at = x - 0.07 * np.sin(slope), hill[1] + 0.07 * np.cos(slope)  # above the ground, at a right angle to it
        assert near(pixel(picture(state.replace(position=x)), (at[0] + 1.2) / 1.8, (1.25 - at[1]) / 1.25), drawing.BLUE)


def test_channels_of_minatar_have_colors_of_their_own():
    environment = make("Breakout-MinAtar")
    observation, state = environment.reset(jax.random.key(0))
    shown = drawing.drawing_of(environment).picture(state)
    colors = {}
    for row in range(10):
        for column in range(10):
            there = np.flatnonzero(np.asarray(observation[row, column]))
            seen = there[-1] if len(there) else None
            found = tuple(pixel(shown, (column + 0.5) / 10, (row + 0.5) / 10))
            assert colors.setdefault(seen, found) == found
    assert len(set(colors.values())) == len(colors) >= 3


def test_who_walks_the_map():
    environment = make_table("CliffWalking")[0]
    picture = drawing.drawing_of(environment).picture
    _, state = environment.reset(jax.random.key(0))
    shown = picture(state._replace(position=jnp.int32(12 + 3)))
    assert near(pixel(shown, 3.5 / 12, 1.5 / 4), drawing.ORANGE)
    assert near(pixel(shown, 0.5 / 12, 3.5 / 4), drawing.TILES["S"])
    assert near(pixel(shown, 11.5 / 12, 3.5 / 4), drawing.TILES["G"])


def test_frames_joined_are_drawn_as_one():
    environment = stacked(make("CartPole-v1"), 3)
    _, state = environment.reset(jax.random.key(0))
    alone = make("CartPole-v1").reset(jax.random.key(0))[1]
    pictures = (
        drawing.drawing_of(environment).picture(environment.inner(state)),
        drawing.drawing_of(make("CartPole-v1")).picture(alone),
    )
    np.testing.assert_array_equal(*map(np.asarray, pictures))
    made = environment.step(jax.random.key(1), state, jnp.int32(0), environment.reset(jax.random.key(2)))
    assert environment.inner(made.next_state).time == 1


def test_what_is_scaled_is_drawn_as_it_is():
    environment = centered(make("MountainCar-v0"))
    start = environment.reset(jax.random.key(0))
    made = environment.step(jax.random.key(1), start[1], jnp.int32(0), start)
    drawing.drawing_of(environment).picture(environment.inner(start[1]))
    assert environment.inner(start[1]).time == 0 and environment.inner(made.next_state).time == 1


# --- finished runs --------------------------------------------------------------------------------


def code(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["play", *map(str, arguments)])
    try:
        play.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    """The way over the lake where it does not slip, known to two members."""
    options = ["--env-options", "is_slippery=False", "--env-steps", 40, "--envs", 1, "--length", 1]
    folder = tmp_path_factory.mktemp("runs")
    return run(tabular, folder, "--method.method", "value_iteration", *options, "--replicas", 2)


def test_a_run_played(lake, monkeypatch, capsys):
    assert code(monkeypatch, lake, "--episodes", 2, "--member", 1) == 0
    said = capsys.readouterr().out
    assert said.count("6 steps, return 1") == 2
    with Image.open(lake / "played.gif") as played:
        assert played.n_frames == 14
        for frame, (x, y) in ((0, (0.5, 0.5)), (6, (3.5, 3.5)), (7, (0.5, 0.5))):
            played.seek(frame)
            assert near(pixel(played, x / 4, y / 4), drawing.ORANGE)


def test_what_cannot_be_played(lake, tmp_path, monkeypatch, capsys):
    (tmp_path / "there.gif").write_text("kept")
    for arguments, said in (
        ([tmp_path], "is not a run"),
        ([run(line, tmp_path, "--steps", 2)], "is not a run of one agent: there is nothing to play"),
        ([lake, "--member", 2], "--member 2: " + str(lake) + " has 2, from 0."),
        ([lake, "--episodes", 0], "--episodes 0 is below 1."),
        ([lake, "--output", "a.mp4"], "a.mp4 is not a .gif."),
        ([lake, "--output", tmp_path / "there.gif"], "--overwrite replaces it."),
    ):
        assert code(monkeypatch, *arguments) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "there.gif").read_text() == "kept"


def test_what_cannot_be_drawn():
    from jaxarch.run import ConfigError

    with pytest.raises(ConfigError, match="MemoryChain-bsuite cannot be drawn; these can: CartPole-v1, "):
        drawing.drawing_of(make("MemoryChain-bsuite"))
