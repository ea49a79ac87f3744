"""A GPT trained on text.

    python -m experiments.gpt
    python -m experiments.gpt --data my.txt --steps 5000 --model.layers 6
    python -m experiments.gpt llama --data 'corpus/**/*.jsonl' --tokenizer bpe --precision bf16
    python -m jaxarch.transformer.generate runs/gpt/NAME --prompt "Once"

Data: `--data` a file, a folder or a glob of UTF-8 text or JSONL; by default the manual of Python's own
language (`pydoc_data.topics` of the standard library: about 400 kB of English prose, what it says twice left out).

Measured: 2026-11-25, two cores of an AMD EPYC (Zen 5), jax 0.10.2, `--data shakespeare.txt` (1.1 MB) with all else by
default: val/loss 1.577 after 2,000 steps (seeds 0, 1, 2: 1.569, 1.575, 1.587) in 65 seconds.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxarch.data.text import TextData, load_text, windows
from jaxarch.run import ConfigError, Experiment, Metrics, checked_by, main
from jaxarch.transformer.decoder import ModelConfig, decoder, forward_flops, gpt2, llama
from jaxarch.transformer.decoding import sampling
from jaxarch.transformer.generate import complete, drawing
from jaxarch.transformer.layout import LAYOUT
from jaxarch.transformer.training import (
    PRECISIONS,
    Hypers,
    OptimConfig,
    TrainState,
    check_sizes,
    make_evaluate,
    make_init,
    make_step,
    next_token,
)

SAMPLE_TOKENS = 256


@dataclass(frozen=True)
class Config:
    data: str | None = None
    """file, folder or glob of text or JSONL (default: the manual of Python's language)"""
    tokenizer: str = "char"
    """char, byte, bpe (trained on the data), or the path of a tokenizer.json"""
    vocab_size: int = 4096
    """of bpe"""
    field: str = "text"
    """of a JSONL object: what to read"""
    split: Literal["auto", "document", "tail"] = "auto"
    """what is held out: whole documents or the end of the text"""
    held_out: float = 0.1
    """the fraction held out"""
    data_seed: int = 0
    """seed of the data's order"""
    steps: int = 2000
    """length of the run and of the schedule"""
    batch_size: int = 12
    """examples a step"""
    length: int = 64
    """tokens an example"""
    precision: Literal["f32", "bf16"] = "f32"
    """of the computation; parameters are f32"""
    eval_tokens: int = 2_000_000
    """held-out tokens that an evaluation reads at most"""
    prompt: str = ""
    """what the samples begin with (default: a line break, or what the held-out text begins with)"""
    model: ModelConfig = ModelConfig(positions="rotary")
    optim: OptimConfig = OptimConfig(optimizer="muon", learning_rate=3e-3)

    def __post_init__(self) -> None:
        check_sizes(self, ("steps", "batch_size", "length", "eval_tokens"), ("data_seed",))


def experiment(config: Config) -> Experiment:
    data = load_text(
        config.data,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        length=config.length,
        held_out=config.held_out,
        split=config.split,
        field=config.field,
        seed=config.data_seed,
        say=print,
    )
    prompt = config.prompt or opening(data)
    if not len(data.tokenizer.encode(prompt)):
        raise ConfigError(f"--prompt {prompt!r} is nothing to this tokeniser; give another one.")
    model = decoder(config.model, data.tokenizer.vocab, config.length, PRECISIONS[config.precision])
    operations = forward_flops(config.model, data.tokenizer.vocab, config.batch_size, config.length)
    validation = windows(data.validation[: config.eval_tokens + 1], config.length)

    def report(state: TrainState, key: Key[Array, ""], folder: Path) -> Metrics:
        write = drawing(model, {"params": state.evaluated}, sampling(0.8), data.tokenizer.end)
        texts = complete(write, model.length, data.tokenizer, [prompt] * 2, SAMPLE_TOKENS, key)
        (folder / "samples.txt").write_text("\n---\n".join(text.strip("\n") for text in texts) + "\n")
        return {}

    return Experiment(
        init=make_init(model, (jnp.zeros((1, config.length), jnp.int32),), config.optim),
        step=make_step(next_token(model), config.optim, config.steps),
        evaluate=make_evaluate(model, validation, max(1, 16384 // config.length), data.characters_per_token),
        data=data.train,
        batch_size=config.batch_size,
        report=report,
        hypers=Hypers(config.optim.learning_rate, config.optim.weight_decay),
        check=checked_by(config.optim),
        assets=data.save,
        weights=("params", "ema"),
        layout=LAYOUT,
        flops={jnp.dtype(model.dtype).name: 3 * operations},
    )


def opening(data: TextData) -> str:
    """A line break if the tokeniser knows it, else the first token of the held-out text."""
    with contextlib.suppress(ConfigError):
        if len(data.tokenizer.encode("\n")):
            return "\n"
    return data.tokenizer.decode(data.validation[:1])


# The published shapes, for an accelerator: a batch of half a million tokens in micro-batches.
LARGE = OptimConfig(learning_rate=6e-4, beta2=0.95, warmup=700, accumulate=32)
PRESETS = {
    "nanogpt": Config(model=ModelConfig(), optim=OptimConfig()),  # nanoGPT's setting for CPU: learned positions, AdamW
    "gpt2": Config(model=gpt2(), optim=LARGE, length=1024, batch_size=480, tokenizer="bpe", vocab_size=50257),
    "llama": Config(model=llama(), optim=LARGE, length=2048, batch_size=256, tokenizer="bpe", vocab_size=32768),
}

if __name__ == "__main__":
    main(experiment, Config, PRESETS)
