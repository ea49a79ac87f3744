from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.transformer.attention import SelfAttention
from jaxarch.transformer.blocks import Context
from jaxarch.transformer.layers import RelativeBias
from jaxarch.transformer.positions import (
    Rotary,
    alibi,
    alibi_slopes,
    packed_positions,
    relative_buckets,
    rotary,
    rotary_frequencies,
    sinusoidal,
)

RNG = np.random.default_rng(0)

# --- sines and turns ----------------------------------------------------------------------------


def test_sinusoidal_equals_the_definition():
    """PE(pos, 2i) = sin(pos / base^(2i/d)), PE(pos, 2i+1) = cos of the same."""
    positions = np.array([[0, 1, 7], [2, 2, 300]])
    expected = np.zeros((2, 3, 6))
    for b, t, i in np.ndindex(2, 3, 3):
        angle = positions[b, t] / 50.0 ** (2 * i / 6)
        expected[b, t, 2 * i], expected[b, t, 2 * i + 1] = np.sin(angle), np.cos(angle)
    np.testing.assert_allclose(sinusoidal(jnp.asarray(positions), 6, 50.0), expected, atol=1e-5)


def test_a_rotation_by_hand():
    """Four features, base 100: the pairs (0, 2) and (1, 3) turn by 1 and by 1/10 at each position."""
    x = jnp.asarray([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], jnp.float32)[None, :, None]
    turned = rotary(x, jnp.array([[1, 1, 2, 2]]), *rotary_frequencies(4, Rotary(100.0)))[0, :, 0]
    c, s = np.cos, np.sin
    expected = [[c(1), 0, s(1), 0], [0, c(0.1), 0, s(0.1)], [-s(2), 0, c(2), 0], [0, -s(0.2), 0, c(0.2)]]
    np.testing.assert_allclose(turned, expected, atol=1e-6)


def products(shift_q, shift_k):
    q, k = (jnp.asarray(np.random.default_rng(n).normal(size=(1, 6, 2, 8)), jnp.float32) for n in (1, 2))
    positions, frequencies = jnp.arange(6)[None], rotary_frequencies(8)
    q, k = rotary(q, positions + shift_q, *frequencies), rotary(k, positions + shift_k, *frequencies)
    return np.einsum("bthd,bshd->bhts", q, k)


@pytest.mark.parametrize("shift", [1, 37, -5])
def test_only_distances_matter(shift):
    np.testing.assert_allclose(products(shift, shift), products(0, 0), atol=2e-5)
    assert np.abs(products(shift, 0) - products(0, 0)).max() > 0.1, "and they do"


def test_turning_keeps_lengths_and_the_type():
    x = jnp.asarray(RNG.normal(size=(2, 3, 2, 8)), jnp.bfloat16)
    turned = rotary(x, jnp.array([[0, 5, 1000]]), *rotary_frequencies(8))
    assert turned.dtype == jnp.bfloat16
    norms = [np.linalg.norm(np.asarray(a, np.float64), axis=-1) for a in (turned, x)]
    np.testing.assert_allclose(*norms, rtol=0.01)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])


def test_rows_may_turn_at_different_rates():
    x = jnp.asarray(RNG.normal(size=(2, 3, 2, 4)), jnp.float32)
    positions, rates = jnp.array([[0, 5, 9]]), jnp.array([[1.0, 0.1], [0.5, 0.3]])
    turned = rotary(x, positions, rates)
    for row in range(2):
        np.testing.assert_allclose(turned[row], rotary(x[row][None], positions, rates[row])[0], atol=1e-6)


# --- longer texts than in training --------------------------------------------------------------

# rotary, dim, length of the text, and the parts of base ** (-2 i / dim) that are left of each frequency
BY_HAND = {
    "linear": (Rotary(100.0, "linear", 4.0), 4, 0, [1 / 4, 1 / 4]),
    # 12 tokens for 8: 2 * 12 / 8 - 1 = 2, to the power 4 / (4 - 2) it is 4: the base 400, whose root is 20, not 10.
    "dynamic": (Rotary(100.0, "dynamic", 2.0, 8), 4, 12, [1, 1 / 2]),
    # The frequencies 10 ** (-i / 2) turn 2011 / 2 pi = 320.06 * 10 ** (-i / 2) times in 2011 tokens: 32 times between
    # pairs 2 and 3, once between 5 and 6. So pairs 3, 4, 5 keep 3/4, 2/4, 1/4, and a quarter is left of the rest.
    "yarn": (Rotary(1e4, "yarn", 4.0, 2011), 16, 0, [1, 1, 1, 13 / 16, 10 / 16, 7 / 16, 1 / 4, 1 / 4]),
    # 250.03, 25.003, 2.5003 and 0.25003 turns in 1571 tokens: 2.5 is midway between 1 and 4.
    "llama3": (Rotary(1e4, "llama3", 8.0, 1571), 8, 0, [1, 1, 9 / 16, 1 / 8]),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_scaled_frequencies_by_hand(kind):
    given, dim, length, left = BY_HAND[kind]
    frequencies, factor = rotary_frequencies(dim, given, length)
    np.testing.assert_allclose(frequencies, given.base ** (-np.arange(0, dim, 2) / dim) * left, rtol=3e-4)
    np.testing.assert_allclose(factor, 1.1386294 if kind == "yarn" else 1, rtol=1e-7)  # 0.1 ln 4 + 1
    _, factor = rotary_frequencies(dim, dataclasses.replace(given, attention_factor=1.25), length)
    assert factor == (1.25 if kind == "yarn" else 1)


def test_what_turns_often_is_kept_and_what_turns_seldom_divided():
    """Both papers' rule at both ends of the ramp (Peng et al. 2023, eq. of gamma), with bounds of one's own."""
    plain = 5e5 ** (-np.arange(0, 128, 2) / 128)
    turns = 4096 * plain / (2 * np.pi)
    for given, often, seldom in (
        (Rotary(5e5, "yarn", 16.0, 4096), 32, 1),
        (Rotary(5e5, "yarn", 16.0, 4096, 20.0, 3.0), 20, 3),
        (Rotary(5e5, "llama3", 16.0, 4096), 4, 1),
        (Rotary(5e5, "llama3", 16.0, 4096, 9.0, 2.0), 9, 2),
    ):
        parts = np.asarray(rotary_frequencies(128, given)[0]) / plain
        np.testing.assert_allclose(parts[turns > often], 1, rtol=1e-5)
        np.testing.assert_allclose(parts[turns < seldom], 1 / 16, rtol=1e-5)
        between = parts[(turns < 0.8 * often) & (turns > 1.3 * seldom)]
        assert len(between) and (between > 1 / 16).all() and (between < 1).all()
        assert (np.diff(parts) < 1e-6).all()


@pytest.mark.parametrize("kind", BY_HAND)
def test_a_factor_of_1_is_the_identity(kind):
    """Of dynamic up to its length, where every factor is."""
    plain, _ = rotary_frequencies(64)
    frequencies, factor = rotary_frequencies(64, Rotary(scaling=kind, factor=1.0, length=512), length=512)
    np.testing.assert_allclose(frequencies, plain, rtol=1e-6)
    assert factor == 1


def test_dynamic_follows_the_length_of_each_row():
    rows, _ = rotary_frequencies(6, Rotary(100.0, "dynamic", 3.0, 8), jnp.array([5, 8, 9, 24]))
    plain = 100.0 ** (-np.arange(0, 6, 2) / 6)
    for row, grown in zip(rows, [1, 1, 3 * 9 / 8 - 2, 3 * 3 - 2], strict=True):
        np.testing.assert_allclose(row, (100 * grown**1.5) ** (-np.arange(0, 6, 2) / 6), rtol=1e-5)
    np.testing.assert_allclose(rows[1], plain, rtol=1e-6)


def test_turned_vectors_are_multiplied_by_the_factor():
    x = jnp.asarray(RNG.normal(size=(1, 3, 2, 8)), jnp.float32)
    frequencies, _ = rotary_frequencies(8)
    positions = jnp.array([[0, 3, 9]])
    np.testing.assert_allclose(
        rotary(x, positions, frequencies, 1.5), 1.5 * rotary(x, positions, frequencies), rtol=1e-5, atol=1e-6
    )


# The names of `transformers`, and those here, beside base, factor and length.
NUMBERS = {
    "linear": [({}, {})],
    "dynamic": [({}, {})],
    "yarn": [
        ({}, {}),
        ({"beta_fast": 20.0, "beta_slow": 2.0}, {"fast_turns": 20.0, "slow_turns": 2.0}),
        ({"attention_factor": 1.5}, {"attention_factor": 1.5}),
    ],
    "llama3": [
        ({"low_freq_factor": 1.0, "high_freq_factor": 4.0}, {}),
        ({"low_freq_factor": 1.5, "high_freq_factor": 9.0}, {"fast_turns": 9.0, "slow_turns": 1.5}),
    ],
}


@pytest.mark.parametrize("dim,base", [(16, 1e4), (128, 5e5)])
@pytest.mark.parametrize("kind", NUMBERS)
def test_frequencies_equal_huggingface(kind, dim, base):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for factor, original, length in ((2.0, 40, 100), (8.0, 8192, 70_000), (3.5, 2048, 100)):
        for theirs, ours in NUMBERS[kind]:
            rope = {"rope_type": kind, "rope_theta": base, "factor": factor}
            config = transformers.LlamaConfig(
                hidden_size=2 * dim,
                num_attention_heads=2,
                max_position_embeddings=original,
                rope_parameters=rope | {"original_max_position_embeddings": original} | theirs,
            )
            expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
            given = Rotary(base, kind, factor, original, **ours)
            frequencies, scale = rotary_frequencies(dim, given, length)
            np.testing.assert_allclose(frequencies, expected.numpy(), rtol=3e-6)
            np.testing.assert_allclose(scale, expected_factor, rtol=1e-12)


# --- ALiBi --------------------------------------------------------------------------------------


def test_slopes_by_hand():
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    np.testing.assert_array_equal(alibi_slopes(8), np.float32(eight))
    np.testing.assert_array_equal(alibi_slopes(4), np.float32([1 / 4, 1 / 16, 1 / 64, 1 / 256]))
    np.testing.assert_array_equal(alibi_slopes(1), np.float32([1 / 256]))
    # Of sixteen, 2 ** (-i / 2), the first, third, fifth and seventh.
    np.testing.assert_allclose(alibi_slopes(12), [*eight, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5], rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(3), [1 / 16, 1 / 256, 1 / 4], rtol=1e-6)


def test_alibi_by_hand():
    bias = alibi(2, jnp.arange(3)[None], jnp.arange(3)[None])
    distances = np.array([[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    np.testing.assert_allclose(bias, -np.stack([distances / 16, distances / 256])[None], rtol=1e-6)
    later = alibi(2, 2 + jnp.arange(1)[None], jnp.arange(3)[None])
    np.testing.assert_array_equal(later, bias[:, :, 2:])
    rows = alibi(2, jnp.array([[0], [2]]), jnp.array([[0, 1, 2]]))
    np.testing.assert_array_equal(rows, jnp.concatenate([bias[:, :, :1], later]))


def test_attention_with_alibi_alone_is_the_softmax_of_the_distances():
    """Queries of zeros, so that the bias is all there is; four heads over two heads of values."""
    x = jnp.asarray(RNG.normal(size=(1, 5, 8)), jnp.float32)
    module = SelfAttention(4, 2, 2, alibi=True)
    kernels = {name: RNG.normal(size=(8, 4)).astype(np.float32) for name in ("key", "value")}
    kernels |= {"query": np.zeros((8, 8), np.float32), "out": np.eye(8, dtype=np.float32)}
    params = {name: {"kernel": jnp.asarray(kernel)} for name, kernel in kernels.items()}
    actual, _ = module.apply({"params": params}, x, Context(jnp.arange(5)[None]))
    values = np.float64(x[0]) @ kernels["value"]
    for t in range(5):
        for head, slope in enumerate([1 / 4, 1 / 16, 1 / 64, 1 / 256]):
            weights = np.exp(-slope * (t - np.arange(t + 1)))
            own = values[: t + 1, 2 * (head // 2) : 2 * (head // 2) + 2]
            expected = (weights / weights.sum()) @ own
            np.testing.assert_allclose(actual[0, t, 2 * head : 2 * head + 2], expected, rtol=1e-4, atol=1e-5)


# --- T5's buckets -------------------------------------------------------------------------------


def test_buckets_on_both_sides_by_hand():
    """Of 16 a side, 8 hold one distance each; the others begin at 8, 11.3, 16, 22.6, 32, 45.3, 64 and 90.5."""
    distances = [0, 1, 7, 8, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 127, 128, 5000]
    expected = np.array([0, 1, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15, 15])
    before = relative_buckets(-jnp.asarray(distances), bidirectional=True)
    np.testing.assert_array_equal(before, expected)
    after = relative_buckets(jnp.asarray(distances), bidirectional=True)
    np.testing.assert_array_equal(after, np.where(expected > 0, expected + 16, 0))


def test_buckets_of_the_past_by_hand():
    """16 of one distance each; then 8 ** (i / 16) apart, so 45.3 begins the 24th, 112.4 the 31st."""
    relative = jnp.array([5000, 1, 0, -1, -15, -16, -18, -19, -45, -46, -112, -113, -128, -5000])
    expected = [0, 0, 0, 1, 15, 16, 16, 17, 23, 24, 30, 31, 31, 31]
    np.testing.assert_array_equal(relative_buckets(relative, bidirectional=False), expected)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_huggingface(bidirectional):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    grid = np.arange(-1100, 1101)
    for buckets, max_distance in ((32, 128), (16, 64), (8, 20), (64, 256), (32, 1000), (5, 9), (4, 128)):
        expected = t5.T5Attention._relative_position_bucket(torch.tensor(grid), bidirectional, buckets, max_distance)
        actual = relative_buckets(jnp.asarray(grid), bidirectional, buckets, max_distance)
        np.testing.assert_array_equal(actual, expected.numpy())


def test_buckets_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="3 buckets are too few; 4 would do"):
        relative_buckets(jnp.arange(3), bidirectional=True, buckets=3)
    with pytest.raises(ValueError, match="max_distance 16 is not above the 16 buckets of one distance each"):
        relative_buckets(jnp.arange(3), bidirectional=False, max_distance=16)


def test_a_relative_bias_reads_its_table():
    table = RNG.normal(size=(8, 3)).astype(np.float32)
    module = RelativeBias(3, bidirectional=True, buckets=8, max_distance=16)
    positions, keys = jnp.array([[4, 5]]), jnp.arange(7)[None]
    bias = module.apply({"params": {"embedding": table}}, positions, keys)
    # 4 buckets a side: 0, 1, from 2 on, and from 2 * 8 ** (1 / 2) = 5.7 on; keys after the query 4 more.
    numbers = np.array([[2, 2, 2, 1, 0, 5, 6], [2, 2, 2, 2, 1, 0, 5]])
    np.testing.assert_array_equal(bias, table[numbers].transpose(2, 0, 1)[None])


def test_positions_of_packed_texts_begin_anew():
    segments = np.array([[3, 3, 1, 1, 1, 0], [0, 0, 1, 1, 2, 2]])
    np.testing.assert_array_equal(packed_positions(segments), [[0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 0, 1]])
