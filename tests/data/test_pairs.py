from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from jaxarch.data import pairs as module
from jaxarch.data.pairs import Pairs, Specials, examples, load_pairs, name_pairs, number_pairs, padded
from jaxarch.data.tokenization import Bytes, Characters
from jaxarch.run.protocol import ConfigError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def table(path: Path, count: int) -> str:
    return write(path, "".join(f"source {i}\ttarget {i:03}\n" for i in range(count)))


# --- tokens -------------------------------------------------------------------------------------


def test_padded_by_hand():
    batch = padded([([5, 6], [7]), ([4], [5, 6, 4])], Specials(pad=7, begin=8, end=9), 4, 4)
    assert batch.source.tolist() == [[5, 6, 9, 7], [4, 9, 7, 7]]
    assert batch.inputs.tolist() == [[8, 7, 7, 7], [8, 5, 6, 4]]
    assert batch.targets.tolist() == [[7, 9, 7, 7], [5, 6, 4, 9]]
    assert batch.weights.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert {array.dtype for array in batch[:3]} == {np.dtype(np.int32)} and batch.weights.dtype == np.float32


@pytest.mark.parametrize("pair", [([1, 2, 3], [1]), ([1], [1, 2, 3])])
def test_what_does_not_fit_with_its_end_is_refused(pair):
    with pytest.raises(ValueError, match="do not fit 3 and 3"):
        padded([pair], Specials(7, 8, 9), 3, 3)


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_a_row_says_its_text_again_under_any_tokeniser(tokenizer, tmp_path):
    path = write(tmp_path / "a.tsv", "".join(f"größe {i}\tÜbergröße {i} ẞ\n" for i in range(40)))
    data = load_pairs(path, tokenizer=tokenizer, vocab_size=300)
    assert data.specials == (data.tokenizer.vocab, data.tokenizer.vocab + 1, data.tokenizer.vocab + 2)
    assert data.vocab == data.tokenizer.vocab + 3
    for (source, target), row in zip(data.texts, zip(*data.validation, strict=True), strict=True):
        assert data.text(row[0]) == source and data.text(row[2]) == target
        # What stands after the end, and special tokens before it, say nothing.
        assert data.text([data.specials.begin, *row[1][1:].tolist(), data.specials.end, 0, 0]) == target
        assert row[0].max() == data.specials.end and (row[0] != data.specials.pad).sum() == row[0].argmax() + 1


def test_the_lengths_are_those_of_the_longest_pair_and_longer_ones_are_left_out_and_said(tmp_path):
    long = "".join(f"{i}\t{'x' * (20 + i % 2)}\n" for i in range(40))
    path = write(tmp_path / "a.tsv", "".join(f"{i}\t{'y' * (i % 10)}z\n" for i in range(100, 160)) + long)
    said: list[str] = []
    data = load_pairs(path, tokenizer="byte", length=21, say=said.append)
    assert data.validation.source.shape[1] == 4 and data.validation.targets.shape[1] == 21
    assert len(said) == 1 and "20 pairs of more than 21 left out" in said[0]
    assert data.counts["train"]["pairs"] + data.counts["validation"]["pairs"] == 80
    assert len(data.texts) == len(data.validation.source) == data.counts["validation"]["pairs"]
    assert all("x" * 21 not in target for _, target in data.texts)
    said.clear()
    assert load_pairs(path, tokenizer="byte", length=22, say=said.append).validation.targets.shape[1] == 22
    assert "left out" not in said[0]
    with pytest.raises(ConfigError, match=r"no pair to learn from fits --length 3; --length 22 would hold all\."):
        load_pairs(path, tokenizer="byte", length=3)


# --- the split and the order --------------------------------------------------------------------


def seen(data: module.PairData, start: int, stop: int) -> list[str]:
    return [data.text(example(data, i).source) for i in range(start, stop)]


def example(data: module.PairData, number: int) -> Pairs:
    found = data.train[number]
    assert isinstance(found, Pairs)
    return found


def test_each_epoch_has_every_pair_once_in_another_order(tmp_path):
    data = load_pairs(table(tmp_path / "a.tsv", 50), seed=3)
    assert data.counts["train"]["pairs"] == 45 and data.counts["validation"]["pairs"] == 5
    held = [source for source, _ in data.texts]
    first, second = seen(data, 0, 45), seen(data, 45, 90)
    assert sorted(first + held) == sorted(second + held) == sorted(f"source {i}" for i in range(50))
    assert first != second and seen(load_pairs(str(tmp_path / "a.tsv"), seed=4), 0, 45) != first
    # By number: the same pair whatever was read before, and the target beside its own source.
    again = load_pairs(str(tmp_path / "a.tsv"), seed=3)
    for number in (70, 3, 44):
        assert seen(again, number, number + 1) == (first + second)[number : number + 1]
        one = example(again, number)
        assert int(again.text(one.source).split()[1]) == int(again.text(one.targets).split()[1])


def test_what_is_held_out_depends_on_the_data_alone(tmp_path):
    path = table(tmp_path / "a.tsv", 50)
    assert load_pairs(path, seed=1).texts == load_pairs(path, seed=2).texts
    assert len(load_pairs(path, held_out=3).texts) == 3
    assert load_pairs(path, seed=1).counts == load_pairs(path, seed=2).counts
    changed = write(tmp_path / "b.tsv", (tmp_path / "a.tsv").read_text().replace("target 007", "target 008"))
    assert load_pairs(path).counts != load_pairs(changed).counts


def test_a_source_with_two_targets_is_on_one_side_alone(tmp_path):
    lines = "".join(f"{max(i - 40, 0)}\t{i}\n" for i in range(60))  # 0 stands on 41 of the lines
    data = load_pairs(write(tmp_path / "a.tsv", lines), held_out=50)
    held = {source for source, _ in data.texts}
    assert len(held) == 2 and not held & set(seen(data, 0, 60 - len(data.texts)))


def test_examples_are_single_rows():
    pairs = Pairs(*(np.arange(12).reshape(4, 3) + 100 * i for i in range(4)))
    rows = [row for row in (examples(pairs, 0)[i] for i in range(4)) if isinstance(row, Pairs)]
    assert sorted(int(row.source[0]) for row in rows) == [0, 3, 6, 9]
    assert all((row.weights - row.source == 300).all() for row in rows)


def test_saved_with_its_run(tmp_path):
    data = load_pairs(table(tmp_path / "a.tsv", 30))
    data.save(tmp_path)
    assert (
        Characters(data.tokenizer.decode(range(data.tokenizer.vocab))).to_json()
        in (tmp_path / "tokenizer.json").read_text()
    )
    assert (tmp_path / "data.json").exists()


# --- where pairs come from ----------------------------------------------------------------------


def test_two_files_are_one_table(tmp_path):
    one = table(tmp_path / "a.tsv", 30)
    lines = [line.split("\t") for line in (tmp_path / "a.tsv").read_text().splitlines()]
    # A byte order mark and line ends of another system are no part of the text; a third column is left out.
    source = write(tmp_path / "s.txt", "\ufeff" + "".join(pair[0] + "\r\n" for pair in lines))
    target = write(tmp_path / "t.txt", "\n".join(pair[1] for pair in lines))
    three = write(tmp_path / "c.tsv", "".join("\t".join([*pair, "who wrote it"]) + "\n" for pair in lines))
    datas = [load_pairs(one), load_pairs(f"{source}, {target}"), load_pairs(source, target=target), load_pairs(three)]
    for data in datas[1:]:
        assert data.counts == datas[0].counts and data.texts == datas[0].texts


def test_a_line_ends_at_a_line_break_alone(tmp_path):
    source = write(tmp_path / "s.txt", "a\u2028b\na\x0cb\nc\n" * 4)
    data = load_pairs(source, target=write(tmp_path / "t.txt", "".join(f"{i}\n" for i in range(12))))
    assert data.counts["train"]["pairs"] + data.counts["validation"]["pairs"] == 12


FILES = {
    "good.txt": "a\nb\nc\n",
    "short.txt": "1\n2\n",
    "gap.txt": "1\n \n3\n",
    "empty.txt": "",
    "latin.txt": "Gr\xfc\xdfe\n".encode("latin-1"),
    "mark.txt": b"\xef\xbb\xbfGr\xfc\n",
    "tabless.tsv": "a\tb\nc d\n",
    "half.tsv": "a\tb\nc\t \n",
    "first.tsv": "\tb\n",
    "one.tsv": "a\tb\n",
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no.tsv",), "--data no.tsv does not exist; numbers, names, a tab-separated file or two files"),
        (("good.txt,no.txt",), "--data no.txt does not exist"),
        (("good.txt,short.txt",), "good.txt line 3 has no partner: short.txt ends with line 2;"),
        (("short.txt,good.txt",), "good.txt line 3 has no partner: short.txt ends with line 2;"),
        (("good.txt,gap.txt",), "gap.txt line 2 is empty; leave it out of both files."),
        (("empty.txt",), "--data empty.txt is empty"),
        (("latin.txt",), "latin.txt is not UTF-8: byte 0xfc at offset 2; convert it"),
        (("mark.txt",), "mark.txt is not UTF-8: byte 0xfc at offset 5; convert it"),
        (("tabless.tsv",), "tabless.tsv line 2 has no tab"),
        (("half.tsv",), "half.tsv line 2 has no target"),
        (("first.tsv",), "first.tsv line 1 has no source"),
        (("one.tsv",), "one.tsv has 1 pairs; give more"),
        ((".",), "cannot read --data .: Is a directory"),
    ],
)
def test_one_line_says_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        write(tmp_path / name, content)
    with pytest.raises(ConfigError) as error:
        load_pairs(*arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "message"), [({"length": 1}, "--length 1"), ({"held_out": 0}, "--held-out 0")])
def test_options_out_of_range(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_pairs(table(tmp_path / "a.tsv", 20), **options)


@pytest.mark.parametrize(("data", "package"), [("numbers", "num2words"), ("names", "pycountry")])
def test_a_package_that_is_not_there_is_named_with_its_extra(data, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package} is not installed; .*'jaxarch\[data\]'"):
        load_pairs(data)


def test_numbers_in_words(monkeypatch):
    pytest.importorskip("num2words")
    monkeypatch.setattr(module, "NUMBERS", 300)
    monkeypatch.setattr(module, "MILLION", 2000)
    pairs = dict(number_pairs())
    assert len(pairs) == 1300 and {str(number) for number in range(1000)} < pairs.keys()
    assert all(0 <= int(number) < 2000 for number in pairs)
    assert pairs["0"] == "null" and pairs["17"] == "siebzehn" and pairs["931"] == "neunhunderteinunddreißig"
    assert number_pairs() == list(pairs.items())  # the same draw
    assert dict(number_pairs("fr"))["21"] == "vingt et un"
    data = load_pairs("numbers", tokenizer=Bytes(), held_out=100)
    assert len(data.texts) == 100 and not {source for source, _ in data.texts} & set(seen(data, 0, 1200))
    with pytest.raises(ConfigError, match="num2words has no --language xx"):
        number_pairs("xx")


def test_names_that_are_translated():
    pytest.importorskip("pycountry")
    pairs = name_pairs()
    found = dict(pairs)
    assert found["Germany"] == "Deutschland" and found["Trento"] == "Trient"
    assert found["French"] == "Französisch" and found["Swiss Franc"] == "Schweizer Franken"
    assert len(set(pairs)) == len(pairs) > 2000
    assert all(one and other and one != other for one, other in pairs)
    assert dict(name_pairs("fr"))["Germany"] == "Allemagne"
    with pytest.raises(ConfigError, match="pycountry has no --language xx"):
        name_pairs("xx")
