"""Loss curves of an experiment on a mesh, for tests that hold one mesh against another."""

from __future__ import annotations

import numpy as np

from jaxarch.run import Experiment
from jaxarch.run.command import first_batch
from jaxarch.run.loop import feed
from jaxarch.run.mesh import make_mesh, parse
from jaxarch.run.metrics import divide
from jaxarch.run.program import Carry, Programs, members, restart


def curve(experiment: Experiment, mesh: str, steps: int, replicas: int = 1, scan: int = 1) -> dict[str, np.ndarray]:
    """Each metric of the steps, `[steps / scan, replicas]`, nan where it has none, and of the evaluation after them.

    mesh: as `--mesh`.
    """
    on = make_mesh(parse(mesh)) if mesh else None
    programs = Programs(experiment, members(experiment.hypers, (), 0, replicas), on)
    carry, seen = Carry(programs.init(), programs.sums(first_batch(experiment))), []
    for index, _, batch in feed(programs, ((index, scan) for index in range(0, steps, scan))):
        carry = programs.steps(carry, batch, index)
        seen.append(divide(carry.sums))
        carry = Carry(carry.state, restart(carry.sums))
    none = np.full(replicas, np.nan)
    found = {name: np.stack([values.get(name, none) for values in seen]) for name in sorted(set().union(*seen))}
    return found | divide(programs.evaluate(carry.state, steps))


def assert_same_curve(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    """Relative to each value, or to the curve's largest: means of what cancels may be near zero."""
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        largest = np.nanmax(np.abs(values), initial=0.0)
        np.testing.assert_allclose(found[name], values, rtol=tolerance, atol=tolerance * largest, err_msg=name)
