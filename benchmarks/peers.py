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


def main() -> None:
    kind, *arguments = sys.argv[1:]
    description, measure = {"nanogpt": nanogpt, "hugging_face": hugging_face, "bert": bert}[kind](*arguments)
    measure()  # compiles, allocates
    print(json.dumps({"description": description}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": measure()}), flush=True)


if __name__ == "__main__":
    main()
