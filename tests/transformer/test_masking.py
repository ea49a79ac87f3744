"""What is hidden, how often, and that nothing else counts."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxarch.data.text import Tokens
from jaxarch.transformer.encoder import EncoderConfig, encoder
from jaxarch.transformer.masking import candidates, masked, masked_words

VOCAB, MASK = 10, 10
RNG = np.random.default_rng(0)


def test_rates_by_their_binomial_bounds():
    """15 % chosen; of those 80 % masks, 10 % drawn evenly from the vocabulary, 10 % as they were. At 1 in 100,000."""
    tokens = RNG.integers(0, VOCAB, (500, 200))
    out = jax.tree.map(np.asarray, masked(jax.random.key(0), tokens, np.ones((500, 200), bool), 0.15, MASK, VOCAB))
    np.testing.assert_array_equal(out.targets, tokens)
    chosen = out.weights == 1
    assert set(np.unique(out.weights)) == {0, 1}
    np.testing.assert_array_equal(out.inputs[~chosen], tokens[~chosen])
    count = int(chosen.sum())
    # Of the drawn ones a tenth is, by chance, what was there.
    changed = chosen & (out.inputs != MASK) & (out.inputs != tokens)
    for number, total, rate in (
        (count, tokens.size, 0.15),
        (int((out.inputs[chosen] == MASK).sum()), count, 0.8),
        (int(changed.sum()), count, 0.1 * (1 - 1 / VOCAB)),
    ):
        assert stats.binomtest(number, total, rate).pvalue > 1e-5, (number, total, rate)
    assert stats.chisquare(np.bincount(out.inputs[changed], minlength=VOCAB)).pvalue > 1e-5
    # Every place is as likely as any other, and so is every token.
    assert stats.chisquare(chosen.sum(0)).pvalue > 1e-5
    shares = np.bincount(tokens[chosen], minlength=VOCAB), np.bincount(tokens.ravel()) * count / tokens.size
    assert stats.chisquare(*shares).pvalue > 1e-5


def test_what_is_no_candidate_stays():
    """Padding and the end of a document; the same key hides the same, another one other tokens."""
    tokens = RNG.integers(0, VOCAB, (40, 50)).astype(np.int32)
    weights = (np.arange(50) < 30).astype(np.float32) * np.ones((40, 1), np.float32)
    may = candidates(Tokens(tokens, tokens, weights), 3)
    np.testing.assert_array_equal(may, (weights == 1) & (tokens != 3))
    np.testing.assert_array_equal(candidates(Tokens(tokens, tokens, weights), None), weights == 1)
    one, again, other = (masked(jax.random.key(seed), tokens, may, 0.5, MASK, VOCAB) for seed in (0, 0, 1))
    assert not np.any(np.asarray(one.weights)[~np.asarray(may)])
    np.testing.assert_array_equal(one.inputs, again.inputs)
    assert np.any(one.weights != other.weights)


def test_the_objective_is_the_mean_over_hidden_tokens():
    """By the definition in numpy; a token that is not hidden has no part in it, whatever the model says of it."""
    model = encoder(EncoderConfig(1, 2, 8), VOCAB + 1, 12, head="masked_lm")
    params = jax.jit(model.init)(jax.random.key(0), *model.inputs())["params"]
    params = jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, params)
    tokens = jnp.asarray(RNG.integers(0, VOCAB, (6, 12)), jnp.int32)
    batch = Tokens(jnp.full((6, 12), 9), tokens, jnp.ones((6, 12)).at[5].set(0))
    key = jax.random.key(3)
    objective = jax.jit(masked_words(model, 0.3, MASK, VOCAB, end=2))
    total, weight = objective(params, batch, key)
    given = masked(jax.random.split(key)[0], tokens, candidates(batch, 2), 0.3, MASK, VOCAB)
    logits = np.float64(jax.jit(model.apply)({"params": params}, given.inputs))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    hidden = np.asarray(given.weights) == 1
    assert weight == hidden.sum() > 0 and not hidden[5].any() and not hidden[np.asarray(tokens) == 2].any()
    own = np.take_along_axis(log_probs, np.asarray(tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(total, -own[hidden].sum(), rtol=1e-5)
    assert objective(params, batch, jax.random.key(4))[1] != weight or weight == 0
