"""PyTorch peers, each in an interpreter that has PyTorch: started by a benchmark, not by hand.

Prints one JSON line when it is ready, and one after each line that it reads: the seconds of one measurement.
Imports nothing of this repository, so that it runs where only the peer is installed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable


def nanogpt(
    checkout: str,
    layers: str,
    heads: str,
    dim: str,
    length: str,
    batch: str,
    vocab: str,
    precision: str,
    mode: str,
    steps: str,
) -> tuple[str, Callable[[], float]]:
    """nanoGPT's own model and optimiser from a checkout; seconds of a training step with clipping."""
    sys.path.insert(0, checkout)
    import contextlib

    import torch
    from model import GPT, GPTConfig  # type: ignore[import-not-found]  # nanoGPT's model.py

    torch.manual_seed(0)
    config = GPTConfig(
        block_size=int(length), vocab_size=int(vocab), n_layer=int(layers), n_head=int(heads), n_embd=int(dim),
        dropout=0.0, bias=False,
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        model = GPT(config)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    if mode == "compile":
        model = torch.compile(model)
    tokens = torch.randint(int(vocab), (int(batch), int(length) + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    cast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(int(steps)):
            with cast:
                _, loss = model(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()
        return (time.perf_counter() - start) / int(steps)

    return f"nanoGPT ({mode}), torch {torch.__version__}, {torch.get_num_threads()} threads", measure


def hugging_face(
    layers: str, heads: str, dim: str, vocab: str, batch: str, prompt: str, new: str, precision: str
) -> tuple[str, Callable[[], float]]:
    """Greedy `generate` of a GPT-2 at random weights; seconds of one call."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=int(layers), n_head=int(heads), n_embd=int(dim), vocab_size=int(vocab),
        n_positions=int(prompt) + int(new), bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = transformers.GPT2LMHeadModel(config).eval().to(dtype)
    tokens = torch.randint(int(vocab), (int(batch), int(prompt)))

    def measure() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=int(new), min_new_tokens=int(new),
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == int(prompt) + int(new)
        return time.perf_counter() - start

    return f"transformers {transformers.__version__}, torch {torch.__version__}", measure


def bert(
    layers: str,
    heads: str,
    dim: str,
    vocab: str,
    batch: str,
    length: str,
    precision: str,
    padded: str,
    attention: str,
    calls: str,
) -> tuple[str, Callable[[], float]]:
    """Forward passes of a BERT at random weights, without its pooler; seconds of one."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=int(layers), num_attention_heads=int(heads), hidden_size=int(dim),
        intermediate_size=4 * int(dim), vocab_size=int(vocab), attn_implementation=attention,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    tokens = torch.randint(int(vocab), (int(batch), int(length)))
    lengths = torch.linspace(int(length) // 2, int(length), int(batch)).long()
    mask = (torch.arange(int(length)) < lengths[:, None]).long() if int(padded) else None

    def measure() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(int(calls)):
                model(tokens, attention_mask=mask)
        return (time.perf_counter() - start) / int(calls)

    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return f"BertModel ({attention}), {versions}, {torch.get_num_threads()} threads", measure


def dcgan(features: str, batch: str, size: str, steps: str) -> tuple[str, Callable[[], float]]:
    """A DCGAN's training step as PyTorch's tutorial has it: real and generated pictures pass D apart, one forward pass
    of G serves both players; channels last, and D's parameters frozen in G's step. Seconds of a step.
    """
    import itertools
    import math

    import torch
    from torch import nn

    torch.manual_seed(0)
    blocks = int(math.log2(int(size))) - 3
    widths = [int(features) * 2**block for block in range(blocks + 1)]
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for below, above in itertools.pairwise(widths):
        layers += [nn.Conv2d(below, above, 4, 2, 1, bias=False), nn.BatchNorm2d(above), nn.LeakyReLU(0.2, inplace=True)]
    discriminator = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 0, bias=False), nn.Flatten(0))
    layers = [nn.ConvTranspose2d(100, widths[-1], 4, 1, 0, bias=False), nn.BatchNorm2d(widths[-1]), nn.ReLU(True)]
    for above, below in itertools.pairwise(widths[::-1]):
        layers += [nn.ConvTranspose2d(above, below, 4, 2, 1, bias=False), nn.BatchNorm2d(below), nn.ReLU(True)]
    generator = nn.Sequential(*layers, nn.ConvTranspose2d(widths[0], 3, 4, 2, 1, bias=False), nn.Tanh())
    networks = discriminator, generator
    d_opt, g_opt = (torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999)) for network in networks)
    for network in networks:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    real = torch.rand(int(batch), 3, int(size), int(size)).to(memory_format=torch.channels_last)
    loss = nn.BCEWithLogitsLoss()
    ones, zeros = torch.ones(int(batch)), torch.zeros(int(batch))

    def step() -> torch.Tensor:
        d_opt.zero_grad(set_to_none=True)
        loss(discriminator(real), ones).backward()
        fakes = generator(torch.randn(int(batch), 100, 1, 1))
        loss(discriminator(fakes.detach()), zeros).backward()
        d_opt.step()
        g_opt.zero_grad(set_to_none=True)
        discriminator.requires_grad_(False)
        value = loss(discriminator(fakes), ones)
        value.backward()
        discriminator.requires_grad_(True)
        g_opt.step()
        return value

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(int(steps)):
            value = step()
        value.item()
        return (time.perf_counter() - start) / int(steps)

    return f"PyTorch {torch.__version__}, channels last, {torch.get_num_threads()} threads", measure


def main() -> None:
    kind, *arguments = sys.argv[1:]
    kinds = {"nanogpt": nanogpt, "hugging_face": hugging_face, "bert": bert, "dcgan": dcgan}
    description, measure = kinds[kind](*arguments)
    measure()  # compiles, allocates
    print(json.dumps({"description": description}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": measure()}), flush=True)


if __name__ == "__main__":
    main()
