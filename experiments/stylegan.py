"""Pictures from StyleGAN2, or from the plainer backbone of R3GAN: by default handwritten digits.

    python -m experiments.stylegan
    python -m experiments.stylegan emoji
    python -m experiments.stylegan r3gan
    python -m experiments.stylegan paper --data faces --size 256

Data: `--data digits` (scikit-learn's, 8 x 8), `emoji` (OpenMoji's, 32 x 32), a folder of pictures, `.npz`, MNIST's idx
or CIFAR's binary files (`jaxarch.data.images`); square, of a power of two of pixels.

The game: non-saturating, with R1 at every 16th step; as for CIFAR in Karras et al. 2020, "Training GANs with limited
data", app. C, without style mixing and path lengths, which cost variety in small pictures. `paper` has both, path
lengths at every 4th step, its sizes, and with `--game.gamma 0` its weight of R1, 0.0002 pixels / batch. That weight is
for many pictures of many pixels: on the digits it is 0.0004, and all fakes become alike.

Reported, at each look: fakes over the same latents, and the same with styles drawn towards their mean
(`truncated.png`); the metrics of `jaxarch.gan.metrics` by a classifier of the data beside their floors. Afterwards
`python -m jaxarch.gan.edit` mixes, moves and searches for styles.

Measured: 2026-11-26, two cores of an AMD EPYC (Zen 5), jax 0.10.2, beside other work 4:43 of training: FID[digits-cnn]
2.69 (as many real digits: 0.77), recall 0.72, precision 0.66. `emoji`, stopped at 7,200 of 12,000 steps (115,000
pictures, 18 minutes of processor time): FID[emoji-cnn] 7.9 (1.7), recall 0.51, precision 0.96: many kinds of smooth
shapes and colours, few details. `r3gan` and `paper` were not run to their ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp

from experiments import dcgan
from jaxarch.data.images import ImageData
from jaxarch.gan.r3gan import R3GANConfig, r3gan
from jaxarch.gan.stylegan2 import StyleGAN2Config, stylegan2
from jaxarch.gan.training import PRECISIONS, GameConfig, OptimConfig, check_batch
from jaxarch.run import ConfigError, Experiment, main

TRUNCATED = {"truncated.png": {"truncation": 0.7}}
CLAMP = 256.0  # of activations in bf16
SMALL = StyleGAN2Config(mapping_layers=2, mixing=0.0)
LAZY = GameConfig("non_saturating", "r1", gamma=1.0, penalty_every=16)


@dataclass(frozen=True)
class Config(dcgan.Config):
    steps: int = 6000
    """length of the run and of the schedule"""
    batch_size: int = 32
    """pictures that a player sees a step"""
    backbone: Literal["stylegan2", "r3gan"] = "stylegan2"
    conditional: bool = False
    """tell both networks the classes"""
    model: StyleGAN2Config = SMALL
    r3gan: R3GANConfig = R3GANConfig()
    game: GameConfig = LAZY
    optim: OptimConfig = OptimConfig(learning_rate=2e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_batch(self.batch_size, self.game, self.conditional)
        if self.backbone == "r3gan" and self.game.path_length:
            raise ConfigError(
                "--game.path-length is of StyleGAN2's styles; it is 0 for --backbone r3gan, as after the word r3gan."
            )


PRESETS = {
    "emoji": Config(data="emoji", steps=12_000, batch_size=16, augment="diff", model=replace(SMALL, channel_base=1024)),
    "r3gan": Config(
        backbone="r3gan", game=GameConfig(gamma=1.0), optim=OptimConfig(learning_rate=5e-4, final=0.1, beta2=0.9)
    ),
    "paper": Config(
        model=StyleGAN2Config(512, 512, 8, 32768, 512),
        game=replace(LAZY, gamma=0.0, path_length=2.0),
        optim=OptimConfig(learning_rate=2.5e-3),
    ),
}


def experiment(config: Config) -> Experiment:
    data = dcgan.load(config)
    config = settled(config, data)
    classes = len(data.classes) if config.conditional else 0
    dtype = PRECISIONS[config.precision]
    if config.backbone == "r3gan":
        return dcgan.played(config, data, *r3gan(config.r3gan, data.shape, classes, dtype), config.conditional)
    networks = stylegan2(config.model, data.shape, classes, dtype)
    return dcgan.played(config, data, *networks, config.conditional, TRUNCATED)


def settled(config: Config, data: ImageData) -> Config:
    """With what depends on the pictures and on the precision."""
    game, model = config.game, config.model
    if not game.gamma:
        height, width, _ = data.shape
        game = replace(game, gamma=0.0002 * height * width / config.batch_size)
    if PRECISIONS[config.precision] == jnp.bfloat16 and not model.clamp:
        model = replace(model, clamp=CLAMP)
    return replace(config, game=game, model=model)


if __name__ == "__main__":
    main(experiment, Config, PRESETS)
