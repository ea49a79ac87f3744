"""Transformers, GANs and reinforcement learning as pure functions over a pytree of state.

Import what you use from its room (`jaxarch.attention`, `jaxarch.transformer`, `jaxarch.data`, `jaxarch.run`);
this module itself imports nothing, so that every command starts quickly.
"""

__version__ = "0.1.0"
