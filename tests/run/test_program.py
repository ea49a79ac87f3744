"""Laws of the compiled programs: a member is the solo run, the index stays unbatched, nothing is retraced."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import gan_toy
from jaxarch.gan import training as gan_training
from jaxarch.run.command import first_batch
from jaxarch.run.loop import batches
from jaxarch.run.metrics import divergences, divide
from jaxarch.run.program import Carry, Member, Programs, closed, members, restart
from jaxarch.run.protocol import ConfigError, Mean, checked_by
from tests.run.running import after
from tests.run.sketches import gan, line, loaded, tabular

MODULES = pytest.mark.parametrize("module", [line, gan, tabular], ids=["line", "gan", "tabular"])


@MODULES
@pytest.mark.parametrize("x64, tolerance", [(False, 1e-5), (True, 1e-10)])
def test_a_member_is_the_solo_run(module, x64, tolerance):
    """Replica i has seed + i; a point of the sweep has its value: 20 steps of each against a run of its own."""
    with jax.enable_x64(x64):
        experiment = module.experiment(module.Config())
        grid = members(experiment.hypers, ["learning-rate=0.01,0.03"], seed=5, replicas=2)
        assert [member.seed for member in grid] == [5, 6, 5, 6]
        programs, together = after(experiment, grid, 20)
        for number, member in enumerate(grid):
            _, alone = after(experiment, [member], 20)
            drop = lambda state: state.replace(key=None)  # noqa: E731
            chex.assert_trees_all_close(
                drop(programs.member(together.state, number)), drop(alone.state), atol=tolerance, rtol=tolerance
            )
            for name, sums in divide(together.sums).items():
                np.testing.assert_allclose(sums[number], divide(alone.sums)[name][0], rtol=10 * tolerance)
        if x64:
            assert jax.tree.leaves(together.state.hypers)[0].dtype == jnp.float64


def test_members_differ_from_each_other():
    experiment = gan.experiment(gan.Config())
    _, carry = after(experiment, members(experiment.hypers, [], 0, 3), 1)
    kernels = np.asarray(jax.tree.leaves(carry.state.generator)[1])
    assert not np.allclose(kernels[0], kernels[1]) and not np.allclose(kernels[1], kernels[2])


def test_a_predicate_on_the_index_stays_a_conditional_under_replicas():
    experiment = gan.experiment(gan.Config())
    programs, _ = after(experiment, members(experiment.hypers, [], 0, 3), 1)
    assert "conditional(" in programs._compiled["steps", 1].as_text()


def test_a_batched_index_would_lose_the_conditional():
    """The law above can fail: with the counter among the members' own arrays the same step has none."""
    experiment = gan.experiment(gan.Config())
    programs = Programs(experiment, members(experiment.hypers, [], 0, 3))
    state, batch = programs.init(), first_batch(experiment)
    step = jax.jit(jax.vmap(experiment.step, (0, None, 0)))
    assert "conditional(" not in step.lower(state, batch, jnp.zeros(3, jnp.int32)).compile().as_text()


@pytest.mark.parametrize("count", [1, 3])
def test_no_retrace(count):
    chex.clear_trace_counter()
    experiment = line.experiment(line.Config())
    traced = chex.assert_max_traces(experiment.step, n=1)
    programs = Programs(experiment._replace(step=traced), members(experiment.hypers, [], 0, 1))
    carry = Carry(programs.init(), programs.sums(first_batch(experiment)))
    for index in range(0, 3 * count, count):
        carry = programs.steps(carry, batches(experiment, index, count), index)
        seconds = seconds if index else programs.compile_seconds
    assert programs.compile_seconds == seconds, "compiled once"


def test_metrics_of_unequal_counts_are_weighted():
    """Two steps with 1 and 3 examples of value 4 and 8: the mean is 7, not 6. A metric never due has no value."""

    def step(state, batch, index):
        count = jnp.where(index == 0, 1.0, 3.0)
        nothing = Mean(jnp.zeros(()), jnp.zeros(()))
        return state, {
            "a": Mean(jnp.where(index == 0, 4.0, 8.0) * count, count),
            "b": jnp.float32(index),
            "none": nothing,
        }

    experiment = tabular.experiment(tabular.Config())._replace(step=step)
    _, carry = after(experiment, [Member(0, {})], 2)
    values = divide(carry.sums)
    assert values["a"] == [7.0] and values["b"] == [0.5] and "none" not in values
    assert divide(restart(carry.sums)) == {}


@pytest.mark.parametrize("scan", [1, 5])
def test_metrics_of_low_precision_are_added_in_float32(scan):
    """Ones in bfloat16 would stop at 256, and a condition that holds once in ten steps would count as always."""
    experiment = line.experiment(line.Config())

    def step(state, batch, index):
        one = (0 * state.params["w"][0] + 1).astype(jnp.bfloat16)
        return state, {"ones": Mean(one, one.astype(jnp.float32)), "once": index % 10 == 0, "sum": Mean(one, one)}

    programs = Programs(experiment._replace(step=step), [Member(0, {})])
    carry = Carry(programs.init(), programs.sums(first_batch(experiment)))
    for index in range(0, 600, scan):
        carry = programs.steps(carry, batches(experiment, index, scan), index)
    assert carry.sums["sum"].weight == carry.sums["ones"].total == 600
    np.testing.assert_allclose(divide(carry.sums)["once"], 0.1, rtol=1e-6)


def test_weights_that_the_state_lacks_are_named():
    experiment = line.experiment(line.Config())._replace(weights=("params", "target"))
    with pytest.raises(ConfigError, match="called target, which its state has no field for"):
        Programs(experiment, [Member(0, {})])


def test_the_first_step_that_is_not_finite_is_remembered():
    experiment = line.experiment(line.Config(nan_at=2))
    _, carry = after(experiment, members(experiment.hypers, [], 0, 2), 6)
    assert divergences(carry.sums) == {0: (3, "train/loss"), 1: (3, "train/loss")}
    assert divergences(restart(carry.sums)) == {0: (3, "train/loss"), 1: (3, "train/loss")}


def test_weights_read_in_init_are_not_baked_into_the_program(tmp_path):
    weights = np.random.default_rng(0).normal(size=(64, 1000)).astype(np.float32)
    save_file({"w": weights}, tmp_path / "w.safetensors")
    experiment = loaded.experiment(loaded.Config(weights=str(tmp_path / "w.safetensors")))
    for grid in (members(experiment.hypers, [], 0, 1), members(experiment.hypers, [], 0, 2)):
        programs, carry = after(experiment, grid, 0)
        np.testing.assert_array_equal(programs.member(carry.state, 0).params["w"], weights)
        assert len(programs._compiled["init"].as_text()) < 20_000
    constants = closed(experiment.init, jax.random.key(0), experiment.hypers).constants
    assert [constant.shape for constant in constants] == [(64, 1000)]


def test_buffers_that_are_the_same_at_the_start_can_be_donated(tmp_path):
    """Weights that were read stand twice in the state; the step donates both."""
    weights = np.random.default_rng(0).normal(size=(64, 1000)).astype(np.float32)
    save_file({"w": weights}, tmp_path / "w.safetensors")
    experiment = loaded.experiment(loaded.Config(weights=str(tmp_path / "w.safetensors")))
    _, carry = after(experiment, [Member(0, {})], 2)
    np.testing.assert_array_equal(carry.state.start["w"], weights)
    assert not np.allclose(carry.state.params["w"], weights)


@pytest.mark.parametrize(
    "sweep, message",
    [
        (["learning-rate=1,1.0"], "the same value twice"),
        (["rate=1,2"], "--sweep rate=1,2: no such number; this experiment can vary: learning-rate."),
        (["learning-rate=a"], "the values are not numbers"),
        (["learning-rate=1,nan"], "the values are not numbers"),
        (["learning-rate=1", "learning_rate=2"], "names learning_rate twice"),
    ],
)
def test_a_wrong_sweep_is_refused(sweep, message):
    with pytest.raises(ConfigError, match=message):
        members(line.Hypers(), sweep, 0, 1)


def test_values_that_the_experiment_refuses_are_refused_in_a_sweep():
    def check(hypers):
        if hypers.learning_rate > 1:
            raise ConfigError("a rate above 1.")

    assert len(members(line.Hypers(), ["learning-rate=0.1,1"], 0, 1, check)) == 2
    with pytest.raises(ConfigError, match="^--sweep learning-rate=0.1,2: a rate above 1.$"):
        members(line.Hypers(), ["learning-rate=0.1,2"], 0, 1, check)


def test_hypers_are_looked_at_by_the_configurations_whose_fields_they_are():
    config = gan_toy.Config()
    check = checked_by(config.game, config.optim)
    hypers = gan_training.hypers(config.game, config.optim)
    check(hypers)
    for field in ("gamma", "ratio"):
        with pytest.raises(ConfigError, match=f"{field} -1 is not"):
            check(hypers._replace(**{field: -1.0}))


def test_the_sweep_is_the_product_of_its_axes():
    grid = members(gan.Hypers(), ["learning-rate=1,2", "gamma=3,4,5"], seed=0, replicas=2)
    assert len(grid) == 12
    assert len({(member.seed, *member.point.values()) for member in grid}) == 12
