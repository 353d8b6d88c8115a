"""Tokenizers as GGUF: llama.cpp makes the same ids of the same text; what it cannot is refused by name."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from frugal_rl.errors import InputError
from frugal_rl.gguf.file import STRING, write
from frugal_rl.gguf.layout import metadata_of
from frugal_rl.gguf.vocab import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary_of
from frugal_rl.models import find_model, load_tokenizer, stop_ids

from .conftest import make_config, needs_llama

DATA = Path(os.environ.get("FRUGAL_RL_DATA", Path(__file__).parents[2] / "shared" / "data"))
CORPUS = [
    "Natalia sold 48 clips to her friends in April, and then she sold half as many clips in May.",
    "How many clips did Natalia sell altogether in April and May?  It's $12.50 -- she'll pay!",
    "Weng earns $12 an hour\nfor babysitting.\n\n\tYesterday, she just did 50 minutes.",
]
HARD = [
    *CORPUS,
    "",
    " ",
    "   leading and trailing   ",
    "tabs\t\tand\n\n\nlines\r\n",
    "1234567890 3.14159 1,000,000",
    "don't I'LL we'Ve 'twas",
    "naïve café Übermut 北京市 привет мир 🚀😶‍🌫️ ក្រុម",
    "x<eos>y",
    "=-*/+ ((a)) [b] {c} \\boxed{1}",
]


@functools.cache
def real_tokenizer(name: str) -> Any:
    """One of llama.cpp's vocabulary files, as transformers reads it."""
    from transformers import AutoTokenizer

    file = f"ggml-vocab-{name}.gguf"
    if not (DATA / "vocab" / file).exists():
        pytest.skip(f"needs {file} in vocab/ of FRUGAL_RL_DATA (llama.cpp's models folder has it)")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "vocab", gguf_file=file)
    if name == "llama-bpe":  # transformers loses this key of Llama 3's tokenizer.json
        tokenizer.backend_tokenizer.model.ignore_merges = True
    return tokenizer


def trained(byte_fallback: bool) -> Any:
    """A tokenizer of 400 tokens trained here: byte-level BPE as Qwen2's, or SentencePiece's BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if byte_fallback:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.ByteFallback()
        special = ["<unk>", "<eos>", *(f"<0x{i:02X}>" for i in range(256))]
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            json_pre_tokenizer(find_model("tiny").folder / "tokenizer.json")
        )
        special = ["<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400 if byte_fallback else 350,
        special_tokens=special,
        initial_alphabet=[] if byte_fallback else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    if byte_fallback:  # bytes are no special tokens
        tree = json.loads(tokenizer.to_str())
        tree["added_tokens"] = [t for t in tree["added_tokens"] if not t["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(tree))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    if byte_fallback:
        fast.unk_token = "<unk>"
    fast.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return fast


def json_pre_tokenizer(path: Path) -> list[Any]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(path)).pre_tokenizer)


def keys_of(tokenizer: Any, **changes: Any) -> dict[str, tuple[int, Any]]:
    config = {"vocab_size": max(tokenizer.get_vocab().values()) + 1, **changes}
    return vocabulary_of(tokenizer, config, "some", frozenset({tokenizer.eos_token_id}))


def llama_ids(tokenizer: Any, folder: Path) -> Callable[[str, bool], list[int]]:
    """llama.cpp's own tokenisation by the keys written; special tokens in text are read where told."""
    from llama_cpp import Llama

    size = max(tokenizer.get_vocab().values()) + 1
    config = make_config("llama", vocab_size=size).to_dict()
    path = folder / "vocabulary.gguf"
    write(path, metadata_of(config, "some") | keys_of(tokenizer), [])
    llama = Llama(str(path), vocab_only=True, verbose=False)
    return lambda text, special: llama.tokenize(text.encode(), add_bos=special, special=special)


@needs_llama
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "llama-spm"])
def test_1000_gsm8k_prompts_have_the_ids_of_the_real_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = real_tokenizer(name)
    rows = (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:1000]
    ours = llama_ids(tokenizer, tmp_path)
    for text in (json.loads(row)["question"] for row in rows):
        assert ours(text, True) == tokenizer(text)["input_ids"], text


@needs_llama
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "llama-spm"])
def test_llama_cpps_own_test_strings_have_the_ids_it_expects(name: str, tmp_path: Path) -> None:
    ours = llama_ids(real_tokenizer(name), tmp_path)
    file = DATA / "vocab" / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = [[int(x) for x in line.split()] for line in Path(f"{file}.out").read_text().split("\n")]
    assert len(texts) > 40
    for text, ids in zip(texts, expected, strict=False):
        assert ours(text, False) == ids, repr(text)


@needs_llama
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("byte_fallback", [False, True], ids=["byte-level", "sentencepiece"])
def test_a_trained_tokenizers_ids_are_llama_cpps(byte_fallback: bool, tmp_path: Path) -> None:
    tokenizer = trained(byte_fallback)
    ours = llama_ids(tokenizer, tmp_path)
    for text in HARD:
        assert ours(text, True) == tokenizer(text)["input_ids"], repr(text)
    assert len(ours(CORPUS[0], True)) < 0.7 * len(CORPUS[0])  # merges are used


@needs_llama
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_embedded_models_ids_are_llama_cpps(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(find_model("tiny"))
    ours = llama_ids(tokenizer, tmp_path)
    for text in [*HARD, "Q:3+8*5-9=?\nA:\n"]:
        if text == text.encode("ascii", "ignore").decode():  # llama.cpp does not normalise (NFC)
            assert ours(text, True) == tokenizer(text)["input_ids"], repr(text)


def test_specials_and_template_are_the_tokenizers() -> None:
    files = find_model("tiny")
    tokenizer = load_tokenizer(files)
    keys = vocabulary_of(tokenizer, files.config, files.name, stop_ids(files, tokenizer) | {9})
    assert keys["tokenizer.ggml.eos_token_id"][1] == 256
    assert keys["tokenizer.ggml.padding_token_id"][1] == 257
    assert keys["tokenizer.ggml.eot_token_id"][1] == 9
    assert "tokenizer.ggml.bos_token_id" not in keys
    assert keys["tokenizer.ggml.add_bos_token"][1] is keys["tokenizer.ggml.add_eos_token"][1] is False
    assert keys["tokenizer.chat_template"] == (STRING, tokenizer.chat_template)


def test_a_beginning_that_the_tokenizer_adds_is_said() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = trained(False)
    tokenizer.bos_token = "<eos>"
    number = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", number)]
    )
    keys = keys_of(tokenizer)
    assert keys["tokenizer.ggml.add_bos_token"][1] is True
    assert keys["tokenizer.ggml.add_eos_token"][1] is False


def test_types_tell_text_from_control_and_ids_without_a_token_are_filled_up() -> None:
    tokenizer = trained(True)
    size = len(tokenizer) + 3
    keys = keys_of(tokenizer, vocab_size=size)
    tokens, types = keys["tokenizer.ggml.tokens"][1], keys["tokenizer.ggml.token_type"][1]
    assert len(tokens) == len(types) == len(keys["tokenizer.ggml.scores"][1]) == size
    of = dict(zip(tokens, types, strict=True))
    assert (of["<unk>"], of["<eos>"], of["<tool>"], of["<0x0A>"]) == (UNKNOWN, CONTROL, USER_DEFINED, BYTE)
    assert of[f"[PAD{size - 1}]"] == UNUSED


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    with pytest.raises(InputError, match="do not belong together"):
        keys_of(trained(False), vocab_size=100)


def change_tree(change: Callable[[dict[str, Any]], None]) -> Any:
    """The trained byte-level tokenizer with its tokenizer.json changed."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tree = json.loads(trained(False).backend_tokenizer.to_str())
    change(tree)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tree)), eos_token="<eos>")


def other_regex(tree: dict[str, Any]) -> None:
    tree["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_regex, r"splits text by .*\\\\w\+"),
        (lambda tree: tree.update(pre_tokenizer=None), "splits text by null"),
        (lambda tree: tree.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda tree: tree.update(normalizer={"type": "Lowercase"}), "normalises text by Lowercase"),
        (lambda tree: tree["model"].update(dropout=0.1), "with dropout"),
        (lambda tree: tree["model"].update(continuing_subword_prefix="##", merges=[]), "pieces of words"),
        (lambda tree: tree["model"].update(byte_fallback=True), "SentencePiece that treats spaces by"),
        (
            lambda tree: tree.update(
                model={"type": "WordLevel", "vocab": {"<eos>": 0}, "unk_token": "<eos>"}
            ),
            "is a WordLevel model",
        ),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused_by_name(
    change: Callable[[dict[str, Any]], None], why: str
) -> None:
    with pytest.raises(InputError, match=why) as caught:
        keys_of(change_tree(change))
    assert "qwen2" in str(caught.value) and "convert_hf_to_gguf.py" in str(caught.value)
