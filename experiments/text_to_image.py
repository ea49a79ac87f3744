"""Emoji from their names: a GAN whose players are told a text, which a Transformer reads.

    python -m experiments.text_to_image
    python -m experiments.text_to_image --text-encoder minilm --texts "green cat" "sad robot"
    python -m experiments.text_to_image --data birds --size 64

Data: OpenMoji's emoji and their Unicode names, at 32 x 32 pixels; or `--data` a folder of pictures whose texts stand in
its `metadata.csv`, beside the pictures or in their names (`jaxarch.data.captioned`). A fifth is held out, at random.

The Transformer learns what texts mean for pictures from true pairs, in the first steps of the run: it and an encoder of
pictures bring a picture nearer to its own text than to others (`jaxarch.gan.text_to_image`). `--text-encoder` takes a
pretrained BERT in its place, which stays as it is and knows words that no text of the data has.

Whether texts are obeyed says `val/r_precision`: how often, of a picture's own text and 99 others, the encoder of
pictures finds its own the nearest. Chance is 0.01. Beside it stand the same of real pictures, which is what the
encoders can tell (`..._real`), and of texts that were learned from (`seen`). Of emoji also `val/group[emoji-cnn]`: how
often a classifier of real emoji sees the group (faces, food ...) that a held-out name is of; 0.22 is the largest group.

Measured: 2026-11-26, two cores of an AMD EPYC (Zen 5), jax 0.10.2, 12 minutes of processor time: val/r_precision 0.288
(chance 0.01), of names that were learned from 0.317, val/group[emoji-cnn] 0.369 (real pictures 0.55). Colours and
rough shapes follow the name (a dark ellipse, a clock's outline, yellow hands, an orange jack-o-lantern); things cannot
be told by their pictures alone, and different latents change little.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxarch.data.captioned import load_captioned
from jaxarch.data.images import load_images, scaled, unscaled
from jaxarch.data.tokenization import Subwords, train_bpe
from jaxarch.gan import panels, text_to_image
from jaxarch.gan.augmentation import DiffAugmentConfig, diff_augment
from jaxarch.gan.dcgan import widths
from jaxarch.gan.features import Extractor, classifier, extracted
from jaxarch.gan.finished import save_description
from jaxarch.gan.layout import LAYOUT
from jaxarch.gan.text_to_image import (
    WEIGHTS,
    Captions,
    Discriminator,
    Generator,
    Matcher,
    State,
    Texts,
    make_drawing,
    make_init,
    obedience,
)
from jaxarch.gan.training import PRECISIONS, Augment, GameConfig, OptimConfig, check_batch, hypers, latents_of
from jaxarch.run import ConfigError, Experiment, Metrics, check_least, checked_by, main
from jaxarch.transformer.encoder import Encoder, EncoderConfig, encoder
from jaxarch.transformer.pretrained import load_pretrained
from jaxarch.transformer.pretrained.minilm import minilm

JUDGED = 512  # texts of an evaluation at most, of each kind
SHOWN, VARIANTS = 8, 6  # texts of a report, of each kind, and pictures of each


@dataclass(frozen=True)
class Config:
    data: str = "emoji"
    """emoji, or a folder of pictures with texts"""
    size: int = 0
    """height and width that pictures are brought to (0: 32 for emoji, 64 for a folder)"""
    gray: bool = False
    """read pictures in grey"""
    alpha: bool = False
    """keep opacity, as a fourth channel"""
    strict: bool = False
    """a file that is no picture ends the run, instead of being left out"""
    held_out: float = 0.2
    """the fraction held out"""
    split_seed: int = 0
    """seed of what is held out"""
    data_seed: int = 0
    """seed of the data's order"""
    texts: tuple[str, ...] = ()
    """to be drawn in each report, beside those of the data"""
    steps: int = 4000
    """length of the run and of the schedule"""
    batch_size: int = 64
    """pictures a step"""
    precision: Literal["f32", "bf16"] = "f32"
    """of the players' computation; parameters are f32"""
    latents: int = 64
    """numbers that a picture is made of, beside its text"""
    features: int = 32
    """features at half the picture's size; twice as many at each further halving"""
    text_encoder: str | None = None
    """folder of a pretrained BERT that reads the texts, or minilm (default: one of --model that learns here)"""
    length: int = 24
    """tokens of a text at most"""
    vocab_size: int = 600
    """of the tokeniser that is trained on the texts"""
    model: EncoderConfig = EncoderConfig(layers=2, heads=4, dim=64)
    matching_steps: int = 500
    """steps in which texts and pictures are matched"""
    matching_rate: float = 1e-3
    """learning rate of the matching"""
    matching_dim: int = 128
    """numbers of a text's vector"""
    augment: DiffAugmentConfig = DiffAugmentConfig()
    game: GameConfig = GameConfig(mismatch=1.0, gamma=1.0)
    optim: OptimConfig = OptimConfig(learning_rate=4e-4, final=0.1)

    def __post_init__(self) -> None:
        check_least(self, ("steps", "batch_size", "latents", "features", "length", "matching_dim"), 1)
        check_least(self, ("matching_steps", "data_seed", "split_seed"), 0)
        if not 0 < self.matching_rate < float("inf"):
            raise ConfigError(f"--matching-rate {self.matching_rate:g} is not above 0; 1e-3 is usual.")
        if self.gray and self.alpha:
            raise ConfigError("--gray and --alpha exclude each other.")
        check_batch(self.batch_size, self.game, conditional=True)


class Reader(NamedTuple):
    """How texts become numbers.

    read: texts to `Texts`, padded to one length.
    encoder: that learns; None: `read` gives vectors.
    save: writes what is needed to read others.
    """

    read: Callable[[list[str]], Texts]
    encoder: Encoder | None
    save: Callable[[Path], None]


def experiment(config: Config) -> Experiment:
    data = load_captioned(
        config.data,
        size=config.size,
        gray=config.gray,
        alpha=config.alpha,
        held_out=config.held_out,
        split_seed=config.split_seed,
        strict=config.strict,
        say=print,
    )
    seen, unseen = (np.flatnonzero(data.is_held_out == held) for held in (False, True))
    if len(unseen) < 2:
        raise ConfigError(f"--data {config.data} has one held-out picture; raise --held-out, or give more.")
    reader = (pretrained_reader if config.text_encoder else trained_reader)(config, [data.texts[i] for i in seen])
    texts = reader.read(list(data.texts))
    size, channels = data.pixels.shape[1], data.pixels.shape[3]
    widths(size, config.features)  # says what is wrong with a size
    dtype = PRECISIONS[config.precision]
    generator = Generator(size, channels, config.latents, config.features, dtype)
    discriminator, matcher = Discriminator(config.features, dtype), Matcher(reader.encoder, config.matching_dim)
    captions = Captions(data.pixels, texts)
    matching = config.matching_rate, config.matching_steps
    augment = Augment(diff_augment(config.augment))
    step = text_to_image.make_step(
        generator, discriminator, matcher, config.game, config.optim, *matching, config.steps, augment
    )

    def assets(folder: Path) -> None:
        reader.save(folder)
        save_description(folder, generator, "other")
        facts = {"train": len(seen), "validation": len(unseen), "pixels_crc32": data.checksum}
        (folder / "data.json").write_text(json.dumps(facts, indent=2) + "\n")

    groups = None
    if len(data.classes) > 1:
        groups = Groups(
            group_classifier(config), some(captions, unseen, JUDGED).texts, data.labels[chosen(unseen, JUDGED)]
        )
    judged = {"seen_": some(captions, seen, JUDGED), "": some(captions, unseen, JUDGED)}
    shown = [some(captions, rows, SHOWN) for rows in (unseen, seen)]
    names = [data.texts[i] for rows in (unseen, seen) for i in chosen(rows, SHOWN)]
    return Experiment(
        init=make_init(generator, discriminator, matcher, config.game, config.optim, some(captions, seen, 2)),
        step=step,
        evaluate=make_evaluate(generator, matcher, judged),
        data=examples(captions, seen, config.data_seed),
        batch_size=config.batch_size * config.game.critics,
        report=make_report(generator, matcher, shown, names, config.texts, reader.read, groups),
        monitor="-val/r_precision",
        hypers=hypers(config.game, config.optim),
        check=checked_by(config.game, config.optim),
        assets=assets,
        weights=WEIGHTS,
        layout=LAYOUT,
    )


class Groups(NamedTuple):
    """What sees groups, when it is first asked for; texts and the groups that they are of."""

    extractor: Callable[[], Extractor]
    texts: Texts
    labels: np.ndarray


def group_classifier(config: Config) -> Callable[[], Extractor]:
    """A classifier of the emoji that are learned from here: the options are the same, and so is what is held out."""
    options = {"size": config.size, "gray": config.gray, "alpha": config.alpha}
    split = {"held_out": config.held_out, "split_seed": config.split_seed}
    return cache(lambda: classifier(load_images(config.data, **options, **split)))


def trained_reader(config: Config, texts: list[str]) -> Reader:
    """A tokeniser of these texts, and an encoder that is to learn with the rest."""
    tokenizer = train_bpe(texts, config.vocab_size)
    model = encoder(config.model, tokenizer.vocab, config.length)

    def read(texts: list[str]) -> Texts:
        framed = tokenizer.frame(texts, config.length)
        return padded(framed.tokens, framed.mask, config.length)

    return Reader(read, model, tokenizer.save)


def pretrained_reader(config: Config, texts: list[str]) -> Reader:
    """An encoder that stays as it is: each text is read once, and its tokens' vectors are kept."""
    folder = minilm() if config.text_encoder == "minilm" else Path(config.text_encoder or "").expanduser()
    model, params, tokenizer, _ = load_pretrained(folder)
    if not isinstance(model, Encoder) or not isinstance(tokenizer, Subwords) or model.head not in ("none", "pooler"):
        raise ConfigError(f"--text-encoder {folder} is not a BERT that gives vectors, with its tokenizer.json.")

    @jax.jit
    def hidden(params: Any, tokens: Array, types: Array, mask: Array) -> Array:
        return model.apply({"params": params}, tokens, types, mask).hidden  # type: ignore[reportAttributeAccessIssue]

    def read(texts: list[str]) -> Texts:
        framed = tokenizer.frame(texts, min(config.length, model.length))
        batches = range(0, len(texts), 64)
        found = [np.asarray(hidden(params, *(part[i : i + 64] for part in framed))) for i in batches]
        return padded(np.concatenate(found).astype(np.float32), framed.mask, config.length)

    return Reader(read, None, tokenizer.save)


def padded(tokens: np.ndarray, mask: np.ndarray, length: int) -> Texts:
    """To one length, so that all texts fit the same programs."""
    missing = [(0, 0), (0, length - tokens.shape[1])]
    return Texts(np.pad(tokens, [*missing, *[(0, 0)] * (tokens.ndim - 2)]), np.pad(mask, missing))


def chosen(rows: np.ndarray, count: int) -> np.ndarray:
    """Some of the rows, spread over all of them."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]


def some(captions: Captions, rows: np.ndarray, count: int) -> Captions:
    return jax.tree.map(lambda leaf: leaf[chosen(rows, count)], captions)


def examples(captions: Captions, rows: np.ndarray, seed: int) -> grain.MapDataset:
    """The pairs of these rows by number, without end; each epoch has all of them once, in a new order."""
    order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
    return order.map(lambda place: jax.tree.map(lambda leaf: leaf[rows[place]], captions))


def make_evaluate(
    generator: Generator, matcher: Matcher, judged: dict[str, Captions]
) -> Callable[[State, Key[Array, ""]], Metrics]:
    """How often texts are obeyed: `val/r_precision` of one picture a text, and of the real ones."""
    draw = make_drawing(generator, matcher)

    def evaluate(state: State, key: Key[Array, ""]) -> Metrics:
        metrics: Metrics = {}
        for name, (pixels, texts) in judged.items():
            latents = latents_of(generator, key, len(pixels))
            for kind, pictures in (("", draw(state, latents, texts)), ("_real", scaled(pixels))):
                metrics[f"val/{name}r_precision{kind}"] = obedience(matcher, state.matcher, pictures, texts)
        return metrics

    return evaluate


def make_report(
    generator: Generator,
    matcher: Matcher,
    shown: list[Captions],
    names: list[str],
    own: tuple[str, ...],
    read: Callable[[list[str]], Texts],
    groups: Groups | None,
) -> Callable[[State, Key[Array, ""], Path], Metrics]:
    """Draws pictures of held-out texts, of texts that were learned from and of one's own, over the same latents.

    `texts.png` has the real picture first in each row, `fakes.png` the generated ones alone, `training.gif` these over
    the steps.
    """
    draw = jax.jit(make_drawing(generator, matcher))
    latents = latents_of(generator, jax.random.key(0), VARIANTS)

    def drawn(state: State, texts: Texts) -> np.ndarray:
        """`[texts, variants, height, width, channels]`"""
        count = len(texts.mask)
        asked = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), VARIANTS, axis=0), texts)
        pictures = np.asarray(draw(state, jnp.tile(latents, (count, 1)), asked), np.float32)
        return pictures.reshape(count, VARIANTS, *pictures.shape[1:])

    def of_groups(state: State, key: Key[Array, ""], groups: Groups) -> Metrics:
        extractor, pictures = groups.extractor(), []
        for start in range(0, len(groups.labels), 64):
            some = jax.tree.map(lambda leaf, start=start: jnp.asarray(leaf[start : start + 64]), groups.texts)
            latents = latents_of(generator, jax.random.fold_in(key, start), len(some.mask))
            pictures.append(np.asarray(draw(state, latents, some)))
        guesses = extracted(extractor, unscaled(np.concatenate(pictures)))[1].argmax(1)
        found = {"group": np.mean(guesses == groups.labels), "group_real": extractor.accuracy}
        return {f"val/{name}[{extractor.name}]": jnp.float32(value) for name, value in found.items()}

    both = jax.tree.map(lambda *leaves: np.concatenate(leaves), *shown)

    def report(state: State, key: Key[Array, ""], folder: Path) -> Metrics:
        fakes = drawn(state, both.texts)
        rows = np.concatenate([np.asarray(scaled(both.pixels))[:, None], fakes], 1)
        kinds = ["held out"] * len(shown[0].pixels) + ["learned"] * len(shown[1].pixels)
        titles = [f"{name} ({kind})" for name, kind in zip(names, kinds, strict=True)]
        panels.save(panels.named_rows(titles, rows), folder / "texts.png", scale=1)
        panels.save(panels.grid(fakes.reshape(-1, *fakes.shape[2:]), VARIANTS), folder / panels.FAKES)
        panels.training_gif(folder)
        if own:
            panels.save(panels.named_rows(own, drawn(state, read(list(own)))), folder / "own_texts.png", scale=1)
        return of_groups(state, key, groups) if groups else {}

    return report


if __name__ == "__main__":
    main(experiment, Config)
