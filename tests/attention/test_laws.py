"""What holds for every implementation, whichever options it has."""

from __future__ import annotations

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.attention import attention

LENGTH = 150
ALL = pytest.mark.parametrize(
    "options",
    [
        {"implementation": "blocks", "causal": True},
        {"implementation": "blockwise", "causal": True},
        {"implementation": "blockwise"},
        {"implementation": "window", "causal": True, "window": 20},
        {"implementation": "window", "window": 33},
    ],
    ids=lambda options: "-".join(f"{value}" for value in options.values()),
)


def arrays(dtype, size=1.0):
    rng = np.random.default_rng(0)
    shapes = (2, LENGTH, 4, 48), (2, LENGTH, 2, 48), (2, LENGTH, 2, 8)  # 48 ** -0.5 is no bfloat16
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return q * jnp.asarray(size, dtype), k, v


def out_and_gradients(qkv, **options):
    def loss(qkv):
        out = attention(*qkv, **options)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=out.shape), jnp.bfloat16)
        wide = jnp.promote_types(out.dtype, jnp.float32)
        return (out.astype(wide) * weights).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
    return out, *grads


@ALL
def test_error_in_bfloat16(options):
    """Against float64 on the same numbers: at most twice dense bfloat16's, of a gradient three times (Dao 2023)."""
    with jax.enable_x64(True):
        narrow = arrays(jnp.bfloat16)
        exact = out_and_gradients([x.astype(jnp.float64) for x in narrow], **options | {"implementation": "dense"})
        dense = out_and_gradients(narrow, **options | {"implementation": "dense"})
        own = out_and_gradients(narrow, **options)

        def error(x, y):
            return float(jnp.abs(x.astype(jnp.float64) - y).max())

        for times, mine, reference, truth in zip((2, 3, 3, 3), own, dense, exact, strict=True):
            assert mine.dtype == jnp.bfloat16
            assert 0 < error(mine, truth) <= times * error(reference, truth), times


@ALL
def test_logits_of_ten_thousand_stay_finite(options):
    q, k, v = arrays(jnp.float32, size=1e4)
    out, *grads = out_and_gradients((q, k, v), **options)
    assert abs(jnp.einsum("bthd,bshd->bhts", q[:, :, ::2], k) / 48**0.5).max() > 1e4
    assert all(jnp.isfinite(x).all() for x in (out, *grads))
    # A float32 of 10,000 is exact to a thousandth, and so are the weights' logarithms.
    np.testing.assert_allclose(out, attention(q, k, v, **options | {"implementation": "dense"}), rtol=0.02, atol=0.02)


@ALL
def test_composes_with_vmap_jit_and_remat(options):
    """A gradient of a rematerialised function under `vmap`, against one row after another without."""
    qkv = tuple(x.reshape(2, 1, *x.shape[1:]) for x in arrays(jnp.float32))

    def energy(q, k, v):
        return jnp.square(attention(q, k, v, **options)).sum()

    gradients = jax.grad(energy, argnums=(0, 1, 2))
    together = jax.jit(jax.vmap(jax.grad(jax.checkpoint(energy), argnums=(0, 1, 2))))(*qkv)
    apart = [jax.jit(gradients)(*(x[row] for x in qkv)) for row in range(2)]
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        together,
        jax.tree.map(lambda *x: jnp.stack(x), *apart),
    )


@pytest.mark.parametrize("implementation", ["dense", "blocks", "blockwise", "window"])
def test_a_change_of_the_future_changes_nothing(implementation):
    q, k, v = arrays(jnp.float32)
    window = 20 if implementation == "window" else None
    run = jax.jit(partial(attention, causal=True, window=window, implementation=implementation))
    later = [x.at[:, 100:].set(7.0) for x in (k, v)]
    np.testing.assert_array_equal(run(q, k, v)[:, :100], run(q, *later)[:, :100])


@pytest.mark.parametrize(
    "implementation, options",
    [("dense", {}), ("blockwise", {}), ("dense", {"window": 5}), ("blockwise", {"window": 5})],
)
def test_decoding_over_a_cache_is_the_last_row_of_the_whole(implementation, options):
    """One query at each of three positions; the slots after it hold garbage."""
    q, k, v = arrays(jnp.float32)
    whole = attention(q, k, v, causal=True, implementation=implementation, **options)

    @jax.jit
    def one(number):
        filled = [jnp.where((jnp.arange(LENGTH) <= number)[:, None, None], x, jnp.nan) for x in (k, v)]
        query = jax.lax.dynamic_slice_in_dim(q, number, 1, axis=1)
        length = jnp.full(2, number + 1)
        return attention(
            query, *filled, causal=True, q_offset=number, kv_length=length, implementation=implementation, **options
        )

    for number in (0, 7, LENGTH - 1):
        np.testing.assert_allclose(one(number)[:, 0], whole[:, number], rtol=1e-5, atol=1e-6)


def test_forward_mode_where_the_implementation_has_it():
    """JVP against the reverse mode: dense and window are plain functions; the others have a rule for reverse mode."""
    q, k, v = arrays(jnp.float32)
    for options in ({"implementation": "dense"}, {"implementation": "window", "window": 20, "causal": True}):

        def energy(q, options=options):
            return jnp.square(attention(q, k, v, **options)).sum()

        forward = jax.jvp(energy, (q,), (q,))[1]
        assert forward == pytest.approx(float((jax.grad(energy)(q) * q).sum()), rel=1e-4)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda q: attention(q, k, v, causal=True, implementation="blockwise"), (q,), (q,))


@pytest.mark.parametrize("implementation", ["dense", "blockwise", "window"])
def test_a_window_beyond_all_positions_is_none(implementation):
    q, k, v = arrays(jnp.float32)
    far = attention(q, k, v, causal=True, window=2**31 - 1, implementation=implementation)
    np.testing.assert_allclose(far, attention(q, k, v, causal=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("least", [jnp.finfo(jnp.float32).min, -jnp.inf, -1e30])
def test_a_bias_does_not_bring_hidden_keys_back(least, implementation):
    """The first key weighed down to nothing: the first query, which sees it alone, gives its value all the same."""
    q, k, v = arrays(jnp.float32)
    bias = jnp.where(jnp.arange(LENGTH) < 1, least, 0.0)[None, None, None]
    out = attention(q, k, v, causal=True, bias=bias, implementation=implementation)
    np.testing.assert_allclose(out[:, 0], jnp.repeat(v[:, 0], 2, axis=1), rtol=1e-6)


@pytest.mark.devices(2)
def test_gradients_of_what_is_the_same_on_all_devices():
    """A batch cut over two devices; sinks, bias, keys and values the same on both: their gradients are sums."""
    q, k, v = arrays(jnp.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    extra = {"sinks": jnp.arange(4.0), "bias": jnp.ones((1, 1, 1, LENGTH))}
    for implementation, options in [("blockwise", extra), ("blocks", {}), ("window", {"sinks": extra["sinks"]})]:
        window = 9 if implementation == "window" else None

        def loss(q, k, v, options, implementation=implementation, window=window, cut=True):
            def own(q, k, v, options):
                return attention(q, k, v, causal=True, window=window, implementation=implementation, **options)

            specs = (rows, same, same, same)
            out = (
                jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=rows)(q, k, v, options)
                if cut
                else (own(q, jnp.concatenate([k, k]), jnp.concatenate([v, v]), options))
            )
            return jnp.square(out).sum()

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), static_argnames="cut")
        given = q, k[:1], v[:1], options
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradients(*given), gradients(*given, cut=False)
        )


def test_blocks_of_keys_that_nothing_sees_are_not_read():
    """NaN in them would show, in the output or in the gradients."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 1100, 1, 4)), jnp.float32) for _ in range(3))
    k, v = (x.at[:, 512:].set(jnp.nan) for x in (k, v))

    def energy(q, k, v):
        return jnp.square(attention(q, k, v, causal=True, implementation="blockwise")[:, :512]).sum()

    out, grads = jax.jit(jax.value_and_grad(energy, argnums=(0, 1, 2)))(q, k, v)
    assert jnp.isfinite(out) and jnp.isfinite(grads[0][:, :512]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bias": jnp.zeros((1, 1, 150, 100))}, r"bias is of shape \(1, 1, 150, 100\), not \(2, 4, 150, 150\)"),
        ({"q_segments": jnp.zeros((2, 9), int), "kv_segments": jnp.zeros((2, 150), int)}, "q_segments is of shape"),
        ({"kv_length": jnp.zeros(1, int)}, r"kv_length is of shape \(1,\), not \(2,\)"),
        ({"sinks": jnp.zeros(3)}, "sinks is of shape"),
        ({"soft_cap": 0.0}, "a soft_cap of 0.0 is not above 0"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(options, message):
    """Without the shapes' check at run time, as users run it."""
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(attention)(*arrays(jnp.float32), **options)
