"""Tables and what learns them, against plain loops in float64, closed forms and sampled steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tabular as experiment
from jaxarch.rl.agent import Rollout
from jaxarch.rl.algorithms import tabular
from jaxarch.rl.algorithms.tabular import Hypers, Learner, TabularConfig, make_agent
from jaxarch.rl.environments import make
from jaxarch.rl.tables import Table, as_environment, cliff_walking, make_table
from tests.rl.probes import CONSTANT
from tests.rl.together import train
from tests.run.running import assert_same, exit_code, log, resumed, run

GAMMA = 0.9


def random_table(seed=0, states=6, actions=3):
    rng = np.random.default_rng(seed)
    chances = rng.dirichlet(np.full(states, 0.5), (states, actions))
    rewards = rng.normal(size=(states, actions, states))
    terminal = np.arange(states) >= states - 2
    starts = np.eye(states)[0]
    return Table(*(jnp.asarray(x, jnp.float32) for x in (chances, rewards)), jnp.asarray(terminal), jnp.asarray(starts))


def swept(table, gamma, choose):
    """Q after many sweeps, `V = choose(Q)`, in float64."""
    chances, rewards = np.asarray(table.chances, np.float64), np.asarray(table.rewards, np.float64)
    terminal = np.asarray(table.terminal)
    values = np.zeros(rewards.shape[:2])
    for _ in range(200):
        following = choose(values)
        new = np.zeros_like(values)
        for s, a in np.ndindex(*values.shape):
            if not terminal[s]:
                for n, chance in enumerate(chances[s, a]):
                    new[s, a] += chance * (rewards[s, a, n] + gamma * following[n] * (not terminal[n]))
        values = new
    return values


def test_value_iteration():
    table = random_table()
    expected = swept(table, GAMMA, lambda values: values.max(axis=1))
    np.testing.assert_allclose(tabular.value_iteration(table, GAMMA), expected, atol=2e-5)


def test_policy_values():
    table = random_table(1)
    policy = np.random.default_rng(2).dirichlet(np.ones(3), 6)
    expected = swept(table, GAMMA, lambda values: (policy * values).sum(axis=1))
    np.testing.assert_allclose(tabular.policy_values(table, jnp.asarray(policy), GAMMA), expected, atol=1e-5)


def test_along_the_cliff():
    """The shortest way is 13 steps of -1; one into the cliff costs 100 and the whole way again."""
    table = cliff_walking()
    values = np.asarray(tabular.value_iteration(table, GAMMA))
    way = -(1 - GAMMA**13) / (1 - GAMMA)
    start = 36
    np.testing.assert_allclose(values[start].max(), way, rtol=1e-5)
    assert values[start].argmax() == 3  # up
    np.testing.assert_allclose(values[start, 2], -100 + GAMMA * way, rtol=1e-5)
    assert values[47].tolist() == [0, 0, 0, 0]


COUNT = 4000


def sampler(environment):
    """`(position, action) -> ` where many steps from there lead, their rewards, whether they terminate."""
    start = environment.reset(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), COUNT)

    @jax.jit
    def sampled(position, action):
        fields = {**vars(start[1])} if hasattr(start[1], "replace") else start[1]._asdict()
        state = type(start[1])(**{**fields, "position": position})
        return jax.vmap(lambda key: environment.step(key, state, action, start))(keys)

    def sample(position, action):
        made = sampled(jnp.int32(position), jnp.int32(action))
        return np.asarray(made.next_observation), np.asarray(made.reward), np.asarray(made.terminated)

    return sample


def assert_as_in(table, position, action, made):
    reached, rewards, terminated = made
    expected = np.asarray(table.chances[position, action])
    seen = np.bincount(reached, minlength=len(expected)) / COUNT
    assert np.abs(seen - expected).max() < 4 * 0.5 / np.sqrt(COUNT)
    assert (seen[expected == 0] == 0).all()
    np.testing.assert_array_equal(rewards, np.asarray(table.rewards)[position, action, reached])
    np.testing.assert_array_equal(terminated, np.asarray(table.terminal)[reached])


@pytest.mark.parametrize("options", [{}, {"map_name": "8x8", "success_rate": 0.6}, {"is_slippery": False}])
def test_the_lake_s_table_is_what_its_steps_do(options):
    environment, table = make_table("FrozenLake-misc", options)
    sample, width = sampler(environment), len(table.grid[0])
    for position in (0, 3 * width - 2, len(table.terminal) - 2):  # a corner, the middle, beside the goal
        for action in (0, 1, 2, 3):
            assert_as_in(table, position, action, sample(position, action))


def test_a_table_as_an_environment():
    table = random_table(3)
    environment = as_environment(table, "random", 2)
    assert_as_in(table, 1, 2, sampler(environment)(1, 2))
    # A time limit is told apart from the end, and the end wins where they fall together.
    start = environment.reset(jax.random.key(0))
    last = start[1]._replace(time=jnp.int32(1))
    keys = jax.random.split(jax.random.key(2), 50)
    made = jax.jit(jax.vmap(lambda key: environment.step(key, last, jnp.int32(0), start)))(keys)
    np.testing.assert_array_equal(made.truncated, ~made.terminated)
    assert (np.asarray(made.observation) == 0).all() and len(np.unique(made.next_observation)) > 2


# --- learned from steps --------------------------------------------------------------------------


def random_rollout(seed, time=25, envs=3, states=4, actions=2):
    """Random steps with random ends; inside an episode what follows is what was led to."""
    rng = np.random.default_rng(seed)
    reached = rng.integers(states, size=(time, envs))
    terminated = rng.random((time, envs)) < 0.15
    truncated = (rng.random((time, envs)) < 0.15) & ~terminated
    fresh = rng.integers(states, size=(time + 1, envs))
    observation = fresh[:-1].copy()
    for t in range(1, time):
        observation[t] = np.where(terminated[t - 1] | truncated[t - 1], fresh[t], reached[t - 1])
    action = rng.integers(actions, size=(time, envs))
    reward = rng.normal(size=(time, envs)).astype("f4")
    arrays = observation, terminated, action, reward, terminated, truncated, reached
    return Rollout(*map(jnp.asarray, arrays), (), ())


HYPERS = Hypers(learning_rate=0.7, decay=0.6, gamma=GAMMA)
EMPTY = jnp.zeros((4, 2))


def steps_of(rollout):
    """One after another, time after time."""
    time, envs = rollout.reward.shape
    for t in range(time):
        for e in range(envs):
            yield t, e, {name: np.asarray(getattr(rollout, name))[t, e] for name in rollout._fields[:-2]}


@pytest.mark.parametrize("greedy", [True, False])
def test_temporal_differences(greedy):
    rollout = random_rollout(0)
    next_action = np.random.default_rng(1).integers(2, size=rollout.reward.shape)
    values, visits = np.zeros((4, 2)), np.zeros((4, 2))
    for t, e, step in steps_of(rollout):
        s, a, following = step["observation"], step["action"], step["next_observation"]
        worth = values[following].max() if greedy else values[following, next_action[t, e]]
        visits[s, a] += 1
        target = step["reward"] + (0 if step["terminated"] else GAMMA * worth)
        values[s, a] += 0.7 / visits[s, a] ** 0.6 * (target - values[s, a])
    learner = Learner(EMPTY, EMPTY, None, HYPERS)
    update = jax.jit(tabular.temporal_differences, static_argnums=3)
    learned, _ = update(learner, rollout, jnp.asarray(next_action), greedy)
    np.testing.assert_allclose(learned.values, values, atol=1e-5)
    np.testing.assert_array_equal(learned.visits, visits)


def test_monte_carlo():
    """Episodes kept as lists of steps, also over the end of a rollout."""
    values, visits = np.zeros((4, 2)), np.zeros((4, 2))
    episodes = [[], [], []]
    parts = tabular.Episodes(*(jnp.zeros((3, 4, 2)) for _ in range(3)))
    learner, update = Learner(EMPTY, EMPTY, parts, HYPERS._replace(learning_rate=1.0)), jax.jit(tabular.monte_carlo)
    for seed in (0, 1):
        rollout = random_rollout(seed)
        learner, _ = update(learner, rollout)
        for t in range(len(rollout.reward)):
            new, total = np.zeros((4, 2)), np.zeros((4, 2))
            for e, episode in enumerate(episodes):
                step = {name: np.asarray(getattr(rollout, name))[t, e] for name in rollout._fields[:-2]}
                episode.append((step["observation"], step["action"], step["reward"]))
                if step["terminated"] or step["truncated"]:
                    returned = 0.0 if step["terminated"] else values[step["next_observation"]].max()
                    for s, a, reward in reversed(episode):
                        returned = reward + GAMMA * returned
                        new[s, a] += 1
                        total[s, a] += returned
                    episode.clear()
            visits += new
            seen = new > 0
            mean = total[seen] / new[seen]
            rate = np.minimum(1, new[seen] / visits[seen] ** 0.6)
            values[seen] += rate * (mean - values[seen])
    np.testing.assert_allclose(learner.values, values, atol=1e-5)
    np.testing.assert_array_equal(learner.visits, visits)


def test_sarsa_follows_what_was_done():
    """Inside an episode the target is the value of the very action that came next; after a time limit that of one that
    the policy would have taken there, not of the next episode's first.
    """
    no = jnp.zeros((3, 1), bool)
    steps = jnp.array([[[0], [1], [3]], [[0], [1], [1]], [[1], [2], [3]]])  # states, actions, what they led to
    truncated = no.at[1].set(True)
    rollout = Rollout(steps[0], no, steps[1], jnp.zeros((3, 1)), no, truncated, steps[2], (), ())
    environment = as_environment(random_table(states=4, actions=2), "random", 5)
    agent = make_agent(environment, TabularConfig("sarsa"), 1, 10)
    values = jnp.array([[0.0, 0.0], [8.0, 3.0], [9.0, 2.0], [1.0, 1.0]])
    learner = Learner(values, EMPTY, None, Hypers(1.0, 0.0, GAMMA, 0.0, 0.0))
    learned, _ = jax.jit(agent.learn)(learner, rollout, jax.random.key(0), jnp.int32(0))
    assert learned.values[0, 0] == pytest.approx(GAMMA * 3.0)
    assert learned.values[1, 1] == pytest.approx(GAMMA * 9.0)


def probes():
    """Of one step that earns 1 (state 0), 1 or -1 (1, 2), 1 or -1 by action (3); of two, the second 1 (4, 5); and 1 for
    ever, cut off (6).
    """
    chances, rewards, end = np.zeros((8, 2, 8)), np.zeros((8, 2, 8)), 7
    for state, following, earned in (
        (0, end, (1, 1)),
        (1, end, (1, 1)),
        (2, end, (-1, -1)),
        (3, end, (-1, 1)),
        (4, 5, (0, 0)),
        (5, end, (1, 1)),
        (6, 6, (1, 1)),
        (end, end, (0, 0)),
    ):
        chances[state, :, following] = 1
        rewards[state, :, following] = earned
    starts = np.array([1, 1, 1, 1, 1, 0, 1, 0]) / 6
    table = Table(*(jnp.asarray(x, jnp.float32) for x in (chances, rewards)), jnp.arange(8) == end, jnp.asarray(starts))
    return as_environment(table, "probes", 4)


@pytest.mark.parametrize("method", ["q_learning", "sarsa", "monte_carlo"])
def test_probes(method):
    """What earns for ever is cut off at every fourth step, which is no death."""
    hypers = Hypers(learning_rate=1.0, decay=0.0, gamma=GAMMA, epsilon=0.5, epsilon_final=0.0)
    agent = make_agent(probes(), TabularConfig(method), 8, 150)
    state, _ = train(probes(), agent, hypers, 8, 4, 150)
    values = [1, 1, -1, 1, GAMMA, 1, 1 / (1 - GAMMA)]
    np.testing.assert_allclose(state.learner.values.max(-1)[:7], values, rtol=1e-2)
    at_choice = jnp.array([3])
    assert agent.policy(state.learner, at_choice, jax.random.key(0), (), at_choice == 0, True)[0] == 1


def test_actions_are_drawn_epsilon_greedily():
    values = jnp.array([[1.0, 3.0, 2.0], [5.0, 0.0, 5.0]])
    expected = [[0.1, 0.8, 0.1], [0.45, 0.1, 0.45]]
    np.testing.assert_allclose(tabular.epsilon_greedy(values, 0.3), expected, rtol=1e-6)
    environment = as_environment(random_table(), "random", 5)
    agent = make_agent(environment, TabularConfig(), 4, 10)
    learner = Learner(jnp.tile(values[0], (6, 1)), jnp.zeros((6, 3)), None, Hypers(epsilon=0.5, epsilon_final=0.1))
    states = jnp.zeros(4000, jnp.int32)
    drawn = jax.jit(lambda index: agent.act(learner, states, jax.random.key(0), (), states == 0, index)[0])
    for index, share in ((0, 0.5), (5, 0.3), (10, 0.1), (20, 0.1)):
        seen = np.bincount(drawn(jnp.int32(index)), minlength=3) / 4000
        assert abs(seen[1] - (1 - 2 / 3 * share)) < 4 * 0.5 / np.sqrt(4000)


def test_what_has_no_table():
    from jaxarch.run import ConfigError

    with pytest.raises(ConfigError, match="value iteration needs the table of random"):
        make_agent(as_environment(random_table(), "random", 5), TabularConfig("value_iteration"), 1, 1)
    with pytest.raises(ConfigError, match="sarsa needs numbered states; what constant observes is not"):
        make_agent(CONSTANT, TabularConfig("sarsa"), 1, 1)
    with pytest.raises(ConfigError, match="q learning chooses among discrete actions"):
        make_agent(make("Pendulum-v1"), TabularConfig(), 1, 1)


# --- the experiment -------------------------------------------------------------------------------

TINY = ["--env-steps", 256, "--envs", 4, "--length", 8, "--eval-every", 4]


@pytest.mark.parametrize("way", [["monte_carlo"], ["sarsa", "--replicas", 2, "--scan", 2]], ids=["solo", "replicas"])
def test_stopped_and_resumed_is_uninterrupted(way, tmp_path):
    whole = run(experiment, tmp_path, "--method.method", *way, *TINY, "--checkpoint-every", 4)
    assert_same(whole, resumed(experiment, whole, 4))
    assert {"eval/return", "eval/value_error", "eval/regret", "train/td_error"} <= log(whole)[-1].keys()
    assert next((whole / "samples").rglob("values.png")).stat().st_size > 5000


def test_value_iteration_as_an_experiment(tmp_path):
    options = ["--env", "CliffWalking", "--env-steps", 100, "--envs", 1, "--length", 1]
    whole = run(experiment, tmp_path, "--method.method", "value_iteration", *options)
    assert log(whole)[-1]["eval/value_error"] < 1e-3
    assert log(whole)[-1]["eval/return"] == -13


def test_what_a_sweep_varies_is_measured_by_its_own_optimum():
    config = experiment.Config(
        env="CliffWalking", method=TabularConfig("value_iteration"), envs=1, length=1, gamma=0.95
    )
    whole, (_, table) = experiment.experiment(config), make_table("CliffWalking")
    state = whole.init(jax.random.key(0), whole.hypers._replace(gamma=0.5))
    state = state.replace(learner=state.learner._replace(values=tabular.value_iteration(table, 0.5)))
    assert whole.evaluate.measure(state, jax.random.key(1))["eval/action_value_error"] < 1e-5


@pytest.mark.parametrize(
    "options, said",
    [
        (["--env", "CartPole-v1"], "tables are known of FrozenLake-misc and CliffWalking"),
        (["--env", "CliffWalking", "--env-options", "wind=1"], "CliffWalking has none"),
        (["--gamma", 1.0], "--gamma 1 is not in [0, 1)"),
        (["--epsilon-final", 1.5], "--epsilon-final 1.5 is not in [0, 1]"),
        (["--envs", 0], "--envs 0 is below 1"),
        (["--sweep", "gamma=0.9,1"], "--sweep gamma=0.9,1: --gamma 1 is not in [0, 1)"),
    ],
)
def test_bad_options(options, said, tmp_path, capsys):
    assert exit_code(experiment, "--runs", tmp_path, *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_q_learning_finds_the_optimal_values(tmp_path):
    whole = run(experiment, tmp_path, "--replicas", 5, "--scan", 500)
    last = log(whole)[-1]
    assert max(last["eval/value_error/replicas"]) < 0.02
    assert max(last["eval/regret/replicas"]) < 0.01
