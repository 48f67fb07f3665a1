"""The tokenizer gives the ids of openai/CLIP and of open_clip, frames them as rows, and takes placeholders."""

import gzip
import json
import subprocess
import sys
import warnings
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from minisd.checkpoints.diffusers_write import tokenizer_files
from minisd.text.tokenizer import BOS, EOS, FIRST_ADDED, SPECIALS, Tokenizer, clean

# 300 prompts with the ids of openai/CLIP (and of open_clip where they differ), without BOS and EOS
PROMPTS = json.loads(gzip.decompress((Path(__file__).parent / "data" / "tokenizer.json.gz").read_bytes()))["prompts"]
TEXTS = [prompt["text"] for prompt in PROMPTS]
IDS = {
    "openai": [prompt["openai"] for prompt in PROMPTS],
    "open_clip": [prompt.get("open_clip", prompt["openai"]) for prompt in PROMPTS],
}

# Text of the kinds that prompts are made of; letters of Unicode 6 and older, which every library's tables know
letters = st.one_of(
    st.characters(min_codepoint=0x20, max_codepoint=0x7E),
    st.characters(min_codepoint=0xA0, max_codepoint=0x24F),
    *(st.characters(min_codepoint=low, max_codepoint=high) for low, high in [
        (0x391, 0x3A1), (0x3B1, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x627, 0x64A), (0x905, 0x939),
        (0x2010, 0x2027), (0x3041, 0x3096), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xFF01, 0xFF5E), (0x1F600, 0x1F64F),
    ]),
)  # fmt: skip
fragments = st.sampled_from(
    [" ", "  ", "\n", "'s", "'RE", "n't", "&amp;", "&lt;b&gt;", "&#39;", "Ã©", "“cat”", "8k", "!"]
)
texts = st.lists(st.one_of(st.text(letters, max_size=8), fragments), max_size=12).map("".join)
placeholders = st.from_regex(r"<[a-z][a-z0-9-]{2,8}>|[a-z]{3,5}_[0-9]{2}", fullmatch=True)


@pytest.mark.parametrize("dialect", SPECIALS)
def test_every_recorded_prompt_gets_the_ids_of_the_original(dialect):
    tokenizer = Tokenizer(dialect=dialect)

    assert [tokenizer.encode(text) for text in TEXTS] == IDS[dialect]
    assert len(TEXTS) == 300
    assert sum(a != b for a, b in zip(*IDS.values(), strict=True)) == 4


@pytest.mark.parametrize("pad_id", [EOS, 0])
@pytest.mark.filterwarnings("ignore:the prompt has")
def test_a_row_is_bos_the_first_75_ids_eos_and_padding(pad_id):
    rows = Tokenizer(pad_id=pad_id)(TEXTS)

    assert rows.shape == (300, 77)
    assert rows.dtype == torch.long
    for row, ids in zip(rows.tolist(), IDS["openai"], strict=True):
        full = [49406, *ids, 49407]
        assert row == ([*full[:76], 49407] if len(full) > 77 else full + [pad_id] * (77 - len(full)))


def test_one_prompt_is_a_batch_of_one_and_no_prompts_are_an_empty_batch():
    tokenizer = Tokenizer()

    assert torch.equal(tokenizer("a cat"), tokenizer(["a cat"]))
    assert tokenizer([]).shape == (0, 77)


def test_the_length_of_a_row_is_a_parameter():
    row = Tokenizer(length=5)("a cat")

    assert row.tolist() == [[BOS, 320, 2368, EOS, EOS]]


@settings(deadline=None, max_examples=300)
@given(texts)
@example("'ſ <end_of_text> <|endoftext|>")
def test_any_text_gets_the_ids_of_open_clip(original_open_clip, text):
    assert Tokenizer(dialect="open_clip").encode(text) == original_open_clip.encode(text)


@settings(deadline=None, max_examples=300)
@given(texts)
def test_cleaned_text_gets_the_ids_of_hugging_face(hugging_face, text):
    assume("ſ" not in text)  # Hugging Face's pattern does not fold it to "s" in "'s"

    assert Tokenizer().encode(text) == hugging_face(clean(text), add_special_tokens=False).input_ids


def test_entities_are_decoded_twice_and_once_more_by_ftfy_where_no_tag_stands():
    assert clean(" <B>  &amp;quot;Ｃａｔ’s&amp;quot;\n&amp;amp;lt;") == '<b> "cat\'s" &lt;'
    assert clean("&amp;amp;lt;") == "<"


def test_raw_text_gets_other_ids_from_hugging_face(hugging_face):
    raw = "a “smart” quote &amp; ｆｕｌｌ width"

    assert Tokenizer().encode(raw) == Tokenizer().encode('a "smart" quote & full width')
    assert Tokenizer().encode(raw) != hugging_face(raw, add_special_tokens=False).input_ids


@settings(deadline=None)
@given(texts)
def test_decode_spells_what_encode_read_up_to_spaces(text):
    tokenizer = Tokenizer()

    assert "".join(tokenizer.decode(tokenizer.encode(text)).split()) == "".join(clean(text).split())


def test_decode_is_undone_by_encode_and_reads_a_framed_row():
    tokenizer = Tokenizer(pad_id=0)
    ids = tokenizer.encode("Isn't it a photo of 12 cafés?!")

    assert tokenizer.decode(ids) == "isn 't it a photo of 1 2 cafés ?!"
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.decode(tokenizer("a red apple")[0]) == "a red apple"


def test_a_cut_prompt_warns_with_the_dropped_words_as_they_were_written():
    with pytest.warns(UserWarning, match=r"has 79 tokens, .* reads 75: dropped 'The Big & DOG'$") as seen:
        Tokenizer()("word " * 75 + "The   Big &amp; DOG")

    assert seen[0].filename == __file__


def test_a_cut_inside_a_word_says_how_much_of_it_stays():
    with pytest.warns(UserWarning, match=r"dropped 'Artstationn, 8k' \(of its first word, 1 of 3 tokens stay\)"):
        Tokenizer()("word " * 74 + "Artstationn, 8k")


def test_a_prompt_that_fits_exactly_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Tokenizer()("word " * 75)[0].tolist() == [BOS, *Tokenizer().encode("word") * 75, EOS]


def test_a_letter_that_grows_in_lower_case_does_not_shift_the_dropped_words():
    with pytest.warns(UserWarning, match="dropped 'the dog'"):
        Tokenizer()("İ " + "word " * 73 + "The Dog")


@given(st.lists(st.integers(0, BOS - 1), max_size=400))
def test_chunks_hold_every_id_in_order_and_fit_in_rows(ids):
    tokenizer = Tokenizer()
    runs = tokenizer.chunks(ids)

    assert [*chain(*runs)] == ids
    assert [len(run) for run in runs[:-1]] == [75] * ((max(len(ids), 1) - 1) // 75)
    assert all(len(tokenizer.frame(run)) == 77 for run in runs)


def test_a_chunk_never_ends_inside_a_placeholder():
    tokenizer = Tokenizer()
    cat = tokenizer.add_token("<my-cat>", vectors=4)

    runs = tokenizer.chunks(tokenizer.encode("word " * 73 + "<my-cat><my-cat> dog"))

    assert [len(run) for run in runs] == [73, 9]
    assert runs[1] == [*cat, *cat, *tokenizer.encode("dog")]


def test_a_placeholder_is_found_wherever_a_prompt_puts_it():
    tokenizer = Tokenizer()
    cat = tokenizer.add_token("<My-Cat>", vectors=2)
    encode = Tokenizer().encode

    assert cat == [49408, 49409]
    assert tokenizer.encode("a photo of <my-cat>'s bed") == [*encode("a photo of"), *cat, *encode("'s bed")]
    assert tokenizer.encode("<MY-CAT>, (<my-cat>:1.2)") == [*cat, *encode(","), *encode("("), *cat, *encode(":1.2)")]
    assert tokenizer.encode("&lt;my-cat&gt;dog<my-cat>") == [*cat, *encode("dog"), *cat]
    assert tokenizer.decode(tokenizer.encode("a <my-cat>'s bed")) == "a <my-cat> 's bed"


def test_a_placeholder_that_looks_like_a_word_is_no_part_of_a_longer_word():
    tokenizer = Tokenizer()
    tokenizer.add_token("mycat")

    assert tokenizer.encode("mycat, MYCAT's") == [49408, *tokenizer.encode(","), 49408, *tokenizer.encode("'s")]
    for longer in ["mycatalog", "amycat", "mycat2", "mycat_b"]:
        assert tokenizer.encode(longer) == Tokenizer().encode(longer)


def test_the_longest_placeholder_wins():
    tokenizer = Tokenizer(added_tokens={"sks-cat": [49408], "sks-cat-big": [49409]})

    assert tokenizer.encode("sks-cat-big sks-cat") == [49409, 49408]


@settings(deadline=None)
@given(texts, st.dictionaries(placeholders, st.integers(1, 5), max_size=4))
def test_placeholders_never_change_the_ids_of_text_without_them(text, vectors):
    assume(not any(token in clean(text) for token in vectors))
    tokenizer = Tokenizer()
    for token, n in vectors.items():
        tokenizer.add_token(token, n)

    assert tokenizer.encode(text) == Tokenizer().encode(text)


@settings(deadline=None)
@given(st.dictionaries(placeholders, st.integers(1, 5), min_size=2, max_size=5), texts, st.data())
def test_ids_survive_saving_and_the_removal_of_another_placeholder(vectors, text, data):
    tokenizer = Tokenizer()
    added = {token: tokenizer.add_token(token, n) for token, n in vectors.items()}
    gone = data.draw(st.sampled_from(list(added)))
    assert [*chain(*added.values())] == list(range(FIRST_ADDED, tokenizer.vocab_size))

    assert tokenizer.remove_token(gone) == added.pop(gone)
    restored = Tokenizer(added_tokens=json.loads(json.dumps(tokenizer.added_tokens)))

    assert list(restored.added_tokens.items()) == list(added.items())
    assert restored.vocab_size == tokenizer.vocab_size == max(ids[-1] for ids in added.values()) + 1
    prompt = f" {gone} ".join([text, *added])
    assert restored.encode(prompt) == tokenizer.encode(prompt)
    assert not {*range(FIRST_ADDED, 50000)} & {*restored.encode(gone)}


def test_a_cut_through_a_placeholders_vectors_warns():
    tokenizer = Tokenizer()
    tokenizer.add_token("<my-cat>", vectors=4)

    with pytest.warns(UserWarning, match=r"dropped '<My-Cat> bed' \(of its first word, 2 of 4 tokens stay\)"):
        row = tokenizer("word " * 73 + "<My-Cat> bed")[0].tolist()

    assert row[74:] == [49408, 49409, EOS]


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("*", r"'\*' is a word of CLIP's vocabulary \(id 265\)"),
        ("Cat", "is a word of CLIP's vocabulary"),
        ("<|endoftext|>", "is a word of CLIP's vocabulary"),
        ("<here>", r"is an added token already, ids \[49408, 49409\]"),
        ("<HERE>", "is an added token already"),
        ("my cat", "one word without spaces"),
        (" <x> ", r"it becomes '<x>'"),
        ("“x”", "typographic characters"),
        ("&lt;x&gt;", "entities"),
        ("", "cannot be a placeholder"),
        (7, "must be a str, not int"),
    ],
)
def test_a_name_that_cannot_be_a_placeholder_is_refused(token, says):
    tokenizer = Tokenizer(added_tokens={"<here>": [49408, 49409]})

    with pytest.raises(ValueError, match=says):
        tokenizer.add_token(token)
    assert tokenizer.added_tokens == {"<here>": [49408, 49409]}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Tokenizer()(3), "a str or a list of str, not int"),
        (lambda: Tokenizer()(["a", None]), "must be a str, not NoneType"),
        (lambda: Tokenizer().encode(b"a"), "must be a str, not bytes"),
        (lambda: Tokenizer().decode([320, 49408]), "id 49408 is no token"),
        (lambda: Tokenizer().decode([-1]), "id -1 is no token"),
        (lambda: Tokenizer().frame([320] * 76), "76 ids with BOS and EOS do not fit in 77"),
        (lambda: Tokenizer().add_token("<x>", 76), "1…75 vectors"),
        (lambda: Tokenizer().add_token("<x>", 0), "1…75 vectors"),
        (lambda: Tokenizer().remove_token("<x>"), "'<x>' is not an added token; added: none"),
        (lambda: Tokenizer(length=2), "use 3 or more"),
        (lambda: Tokenizer(pad_id=49408), "use 49407"),
        (lambda: Tokenizer(dialect="clip"), "unknown dialect 'clip'; known: openai, open_clip"),
        (lambda: Tokenizer(added_tokens={"<x>": []}), "must be consecutive"),
        (lambda: Tokenizer(added_tokens={"<x>": [49407]}), "49408 or more"),
        (lambda: Tokenizer(added_tokens={"<x>": [49408, 49410]}), "must be consecutive"),
        (lambda: Tokenizer(added_tokens={"<x>": [49408, 49409], "<y>": [49409]}), "no other token's"),
    ],
)
def test_wrong_input_is_answered_with_a_sentence(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


def test_hugging_face_reads_the_files_with_padding_and_placeholders(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(pad_id=0, added_tokens={"<my-cat>": [49408, 49409]})
    write_files(tokenizer, tmp_path)

    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)

    assert theirs(["a cat, eh?"], padding="max_length").input_ids == tokenizer(["a cat, eh?"]).tolist()
    assert theirs("<my-cat> <my-cat>_1", add_special_tokens=False).input_ids == tokenizer.encode("<my-cat>")


def test_encoding_does_not_import_torch():
    code = "import sys, minisd.text.tokenizer as t; t.Tokenizer().encode('a'); print('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def write_files(tokenizer: Tokenizer, folder: Path) -> None:
    for name, content in tokenizer_files(tokenizer).items():
        (folder / name).write_text(content, encoding="utf-8")


@pytest.fixture(scope="session")
def original_open_clip():
    return pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    write_files(Tokenizer(), folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)
