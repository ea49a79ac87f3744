"""What other parts of the package say during a run."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import jax.numpy as jnp

from jaxarch.attention import _say, attention
from tests.run.running import exit_code
from tests.run.sketches import line

SAID = "attention with causal, soft_cap: dense\n"


def experiment(config):
    """The line, with attention in the evaluation."""
    base = line.experiment(config)

    def evaluate(state, key):
        for length in (3, 4):
            x = jnp.ones((1, length, 1, 2))
            attention(x, x, x, causal=True, soft_cap=2.0)
        return base.evaluate(state, key)

    return base._replace(evaluate=evaluate)


def test_the_choice_of_attention_is_said_once(tmp_path, capsys, caplog):
    _say.cache_clear()
    module = SimpleNamespace(experiment=experiment, Config=line.Config, __name__="sketch")
    assert exit_code(module, "--help") == 0
    assert "attention" not in capsys.readouterr().out
    assert exit_code(module, "--runs", tmp_path, "--steps", 4) == 0
    output = capsys.readouterr()
    assert (output.out + output.err).count(SAID) == 1
    assert "attention" not in caplog.text, "what listens to all logs does not say it again"
    logger = logging.getLogger("jaxarch.attention")
    assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True), "as it was before"
