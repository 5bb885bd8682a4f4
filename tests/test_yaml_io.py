"""YAML of users: plain values under keys of text, and nothing that is not what it looks like."""

from __future__ import annotations

import re

import pytest
import yaml

from yolo_sophia import yaml_io as reading
from yolo_sophia.compare.plan import parse
from yolo_sophia.presets import preset_directory
from yolo_sophia.runs.run import as_name, check_name
from yolo_sophia.yaml_io import parse_yaml, read_yaml

CHAIN = "\n".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else 'x'}]" for i in range(200))
BOMB = "b0: &b0 [x]\n" + "\n".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]" for i in range(1, 12))
MERGES = "b0: &b0 {x: 1}\n" + "\n".join(
    f"b{i}: &b{i} {{'<<': [{', '.join([f'*b{i - 1}'] * 10)}]}}" for i in range(1, 9)
).replace("'<<'", "<<")


@pytest.mark.parametrize("path", sorted(preset_directory().parent.rglob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_shipped_reads_as_everywhere(path):
    text = path.read_text(encoding="utf-8")
    if path.parent.name != "data":  # class numbers are no keys of text; Ultralytics reads those
        assert parse_yaml(text, "it") == yaml.safe_load(text)


def test_dates_stay_text_and_merges_merge():
    assert parse_yaml("{a: 2024-01-01, b: 2001-99-99}", "it") == {"a": "2024-01-01", "b": "2001-99-99"}
    assert parse_yaml("{x: &x {a: 1, b: 2}, y: {<<: *x, a: 3}}", "it")["y"] == {"a": 3, "b": 2}


def test_an_exponent_makes_a_number():
    read = parse_yaml("[1e-3, 1.0e3, +2E5, -1.e4, '1e3', 1e, e5, 1e5x]", "it")
    assert read == [0.001, 1000.0, 2e5, -1e4, "1e3", "1e", "e5", "1e5x"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{a: 1, a: 2}", "found the key 'a' twice, expected it once"),
        ("{a: {b: 1, 'b': 2}}", "found the key 'b' twice"),
        ("1: x", "found 1 as a key, expected text"),
        ("on: x", "found True as a key, expected text (in quotes"),
        ("? [a]\n: x", "found ['a'] as a key"),
        ("&a [*a]", "more than 100000 values"),
        ("{a: &a {b: *a}}", "more than 100000 values"),
        (BOMB, "more than 100000 values, expected fewer (an alias counts wherever it stands)"),
        (MERGES, "more than 100000 values"),
        (CHAIN, "more than 50 levels"),
        ("[" * 51 + "]" * 51, "more than 50 levels"),
        ("[" * 5000, "more than 50 levels"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor for the tag"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("!!binary aGk=", "could not determine a constructor"),
        ("!!set {a}", "could not determine a constructor"),
        ("!!int ''", "index out of range"),
        ("!!bool x", "'x'"),
        ("!!float .", "could not convert"),
        ("9" * 5000, "5000 digits"),
        ("a: \0", "unacceptable character"),
    ],
)
def test_refuses(text, says):
    with pytest.raises(ValueError, match=f"^it is not readable YAML: .*{re.escape(says)}") as error:
        parse_yaml(text, "it")
    assert "\n" not in str(error.value)


def test_refuses_a_file_that_is_large_or_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1")
    with pytest.raises(ValueError, match=r"^it is not readable YAML: .*directory"):
        read_yaml(tmp_path, "it")
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"^it is not readable YAML: 'utf-8' codec"):
        read_yaml(path, "it")
    monkeypatch.setattr(reading, "LARGEST", 3)
    path.write_text("a: 1")
    with pytest.raises(ValueError, match=r"^it: found 4 bytes, expected a YAML file of at most 3"):
        read_yaml(path, "it")


def test_a_word_that_is_meant_as_a_mapping_is_not_taken_as_text():
    base = ["data=d.yaml", "model=m.yaml", "optimizers=SGD"]
    with pytest.raises(ValueError, match=r"optimizer_args=.* is not readable YAML: found the key 'eps' twice"):
        parse([*base, "optimizer_args={eps: 1, eps: 2}"])


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", "C:a", "a b", "a\n", "é", "CON", "con.x", "lpt1", "a.", "-a"]
)
def test_names_of_folders(name):
    with pytest.raises(ValueError, match="it names a folder"):
        check_name("arm ", name)
    assert not set(as_name(name)) & set("/\\: \n") and as_name(name) not in {"", ".", ".."}


def test_long_names_stay_apart():
    assert len(as_name("a" * 300)) == 64 and as_name("a" * 300) != as_name("a" * 301)
    with pytest.raises(ValueError, match="at most 64"):
        check_name("arm ", "a" * 65)
