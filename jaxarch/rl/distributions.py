"""Distributions of actions, each a pytree of its parameters.

Parameters are `[*batch, ...]`. An action of a continuous space, `[*batch, size]`, is one event: its log-probability is
the density's, of all its independent numbers together, `[*batch]`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import betaln, digamma
from jaxtyping import Array, Float, Int, Key


class Categorical(NamedTuple):
    """Over `actions`; a logit of -inf forbids one."""

    logits: Float[Array, "*batch actions"]

    def sample(self, key: Key[Array, ""]) -> Int[Array, "*batch"]:
        return jax.random.categorical(key, self.logits)

    def log_probs(self) -> Float[Array, "*batch actions"]:
        """Of every action."""
        return jax.nn.log_softmax(self.logits)

    def log_prob(self, action: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        # A selection and a sum: the gradient of an indexed read is a scatter, which is slow.
        chosen = action[..., None] == jnp.arange(self.logits.shape[-1])
        return jnp.where(chosen, self.log_probs(), 0).sum(-1)

    def entropy(self) -> Float[Array, "*batch"]:
        # 0 log 0 = 0, in the value and in the gradient.
        logs = jnp.maximum(self.log_probs(), jnp.finfo(self.logits.dtype).min)
        return -jnp.sum(jax.nn.softmax(self.logits) * logs, -1)

    def mode(self) -> Int[Array, "*batch"]:
        return self.logits.argmax(-1)


class Gaussian(NamedTuple):
    """With a diagonal covariance. log_std: of the standard deviation; it may be one for the whole batch."""

    mean: Float[Array, "*batch size"]
    log_std: Float[Array, "*#batch size"]

    def sample(self, key: Key[Array, ""]) -> Float[Array, "*batch size"]:
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def log_prob(self, action: Float[Array, "*batch size"]) -> Float[Array, "*batch"]:
        deviations = (action - self.mean) * jnp.exp(-self.log_std)
        return jnp.sum(-0.5 * jnp.square(deviations) - self.log_std - 0.5 * jnp.log(2 * jnp.pi), -1)

    def entropy(self) -> Float[Array, "*batch"]:
        each = jnp.broadcast_to(self.log_std, self.mean.shape)
        return jnp.sum(each + 0.5 * jnp.log(2 * jnp.pi * jnp.e), -1)

    def mode(self) -> Float[Array, "*batch size"]:
        return self.mean


class TanhGaussian(NamedTuple):
    """tanh of a Gaussian: actions in (-1, 1) (Haarnoja et al. 2018, app. C). Its entropy has no closed form."""

    mean: Float[Array, "*batch size"]
    log_std: Float[Array, "*#batch size"]

    def sample(self, key: Key[Array, ""]) -> Float[Array, "*batch size"]:
        return jnp.tanh(Gaussian(*self).sample(key))

    def sample_and_log_prob(self, key: Key[Array, ""]) -> tuple[Float[Array, "*batch size"], Float[Array, "*batch"]]:
        """An action with its log-probability, exact also where rounding makes the action 1."""
        before = Gaussian(*self).sample(key)
        return jnp.tanh(before), self._log_prob(before)

    def log_prob(self, action: Float[Array, "*batch size"]) -> Float[Array, "*batch"]:
        """Actions nearer to 1 than rounding tells are taken for the nearest that it does."""
        most = 1 - jnp.finfo(action.dtype).epsneg
        return self._log_prob(jnp.arctanh(jnp.clip(action, -most, most)))

    def _log_prob(self, before: Float[Array, "*batch size"]) -> Float[Array, "*batch"]:
        """before: the Gaussian's numbers, u. log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which is finite."""
        log_slopes = 2 * (jnp.log(2.0) - before - jax.nn.softplus(-2 * before))
        return Gaussian(*self).log_prob(before) - log_slopes.sum(-1)

    def mode(self) -> Float[Array, "*batch size"]:
        """tanh of the Gaussian's mode, as is the custom; the density's own maximum can be elsewhere."""
        return jnp.tanh(self.mean)


class Beta(NamedTuple):
    """Beta distributions between bounds (Chou et al. 2017).

    alpha, beta: at least 1, so that the density has a single maximum.
    """

    alpha: Float[Array, "*batch size"]
    beta: Float[Array, "*batch size"]
    low: Float[Array, "*#batch size"] | float = 0.0
    high: Float[Array, "*#batch size"] | float = 1.0

    def sample(self, key: Key[Array, ""]) -> Float[Array, "*batch size"]:
        return self._scaled(jax.random.beta(key, self.alpha, self.beta, dtype=self.alpha.dtype))

    def log_prob(self, action: Float[Array, "*batch size"]) -> Float[Array, "*batch"]:
        """Actions nearer to a bound than rounding tells, or beyond it, are taken for the nearest that it does."""
        least = jnp.finfo(action.dtype).epsneg
        x = jnp.clip((action - self.low) / (self.high - self.low), least, 1 - least)
        densities = (self.alpha - 1) * jnp.log(x) + (self.beta - 1) * jnp.log1p(-x) - betaln(self.alpha, self.beta)
        return jnp.sum(densities - jnp.log(self.high - jnp.asarray(self.low)), -1)

    def entropy(self) -> Float[Array, "*batch"]:
        alpha, beta = self.alpha, self.beta
        each = betaln(alpha, beta) - (alpha - 1) * digamma(alpha) - (beta - 1) * digamma(beta)
        each += (alpha + beta - 2) * digamma(alpha + beta)
        return jnp.sum(each + jnp.log(self.high - jnp.asarray(self.low)), -1)

    def mode(self) -> Float[Array, "*batch size"]:
        """The middle where all are equally likely."""
        both = self.alpha + self.beta - 2
        return self._scaled(jnp.where(both > 0, (self.alpha - 1) / jnp.where(both > 0, both, 1), 0.5))

    def _scaled(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        return self.low + (self.high - self.low) * x
