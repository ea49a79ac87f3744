"""Self-attention as a module: it owns the projections and calls `jaxarch.attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float, Int

from jaxarch.attention import attention
from jaxarch.attention.cache import KeyValues, append, padding_bias
from jaxarch.transformer.layers import DEFAULT_INIT, Dense
from jaxarch.transformer.positions import UNSCALED, RotaryScaling, alibi, rotary, rotary_frequencies


class SelfAttention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017, sec. 3.2.2) with grouped queries (Ainslie et al. 2023).

    The projections are apart, not fused: published weights, orthogonalised updates and a cut by heads
    all want each matrix on its own.

    rotary_base: turns queries and keys by their position; None leaves them.
    rotary_scaling: of the frequencies.
    alibi: a bias against distance.
    qk_norm: makes the norm of each head's queries and keys (Henry et al. 2020); None for none.
    soft_cap: of the attention's logits; None for none.
    use_bias, qkv_bias: of the output's projection, and of the three others.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_base: float | None = None
    rotary_scaling: RotaryScaling = UNSCALED
    alibi: bool = False
    qk_norm: Callable[..., nn.Module] | None = None
    soft_cap: float | None = None
    use_bias: bool = False
    qkv_bias: bool = False
    out_init: Initializer = DEFAULT_INIT

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        positions: Int[Array, "#batch length"],
        past: KeyValues | None = None,
        index: int | Int[Array, ""] = 0,
        start: Int[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch length dim"], KeyValues | None]:
        """The output, and `past` with this call's keys and values written from slot `index` on.

        start: the first slot of each row that counts.
        """

        def project(heads: int, name: str) -> Float[Array, "batch length heads head_dim"]:
            y = Dense(heads * self.head_dim, self.qkv_bias, name=name)(x)
            return y.reshape(*x.shape[:2], heads, self.head_dim)

        q, k, v = project(self.heads, "query"), project(self.kv_heads, "key"), project(self.kv_heads, "value")
        if self.qk_norm is not None:
            q, k = self.qk_norm(name="query_norm")(q), self.qk_norm(name="key_norm")(k)
        # Frequencies that follow the length would leave turned keys behind: the cache holds them as they were, and
        # each call turns them all (Peng et al. 2023, sec. 3.3). Even so the tokens of before have been through their
        # layers with the frequencies of their time, as they would not in one pass over the longer text.
        late = self.rotary_scaling.kind == "dynamic"
        turn = None
        if self.rotary_base is not None:
            length = positions.max(axis=-1) + 1 if late else 0
            turn = rotary_frequencies(self.head_dim, self.rotary_base, self.rotary_scaling, length)
            q, k = rotary(q, positions, *turn), k if late else rotary(k, positions, *turn)
        bias, key_positions = None, positions
        if past is not None:
            past = append(past, k, v, index)
            k, v = (entry.swapaxes(1, 2) for entry in past)
            key_positions = jnp.arange(k.shape[1])[None] - (0 if start is None else start[:, None])
            bias = None if start is None else padding_bias(k.shape[1], start)
        if turn is not None and late:
            k = rotary(k, key_positions, *turn)
        if self.alibi:
            slopes = alibi(self.heads, positions, key_positions)
            bias = slopes if bias is None else bias + slopes
        y = cast(Array, attention(q, k, v, causal=True, q_offset=index, bias=bias, soft_cap=self.soft_cap))
        y = y.reshape(*x.shape[:2], self.heads * self.head_dim)
        return Dense(x.shape[-1], self.use_bias, self.out_init, name="out")(y), past
