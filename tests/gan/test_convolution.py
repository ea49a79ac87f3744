"""Convolutions against their definition: sums of products, in plain NumPy and float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.gan import convolution as module
from jaxarch.gan.convolution import (
    Convolution,
    TransposedConvolution,
    convolution,
    kernel_gradient,
    transposed_convolution,
)

# rows, columns, stride, and zeros before each axis: DCGAN's, a stride of 1, one that does not divide the rows, two with
# zeros along one axis alone.
SIZES = [(4, 4, 2, (1, 1)), (3, 3, 1, (1, 1)), (3, 4, 2, (0, 1)), (2, 6, 2, (0, 2)), (3, 6, 3, (0, 1))]


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def some(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def by_hand(x, kernel, stride, before):
    """Each pixel of the result as a sum over the kernel; what lies beyond the edge does not count."""
    batch, height, width, _ = x.shape
    rows, columns, _, features = kernel.shape
    y = np.zeros((batch, height // stride, width // stride, features))
    for row in range(y.shape[1]):
        for column in range(y.shape[2]):
            for i in range(rows):
                for j in range(columns):
                    from_row, from_column = row * stride + i - before[0], column * stride + j - before[1]
                    if 0 <= from_row < height and 0 <= from_column < width:
                        y[:, row, column] += x[:, from_row, from_column] @ kernel[i, j]
    return y


def spread(y, kernel, stride, before):
    """The transposed convolution: each pixel adds its products with the kernel to the picture around it."""
    batch, height, width, _ = y.shape
    rows, columns, features_in, _ = kernel.shape
    x = np.zeros((batch, height * stride, width * stride, features_in))
    for row in range(height):
        for column in range(width):
            for i in range(rows):
                for j in range(columns):
                    to_row, to_column = row * stride + i - before[0], column * stride + j - before[1]
                    if 0 <= to_row < x.shape[1] and 0 <= to_column < x.shape[2]:
                        x[:, to_row, to_column] += y[:, row, column] @ kernel[i, j].T
    return x


def arrays(rows, columns, stride):
    """Pictures that are not square, and what a convolution makes of them."""
    x, y = some(2, 2 * stride, 3 * stride, 3), some(2, 2, 3, 5, seed=1)
    return x, some(rows, columns, 3, 5, seed=2), y


@pytest.mark.parametrize(("rows", "columns", "stride", "before"), SIZES)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # each has a form of its own
def test_all_three_against_sums(rows, columns, stride, before, platform, monkeypatch):
    monkeypatch.setattr(module.backend, "platform", lambda: platform)
    x, kernel, y = arrays(rows, columns, stride)
    expected = by_hand(x, kernel, stride, before)
    np.testing.assert_allclose(convolution(jnp.asarray(x), jnp.asarray(kernel), stride), expected, atol=1e-12)
    actual = transposed_convolution(jnp.asarray(y), jnp.asarray(kernel), stride)
    np.testing.assert_allclose(actual, spread(y, kernel, stride, before), atol=1e-12)
    # <c(x, k), y> is linear in k: its gradient's entries are its values at kernels of one 1.
    gradient = np.zeros(kernel.shape)
    for place in np.ndindex(*kernel.shape):
        one = np.zeros(kernel.shape)
        one[place] = 1
        gradient[place] = np.sum(by_hand(x, one, stride, before) * y)
    actual = kernel_gradient(jnp.asarray(x), jnp.asarray(y), (rows, columns), stride)
    np.testing.assert_allclose(actual, gradient, atol=1e-12)


def directional(function, arguments, directions, order=1, eps=1e-3):
    """A derivative along a line, by central differences of five values."""
    at = lambda t: float(function(*(a + t * d for a, d in zip(arguments, directions, strict=True))))  # noqa: E731
    values = [at(n * eps) for n in (-2, -1, 0, 1, 2)]
    weights = ([1, -8, 0, 8, -1], [-1, 16, -30, 16, -1])[order - 1]
    return np.dot(weights, values) / (12 * eps**order)


@pytest.mark.parametrize(("rows", "columns", "stride"), [(4, 4, 2), (3, 3, 1)])
@pytest.mark.parametrize("name", ["convolution", "transposed", "kernel"])
def test_gradients_and_second_derivatives(rows, columns, stride, name):
    x, kernel, y = map(jnp.asarray, arrays(rows, columns, stride))
    function, arguments = {
        "convolution": (lambda x, kernel: convolution(x, kernel, stride), (x, kernel)),
        "transposed": (lambda y, kernel: transposed_convolution(y, kernel, stride), (y, kernel)),
        "kernel": (lambda x, y: kernel_gradient(x, y, (rows, columns), stride), (x, y)),
    }[name]
    value = jax.jit(lambda *arguments: jnp.sum(jnp.sin(0.3 * function(*arguments))))
    directions = [jnp.asarray(some(*a.shape, seed=7 + n)) for n, a in enumerate(arguments)]

    def slope(*arguments):
        return sum(jnp.vdot(g, d) for g, d in zip(jax.grad(value, (0, 1))(*arguments), directions, strict=True))

    np.testing.assert_allclose(slope(*arguments), directional(value, arguments, directions), rtol=1e-6)
    second = jax.jit(jax.grad(slope, (0, 1)))(*arguments)
    second = sum(jnp.vdot(g, d) for g, d in zip(second, directions, strict=True))
    np.testing.assert_allclose(second, directional(value, arguments, directions, order=2), rtol=1e-4)


def test_the_gradient_of_a_squared_gradient():
    """R1's: of a critic sum(c(x, k)^2) / 2 the gradient is t(c(x, k), k), whose squared norm is differentiated by k."""
    x, kernel, _ = map(jnp.asarray, arrays(4, 4, 2))

    def penalty(kernel):
        critic = lambda x: 0.5 * jnp.sum(convolution(x, kernel, 2) ** 2)  # noqa: E731
        return jnp.sum(jax.grad(critic)(x) ** 2)

    def by_numpy(kernel):
        return np.sum(spread(by_hand(np.asarray(x), kernel, 2, (1, 1)), kernel, 2, (1, 1)) ** 2)

    direction = some(*kernel.shape, seed=3)
    expected = directional(by_numpy, (np.asarray(kernel),), (direction,))
    np.testing.assert_allclose(penalty(kernel), by_numpy(np.asarray(kernel)), rtol=1e-12)
    np.testing.assert_allclose(jnp.vdot(jax.jit(jax.grad(penalty))(kernel), direction), expected, rtol=1e-6)


def test_no_derivative_dilates_what_a_kernel_gradient_reads():
    """The one form that is slow: a convolution of a dilated input whose kernel is as large as a picture."""
    _, kernel, y = map(jnp.asarray, arrays(4, 4, 2))

    def penalty(y, kernel):
        critic = lambda y: jnp.sum(transposed_convolution(y, kernel, 2) ** 2)  # noqa: E731
        return jnp.sum(jax.grad(critic)(y) ** 2)

    program = str(jax.make_jaxpr(jax.grad(penalty, (0, 1)))(y, kernel))
    assert "conv_general_dilated" in program and "lhs_dilation=(2, 2)" not in program


@pytest.mark.parametrize("function", [convolution, transposed_convolution])
def test_under_vmap(function):
    """Over pictures and kernels, over pictures alone, over kernels alone."""
    first = jnp.asarray(some(2, 1, 2, 4, 3))
    kernel = jnp.asarray(some(2, 4, 4, *((3, 2) if function is convolution else (2, 3)), seed=2))
    gradient = jax.grad(lambda a, k: jnp.sum(function(a, k, 2) ** 3), (0, 1))
    alone = jax.jit(gradient)
    for mapped in ((0, 0), (0, None), (None, 0)):
        arguments = [array if axis == 0 else array[0] for array, axis in zip((first, kernel), mapped, strict=True)]
        actual = jax.jit(jax.vmap(gradient, mapped))(*arguments)
        for n in range(2):
            expected = alone(*(a[n] if axis == 0 else a for a, axis in zip(arguments, mapped, strict=True)))
            for one, many in zip(expected, actual, strict=True):
                np.testing.assert_allclose(many[n], one, rtol=1e-10)


def test_modules_have_their_kernels_and_biases():
    x = jnp.asarray(some(1, 4, 4, 3))
    down = Convolution(5, size=4, stride=2, use_bias=True)
    up = TransposedConvolution(3, use_bias=True)
    key = jax.random.key(0)
    down_params, up_params = down.init(key, x)["params"], up.init(key, jnp.ones((1, 2, 2, 5)))["params"]
    assert {name: leaf.shape for name, leaf in down_params.items()} == {"kernel": (4, 4, 3, 5), "bias": (5,)}
    assert {name: leaf.shape for name, leaf in up_params.items()} == {"kernel": (4, 4, 3, 5), "bias": (3,)}
    down_params = {"kernel": jnp.asarray(some(4, 4, 3, 5)), "bias": jnp.arange(5.0)}
    up_params = {"kernel": down_params["kernel"], "bias": jnp.arange(3.0)}
    y = down.apply({"params": down_params}, x)
    np.testing.assert_allclose(y, by_hand(np.asarray(x), down_params["kernel"], 2, (1, 1)) + np.arange(5), atol=1e-12)
    back = up.apply({"params": up_params}, y)
    expected = spread(np.asarray(y), np.asarray(down_params["kernel"]), 2, (1, 1)) + np.arange(3)
    np.testing.assert_allclose(back, expected, atol=1e-11)
    # A kernel of DCGAN's is drawn from N(0, 0.02).
    drawn = Convolution(64, size=4).init(key, jnp.ones((1, 4, 4, 64)))["params"]["kernel"]
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [0, 0.02], atol=3e-4)


def test_half_precision_stays_so():
    x = jnp.ones((1, 4, 4, 3), jnp.bfloat16)
    for layer in (Convolution(5, use_bias=True), TransposedConvolution(5, use_bias=True)):
        assert layer.apply(layer.init(jax.random.key(0), x), x).dtype == jnp.bfloat16


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="a stride of 2 does not divide pictures of 4 x 5 pixels"):
        convolution(jnp.ones((1, 4, 5, 1)), jnp.ones((4, 4, 1, 1)), 2)
    with pytest.raises(ValueError, match="a kernel of 1 x 3 is smaller than the stride of 2"):
        transposed_convolution(jnp.ones((1, 4, 4, 1)), jnp.ones((1, 3, 1, 1)), 2)
