"""Texts framed by special tokens: by hand with ten words, and beside transformers with a real vocabulary."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxarch.data.tokenization import Subwords
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.pretrained.minilm import minilm

WORDS = ["a", "b", "c", "d", "e", "[UNK]", "[CLS]", "[SEP]", "[PAD]"]
UNK, CLS, SEP, PAD = range(5, 9)


def words() -> Subwords:
    """One token a word, framed as BERT's."""
    library = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(WORDS[UNK:])
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return Subwords(library.to_str())


def test_texts_and_pairs_are_framed_and_padded():
    framed = words().frame(["a b c", "d", ("a", "b e"), ""], 8)
    np.testing.assert_array_equal(
        framed.tokens,
        [
            [CLS, 0, 1, 2, SEP, PAD],
            [CLS, 3, SEP, PAD, PAD, PAD],
            [CLS, 0, SEP, 1, 4, SEP],
            [CLS, SEP, PAD, PAD, PAD, PAD],
        ],
    )
    np.testing.assert_array_equal(framed.types, [[0] * 6, [0] * 6, [0, 0, 0, 1, 1, 1], [0] * 6])
    np.testing.assert_array_equal(framed.mask.sum(1), [5, 3, 6, 2])
    np.testing.assert_array_equal(np.sort(framed.mask, axis=1)[:, ::-1], framed.mask)


def test_what_is_too_long_loses_its_end_and_encode_stays_whole():
    tokenizer = words()
    framed = tokenizer.frame(["a b c d e", ("a", "b c d e")], 5)
    np.testing.assert_array_equal(framed.tokens, [[CLS, 0, 1, 2, SEP], [CLS, 0, SEP, 1, SEP]])
    assert tokenizer.encode("a b c d e a").tolist() == [0, 1, 2, 3, 4, 0]
    with pytest.raises(ConfigError, match=r"a length of 3 leaves no room beside 3 special tokens; 128 would do\."):
        tokenizer.frame(["a", ("a", "b")], 3)
    assert tokenizer.frame([], 5).tokens.shape == (0, 0)


def test_a_real_vocabulary_beside_transformers():
    transformers = pytest.importorskip("transformers")
    try:
        folder = minilm()
    except ConfigError as error:
        pytest.skip(str(error))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Subwords((folder / "tokenizer.json").read_text())
    long = "The committee's decision — naïve, perhaps — surprised nobody in Reykjavík. " * 9
    texts = ["Tokenisation!", long, "日本語 and emoji 🙂", ""]
    pairs = [("Who?", long), (long, "Nobody."), (long, long), ("a", "b")]
    for given, length in ((texts, 512), (texts, 20), (pairs, 400), (pairs, 21), (pairs, 20)):
        columns = zip(*given, strict=True) if given is pairs else (given,)
        expected = theirs(*map(list, columns), padding=True, truncation=True, max_length=length, return_tensors="np")
        framed = ours.frame(given, length)
        np.testing.assert_array_equal(framed.tokens, expected["input_ids"])
        np.testing.assert_array_equal(framed.types, expected["token_type_ids"])
        np.testing.assert_array_equal(framed.mask, expected["attention_mask"])
