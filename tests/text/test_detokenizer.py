"""Text that comes piece by piece is the text that comes whole, cut before the first stop string."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import ENGLISH, KINDS, WORLD

from jaxinfer.text import Detokenizer, Tokenizer

LAW = settings(max_examples=40, deadline=None, derandomize=True, database=None)
TEXT = " ".join(WORLD + ENGLISH) + " \ufffd <s>x</s><|eot|>y é bien  \n\n end stop"


@pytest.fixture(scope="session")
def tokenizers(made) -> dict[str, Tokenizer]:
    return {name: Tokenizer(directory) for name, directory in made.items()}


@functools.cache
def fragments(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(TEXT)


@st.composite
def rows(draw, tokenizer: Tokenizer) -> list[int]:
    """Ids: stretches of real text, cut anywhere, among random ids (special, added and past the vocabulary too)."""
    real = fragments(tokenizer)
    some = st.integers(0, max(len(real) - 1, 0)).flatmap(
        lambda start: st.integers(0, 25).map(lambda n: real[start : start + n])
    )
    wild = st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=6)
    broken = st.lists(st.sampled_from(bytes_of(tokenizer)), max_size=6) if bytes_of(tokenizer) else wild
    return sum(draw(st.lists(st.one_of(some, wild, broken), max_size=5)), [])


@functools.cache
def bytes_of(tokenizer: Tokenizer) -> list[int]:
    """Tokens of a byte with its high bit, of which most rows make no character."""
    names = [f"<0x{b:02X}>" for b in range(0x80, 0x100)] + [chr(c) for c in range(0xA1, 0x144)]
    return [i for name in names if (i := tokenizer.backend.token_to_id(name)) is not None]


@st.composite
def cuts(draw, text: str) -> list[str]:
    """Stop strings: pieces of the text, with and without a change, so that some are met, some nearly."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(text) - 1, 0)))
        piece = text[start : start + draw(st.integers(1, 6))]
        found.append(piece + draw(st.sampled_from(["", "", "x", " "])) or "x")
    return found


def split(ids: list[int], at: list[int]) -> list[list[int]]:
    edges = [0, *sorted(i % (len(ids) + 1) for i in at), len(ids)]
    return [ids[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def cut(text: str, stops) -> tuple[str, str | None, int]:
    """The text before the stop string that is completed first (the longest of several), which it is, where it ends."""
    hits = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not hits:
        return text, None, len(text)
    end, start, stop = min(hits)
    return text[:start], stop, end


def streamed(detokenizer: Detokenizer, parts: list[list[int]]) -> str:
    return "".join([*(detokenizer.push(part) for part in parts), detokenizer.finish()])


@pytest.mark.parametrize("name", KINDS)
@LAW
@given(data=st.data())
def test_any_split_gives_the_whole_text(tokenizers, name, data):
    tokenizer = tokenizers[name]
    ids = data.draw(rows(tokenizer))
    skip = data.draw(st.booleans())
    parts = split(ids, data.draw(st.lists(st.integers(0, 99), max_size=6)))
    detokenizer = Detokenizer(tokenizer, skip_special=skip)
    assert streamed(detokenizer, parts) == tokenizer.decode(ids, skip_special=skip)
    assert (detokenizer.stopped, detokenizer.num) == (False, len(ids))


@pytest.mark.parametrize("name", KINDS)
@LAW
@given(data=st.data())
def test_any_split_gives_the_text_before_the_first_stop_string(tokenizers, name, data):
    tokenizer = tokenizers[name]
    ids = data.draw(rows(tokenizer))
    whole = tokenizer.decode(ids)
    stops = data.draw(cuts(whole))
    parts = split(ids, data.draw(st.lists(st.integers(0, 99), max_size=6)))
    detokenizer = Detokenizer(tokenizer, stops)
    text, stop, end = cut(whole, stops)
    assert streamed(detokenizer, parts) == text
    assert (detokenizer.stopped, detokenizer.stop_string) == (stop is not None, stop)
    if stop is None:
        assert detokenizer.num == len(ids)
        return
    alone = Detokenizer(tokenizer, stops)
    assert streamed(alone, [[i] for i in ids]) == text
    assert alone.num == detokenizer.num  # whatever the split
    if not whole[:end].endswith("\ufffd"):  # half a character looks like one until it is whole
        # the fewest ids whose text reaches the end of the stop string
        assert detokenizer.num == next(n for n in range(len(ids) + 1) if tokenizer.decode(ids[:n])[:end] == whole[:end])


@pytest.mark.parametrize("name", KINDS)
@LAW
@given(data=st.data())
def test_behind_a_prompt_the_text_goes_on(tokenizers, name, data):
    tokenizer = tokenizers[name]
    start = data.draw(st.integers(0, len(TEXT)))
    prompt = tokenizer.encode(TEXT[start : start + data.draw(st.integers(0, 40))])
    ids = data.draw(rows(tokenizer))
    parts = split(ids, data.draw(st.lists(st.integers(0, 99), max_size=6)))
    whole = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
    assert streamed(Detokenizer(tokenizer, prompt=prompt), parts) == whole


def test_bytes_behind_a_prompt_of_bytes_are_read_with_them(tokenizers):
    tokenizer = tokenizers["fallback"]
    prompt, ids = tokenizer.encode("hello 你"), [tokenizer.id("<0x0A>")]
    assert streamed(Detokenizer(tokenizer, prompt=prompt), [ids]) == "\n"


def test_a_new_word_behind_a_prompt_keeps_its_space(tokenizers):
    tokenizer = tokenizers["fallback"]
    new = tokenizer.encode("hello world", special=False)[1:]
    assert tokenizer.decode(new) == "world"
    for prompt in ("hello", "hello\n", "你好", "<s>", "", "x" * 500):
        ids = tokenizer.encode(prompt)
        text = streamed(Detokenizer(tokenizer, prompt=ids), [new])
        assert text == (" world" if tokenizer.decode(ids) else "world")


# --- held back as long as needed, and no longer ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte_level", "fallback", "no_strip"])
def test_no_push_gives_half_a_character(tokenizers, name):
    tokenizer = tokenizers[name]
    text = "".join(WORLD)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([i]) for i in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, detokenizer.finish()]) == text


@pytest.mark.parametrize("name", ["byte_level", "fallback", "no_strip", "metaspace", "word_pieces", "no_decoder"])
def test_ascii_comes_at_once(tokenizers, name):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("hello world. do not stop the", special=False)
    detokenizer = Detokenizer(tokenizer)
    text = ""
    for n, i in enumerate(ids, start=1):
        text += detokenizer.push([i])
        assert text == tokenizer.decode(ids[:n])


def test_a_character_comes_with_its_last_byte(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = [tokenizer.id(c) for c in "ðŁĳį"]  # 👍, F0 9F 91 8D
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "👍"]


def test_a_run_of_fallback_bytes_comes_when_it_ends(tokenizers):
    tokenizer = tokenizers["fallback"]
    ids = [tokenizer.id(f"<0x{b:02X}>") for b in "你".encode()]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == ["", "", ""]
    assert detokenizer.push([tokenizer.id("h")]) == "你h"
    # why not sooner: a later byte can still turn the whole run into U+FFFD
    assert tokenizer.decode([*ids, ids[0]]) == "\ufffd" * 4


@pytest.mark.parametrize("name", ["fallback", "byte_level"])
def test_ids_without_text_do_not_part_the_bytes_of_a_character(tokenizers, name):
    tokenizer = tokenizers[name]
    names = ["<0xE4>", "<0xBD>", "<0xA0>"] if name == "fallback" else list("ä½ł")  # 你
    first, *rest = [tokenizer.id(name) for name in names]
    ids = [first, tokenizer.vocab_size, tokenizer.bos_id, *rest, tokenizer.id("h")]
    detokenizer = Detokenizer(tokenizer)
    assert streamed(detokenizer, [[i] for i in ids]) == tokenizer.decode(ids) == "你h"


def test_a_real_replacement_character_is_not_held(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = [tokenizer.id(c) for c in "ï¿½"] * 3  # EF BF BD: U+FFFD itself
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == ["", "", "\ufffd"] * 3
    tokenizer = tokenizers["fallback"]
    assert Detokenizer(tokenizer).push([tokenizer.id("\ufffd")] * 2) == "\ufffd\ufffd"
    wrong = tokenizers["byte_level"].id("ÿ")  # FF: begins nothing
    assert Detokenizer(tokenizers["byte_level"]).push([wrong]) == "\ufffd"


def test_half_a_character_at_the_end_becomes_a_replacement_character(tokenizers):
    tokenizer = tokenizers["byte_level"]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([tokenizer.id("ð"), tokenizer.id("Ł")]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
    tokenizer = tokenizers["fallback"]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([tokenizer.id("<0xF0>"), tokenizer.id("<0x9F>")]) == ""
    assert detokenizer.finish() == "\ufffd\ufffd"


def test_only_what_may_become_a_stop_string_is_held(tokenizers):
    tokenizer = tokenizers["byte_level"]
    detokenizer = Detokenizer(tokenizer, ["###", "\n\n"])
    pieces = [detokenizer.push([tokenizer.id(c)]) for c in "a#b##cĊdĊ"]  # Ċ is a newline
    assert pieces == ["a", "", "#b", "", "", "##c", "", "\nd", ""]
    assert detokenizer.finish() == "\n"


# --- stop strings ------------------------------------------------------------------------------------------------


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.id(c) for c in text]


@pytest.mark.parametrize(
    ("stops", "text", "stop", "num"),
    [
        (["lo"], "hel", "lo", 5),
        ("lo", "hel", "lo", 5),  # a str is one stop string, not its letters
        (["lo", "el"], "h", "el", 3),  # the first to be complete
        (["ell", "l"], "he", "l", 3),  # completed first, though it begins later
        (["l", "el", "hel"], "", "hel", 3),  # of those completed together the longest
        (["x"], "hello", None, 5),
    ],
)
def test_the_stop_string_that_is_completed_first_cuts_the_text(tokenizers, stops, text, stop, num):
    tokenizer = tokenizers["byte_level"]
    ids = letters(tokenizer, "hello")
    for parts in ([ids], [[i] for i in ids]):
        detokenizer = Detokenizer(tokenizer, stops)
        assert streamed(detokenizer, parts) == text
        assert (detokenizer.stop_string, detokenizer.num) == (stop, num)


def test_after_a_stop_string_nothing_more_comes(tokenizers):
    tokenizer = tokenizers["byte_level"]
    detokenizer = Detokenizer(tokenizer, ["b"])
    assert detokenizer.push(letters(tokenizer, "abc")) == "a"
    assert detokenizer.stopped and detokenizer.num == 2
    assert detokenizer.push(letters(tokenizer, "abc")) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.num == 2


def test_a_stop_string_in_a_run_of_bytes_ends_at_its_own_token(tokenizers):
    """A newline is a byte in Llama 2's vocabulary: its text comes with the next token, the row ends at the newline."""
    tokenizer = tokenizers["fallback"]
    newline = tokenizer.id("<0x0A>")
    ids = [tokenizer.id("h"), newline, newline, tokenizer.id("e")]
    detokenizer = Detokenizer(tokenizer, ["\n"])
    assert [detokenizer.push([i]) for i in ids] == ["h", "", "", ""]
    assert (detokenizer.stopped, detokenizer.num) == (True, 2)


def test_num_counts_special_ids(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = [tokenizer.bos_id, *letters(tokenizer, "ab"), tokenizer.eos_id, *letters(tokenizer, "c")]
    detokenizer = Detokenizer(tokenizer, ["c"])
    assert streamed(detokenizer, [ids]) == "ab"
    assert detokenizer.num == 5


def test_a_stop_string_is_met_by_a_special_token_that_is_shown(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = [*letters(tokenizer, "ab"), tokenizer.eos_id]
    assert streamed(Detokenizer(tokenizer, ["<|end|>"]), [ids]) == "ab"
    shown = Detokenizer(tokenizer, ["<|end|>"], skip_special=False)
    assert streamed(shown, [ids]) == "ab"
    assert shown.stopped


# --- cost, and bad input -----------------------------------------------------------------------------------------


class Counting:
    """A backend that counts the ids it decodes."""

    def __init__(self, backend) -> None:
        self.backend, self.decoder, self.id_to_token, self.ids = backend, backend.decoder, backend.id_to_token, 0

    def decode(self, ids, **kwargs) -> str:
        self.ids += len(ids)
        return self.backend.decode(ids, **kwargs)


@pytest.mark.parametrize("name", KINDS)
def test_the_cost_is_linear(made, name):
    """Over ids of text, of one token again and again (spaces that are trimmed, bytes), one at a time."""
    tokenizer = Tokenizer(made[name])
    tokenizer.backend = counting = Counting(tokenizer.backend)
    again = [tokenizer.backend.backend.token_to_id(token) for token in ("▁", "<0xE4>", "\ufffd", "Ċ", "ÿ", "the")]
    for ids in [fragments(Tokenizer(made[name])), *([i] for i in again if i is not None)]:
        ids = (ids * 2000)[:2000]
        detokenizer = Detokenizer(tokenizer, ["never seen"], prompt=ids)
        counting.ids = 0
        streamed(detokenizer, [[i] for i in ids])
        assert counting.ids <= 10 * 2000 + 4 * len(ids)


def test_an_empty_stop_string_is_refused(tokenizers):
    with pytest.raises(ValueError, match="a stop string is empty.*leave it out"):
        Detokenizer(tokenizers["byte_level"], ["x", ""])


def test_pads_are_refused(tokenizers):
    with pytest.raises(ValueError, match=r"id -1 is outside any vocabulary: -1 pads a row, so pass ids\[:num\]"):
        Detokenizer(tokenizers["byte_level"]).push([1, -1])


def test_a_finished_row_takes_no_more(tokenizers):
    detokenizer = Detokenizer(tokenizers["byte_level"])
    detokenizer.finish()
    with pytest.raises(ValueError, match="push after finish.*make a Detokenizer for the next"):
        detokenizer.push([1])
