"""The text that the built-in model is made from: one CPython version, named, hashed, split by whole modules."""

import json
import sys

import pytest

from jaxinfer.training import corpus

LIST = corpus.read_list()
HELD_OUT = [path for path in LIST["files"] if corpus.is_held_out(path, LIST["held_out"])]
needs_its_python = pytest.mark.skipif(
    ".".join(map(str, sys.version_info[:3])) != LIST["python"], reason=f"the text is the library of {LIST['python']}"
)


def test_every_file_is_named_with_its_hash():
    assert LIST["python"] == "3.11.7"
    assert list(LIST["files"]) == sorted(LIST["files"]) and len(LIST["files"]) == 540
    assert all(len(sha256) == 64 and int(sha256, 16) for sha256 in LIST["files"].values())


def test_no_tests_tables_or_installed_packages_are_in_the_text():
    folders = {part for path in LIST["files"] for part in path.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not {"pydoc_data/topics.py", "html/entities.py", "encodings/cp437.py"} & set(LIST["files"])


def test_whole_modules_are_held_out():
    assert len(HELD_OUT) >= 32  # the speculation benchmark takes its prompts from the first 32
    for module in LIST["held_out"]:
        assert any(corpus.is_held_out(path, [module]) for path in HELD_OUT), module
    assert "json/decoder.py" in HELD_OUT and "textwrap.py" in HELD_OUT and "jsonish.py" not in HELD_OUT


@needs_its_python
def test_held_out_text_is_six_to_nine_percent_and_xz_needs_more_than_one_and_a_half_bits():
    text = corpus.read_corpus()
    assert list(text.held_out) == sorted(HELD_OUT) and not set(text.train) & set(text.held_out)
    held, train = (sum(len(s.encode()) for s in part.values()) for part in (text.held_out, text.train))
    assert 0.06 < held / (held + train) < 0.09
    assert 1.5 < corpus.xz_bits_per_byte(text.held_out) < 1.8


@needs_its_python
def test_no_held_out_file_is_mostly_lines_that_were_trained_on():
    text = corpus.read_corpus()
    seen = {line.strip() for file in text.train.values() for line in file.split("\n")}
    for path, file in text.held_out.items():
        lines = [line.strip() for line in file.split("\n") if len(line.strip()) > 25]
        assert sum(line in seen for line in lines) < 0.2 * len(lines), path


def test_a_missing_file_is_refused_with_version_and_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"lacks __future__\.py, which CPython 3\.11\.7 has: .*--stdlib") as caught:
        corpus.read_corpus(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_changed_file_is_refused_with_both_hashes(tmp_path):
    (tmp_path / "__future__.py").write_text("pass\n")
    with pytest.raises(
        ValueError, match=r"__future__\.py has sha256 [0-9a-f]{12}\.\.\., CPython 3\.11\.7 has [0-9a-f]{12}"
    ):
        corpus.read_corpus(tmp_path)


def test_xz_is_the_xz_of_the_sorted_files():
    same = {"b": "x" * 5000, "a": json.dumps(list(range(500)))}
    assert corpus.xz_bits_per_byte(same) == corpus.xz_bits_per_byte(dict(sorted(same.items())))
    assert corpus.xz_bits_per_byte({"a": "x" * 100_000}) < 0.1
