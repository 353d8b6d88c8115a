"""A Hugging Face tokenizer as GGUF's keys, such that llama.cpp makes the same ids of the same text.

llama.cpp knows pre-tokenizers by name. The name is found here by what the tokenizer does, its own regular
expression, not by whose it is; what llama.cpp has no name for is refused. Two families:

    byte-level BPE ("gpt2")     tokens and merges as they are, and the name of the pre-tokenizer
    SentencePiece BPE ("llama") tokens with scores: llama.cpp joins the neighbours whose joint token scores
                                highest, so the score is minus the rank of the first merge that makes it

Differs from the tokenizer: llama.cpp does not normalise text (NFC of Qwen2's tokenizers); of a SentencePiece
tokenizer that puts a space before the first word only, llama.cpp puts one behind special tokens too.

Source: ggml-org/llama.cpp src/llama-vocab.cpp (the regular expressions beside its own), conversion/base.py
(`get_vocab_base`, `_create_vocab_sentencepiece`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .file import BOOL, F32, I32, STRING, U32, Metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
ADDED_SCORE = -1000.0  # of a token that no merge makes
SPACE = "▁"

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (steps before bytes are taken, whether a whole word in the vocabulary is taken as it is): llama.cpp's name
PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_QWEN2,), False): "qwen2",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_TEKKEN,), True): "tekken",
    (("GPT-2",), False): "gpt-2",
    (("digits", "GPT-2"), False): "smollm",
}


def vocabulary_of(tokenizer: Any, config: Mapping[str, Any], name: str, stop_ids: frozenset[int]) -> Metadata:
    """The keys of a tokenizer, its special tokens and its chat template. Raises InputError."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(name, f"is a {type(tokenizer).__name__} without a tokenizer.json")
    tree = json.loads(backend.to_str())
    size, most = int(config["vocab_size"]), max(tokenizer.get_vocab().values())
    if most >= size:
        raise InputError(
            f"model {name}: its tokenizer has the id {most}, its config only {size} tokens: the two do not "
            "belong together"
        )
    model = tree["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        raise _refused(name, f"is a {model['type']} model{' with dropout' if model.get('dropout') else ''}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refused(name, "marks the pieces of words")
    tokens, types = _tokens(tokenizer, size)
    if model.get("byte_fallback"):
        keys = _sentencepiece(tree, tokenizer, tokens, types, name)
    else:
        keys = _byte_level(tree, tokens, types, name)
    return keys | _specials(tokenizer, stop_ids)


def _refused(name: str, what: str) -> InputError:
    return InputError(
        f"model {name}: its tokenizer {what}, which is not written as GGUF here; supported are byte-level "
        f"BPE with the pre-tokenizers {', '.join(sorted(PRE_TOKENIZERS.values()))}, and SentencePiece BPE. "
        "llama.cpp's own convert_hf_to_gguf.py may know it"
    )


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """Text and type by id; ids without a token are filled up."""
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for text, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = text, NORMAL
    for number, added in tokenizer.added_tokens_decoder.items():
        tokens[number] = added.content
        types[number] = CONTROL if added.special or _looks_special(added.content) else USER_DEFINED
    return tokens, types


def _looks_special(text: str) -> bool:
    """Tokens that some tokenizers do not mark and that never are text."""
    return (text.startswith("<|") and text.endswith("|>")) or (
        text.startswith("<｜") and text.endswith("｜>")
    )


def _byte_level(tree: Mapping[str, Any], tokens: list[str], types: list[int], name: str) -> Metadata:
    normalizer = tree.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refused(name, f"normalises text by {normalizer['type']}")
    steps = _steps(tree.get("pre_tokenizer"))
    pre = PRE_TOKENIZERS.get((steps, bool(tree["model"].get("ignore_merges")))) if steps else None
    if pre is None:
        raise _refused(
            name, f"splits text by {json.dumps(tree.get('pre_tokenizer'), ensure_ascii=False)[:300]}"
        )
    return {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, pre),
        "tokenizer.ggml.tokens": (STRING, tokens),
        "tokenizer.ggml.token_type": (I32, types),
        "tokenizer.ggml.merges": (STRING, [" ".join(pair) for pair in _merges(tree)]),
    }


def _steps(pre: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """What is done before bytes are taken, as PRE_TOKENIZERS has it; None for what it cannot say."""
    parts = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    steps = []
    for part in parts[:-1]:
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            steps.append(part["pattern"].get("Regex", ""))
        elif part["type"] == "Digits" and part["individual_digits"]:
            steps.append("digits")
        else:
            return None
    return (*steps, "GPT-2") if parts[-1].get("use_regex", True) else tuple(steps)


def _merges(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = tree["model"]["merges"]
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in merges)
    return [(left, right) for left, right in pairs]


def _sentencepiece(
    tree: Mapping[str, Any], tokenizer: Any, tokens: list[str], types: list[int], name: str
) -> Metadata:
    prefix = _space_before(tree)
    if prefix is None:
        shown = json.dumps([tree.get("normalizer"), tree.get("pre_tokenizer")], ensure_ascii=False)
        raise _refused(name, f"is SentencePiece that treats spaces by {shown[:300]}")
    rank: dict[str, int] = {}
    for number, pair in enumerate(_merges(tree)):
        rank.setdefault("".join(pair), number)
    scores = [ADDED_SCORE if kind != NORMAL else 0.0 for kind in types]
    for number, text in enumerate(tokens):
        if types[number] == NORMAL and text in rank:
            scores[number] = -float(rank[text])
        elif types[number] == NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = BYTE
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    return {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.pre": (STRING, "default"),
        "tokenizer.ggml.tokens": (STRING, tokens),
        "tokenizer.ggml.scores": (F32, scores),
        "tokenizer.ggml.token_type": (I32, types),
        "tokenizer.ggml.add_space_prefix": (BOOL, prefix),
    }


def _space_before(tree: Mapping[str, Any]) -> bool | None:
    """Whether a space is put before text; None for a treatment of spaces that is not known."""
    normalizer, pre = tree.get("normalizer"), tree.get("pre_tokenizer")
    if pre is not None:
        known = pre["type"] == "Metaspace" and pre["replacement"] == SPACE and not pre.get("split", True)
        return pre.get("prepend_scheme", "always") != "never" if known and normalizer is None else None
    if normalizer is None:
        return None
    parts = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if parts == [{"type": "Prepend", "prepend": SPACE}, replace]:
        return True
    return False if parts == [replace] else None


def _specials(tokenizer: Any, stop_ids: frozenset[int]) -> Metadata:
    """Ids of special tokens, what is put around a text, and the chat template."""
    keys: Metadata = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = getattr(tokenizer, f"{ours}_token_id")
        if number is not None:
            keys[f"tokenizer.ggml.{theirs}_token_id"] = (U32, number)
    eos = tokenizer.eos_token_id
    others = sorted(stop_ids - {eos})
    if eos is None and others:
        keys["tokenizer.ggml.eos_token_id"] = (U32, others.pop(0))
    if others:  # llama.cpp stops at the end of a turn too; well-known ones beyond the first it knows by name
        keys["tokenizer.ggml.eot_token_id"] = (U32, others[0])
    plain, framed = (tokenizer("a", add_special_tokens=s)["input_ids"] for s in (False, True))
    before = framed[: len(framed) - len(plain)] if framed[-len(plain) :] == plain else framed[:1]
    begins = bool(before) and before[0] == tokenizer.bos_token_id
    keys["tokenizer.ggml.add_bos_token"] = (BOOL, begins)
    keys["tokenizer.ggml.add_eos_token"] = (BOOL, framed[-1] == eos and plain[-1] != eos)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        keys["tokenizer.chat_template"] = (STRING, template)
    return keys
