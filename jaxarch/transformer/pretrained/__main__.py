"""A finished run as a folder that `transformers` reads.

python -m jaxarch.transformer.pretrained export runs/gpt/NAME my-model
python -m jaxarch.transformer.pretrained export runs/finetune/NAME my-model --step best
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxarch.run import backend
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.transformer.finished import restored
from jaxarch.transformer.pretrained.folder import save_pretrained


@dataclasses.dataclass(frozen=True)
class Arguments:
    command: Annotated[Literal["export"], tyro.conf.Positional]
    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run, as runs/gpt/demo"""
    folder: Annotated[Path, tyro.conf.Positional]
    """the folder to be written"""
    step: str = "newest"
    """checkpoint: newest, best or a number"""


def main() -> None:
    with exits("pretrained"):
        program = "python -m jaxarch.transformer.pretrained"
        arguments = parsed_or_usage(Arguments, program, __doc__ or "", sys.argv[1:])
        backend.prepare()
        model, params, tokenizer = restored(arguments.run, arguments.step)
        save_pretrained(arguments.folder, model, params, tokenizer)
        print(f"{arguments.folder}: {', '.join(sorted(path.name for path in arguments.folder.iterdir()))}")


if __name__ == "__main__":
    main()
