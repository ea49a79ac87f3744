"""A policy and a value as one network: what the on-policy algorithms share."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from gymnax.environments import spaces
from jaxtyping import Array, Float, Int, Key

from jaxarch.rl.distributions import Categorical, Gaussian
from jaxarch.rl.environments import Environment, action_size, actions_of, observation_shape
from jaxarch.rl.networks import Network, NetworkConfig

Policy = Categorical | Gaussian


class ActorCritic(nn.Module):
    """A distribution of actions and a value, each of observations `[*batch, *shape]`.

    categories: of a discrete observation space; 0: it is a box.
    outputs: numbers that tell the distribution: logits, or the means of a Gaussian whose deviation does not depend on
        the observation.
    shared: one network has both heads; else each has its own.
    """

    config: NetworkConfig
    shape: tuple[int, ...]
    categories: int
    outputs: int
    continuous: bool
    shared: bool

    @nn.compact
    def __call__(self, observations: Any) -> tuple[Policy, Float[Array, "*batch"]]:
        policy, value = (self.outputs, 0.01), (1, 1.0)
        if self.shared:
            found = Network(self.config, self.shape, self.categories, (policy, value), name="both")(observations)
            told, values = found[..., :-1], found[..., -1]
        else:
            told = Network(self.config, self.shape, self.categories, (policy,), name="actor")(observations)
            values = Network(self.config, self.shape, self.categories, (value,), name="critic")(observations)[..., 0]
        if not self.continuous:
            return Categorical(told), values
        log_std = self.param("log_std", nn.initializers.zeros, (self.outputs,))
        return Gaussian(told, jnp.broadcast_to(log_std, told.shape)), values


def actor_critic(environment: Environment, config: NetworkConfig, shared: bool, who: str) -> ActorCritic:
    """The network for this environment. Raises ConfigError, said by `who`, where its actions are of another kind."""
    space = environment.observation_space
    categories = int(space.n) if isinstance(space, spaces.Discrete) else 0
    continuous = isinstance(environment.action_space, spaces.Box)
    outputs = (action_size if continuous else actions_of)(environment, who)
    shape = () if categories else observation_shape(environment)
    return ActorCritic(config, shape, categories, outputs, continuous, shared)


def noise_of(network: ActorCritic, key: Key[Array, ""], envs: int) -> Float[Array, "envs outputs"]:
    """What makes an action of a distribution random (`chosen`)."""
    return (jax.random.normal if network.continuous else jax.random.gumbel)(key, (envs, network.outputs))


def chosen(policy: Policy, noise: Float[Array, "envs outputs"]) -> Int[Array, " envs"] | Float[Array, "envs outputs"]:
    """A sample: of logits the largest with Gumbel noise on it (Gumbel 1954)."""
    if isinstance(policy, Gaussian):
        return policy.mean + jnp.exp(policy.log_std) * noise
    return jnp.argmax(policy.logits + noise, axis=-1)
