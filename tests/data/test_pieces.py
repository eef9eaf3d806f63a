"""Tokens as text: the pieces are the text that the tokenizer itself writes, whatever it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import byte_tokenizer
from upit_merge.data.pieces import Piece, runs_leftwards, text_pieces, visible

TEXTS = [
    "plain words,  two spaces\n\nand lines\t",
    "é ß 中文 👩\u200d👩\u200d👧 שלום",
    " begins with a space",
    "\ufffd genuine \ufffd\ufffd\ufffd\ufffd\ufffd end",
    "",
]


def sentence_pieces() -> PreTrainedTokenizerFast:
    """Spaces as ▁, bytes for what is not in the vocabulary, as in Llama 2's tokenizer."""
    letters = "▁abcdefghijklmnopqrstuvwxyz,\n"
    vocabulary = {"<unk>": 0, "<s>": 1, **{f"<0x{i:02X}>": 2 + i for i in range(256)}}
    vocabulary |= {letter: 258 + i for i, letter in enumerate(letters)}
    core = Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


def merging() -> PreTrainedTokenizerFast:
    """Byte-level, with tokens of several letters, and one that ends within a character."""
    tokenizer = byte_tokenizer()
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    vocabulary = core.get_vocab()
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    begin = alphabet.pre_tokenize_str("中")[0][0][:2]
    pairs = [("w", "o"), ("wo", "r"), ("Ġ", "t"), tuple(begin)]
    for pair in pairs:
        vocabulary["".join(pair)] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, pairs))
    made.pre_tokenizer, made.decoder = core.pre_tokenizer, core.decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


@pytest.mark.parametrize("make", [byte_tokenizer, sentence_pieces, merging])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_what_the_tokenizer_writes(make: Any, text: str) -> None:
    tokenizer = make()
    ids = tokenizer(text)["input_ids"]
    pieces = text_pieces(ids, tokenizer)
    assert len(pieces) == len(ids)
    written = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "".join(piece.text for piece in pieces) == written


def test_a_character_of_several_tokens_is_with_the_first() -> None:
    tokenizer = byte_tokenizer()
    pieces = text_pieces(tokenizer("a中b")["input_ids"], tokenizer)
    expected = [Piece("<s>"), Piece("a"), Piece("中", 1, 3), Piece("", 2, 3), Piece("", 3, 3)]
    assert pieces == [*expected, Piece("b")]


def test_bytes_that_are_no_character_do_not_wait_for_ever() -> None:
    tokenizer = byte_tokenizer()
    whole = tokenizer("中", add_special_tokens=False)["input_ids"]
    pieces = text_pieces([*whole[:2], 5, 6], tokenizer)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode([*whole[:2], 5, 6])
    ends = text_pieces(whole[:1] * 99, tokenizer)
    assert len(ends) == 99
    assert all(piece.parts <= 24 for piece in ends)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x00\x7f\x85", "\u241b[2J\u2400\u2421⟨U+0085⟩"),
        ("a\u202eb\u2066c\u200fd", "a⟨U+202E⟩b⟨U+2066⟩c⟨U+200F⟩d"),
        ("\u2028\u2029", "⟨U+2028⟩⟨U+2029⟩"),
        ("\n\t \r", "\n\t \u240d"),
        ("👩\u200d👧 שלום \u0301", "👩\u200d👧 שלום \u0301"),
        ("\ud800", "\ufffd"),
    ],
)
def test_nothing_unseen_is_left(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("text", "leftwards"),
    [
        ("<s>שלום עולם", True),
        ("abcdef שלום", False),
        ("12 +", False),
        ("<s>مرحبا", True),
        ("", False),
    ],
)
def test_direction_is_that_of_most_letters(text: str, leftwards: bool) -> None:
    assert runs_leftwards(text) == leftwards


def test_a_real_folder_s_tokenizer(tmp_path: Path) -> None:
    """Also of the kind that transformers reads from disk."""
    from transformers import AutoTokenizer

    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("naïve — yes")["input_ids"]
    assert "".join(p.text for p in text_pieces(ids, tokenizer)) == "<s>naïve — yes"
