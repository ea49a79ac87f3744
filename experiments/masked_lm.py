"""A BERT trained to fill in the words that are missing from a text.

    python -m experiments.masked_lm
    python -m experiments.masked_lm --data my.txt --tokenizer bpe --steps 10000 --length 128
    python -m experiments.masked_lm bert --data 'corpus/**/*.jsonl' --precision bf16

Data: `--data` a file, a folder or a glob of UTF-8 text or JSONL; by default the manual of Python's own
language (`pydoc_data.topics` of the standard library: about 400 kB of English prose, what it says twice left out).
A sequence is full of text, on into the next document where one ends (Liu et al. 2019, sec. 4.2, full sentences).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from jaxarch.data.text import Tokens, load_text, windows
from jaxarch.data.tokenization import Tokenizer
from jaxarch.run import ConfigError, Experiment, Mean, Metrics, checked_by, main
from jaxarch.transformer.encoder import EncoderConfig, encoder, forward_flops
from jaxarch.transformer.finished import save_description
from jaxarch.transformer.layout import LAYOUT
from jaxarch.transformer.masking import candidates, masked, masked_words
from jaxarch.transformer.training import (
    PRECISIONS,
    Hypers,
    OptimConfig,
    TrainState,
    check_sizes,
    cross_entropy,
    make_init,
    make_step,
    summed,
)

SHOWN = 8  # sequences of a report


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
    batch_size: int = 32
    """examples a step"""
    length: int = 64
    """tokens an example"""
    mask_rate: float = 0.15
    """the fraction of tokens that are to be filled in"""
    mask_seed: int = 0
    """seed of those of the held-out text"""
    precision: Literal["f32", "bf16"] = "f32"
    """of the computation; parameters are f32"""
    eval_tokens: int = 2_000_000
    """held-out tokens that an evaluation reads at most"""
    model: EncoderConfig = EncoderConfig(placement="pre", positions="rotary")
    optim: OptimConfig = OptimConfig(optimizer="muon", learning_rate=3e-3)

    def __post_init__(self) -> None:
        check_sizes(self, ("steps", "batch_size", "length", "eval_tokens"), ("data_seed", "mask_seed"))
        if not 0 < self.mask_rate < 1:
            raise ConfigError(f"--mask-rate {self.mask_rate:g} is not between 0 and 1; 0.15 is usual.")


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
    # Where the tokeniser has no token for what is missing, it is the number after its last.
    vocab, end = data.tokenizer.vocab, data.tokenizer.end
    mask = vocab if data.tokenizer.mask is None else data.tokenizer.mask
    numbers = max(vocab, mask + 1)
    model = encoder(config.model, numbers, config.length, PRECISIONS[config.precision], head="masked_lm")
    operations = forward_flops(config.model, numbers, config.batch_size, config.length, "masked_lm")

    held_out = windows(data.validation[: config.eval_tokens + 1], config.length)
    key = jax.random.key(config.mask_seed)
    validation = masked(key, held_out.targets, candidates(held_out, end), config.mask_rate, mask, vocab)
    validation = jax.tree.map(np.asarray, validation)

    def logits_of(params: PyTree, tokens: Array | np.ndarray) -> Array:
        return cast(Array, model.apply({"params": params}, tokens))

    def evaluate(state: TrainState, key: Key[Array, ""]) -> Metrics:
        def sums(batch: Tokens) -> tuple[Array, Array, Array]:
            logits = logits_of(state.evaluated, batch.inputs)
            hits = (logits.argmax(-1) == batch.targets) * batch.weights
            return cross_entropy(logits, batch.targets, batch.weights), hits.sum(), jnp.sum(batch.weights)

        total, hits, weight = summed(sums, validation, max(1, 16384 // config.length))
        return {"val/loss": Mean(total, weight), "val/accuracy": Mean(hits, weight)}

    def assets(folder: Path) -> None:
        data.save(folder)
        save_description(folder, model)

    def report(state: TrainState, key: Key[Array, ""], folder: Path) -> Metrics:
        some = Tokens(*(array[:SHOWN] for array in validation))
        guesses = jax.jit(lambda params, tokens: logits_of(params, tokens).argmax(-1))(state.evaluated, some.inputs)
        text = filled_in(some, np.asarray(guesses), data.tokenizer)
        (folder / "samples.txt").write_text("[right] [guess|what was there]\n\n" + text + "\n")
        return {}

    return Experiment(
        init=make_init(model, model.inputs(), config.optim),
        step=make_step(masked_words(model, config.mask_rate, mask, vocab, end), config.optim, config.steps),
        evaluate=evaluate,
        data=data.train,
        batch_size=config.batch_size,
        report=report,
        hypers=Hypers(config.optim.learning_rate, config.optim.weight_decay),
        check=checked_by(config.optim),
        assets=assets,
        weights=("params", "ema"),
        flops={jnp.dtype(model.dtype).name: 3 * operations},
        layout=LAYOUT,
    )


def filled_in(batch: Tokens, guesses: np.ndarray, tokenizer: Tokenizer) -> str:
    """The texts with what the model says in place of each token that it was asked for."""

    def said(token: int) -> str:
        return tokenizer.decode([int(token)]) if token < tokenizer.vocab else "?"

    texts = []
    for targets, asked, row in zip(batch.targets, batch.weights, guesses, strict=True):
        parts, begin = [], 0
        for i in np.flatnonzero(asked):
            parts.append(tokenizer.decode(targets[begin:i]))
            right = row[i] == targets[i]
            parts.append(f"[{said(row[i])}]" if right else f"[{said(row[i])}|{said(targets[i])}]")
            begin = i + 1
        texts.append("".join([*parts, tokenizer.decode(targets[begin:])]))
    return "\n---\n".join(texts)


# BERT base (Devlin et al. 2019, app. A.2, in one phase), for an accelerator.
LARGE = OptimConfig(learning_rate=1e-4, weight_decay=0.01, beta2=0.999, warmup=10_000, final=0.0, accumulate=8)
PRESETS = {
    "bert": Config(
        model=EncoderConfig(12, 12, 768, dropout=0.1), optim=LARGE, steps=1_000_000, batch_size=256, length=512,
        tokenizer="bpe", vocab_size=30522,
    ),
}  # fmt: skip

if __name__ == "__main__":
    main(experiment, Config, PRESETS)
