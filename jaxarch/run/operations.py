"""How many floating-point operations a program's products make, counted in its jaxpr.

Matrix products and convolutions alone, two operations for each multiplication and addition, as MFU counts (Chowdhery
et al. 2022, app. B). The compiler's own count takes the body of a loop once, however often it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

# What runs its body once, as it stands.
# closed_call, since jax 0.11 eval_jaxpr, is the forward pass of a scan within a jax.checkpoint.
CALLS = ("jit", "closed_call", "eval_jaxpr", "remat2", "custom_jvp_call", "custom_vjp_call", "custom_vmap_call")


def counted(program: Jaxpr | ClosedJaxpr) -> dict[str, float] | None:
    """The operations of a program, by the name of the type that it multiplies (the wider of two).

    None where products stand in a `while`, or in anything else whose repetitions the program does not say. Of a `cond`
    the largest branch is counted; what is recomputed in the backward pass (`jax.checkpoint`) is counted again.
    """
    total: dict[str, float] = {}
    for equation in program.eqns:
        found = _operations(equation)
        if found is None:
            return None
        for dtype, number in found.items():
            total[dtype] = total.get(dtype, 0.0) + number
    return total


def _operations(equation: Any) -> dict[str, float] | None:
    name = equation.primitive.name
    if name in ("dot_general", "conv_general_dilated"):
        dtype = max((variable.aval.dtype for variable in equation.invars), key=lambda dtype: dtype.itemsize)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return {}  # integers
        return {dtype.name: _dot(equation) if name == "dot_general" else _convolution(equation)}
    bodies = [counted(body) for body in _bodies(equation.params)]
    known = [body for body in bodies if body is not None]
    if not any(known) and len(known) == len(bodies):
        return {}
    if len(known) < len(bodies) or name not in ("scan", "cond", *CALLS):
        return None
    times = equation.params["length"] if name == "scan" else 1
    largest = max(known, key=lambda body: sum(body.values()))  # the only one, but for a cond
    return {dtype: times * number for dtype, number in largest.items()}


def _bodies(parameters: dict[str, Any]) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in parameters.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield item


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    """Only what is multiplied with a number of the input, not with padding or a gap: so gradients cost the same."""
    parameters, (left, right) = equation.params, (variable.aval.shape for variable in equation.invars)
    out, numbers = equation.outvars[0].aval.shape, parameters["dimension_numbers"]
    features_out, features_in, *_ = numbers.rhs_spec  # the latter of a group
    channels = right[features_out] * right[features_in] * left[numbers.lhs_spec[0]] // parameters["batch_group_count"]
    pairs = [
        _pairs(left[i], right[k], out[o], *of_axis)
        for i, k, o, *of_axis in zip(
            numbers.lhs_spec[2:],
            numbers.rhs_spec[2:],
            numbers.out_spec[2:],
            parameters["window_strides"],
            parameters["padding"],
            parameters["lhs_dilation"],
            parameters["rhs_dilation"],
            strict=True,
        )
    ]
    return 2.0 * channels * math.prod(pairs)


def _pairs(
    length: int, kernel: int, out: int, stride: int, padding: tuple[int, int], lhs_dilation: int, rhs_dilation: int
) -> int:
    """How many pairs of an output and a kernel's position, along one axis, meet a number of the input."""
    position = np.arange(out)[:, None] * stride + np.arange(kernel) * rhs_dilation - padding[0]
    inside = (position >= 0) & (position <= (length - 1) * lhs_dilation) & (position % lhs_dilation == 0)
    return int(inside.sum())
