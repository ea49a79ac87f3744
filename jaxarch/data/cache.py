"""What is made from data once, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from jaxarch.run.protocol import ConfigError


def cached(cache: Path, fingerprint: dict, build: Callable[[Path], None]) -> Path:
    """The cache's folder for what the fingerprint describes, filled by `build` if there is none yet.

    It gets its name only when it is whole: a kill leaves at most a `.partial` folder that nobody reads.
    """
    described = json.dumps(fingerprint, sort_keys=True, indent=1)
    folder = cache / hashlib.sha256(described.encode()).hexdigest()[:24]
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(suffix=".partial", dir=cache) as partial:
            filled = Path(partial) / folder.name
            filled.mkdir()
            build(filled)
            (filled / "fingerprint.json").write_text(described)
            if not folder.is_dir():  # another process may have been faster
                filled.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"cannot write the cache {cache}: {error.strerror}; name another folder in JAXARCH_CACHE."
        ) from error
    return folder
