"""The tokenizer gives the ids and the text that transformers gives, and every special token once."""

import fnmatch
import json
import pathlib
import subprocess
import sys

import pytest
import transformers
from small_tokenizers import KINDS, before_and_after, byte_level, fallback, write
from tokenizers import processors

import jaxinfer
from jaxinfer import hub
from jaxinfer.text import Tokenizer

TEXTS = [
    "hello world",
    "",
    " leading and trailing ",
    "two  spaces\n\nand\ttabs",
    "naïve café 你好，世界 👩‍👩‍👧 é \ufffd",
    "<|head|>user<|eot|> and </s> inside, <tool> and é bien too",
    "don't , stop . the end !",
]
CASES = [(name, text) for name in KINDS for text in TEXTS]


def oracle(directory: pathlib.Path, **kwargs) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory, **kwargs)


@pytest.mark.parametrize(("name", "text"), CASES)
def test_ids_and_text_equal_transformers(made, name, text):
    ours, theirs = Tokenizer(made[name]), oracle(made[name])
    assert ours.encode(text) == theirs.encode(text)
    assert ours.encode(text, special=False) == theirs.encode(text, add_special_tokens=False)
    ids = theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids)


@pytest.mark.parametrize("name", KINDS)
def test_vocabulary_and_special_ids_equal_transformers(made, name):
    ours, theirs = Tokenizer(made[name]), oracle(made[name])
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.special_ids == {i for i in range(len(theirs)) if theirs.decode([i], skip_special_tokens=True) == ""} & {
        i for i, token in theirs.added_tokens_decoder.items() if token.special
    }
    for i in (0, len(theirs) - 1):
        assert ours.token(i) == theirs.convert_ids_to_tokens(i)
        assert ours.id(ours.token(i)) == i


AS_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizerFast"}


@pytest.mark.parametrize(
    ("make", "config"), [(byte_level, {"bos_token": "<|begin|>"}), (byte_level, AS_LLAMA), (fallback, AS_LLAMA)]
)
def test_auto_tokenizer_agrees(tmp_path, make, config):
    directory = write(tmp_path / "auto", make(), config, {"config.json": {"model_type": "llama"}})
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert Tokenizer(directory).encode(text) == theirs.encode(text)


# --- special tokens, once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bos"), [("byte_level", "<|begin|>"), ("fallback", "<s>")])
def test_a_text_that_begins_with_bos_gets_no_second(made, name, bos):
    tokenizer = Tokenizer(made[name])
    ids = tokenizer.encode(f"{bos}hello world")
    assert ids == tokenizer.encode(f"{bos}hello world", special=False)
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.encode(bos) == [tokenizer.bos_id]
    assert tokenizer.encode("") == [tokenizer.bos_id]
    assert tokenizer.encode(f"hello{bos}").count(tokenizer.bos_id) == 2  # in the middle it is the caller's


def test_a_text_that_ends_with_what_is_put_behind_it_gets_no_second(tmp_path):
    tokenizer = fallback()
    tokenizer.post_processor = before_and_after(tokenizer, "<s>", "</s>")
    ours = Tokenizer(write(tmp_path / "both", tokenizer, {"bos_token": "<s>", "eos_token": "</s>"}))
    plain = ours.encode("hello", special=False)
    assert ours.encode("hello") == [ours.bos_id, *plain, ours.eos_id]  # the post-processor says so
    assert ours.encode("<s>hello</s>") == ours.encode("<s>hello</s>", special=False)
    assert ours.encode("hello</s>")[-1:] == [ours.eos_id] and ours.encode("hello</s>").count(ours.eos_id) == 1


def test_a_token_that_opens_and_closes_is_not_counted_twice(tmp_path):
    tokenizer = fallback()
    tokenizer.post_processor = before_and_after(tokenizer, "<s>", "<s>")
    ours = Tokenizer(write(tmp_path / "same", tokenizer, {"bos_token": "<s>", "eos_token": "<s>"}))
    assert ours.encode("<s>") == [ours.bos_id, ours.bos_id]
    assert ours.encode("<s><s>") == [ours.bos_id, ours.bos_id]


@pytest.mark.parametrize("processor", [None, processors.ByteLevel(trim_offsets=False)])
@pytest.mark.parametrize("flag", [True, False, None])
def test_add_bos_token_counts_where_tokenizer_json_adds_nothing(tmp_path, processor, flag):
    tokenizer = fallback()
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": flag, "add_eos_token": False}
    state = json.loads(tokenizer.to_str())
    state["post_processor"] = None if processor is None else json.loads(processor.__getstate__())
    directory = write(tmp_path / "flag", tokenizer, {k: v for k, v in config.items() if v is not None})
    (directory / "tokenizer.json").write_text(json.dumps(state))
    ours = Tokenizer(directory)
    # transformers 5 leaves the flag of the file out, and builds the same post-processor when it is passed by hand
    theirs = oracle(directory, add_bos_token=flag is True)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.encode("<s>hello").count(ours.bos_id) == 1


def test_add_eos_token_puts_no_eos_behind_a_prompt(tmp_path):
    tokenizer = fallback()
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True}
    directory = write(tmp_path / "eos", tokenizer, config)
    ours = Tokenizer(directory)
    assert ours.encode("hello") == oracle(directory).encode("hello")
    assert ours.eos_id not in ours.encode("hello")


def test_tokenizer_json_wins_over_add_bos_token_false(tmp_path):
    directory = write(tmp_path / "wins", fallback(), {"bos_token": "<s>", "add_bos_token": False})
    assert Tokenizer(directory).encode("hello") == oracle(directory).encode("hello")


def test_tokenizer_json_wins_over_add_bos_token_true(tmp_path):
    """As GLM's, which begins with tokens of its own."""
    tokenizer = byte_level()
    tokenizer.post_processor = before_and_after(tokenizer, "<|im_start|> <|head|>")
    directory = write(tmp_path / "wins", tokenizer, {"bos_token": "<|begin|>", "add_bos_token": True})
    ours = Tokenizer(directory)
    assert ours.encode("hello") == oracle(directory).encode("hello")
    assert ours.encode("<|im_start|><|head|>hello") == ours.encode("hello")
    assert ours.encode("<|head|>hello")[:3] == [ours.id(t) for t in ("<|im_start|>", "<|head|>", "<|head|>")]


def test_settings_of_a_training_run_do_not_cut_or_pad(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    directory = write(tmp_path / "cut", tokenizer)
    text = "hello world " * 8
    assert Tokenizer(directory).encode(text) == oracle(directory).encode(text)
    assert len(Tokenizer(directory).encode(text)) > 4


# --- what lies beside tokenizer.json -----------------------------------------------------------------------------


def added(content: str, special: bool, **flags) -> dict:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, "special": special, **plain, **flags}


def as_dict(content: str) -> dict:
    return {"__type": "AddedToken", **added(content, True)}


V4_DECODER = {
    "421": added("<|end|>", True),
    "426": added("<tool>", True),  # special here, not in tokenizer.json
    "428": added("<new>", False, lstrip=True),
    "430": added("<newer>", True),
    "423": added("<|eot|>", False),  # special in tokenizer.json, and skipped whatever stands here
    "1000": added("<last>", True),  # the order is that of numbers
}
BESIDE = {
    "v5": ({"bos_token": "<|begin|>", "extra_special_tokens": ["<|head|>", "<extra>", "<tool>"]}, {}),
    "v5 named": ({"bos_token": "<|begin|>", "image_token": "<img>", "extra_special_tokens": {"tool": "<t>"}}, {}),
    "v4": ({"bos_token": "<|begin|>", "eos_token": "<|end|>", "added_tokens_decoder": V4_DECODER}, {}),
    "v4 dicts": (
        {"bos_token": as_dict("<|begin|>"), "eos_token": {**as_dict("<eos>"), "special": False}, "pad_token": None},
        {},
    ),
    "v4 others": ({"additional_special_tokens": ["<|head|>", "<more>"], "unk_token": "<|end|>"}, {}),
    "v4 map": (
        {"bos_token": "<|head|>"},
        {"special_tokens_map.json": {"bos_token": "<|begin|>", "eos_token": added("<eos>", False), "pad_token": "<p>"}},
    ),
    "v4 map unread": (
        {"bos_token": "<|begin|>", "added_tokens_decoder": V4_DECODER},
        {"special_tokens_map.json": {"bos_token": "<|head|>", "eos_token": "<|eot|>"}},
    ),
    "split": ({"bos_token": "<|begin|>", "split_special_tokens": True}, {}),
}


@pytest.mark.parametrize("case", BESIDE)
def test_tokens_declared_beside_tokenizer_json_equal_transformers(tmp_path, case):
    config, files = BESIDE[case]
    directory = write(tmp_path / "beside", byte_level(), config, files)
    ours, theirs = Tokenizer(directory), oracle(directory)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.special_ids == {
        i for i in theirs.added_tokens_decoder if not theirs.decode([i], skip_special_tokens=True)
    }
    text = "hello <new> <newer><last><extra><more><img><t><p><eos><tool><|end|><|eot|><|im_end|> world"
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids)


def test_what_transformers_saves_is_read_back(made, tmp_path):
    theirs = oracle(made["byte_level"])
    theirs.add_special_tokens({"pad_token": "<pad>", "extra_special_tokens": ["<one>", "<two>"]})
    theirs.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    theirs.save_pretrained(tmp_path / "saved")
    ours = Tokenizer(tmp_path / "saved")
    assert ours.encode("<one>hello<pad>") == theirs.encode("<one>hello<pad>")
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.chat([{"role": "user", "content": "hi"}]) == "<|begin|>hi"


def test_files_that_name_no_special_token_leave_it_to_the_model(tmp_path):
    """As gpt2's: its tokenizer_config.json holds a length only."""
    ids = {"bos_token_id": 420, "eos_token_id": 421}
    files = {"config.json": ids, "generation_config.json": {"eos_token_id": [423, 421]}}
    tokenizer = Tokenizer(write(tmp_path / "gpt2", byte_level(), {"model_max_length": 1024}, files))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (420, 423, None)
    named = Tokenizer(write(tmp_path / "named", byte_level(), {"eos_token": "<|end|>"}, files))
    assert (named.bos_id, named.eos_id) == (None, 421)  # tokens that are named say also which there are not


# --- decoding ----------------------------------------------------------------------------------------------------


def test_spaces_are_not_cleaned_up(tmp_path):
    config = {"bos_token": "<|begin|>", "clean_up_tokenization_spaces": True}  # as Llama 3's
    directory = write(tmp_path / "clean", byte_level(), config)
    ours, theirs = Tokenizer(directory), oracle(directory)
    text = "hello , world ! do n't ."
    assert ours.decode(ours.encode(text)) == text == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_ids_past_the_vocabulary_have_no_text(made):
    ours, theirs = Tokenizer(made["byte_level"]), oracle(made["byte_level"])
    ids = [*ours.encode("hello"), ours.vocab_size + 3, *ours.encode(" world", special=False)]
    assert ours.decode(ids) == "hello world" == theirs.decode(ids, skip_special_tokens=True)


class OnDevice:
    """An array that comes over in one step only: element by element it would be slow."""

    def __init__(self, array) -> None:
        self.tolist = array.tolist


def test_arrays_are_ids_too(made):
    import numpy

    tokenizer = Tokenizer(made["byte_level"])
    ids = tokenizer.encode("hello world")
    array = numpy.array(ids, numpy.int32)
    assert tokenizer.decode(array) == tokenizer.decode(list(array)) == tokenizer.decode(iter(ids)) == "hello world"
    assert tokenizer.decode(OnDevice(array)) == "hello world"


# --- bad input: one line that says what came, what fits, what to do -----------------------------------------------


def refused(match: str):
    return pytest.raises(ValueError, match=rf"\A[^\n]*{match}[^\n]*\Z")


@pytest.mark.parametrize("ids", [[5, -1], [[5, 6]], [1.5], 5, "text", [2**40]])
def test_ids_that_are_no_row_are_refused(made, ids):
    with refused("ids?.*pass"):
        Tokenizer(made["byte_level"]).decode(ids)


@pytest.mark.parametrize(("text", "match"), [(["hello"], "a list: encode each"), ("a\ud800b", "position 1")])
def test_what_is_no_text_is_refused(made, text, match):
    with refused(match):
        Tokenizer(made["byte_level"]).encode(text)


def test_unknown_tokens_and_ids_are_refused(made):
    tokenizer = Tokenizer(made["byte_level"])
    with refused("'nothing' is no token"):
        tokenizer.id("nothing")
    for i in (-1, tokenizer.vocab_size):
        with refused(f"no token {i}: this tokenizer has {tokenizer.vocab_size}"):
            tokenizer.token(i)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def beside(directory: pathlib.Path, config: dict) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


BROKEN = {
    "cut": (lambda d: cut(d / "tokenizer.json"), r"tokenizer\.json is truncated.*again"),
    "empty": (lambda d: (d / "tokenizer.json").write_text(""), r"tokenizer\.json is truncated.*again"),
    "other": (lambda d: (d / "tokenizer.json").write_text('{"a": 1}'), r"tokenizer\.json is .*no tokenizer.*again"),
    "binary": (lambda d: (d / "tokenizer.json").write_bytes(b"\xff\xfe"), r"tokenizer\.json is .*no tokenizer"),
    "none": (lambda d: (d / "tokenizer.json").unlink(), r"has no tokenizer\.json: pass"),
    "model": (
        lambda d: (d / "tokenizer.json").rename(d / "tokenizer.model"),
        r"has tokenizer\.model but no tokenizer\.json: convert it.*save_pretrained",
    ),
    "config cut": (lambda d: cut(d / "tokenizer_config.json"), r"tokenizer_config\.json is truncated.*again"),
    "config list": (lambda d: (d / "tokenizer_config.json").write_text("[]"), r"holds a list, not a JSON object"),
    "token": (
        lambda d: beside(d, {"eos_token": {"id": 3}}),
        r"declares \{'id': 3\} as a special token: it must be text",
    ),
    "decoder": (lambda d: beside(d, {"added_tokens_decoder": ["<s>"]}), r"added_tokens_decoder must be a dict"),
    "template": (lambda d: beside(d, {"chat_template": [{"name": "a"}]}), r"chat_template must be a text, or a list"),
    "template 2": (lambda d: beside(d, {"chat_template": ["a"]}), r"chat_template must be a text, or a list"),
    "config text": (lambda d: (d / "tokenizer_config.json").write_bytes(b'"\xff"'), r"is not UTF-8 text"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_named_in_one_line(tmp_path, case):
    harm, match = BROKEN[case]
    # long enough to be cut
    directory = write(tmp_path / "broken", byte_level(), {"bos_token": "<|begin|>", "note": "x" * 200})
    Tokenizer(directory)
    harm(directory)
    with refused(match):
        Tokenizer(directory)


# --- the room ----------------------------------------------------------------------------------------------------


DOWNLOADED = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
]


def test_text_imports_no_jax_and_jinja2_only_to_chat(made):
    code = (
        "import sys, jaxinfer.text\n"
        f"t = jaxinfer.text.Tokenizer({str(made['byte_level'])!r})\n"
        "assert t.decode(t.encode('hello')) == 'hello'\n"
        "print(sorted({'jax', 'numpy', 'jinja2', 'transformers', 'torch', 'huggingface_hub'} & set(sys.modules)))"
    )
    root = pathlib.Path(jaxinfer.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


def test_a_hub_id_downloads_no_weights_for_its_tokenizer(made, monkeypatch):
    asked = []

    def locate(name, patterns):
        asked.append((name, patterns))
        return made["byte_level"]

    monkeypatch.setattr(hub, "locate", locate)
    assert Tokenizer("owner/name").decode(Tokenizer("owner/name").encode("hello")) == "hello"
    (name, patterns), *_ = asked
    matches = [file for file in DOWNLOADED if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)]
    assert name == "owner/name"
    assert matches == DOWNLOADED[:-2]


def test_the_door_opens_on_the_tokenizer():
    assert jaxinfer.Tokenizer is Tokenizer
