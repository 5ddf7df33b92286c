"""Small tokenizers of the kinds that checkpoints bring, trained here, and written as checkpoints write them."""

import json
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# Byte-level merges of these run across the bytes of a character; with byte fallback their characters are all bytes.
WORLD = [
    "naïve café, coöperate",
    "你好，世界。今天天气很好",
    "こんにちは世界",
    "Привет, мир",
    "👩‍👩‍👧 👍🏽 🇫🇷",
    "é ñ ก็",
]
ENGLISH = [
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "The quick brown fox jumps over the lazy dog. Stop here, or stop there; the end.",
    "hello world, hello there: the theory of the thing, and the other thing.",
]
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def trained(corpus: list[str], pre_tokenizer, size: int, alphabet=()) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=list(alphabet), show_progress=False)
    tokenizer.train_from_iterator(corpus * 4, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def before_and_after(tokenizer: Tokenizer, before: str = "", after: str = ""):
    named = [*before.split(), *after.split()]
    single = " ".join(filter(None, [before, "$A", after]))
    return processors.TemplateProcessing(
        single=single, pair=None, special_tokens=[(token, tokenizer.token_to_id(token)) for token in named]
    )


def byte_level() -> Tokenizer:
    """As Llama 3's: bytes, BOS by a template, special tokens behind the vocabulary."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab, merges = trained(ENGLISH + WORLD, pre_tokenizer, 420, pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|head|>", "<|eot|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("é bien")])
    bos = before_and_after(tokenizer, "<|begin|>")
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    return tokenizer


def fallback() -> Tokenizer:
    """As Llama 2's: sentencepiece BPE, a space in front, whatever is not in the vocabulary as bytes."""
    pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    pieces, merges = trained(ENGLISH, pre_tokenizers.Metaspace(), 200)
    extra = ["▁", "▁▁", "▁▁▁▁", "\ufffd"]
    names = list(dict.fromkeys(["<unk>", "<s>", "</s>", *BYTES, *pieces, *extra]))
    names = [name for name in names if "\n" not in name]
    merges = [pair for pair in merges if "\n" not in "".join(pair)] + [("▁", "▁"), ("▁▁", "▁▁")]
    vocab = {name: i for i, name in enumerate(names)}
    model = models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True)
    model.byte_fallback = True
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = before_and_after(tokenizer, "<s>")
    return tokenizer


def no_strip() -> Tokenizer:
    """As Gemma's: spaces become ▁ by a normalizer, none is put in front or taken away."""
    tokenizer = fallback()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5's: the Metaspace decoder drops every ▁ of the first token."""
    tokenizer = fallback()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def silent() -> Tokenizer:
    """A decoder that trims two spaces, with tokens that show nothing."""
    tokenizer = fallback()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Replace("h", ""), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 2, 0)])
    return tokenizer


def word_pieces() -> Tokenizer:
    """As BERT's: spaces come from the decoder, between tokens."""
    words = ["[UNK]", "hello", "world", "##ing", "##s", "the", ".", ",", "'", "s", "do", "n't", "not", "stop"]
    tokenizer = Tokenizer(models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


def word_ends() -> Tokenizer:
    """As CLIP's: </w> ends a word, and is a space except at the end of the text."""
    names = ["a</w>", "b</w>", "ab", "c", "th", "e</w>", "stop</w>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


def no_decoder() -> Tokenizer:
    """Tokens joined by spaces."""
    tokenizer = word_pieces()
    tokenizer.decoder = None  # type: ignore[assignment]
    return tokenizer


def whole_only() -> Tokenizer:
    """A decoder whose last step looks across tokens: only the whole text is right."""
    tokenizer = fallback()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("the ", "THE_")]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


KINDS = {
    make.__name__: make
    for make in (byte_level, fallback, no_strip, metaspace, silent, word_pieces, word_ends, no_decoder, whole_only)
}


def write(
    directory: pathlib.Path, tokenizer: Tokenizer, config: dict | None = None, files: dict | None = None
) -> pathlib.Path:
    """A checkpoint's tokenizer files in a directory; `files` are further ones, text or JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
    for name, value in {"tokenizer_config.json": config, **(files or {})}.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return directory
