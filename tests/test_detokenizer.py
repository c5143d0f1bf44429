"""Text from tokens as they come, against the tokenizer's own decoding of all of them at once."""

import random
from itertools import combinations, pairwise

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qllama.engine.detokenizer import Detokenizer

TEXTS = [
    "héllo wörld",
    "😀👍🏽 日本語",
    "naïve  —  “quotes”\n\n\ttab",
    "a",
    "𝔘𝔫𝔦 👨‍👩‍👧",
    "  lead",
    "replaced \ufffd mark",
    "\ufffd",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama3):
    return AutoTokenizer.from_pretrained(tiny_llama3("ct_w4a16_g128"))


@pytest.fixture(scope="module")
def spaced_tokenizer():
    """In Llama 2's style: words begin with a mark, the first of a text loses its space, and
    characters without a token are spelled in bytes."""
    words = ["<s>", "▁Hello", "▁world", "lo", "▁"] + [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def whole(tokenizer, ids, skip=True):
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def pieces_of(tokenizer, ids, *, sizes=(), prompt=(), skip=True):
    """The texts that come out when ids come in bursts of `sizes`, then one at a time; and the
    last one of the flush."""
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    pieces, position = [], 0
    for size in [*sizes, *[1] * (len(ids) - sum(sizes))]:
        pieces.append(detokenizer.step(ids[position : position + size]))
        position += size
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_any_burst_is_whole_and_never_shows_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    inner = range(1, len(ids))
    for borders in [*combinations(inner, 1), *combinations(inner, 2), (), tuple(inner)]:
        ends = [0, *borders, len(ids)]
        sizes = [b - a for a, b in pairwise(ends)]
        pieces = pieces_of(tokenizer, ids, sizes=sizes)
        assert "".join(pieces) == text
        if "\ufffd" not in text:
            assert pieces[-1] == ""
            assert not any("\ufffd" in piece for piece in pieces)


def test_an_emoji_of_four_bytes_comes_with_its_last_byte(tokenizer):
    ids = tokenizer.encode("😀", add_special_tokens=False)
    assert len(ids) == 4
    assert pieces_of(tokenizer, ids) == ["", "", "", "😀", ""]
    for length in (1, 2, 3):
        assert pieces_of(tokenizer, ids[:length]) == [*[""] * length, "\ufffd"]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_random_ids_come_out_as_if_decoded_at_once(tokenizer, seed, skip):
    rng = random.Random(seed)
    ids = [rng.randrange(len(tokenizer)) for _ in range(300)]
    prompt = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(40))]
    sizes = [rng.randint(1, 12) for _ in range(20)]
    for kwargs in ({}, {"prompt": prompt}, {"prompt": prompt, "sizes": sizes}):
        assert "".join(pieces_of(tokenizer, ids, skip=skip, **kwargs)) == whole(
            tokenizer, ids, skip
        )


def test_nothing_is_held_that_the_library_would_give(tokenizer):
    ids = tokenizer.encode(" ".join(TEXTS[:6]), add_special_tokens=False)
    stream = DecodeStream(skip_special_tokens=True)
    expected = [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]
    assert pieces_of(tokenizer, ids) == [*expected, ""]


def test_special_tokens_are_left_out_or_shown(tokenizer):
    ids = tokenizer.encode("one", add_special_tokens=False)
    ids = [*ids, tokenizer.eos_token_id, tokenizer.bos_token_id, *ids]
    assert "".join(pieces_of(tokenizer, ids)) == "oneone"
    shown = "one" + tokenizer.eos_token + tokenizer.bos_token + "one"
    assert "".join(pieces_of(tokenizer, ids, skip=False)) == shown


def test_a_run_of_half_characters_or_special_tokens_costs_no_more_with_each_token(tokenizer):
    byte = tokenizer.encode("😀", add_special_tokens=False)[0]
    word = tokenizer.encode("word", add_special_tokens=False)
    for token in (byte, tokenizer.eos_token_id):
        ids = [*word, *[token] * 500, *word]
        assert "".join(pieces_of(tokenizer, ids)) == whole(tokenizer, ids)
        detokenizer = Detokenizer(tokenizer)
        for token in ids:
            detokenizer.step([token])
            assert len(detokenizer._window) <= 65


def test_the_space_of_a_first_word_depends_on_the_prompt(spaced_tokenizer):
    hello, world = 1, 2
    assert whole(spaced_tokenizer, [hello, world]) == "Hello world"
    assert pieces_of(spaced_tokenizer, [hello, world]) == ["Hello", " world", ""]
    assert pieces_of(spaced_tokenizer, [hello, world], prompt=[0, world]) == [
        " Hello",
        " world",
        "",
    ]


def test_characters_spelled_in_bytes_are_put_together(spaced_tokenizer):
    spelled = [5 + byte for byte in "日😀".encode()]
    assert pieces_of(spaced_tokenizer, [1, *spelled, 2]) == [
        *["Hello", "", "", "日", "", "", "", "😀", " world", ""]
    ]


def test_a_prompt_that_ends_within_a_character_keeps_its_bytes(tokenizer):
    emoji = tokenizer.encode("😀", add_special_tokens=False)
    for cut in (1, 2, 3):
        pieces = pieces_of(tokenizer, emoji[cut:], prompt=emoji[:cut])
        assert "".join(pieces) == whole(tokenizer, emoji[cut:])


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer):
    ids = tokenizer.encode("word", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, [*ids, 100_000, *ids])) == "wordword"
