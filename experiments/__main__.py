"""Lists the experiments: `python -m experiments`."""

from __future__ import annotations

import ast
from pathlib import Path


def part(text: str, name: str) -> str:
    """What the docstring says after `name:`, up to the next blank line."""
    _, _, rest = text.partition(f"{name}:")
    return " ".join(rest.split("\n\n")[0].split())


def main() -> None:
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        print(f"{path.stem:<12} {text.splitlines()[0]}")
        print(f"{'':<12} data: {part(text, 'Data')}")
        print(f"{'':<12} measured: {part(text, 'Measured') or 'not yet'}")


if __name__ == "__main__":
    main()
