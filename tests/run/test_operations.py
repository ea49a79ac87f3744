"""Operations counted in a program, against figures by hand and the compiler's own count where nothing loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.run.operations import counted


def ones(*shape, dtype="float32"):
    return jnp.ones(shape, dtype)


def count(function, *arguments):
    return counted(jax.make_jaxpr(function)(*arguments))


def test_products_by_hand():
    assert count(jnp.matmul, ones(3, 5), ones(5, 7)) == {"float32": 2 * 3 * 5 * 7}
    assert count(lambda a, b: jnp.einsum("bij,bjk->bki", a, b), ones(2, 3, 4), ones(2, 4, 5)) == {"float32": 240}
    assert count(jnp.add, ones(3), ones(3)) == {} == count(jnp.matmul, ones(2, 2, dtype=int), ones(2, 2, dtype=int))


def test_types_are_kept_apart_and_the_wider_of_two_counts():
    half, single = ones(4, 4, dtype="bfloat16"), ones(4, 4)

    def mixed(a, b):
        return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    assert count(lambda a, b: (a @ a, a @ a, b @ b), half, single) == {"bfloat16": 256, "float32": 128}
    assert count(mixed, half, single) == count(mixed, single, half) == {"float32": 128}


def convolution(length, kernel, inputs=3, outputs=4, groups=1, **options):
    """A function and its arguments: batch 2, over one axis."""

    def function(x, w):
        options.setdefault("padding", [(0, 0)])
        options.setdefault("window_strides", (1,))
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, feature_group_count=groups, **options)

    return function, ones(2, length, inputs), ones(kernel, inputs // groups, outputs)


CONVOLUTIONS = {  # pairs of output and kernel position that meet the input, then what each of them multiplies
    "valid": (convolution(5, 3), 9 * 12),
    "padded": (convolution(5, 3, padding="SAME"), 13 * 12),
    "strided": (convolution(6, 3, window_strides=(2,)), 6 * 12),
    "dilated": (convolution(7, 3, rhs_dilation=(2,)), 9 * 12),
    "transposed": (convolution(3, 3, lhs_dilation=(2,)), 5 * 12),
    "groups": (convolution(5, 3, inputs=4, outputs=6, groups=2), 9 * 12),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_by_hand_and_as_the_compiler_counts_them(name):
    (function, *arguments), multiplied = CONVOLUTIONS[name]
    assert count(function, *arguments) == {"float32": 2 * 2 * multiplied}  # batch 2
    assert jax.jit(function).lower(*arguments).cost_analysis()["flops"] == 2 * 2 * multiplied


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_each_product_has_two_in_the_backward_pass(name):
    (function, *arguments), multiplied = CONVOLUTIONS[name]

    def both(*arguments):
        out, pullback = jax.vjp(function, *arguments)
        return out, pullback(out)

    assert count(both, *arguments) == {"float32": 3 * 2 * 2 * multiplied}
    assert count(jax.vmap(both), *(jnp.stack([a, a]) for a in arguments)) == {"float32": 2 * 3 * 2 * 2 * multiplied}


def test_a_program_without_loops_is_counted_as_the_compiler_does():
    def program(x, images, w, kernel):
        y, pullback = jax.vjp(lambda x, w: jnp.einsum("btd,dhe->bhte", x, w), x, w)
        strided = jax.lax.conv_general_dilated(images, kernel, (2, 1), "SAME", feature_group_count=2)
        return pullback(y), jnp.einsum("bhte,bhse->bhts", y, y), strided

    arguments = ones(2, 6, 8), ones(2, 4, 9, 7), ones(8, 2, 4), ones(6, 2, 3, 3)
    assert count(program, *arguments) == {"float32": jax.jit(program).lower(*arguments).cost_analysis()["flops"]}


X = ones(4, 4)  # a product of it with itself takes 128


@jax.custom_vjp
def squared(x):
    return x @ x


squared.defvjp(lambda x: (x @ x, x), lambda x, d: (d @ x.T + x.T @ d,))


@jax.custom_jvp
def with_tangent(x):
    return x @ x


with_tangent.defjvp(lambda x, d: (x[0] @ x[0], d[0] @ x[0] + x[0] @ d[0]))


@jax.custom_batching.custom_vmap
def batched(x):
    return x @ x


batched.def_vmap(lambda size, mapped, x: (x @ x, mapped[0]))


def scanned(x):
    return jax.lax.scan(lambda x, _: (x @ x, x @ x @ x), x, length=5)


def sines(x):
    return jax.lax.scan(lambda y, _: (jnp.sin(y @ x), None), x, length=3)[0]


def branches(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)


@pytest.mark.parametrize(
    "function, products",
    [
        (jax.jit(lambda x: x @ x), 1),
        (scanned, 15),
        (lambda x: jax.lax.scan(lambda x, _: (scanned(x)[0], None), x, length=2), 30),
        (lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x @ x, x), 3),
        (branches, 2),
        (squared, 1),
        (jax.value_and_grad(lambda x: squared(x).sum()), 3),
        (with_tangent, 1),
        (jax.value_and_grad(lambda x: with_tangent(x).sum()), 3),
        (batched, 1),
        (jax.value_and_grad(lambda x: (x @ x).sum()), 3),
        # What is recomputed is counted again: the sine's gradient needs the product.
        (jax.value_and_grad(jax.checkpoint(lambda x: jnp.sin(x @ x).sum())), 4),
        # Three forward, three again, and two for each of them backward.
        (jax.grad(jax.checkpoint(lambda x: sines(x).sum())), 12),
        (lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + 1, x @ x), 1),
    ],
)
def test_through_what_calls_and_repeats(function, products):
    assert count(function, X) == {"float32": 128 * products}


def repeated(x):
    return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)


@pytest.mark.parametrize(
    "function",
    [
        repeated,
        jax.jit(repeated),
        lambda x: jax.lax.scan(lambda x, _: (repeated(x), None), x, length=2),
        lambda x: jax.lax.cond(x[0, 0] > 0, repeated, lambda x: x @ x, x),
        lambda x: jax.lax.while_loop(lambda x: (x @ x)[0, 0] < 9, lambda x: x + 1, x),
    ],
)
def test_products_in_a_while_have_no_known_count(function):
    assert count(function, X) is None


def test_pairs_by_definition():
    """Against a convolution of ones with ones in plain NumPy, over random strides, paddings, dilations."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        length, kernel, stride, low, high, left, right = (int(n) for n in rng.integers(1, 5, 7))
        gapped = np.zeros((length - 1) * left + 1)
        gapped[::left] = 1
        padded, wide = np.pad(gapped, (low, high)), (kernel - 1) * right + 1
        starts = range(0, len(padded) - wide + 1, stride)
        if not starts:
            continue
        expected = sum(padded[start : start + wide : right].sum() for start in starts)
        function, *arguments = convolution(
            length, kernel, padding=[(low, high)], window_strides=(stride,), lhs_dilation=(left,), rhs_dilation=(right,)
        )
        assert count(function, *arguments) == {"float32": 2 * 2 * 12 * expected}
