import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxarch.data import corpus as corpus_module
from jaxarch.data import text as text_module
from jaxarch.data.corpus import open_corpus
from jaxarch.data.text import Tokens, cache_folder, examples, load_text, windows
from jaxarch.data.tokenization import Bytes, Characters, Subwords, characters_of, load_tokenizer, train_bpe
from jaxarch.run.protocol import ConfigError

PROSE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age\n"
    "of foolishness.  Größe, naïveté, 東京 — and (some) 12,345 digits; don't they'll we've\r\n"
    "\r\n\tTabs   too.\n"
)


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(path: Path, texts: list[str], field: str = "text") -> str:
    return write(path, "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))


def load(path, tmp_path, **options):
    return load_text(path, **{"tokenizer": "byte", "length": 8, "cache": tmp_path / "cache"} | options)


def get(dataset, index: int) -> Tokens:
    example = dataset[index]
    assert isinstance(example, Tokens)
    return example


def parts(path, split, held_out=0.1, field="text") -> tuple[str, str]:
    """The text of the training and of the validation part, without what joins documents."""
    pieces = list(open_corpus(path, field, split, held_out).pieces())
    return (
        "".join(piece.text for piece in pieces if not piece.held_out),
        "".join(piece.text for piece in pieces if piece.held_out),
    )


# Training examples.

SIZES = [(2, 1), (9, 8), (16, 8), (17, 8), (23, 5), (101, 7), (97, 96), (64, 1), (1000, 64)]


@pytest.mark.parametrize(("size", "length"), SIZES)
def test_every_token_is_a_target_once_an_epoch_and_follows_its_input(size, length):
    tokens = np.arange(size, dtype=np.uint16)  # each token names its place
    dataset = examples(tokens, length, seed=3)
    count = math.ceil(size / length)
    for epoch in range(3):
        targets = []
        for index in range(epoch * count, (epoch + 1) * count):
            example = get(dataset, index)
            assert example.inputs.dtype == example.targets.dtype == np.int32
            assert example.inputs.shape == example.targets.shape == example.weights.shape == (length,)
            np.testing.assert_array_equal(example.targets, (example.inputs + 1) % size)
            np.testing.assert_array_equal(example.inputs[1:], example.targets[:-1])
            targets.extend(example.targets[example.weights == 1])
        assert sorted(targets) == list(range(size))


def test_an_example_depends_on_its_number_alone():
    tokens = np.random.default_rng(0).integers(0, 99, 1000).astype(np.uint16)
    forward = examples(tokens, 7, seed=1)
    backward = examples(tokens, 7, seed=1)
    some = [get(forward, i) for i in range(400)]
    for i in reversed(range(400)):
        for left, right in zip(some[i], get(backward, i), strict=True):
            np.testing.assert_array_equal(left, right)
    # Nor on how many are read together.
    batched = examples(tokens, 7, seed=1).batch(5)
    np.testing.assert_array_equal(get(batched, 13).inputs, np.stack([e.inputs for e in some[65:70]]))


def test_epochs_differ_in_order_and_offset_and_so_do_seeds():
    tokens = np.arange(1000, dtype=np.uint16)
    count = 125

    def starts(seed, epoch):
        dataset = examples(tokens, 8, seed)
        return [int(get(dataset, i).inputs[0]) for i in range(epoch * count, (epoch + 1) * count)]

    first, second, other = starts(0, 0), starts(0, 1), starts(1, 0)
    for a, b in [(first, second), (first, other), (second, other)]:
        offsets = {start % 8 for start in a}, {start % 8 for start in b}
        assert len(offsets[0]) == len(offsets[1]) == 1 and offsets[0] != offsets[1]
        # Steps round the ring do not depend on where it is cut: equal steps would be the same order.
        assert (np.diff(a) % 1000).tolist() != (np.diff(b) % 1000).tolist()
    # Near neighbours in the text are not near in the order: no run of windows is read in sequence.
    assert sum(b - a == 8 for a, b in itertools.pairwise(first)) < count / 10
    # The seed after this one is not this one's next epoch.
    assert starts(1, 0) != starts(0, 1)


def test_same_seed_same_examples_and_same_bpe_in_two_processes(tmp_path):
    path = write(tmp_path / "a.txt", PROSE * 30)
    program = (
        "import sys, hashlib, pathlib; from jaxarch.data.text import load_text\n"
        f"data = load_text({path!r}, tokenizer='bpe', vocab_size=300, length=9, seed=5,"
        " cache=pathlib.Path(sys.argv[1]))\n"
        "digest = hashlib.sha256(data.tokenizer.to_json().encode())\n"
        "for i in range(300): digest.update(data.train[i].inputs.tobytes())\n"
        "print(digest.hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / f"cache{hash_seed}")],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize(("size", "length"), [*SIZES, (2, 5), (10, 3)])
def test_windows_hold_every_token_but_the_first_as_target_once(size, length):
    tokens = np.arange(100, 100 + size, dtype=np.uint16)
    inputs, targets, weights = windows(tokens, length)
    assert inputs.shape == targets.shape == weights.shape == (math.ceil((size - 1) / length), length)
    assert targets[weights == 1].tolist() == list(range(101, 100 + size))
    np.testing.assert_array_equal(inputs[weights == 1] + 1, targets[weights == 1])
    assert set(np.unique(weights)) <= {0, 1}
    assert inputs[weights == 0].tolist() == targets[weights == 0].tolist() == [0] * int((weights == 0).sum())


# Tokenisers.


@pytest.fixture(scope="module")
def bpe() -> Subwords:
    return train_bpe([PROSE] * 5, 330)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_bytes_and_bpe_give_any_text_back(bpe, text):
    for tokenizer in (Bytes(), bpe):
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32 and ((tokens >= 0) & (tokens < tokenizer.vocab)).all()
        assert tokenizer.decode(tokens) == text
        assert [t.tolist() for t in tokenizer.encode_batch([text, "a"])] == [
            tokens.tolist(),
            tokenizer.encode("a").tolist(),
        ]


def test_bytes_are_the_bytes_of_utf8_and_half_a_character_is_marked():
    assert Bytes().encode("é!").tolist() == [0xC3, 0xA9, 0x21]
    assert Bytes().decode([0xC3, 0x21]) == "\ufffd!"


@given(text=st.text(alphabet="abcé東🙂\n"))
def test_characters_give_their_text_back(text):
    tokenizer = characters_of(["東abc", "é🙂\n"])
    assert tokenizer.characters == "\nabcé東🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_characters_hold_what_appears_and_refuse_the_rest():
    tokenizer = characters_of(["hello"])
    assert (tokenizer.vocab, tokenizer.characters) == (4, "ehlo")
    assert tokenizer.encode("hole").tolist() == [1, 3, 2, 0]
    with pytest.raises(ConfigError, match=r"the character '€' \(U\+20AC\) is not among the 4 .* leave it out"):
        tokenizer.encode("he€")


def test_bpe_has_the_end_token_all_bytes_and_as_many_merges_as_asked(bpe):
    assert bpe.vocab == 330 and bpe.end == 0
    assert bpe.decode([0]) == "<|endoftext|>"
    assert len(bpe.encode(PROSE)) < len(PROSE.encode()) / 2  # it has learned something
    assert train_bpe(["ab"], 4096).vocab == 258  # one pair to merge
    with pytest.raises(ConfigError, match="--vocab-size 256 is too small"):
        train_bpe([PROSE], 256)


def test_saved_and_loaded_tokenisers_are_the_same(bpe, tmp_path):
    for tokenizer in (Bytes(), characters_of([PROSE]), bpe):
        tokenizer.save(tmp_path)
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            loaded = load_tokenizer(path)
            assert type(loaded) is type(tokenizer)
            assert (loaded.to_json(), loaded.vocab, loaded.end) == (
                tokenizer.to_json(),
                tokenizer.vocab,
                tokenizer.end,
            )
            assert loaded.encode(PROSE).tolist() == tokenizer.encode(PROSE).tolist()


def test_a_tokeniser_made_to_cut_and_pad_and_decorate_does_neither(bpe, tmp_path):
    import tokenizers
    from tokenizers import processors

    theirs = tokenizers.Tokenizer.from_str(bpe.to_json())
    theirs.enable_truncation(5)
    theirs.enable_padding(length=50)
    theirs.post_processor = processors.TemplateProcessing(  # type: ignore[reportAttributeAccessIssue]
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    theirs.save(str(tmp_path / "mine.json"))
    loaded = load_tokenizer(tmp_path / "mine.json")
    for tokens in (loaded.encode(PROSE), loaded.encode_batch([PROSE])[0]):
        assert tokens.tolist() == bpe.encode(PROSE).tolist()


# Documents and their split.


def test_a_text_is_split_at_its_last_tenth(tmp_path):
    text = ("abcdef " * 200)[:1000]  # both cuts fall inside a word
    path = write(tmp_path / "a.txt", text)
    assert parts(path, "auto") == (text[:900], text[900:])
    assert parts(path, "tail", held_out=0.25) == (text[:750], text[750:])


def test_the_tail_never_cuts_a_character(tmp_path):
    path = write(tmp_path / "a.txt", "東" * 100)  # 300 bytes; the tail begins at byte 200
    train, validation = parts(path, "tail", held_out=0.33)
    # The character that holds byte 200 begins at 198: it is the first held out.
    assert (train, validation) == ("東" * 66, "東" * 34)


@pytest.mark.parametrize("split", ["document", "tail"])
@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 1 << 16])
def test_parts_are_disjoint_and_exhaustive_whatever_is_read_at_a_time(tmp_path, monkeypatch, split, piece_bytes):
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", piece_bytes)
    texts = {f"{i:02}.txt": f"<{i}> " + PROSE * (i % 4) for i in range(24)}  # in the order of their names
    for name, text in texts.items():
        write(tmp_path / "folder" / name, text)
    documents: dict[int, str] = {}
    sides: dict[int, set] = {}
    order = []
    for piece in open_corpus(str(tmp_path / "folder"), "text", split, 0.2).pieces():
        documents[piece.document] = documents.get(piece.document, "") + piece.text
        sides.setdefault(piece.document, set()).add(piece.held_out)
        order.append(piece.held_out)
    assert list(documents.values()) == [text.replace("\r\n", "\n") for text in texts.values()]
    if split == "document":
        assert all(len(side) == 1 for side in sides.values())
        assert 3 <= sum(side == {True} for side in sides.values()) <= 6
    else:
        assert order == sorted(order) and set(order) == {False, True}


def test_appended_documents_leave_the_others_where_they_are(tmp_path):
    texts = [f"document {i}" for i in range(2000)]
    few = list(open_corpus(jsonl(tmp_path / "few.jsonl", texts[:500]), "text", "auto", 0.1).pieces())
    many = list(open_corpus(jsonl(tmp_path / "many.jsonl", texts), "text", "auto", 0.1).pieces())
    assert many[:500] == few
    assert [piece.text for piece in many] == texts
    held = [piece.document for piece in many if piece.held_out]
    assert abs(len(held) - 200) <= 2
    assert len(set(np.diff(held))) > 1  # no period


def test_few_files_are_split_by_their_tail_and_many_by_document(tmp_path):
    for i in range(19):
        write(tmp_path / "f" / f"{i:02}.txt", "text")
    assert open_corpus(str(tmp_path / "f"), "text", "auto", 0.1).split == "tail"
    write(tmp_path / "f" / "20.txt", "text")
    assert open_corpus(str(tmp_path / "f"), "text", "auto", 0.1).split == "document"
    assert open_corpus(jsonl(tmp_path / "one.jsonl", ["a"]), "text", "auto", 0.1).split == "document"


def test_folders_and_globs_are_read_in_the_order_of_names_without_hidden_files(tmp_path):
    for name in ("b.md", "a.txt", "deep/c.log", ".git/config", ".hidden", "deep/.d/e.txt"):
        write(tmp_path / "f" / name, name + " ")
    assert "".join(parts(str(tmp_path / "f"), "tail")) == "a.txt b.md deep/c.log "
    assert "".join(parts(str(tmp_path / "f" / "*.md"), "tail")) == "b.md "
    assert "".join(parts(str(tmp_path / "f" / "**" / "*.[lt]*"), "tail")) == "a.txt deep/c.log "


def test_line_ends_byte_order_marks_and_empty_documents(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n\r\n")
    assert "".join(parts(path, "tail")) == "one\ntwo\nthree\n\n"
    lines = b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": ""}\n{"text": "two \\ud800!"}'
    pieces = list(open_corpus(write(tmp_path / "a.jsonl", lines), "text", "document", 0.1).pieces())
    assert [(piece.document, piece.text) for piece in pieces] == [(0, "one"), (2, "two \ufffd!")]


def test_documents_are_joined_by_a_newline_or_the_end_token(tmp_path, bpe):
    path = jsonl(tmp_path / "a.jsonl", ["first", "", "second", *["more"] * 20], field="body")
    train, validation = (
        [p.text for p in open_corpus(path, "body", "document", 0.2).pieces() if p.held_out is held]
        for held in (False, True)
    )
    assert train[:2] == ["first", "second"] and len(validation) > 1
    for name, separator in [("byte", "\n"), ("char", "\n"), (bpe, "<|endoftext|>")]:
        data = load(path, tmp_path, tokenizer=name, field="body", held_out=0.2)
        assert data.tokenizer.decode(data.validation) == separator.join(validation)
        # The first epoch, put together again from wherever the ring was cut.
        whole = data.tokenizer.encode(separator.join(train)).tolist()
        count = math.ceil(len(whole) / 8)
        epoch = [get(data.train, i) for i in range(count)]
        seen = np.concatenate([example.targets[example.weights == 1] for example in epoch])
        assert sorted(seen) == sorted(whole)
    one = load(write(tmp_path / "b.txt", "abc" * 99), tmp_path, tokenizer="char").tokenizer
    assert isinstance(one, Characters) and one.characters == "abc"


def test_the_default_text_is_a_tenth_held_out_and_unseen_in_training(tmp_path):
    pieces = list(open_corpus(None, "text", "auto", 0.1).pieces())
    held = sum(len(piece.text) for piece in pieces if piece.held_out)
    assert 0.08 < held / sum(len(piece.text) for piece in pieces) < 0.12

    def passages(held_out):
        texts = [" ".join(piece.text.split()) for piece in pieces if piece.held_out is held_out]
        return {text[i : i + 60] for text in texts for i in range(len(text) - 59)}

    validation = passages(True)
    assert len(validation & passages(False)) < 0.02 * len(validation)
    said = []
    data = load(None, tmp_path, tokenizer="char", say=said.append)
    assert "pydoc_data.topics" in said[-1]
    assert data.tokenizer.decode(data.validation).startswith(next(p.text for p in pieces if p.held_out))


# The cache.


@pytest.mark.parametrize("piece_bytes", [100, 1 << 16])
def test_streamed_tokens_are_those_of_the_text_in_memory(tmp_path, monkeypatch, bpe, piece_bytes):
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(text_module, "BATCH_CHARACTERS", 1000)
    path = write(tmp_path / "a.txt", PROSE * 50)
    text = PROSE.replace("\r\n", "\n") * 50
    train, validation = parts(path, "tail")
    assert train + validation == text
    for tokenizer in ("char", "byte", bpe):
        data = load(path, tmp_path, tokenizer=tokenizer)
        assert data.validation.tolist() == data.tokenizer.encode(validation).tolist()
        expected = data.tokenizer.encode(train)
        written = next(
            file
            for file in tmp_path.glob("cache/*/train.bin")
            if np.array_equal(np.fromfile(file, np.uint16), expected)
        )
        assert written.stat().st_size == 2 * len(expected)
        assert data.characters_per_token == len(validation) / len(data.validation)


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    tokenizer = Characters("".join(map(chr, [*range(0xD800), *range(0xE000, 0x12000)])))
    data = load(write(tmp_path / "a.txt", "\U00011fff" * 100), tmp_path, tokenizer=tokenizer)
    assert tokenizer.vocab > 2**16 and set(data.validation.tolist()) == {tokenizer.vocab - 1}


def test_the_cache_is_used_again_and_given_up_when_data_or_tokeniser_change(tmp_path, monkeypatch, bpe):
    path = write(tmp_path / "a.txt", PROSE * 20)
    encoded = []
    real = text_module._encode
    monkeypatch.setattr(text_module, "_encode", lambda *args: (encoded.append(1), real(*args)))

    def times(**options):
        encoded.clear()
        load(path, tmp_path, **options)
        return len(encoded)

    assert times(tokenizer="bpe", vocab_size=300) == 1
    assert times(tokenizer="bpe", vocab_size=300) == 0
    assert times(tokenizer="bpe", vocab_size=300, length=5, seed=9) == 0
    assert times(tokenizer="bpe", vocab_size=310) == 1
    # A run that resumes brings its tokeniser and finds the tokens that it learned from.
    trained = load(path, tmp_path, tokenizer="bpe", vocab_size=300).tokenizer
    trained.save(tmp_path)
    assert times(tokenizer=load_tokenizer(tmp_path)) == 0
    assert times(tokenizer=str(tmp_path / "tokenizer.json")) == 0
    assert times(tokenizer=bpe) == 1
    assert times(tokenizer=bpe, held_out=0.2) == 1
    stat = os.stat(path)
    write(Path(path), PROSE.upper() * 20)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert times(tokenizer=bpe) == 1
    assert "BEST" in load(path, tmp_path, tokenizer=bpe).tokenizer.decode(
        load(path, tmp_path, tokenizer=bpe).validation
    )


def test_a_cache_killed_half_way_is_not_used(tmp_path):
    path = write(tmp_path / "a.txt", PROSE * 100)
    program = (
        "import os, signal, pathlib, jaxarch.data.text as text\n"
        "real = text._Part.write\n"
        "def write(part, *args):\n"
        "    real(part, *args); part.file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "text._Part.write = write\n"
        f"cache = pathlib.Path({str(tmp_path / 'cache')!r})\n"
        f"text.load_text({path!r}, tokenizer='byte', length=8, cache=cache)"
    )
    env = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", program], env=env).returncode == -9
    left = list((tmp_path / "cache").iterdir())
    assert len(left) == 1 and left[0].suffix == ".partial" and list(left[0].glob("*/train.bin"))
    train, validation = parts(path, "tail")
    said = []
    data = load(path, tmp_path, say=said.append)
    assert Bytes().decode(data.validation) == validation
    assert f"{len(train.encode()):,} tokens to learn from" in said[-1]


def test_an_error_while_encoding_leaves_no_cache(tmp_path):
    path = write(tmp_path / "a.txt", "abc" * 100_000 + "é")
    with pytest.raises(ConfigError, match="the character 'é'"):
        load(path, tmp_path, tokenizer=Characters("abc"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("JAXARCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/reader")
    assert cache_folder() == Path("/home/reader/.cache/jaxarch")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/jaxarch")
    monkeypatch.setenv("JAXARCH_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    load_text(write(tmp_path / "a.txt", PROSE), tokenizer="byte", length=4)
    assert list((tmp_path / "mine").iterdir())


def test_importing_the_reader_imports_neither_grain_nor_tokenizers():
    program = "import sys, jaxarch.data.text\nprint({'grain', 'tokenizers', 'pydoc_data'} & set(sys.modules))"
    env = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Bad input: one line that says what would do.


def message(path, tmp_path, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, tmp_path, **options)
    line = str(caught.value).replace(str(tmp_path), "DIR")
    assert "\n" not in line and line.endswith(".")
    return line


def test_missing_paths(tmp_path):
    write(tmp_path / "shakespeare.txt", PROSE)
    assert message(str(tmp_path / "shakespear.txt"), tmp_path) == (
        "--data DIR/shakespear.txt does not exist; the nearest name in DIR is shakespeare.txt."
    )
    assert message(str(tmp_path / "no/a.txt"), tmp_path) == (
        "--data DIR/no/a.txt does not exist; neither does the folder DIR/no."
    )
    assert message(str(tmp_path / "*.md"), tmp_path) == (
        "--data DIR/*.md holds no file; quote it, and let ** stand for folders at any depth."
    )
    (tmp_path / "void").mkdir()
    assert message(str(tmp_path / "void"), tmp_path) == (
        "--data DIR/void holds no file; give text files (.txt, .md, .jsonl, ...)."
    )
    assert "File name too long" in message("text itself " * 100, tmp_path)


def test_empty_data(tmp_path):
    path = write(tmp_path / "a.txt", "")
    assert message(path, tmp_path) == "--data DIR/a.txt is empty; give text to learn from."
    assert message(str(tmp_path / "*.txt"), tmp_path).endswith("*.txt is empty; give text to learn from.")
    assert "validation part of DIR/b.jsonl has 0 tokens" in message(write(tmp_path / "b.jsonl", "\n\n"), tmp_path)


@pytest.mark.parametrize("piece_bytes", [1, 64, 1 << 16])
def test_text_that_is_not_utf8(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", piece_bytes)
    expected = "DIR/a.txt is not UTF-8: byte 0xff at offset 1234; convert it, for example with iconv."
    assert message(write(tmp_path / "a.txt", b"a" * 1234 + b"\xff" + b"b" * 100), tmp_path) == expected
    with_mark = b"\xef\xbb\xbf" + "é".encode() * 615 + b"a\xffb"
    assert message(write(tmp_path / "a.txt", with_mark), tmp_path) == expected
    cut_short = write(tmp_path / "a.txt", b"a" * 70 + "東".encode()[:2])
    assert "byte 0xe6 at offset 70;" in message(cut_short, tmp_path)
    lines = b'{"text": "a"}\n{"text": "\xe9"}\n'
    assert "byte 0xe9 at offset 24;" in message(write(tmp_path / "a.jsonl", lines), tmp_path)


def test_a_binary_file(tmp_path):
    write(tmp_path / "f" / "a.txt", PROSE)
    write(tmp_path / "f" / "b.bin", b"GIF8\x01\x00")
    assert message(str(tmp_path / "f"), tmp_path) == (
        "DIR/f/b.bin is not text: byte 0x00 at offset 5; name the text files alone, for example with a glob."
    )


def test_bad_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    assert message(write(path, '{"text": "a"}\n\n{"text": oops}\n'), tmp_path) == (
        "DIR/a.jsonl line 3 is not JSON: Expecting value at column 10; give one object a line."
    )
    assert message(write(path, '{"text": "a"}\n{"body": "b", "id": 1}\n'), tmp_path) == (
        "DIR/a.jsonl line 2 has no field 'text'; it has body, id: choose with --field."
    )
    assert message(write(path, "[1]\n"), tmp_path) == (
        'DIR/a.jsonl line 1 is not a JSON object; give lines such as {"text": "..."}.'
    )
    assert message(write(path, '{"text": 3}\n'), tmp_path) == (
        "DIR/a.jsonl line 1: the field 'text' is not a string; choose another with --field."
    )


def test_too_little_text(tmp_path):
    path = write(tmp_path / "a.txt", "a" * 100)
    assert message(path, tmp_path, length=90) == (
        "the training part of DIR/a.txt has 90 tokens, fewer than --length 90 + 1; "
        "give more text or a smaller --length."
    )
    assert get(load(path, tmp_path, length=89).train, 0).inputs.shape == (89,)
    assert message(path, tmp_path, split="document") == (
        "the validation part of DIR/a.txt has 0 tokens; give more text, a larger --held-out than 0.1, or --split tail."
    )
    assert message(path, tmp_path, held_out=1.0).startswith("--held-out 1.0 is not a fraction between 0 and 1")
    assert message(path, tmp_path, length=0) == "--length 0 is not a number of tokens; give 1 or more."


def test_bad_tokenisers(tmp_path):
    path = write(tmp_path / "a.txt", PROSE)
    assert message(path, tmp_path, tokenizer="chars") == (
        "cannot read --tokenizer chars: No such file or directory; char, byte, bpe or a tokenizer.json would do."
    )
    for content in ("not json", "[1]", '{"type": "characters"}', '{"model": 1}', b"\xff"):
        file = write(tmp_path / "t.json", content)
        assert "DIR/t.json is not a tokenizer.json (" in message(path, tmp_path, tokenizer=file)
    assert "--vocab-size 3 is too small" in message(path, tmp_path, tokenizer="bpe", vocab_size=3)


def test_what_may_not_be_read_or_written(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", PROSE)
    in_the_way = Path(write(tmp_path / "file", "x"))
    assert message(path, tmp_path, cache=in_the_way / "cache") == (
        "cannot write the cache DIR/file/cache: Not a directory; name another folder in JAXARCH_CACHE."
    )

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)  # chmod does not stop root
    assert message(path, tmp_path, tokenizer="char") == (
        "cannot read --data DIR/a.txt: Permission denied; give text that you may read."
    )


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_module._Part, "write", full)
    assert "No space left on device" in message(write(tmp_path / "a.txt", PROSE), tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []
