"""Prompts become contexts in four syntaxs: as written, in chunks, weighted as A1111 or as ComfyUI does."""

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisd.config import CLIPTextConfig
from minisd.models.clip import CLIPText
from minisd.nn.attention import Attention
from minisd.text.prompts import (
    SYNTAXES,
    chunk_prompt,
    encode_prompts,
    parse_weights,
    same_length,
    weigh_a1111,
    weigh_comfyui,
)
from minisd.text.tokenizer import Tokenizer

TINY = CLIPTextConfig(width=32, layers=2, heads=2, mlp_width=64)
WEIGHTED = ["a1111", "comfyui"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


@pytest.fixture(scope="module")
def text_encoder():
    torch.manual_seed(0)
    clip = CLIPText(TINY).requires_grad_(False)
    # a new norm gives every state the mean 0; a trained one does not, and A1111 divides by that mean
    clip.final_norm.weight.uniform_(0.5, 1.5)
    clip.final_norm.bias.uniform_(-0.2, 0.6)
    return clip


# From a prompt to weighted fragments

# what the two programs' own documentation gives as examples, and what follows from their rules
A1111 = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
    "": [],
    "()": [],
    "[x]": [("x", 1 / 1.1)],
    "[[x": [("x", 1 / 1.21)],
    "((x:1.5):2)": [("x", 3.0)],
    "(x: -.5 )": [("x", -0.5)],
    "(x:big)": [("x:big", 1.1)],
    "(x:1.2.3)": [("x:1.2.3", 1.1)],
    "(a:b:2)": [("a:b", 2.0)],
    "x) y] (z)": [("x) y] ", 1.0), ("z", 1.1)],
    "x:1.3)": [("x:1.3)", 1.0)],
    r"(a\) b)": [("a) b", 1.1)],
    r"one\two \\ three": [(r"onetwo \ three", 1.0)],
    "([a)]": [("a", 1.0)],
    "[cat:dog:0.5]": [("cat:dog:0.5", 1 / 1.1)],
}  # fmt: skip
COMFYUI = {
    "normal text": [("normal text", 1.0)],
    "(foo)": [("foo", 1.1)],
    "(foo)(bar)": [("foo", 1.1), ("bar", 1.1)],
    "(foo:2.0)": [("foo", 2.0)],
    "((foo))": [("foo", 1.21)],
    "((foo):1.1)": [("foo", 1.21)],
    "((foo:1.1))": [("foo", 1.1)],
    "(foo:0.0)": [("foo", 0.0)],
    "((foo:1.0):0.0)": [("foo", 1.0)],
    "foo ((((lol (cat:666) attack:100)))) baz": [
        ("foo ", 1.0), ("lol ", 100.0), ("cat", 666.0), (" attack", 100.0), (" baz", 1.0),
    ],
    "foo ((((lol (cat:666) attack):100))) baz": [
        ("foo ", 1.0), ("lol ", 110.0), ("cat", 666.0), (" attack", 110.0), (" baz", 1.0),
    ],
    "": [],
    "()": [],
    "(unbalanced": [("(unbalanced", 1.0)],
    "(a (b)": [("a ", 1.1), ("(b", 1.1)],
    "a) (b)": [("a) (b)", 1.0)],
    r"\(literal\) [x]": [("(literal) [x]", 1.0)],
    r"(a\) b)": [("a) b", 1.1)],
    r"(a\)": [("(a)", 1.0)],
    r"one\two \\ three": [(r"one\two \\ three", 1.0)],
    "(x: 1e1 )": [("x", 10.0)],
    "(x:big)": [("x:big", 1.1)],
    "(x:nan)": [("x:nan", 1.1)],
    "(:2)": [(":2", 1.1)],
    "(a:b:2)": [("a:b", 2.0)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("syntax", "prompt", "fragments"),
    [("a1111", *row) for row in A1111.items()] + [("comfyui", *row) for row in COMFYUI.items()],
)
def test_a_prompt_is_read_as_the_program_of_that_name_reads_it(syntax, prompt, fragments):
    read = parse_weights(prompt, syntax)

    assert [text for text, _ in read] == [text for text, _ in fragments]
    assert [weight for _, weight in read] == pytest.approx([weight for _, weight in fragments])


@pytest.mark.parametrize("syntax", ["plain", "chunked"])
@pytest.mark.parametrize("prompt", [*A1111, *COMFYUI])
def test_without_weights_brackets_are_text(syntax, prompt):
    assert parse_weights(prompt, syntax) == ([(prompt, 1.0)] if prompt else [])


# a prompt as a tree: a text, or (what is inside, the bracket round it, its weight or None)
words = st.text("ab ,.'é()[]", min_size=1, max_size=6)
trees = st.recursive(
    words,
    lambda inside: st.tuples(
        st.lists(inside, min_size=1, max_size=3),
        st.sampled_from("(["),
        st.none() | st.sampled_from([0.0, 0.5, 1.0, 1.25, 2.0, -1.0]),
    ),
    max_leaves=8,
)


def spell(tree, syntax):
    if isinstance(tree, str):
        escaped = "()[]" if syntax == "a1111" else "()"
        return "".join("\\" * (letter in escaped) + letter for letter in tree)
    inside, bracket, weight = tree
    text = "".join(spell(part, syntax) for part in inside)
    if syntax == "a1111" and bracket == "[":
        return f"[{text}]"
    return f"({text})" if weight is None else f"({text}:{weight})"


def letters(tree, syntax, weight=1.0):
    """(letter, weight) of every letter that the prompt says."""
    if isinstance(tree, str):
        return [(letter, pytest.approx(weight)) for letter in tree]
    inside, bracket, own = tree
    if syntax == "a1111":
        weight *= 1 / 1.1 if bracket == "[" else 1.1 if own is None else own
    else:
        weight = weight * 1.1 if own is None else own
    return [pair for part in inside for pair in letters(part, syntax, weight)]


@pytest.mark.parametrize("syntax", WEIGHTED)
@given(st.lists(trees, max_size=4))
def test_without_its_syntax_a_prompt_is_its_text_and_every_letter_has_the_weight_of_its_brackets(syntax, prompt):
    read = parse_weights("".join(spell(tree, syntax) for tree in prompt), syntax)

    assert all(text for text, _ in read)
    assert [(letter, weight) for text, weight in read for letter in text] == [
        pair for tree in prompt for pair in letters(tree, syntax)
    ]


@pytest.mark.parametrize("syntax", SYNTAXES)
@given(st.text("ab()[]:\\.12 ", max_size=30))
def test_any_prompt_is_read_and_only_syntax_is_lost(syntax, prompt):
    left = iter(prompt)

    assert all(letter in left for text, _ in parse_weights(prompt, syntax) for letter in text)


# From a prompt to chunks


def spelled(tokenizer, chunks):
    return [tokenizer.decode(chunk.ids) for chunk in chunks]


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("pad_id", [49407, 0])
def test_a_short_prompt_is_one_framed_row_of_weight_1(syntax, pad_id):
    tokenizer = Tokenizer(pad_id=pad_id)

    for prompt in ["", "a cat, sitting"]:
        assert chunk_prompt(tokenizer, prompt, syntax) == [(tokenizer(prompt)[0].tolist(), [1.0] * 77)]


@pytest.mark.parametrize("syntax", SYNTAXES[1:])
@pytest.mark.parametrize(("tokens", "chunks"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_a_prompt_has_a_chunk_for_every_75_tokens(tokenizer, syntax, tokens, chunks):
    rows = chunk_prompt(tokenizer, "cat " * tokens, syntax)

    runs = [min(75, tokens - start) for start in range(0, max(tokens, 1), 75)]
    assert len(rows) == chunks
    assert [row.ids for row in rows] == [tokenizer.frame([2368] * run) for run in runs]


@pytest.mark.parametrize("syntax", WEIGHTED)
def test_every_token_has_the_weight_of_its_fragment_and_the_frame_has_1(tokenizer, syntax):
    (row,) = chunk_prompt(tokenizer, "a (red panda:1.5) and a (cat:0.5)", syntax)

    assert row.weights == [1.0, 1.0, 1.5, 1.5, 1.0, 1.0, 0.5, *[1.0] * 70]
    assert row.ids == tokenizer("a red panda and a cat")[0].tolist()


def test_plain_cuts_what_does_not_fit_and_quotes_the_dropped_words(tokenizer):
    prompt = "cat " * 75 + "under the table"

    with pytest.warns(UserWarning, match="dropped 'under the table'"):
        (row,) = chunk_prompt(tokenizer, prompt, "plain")

    assert row.ids == tokenizer.frame([2368] * 75)


@pytest.mark.parametrize("syntax", SYNTAXES[1:])
def test_what_goes_into_chunks_is_all_of_the_prompt(tokenizer, syntax):
    prompt = "a photograph of an extraordinarily overgrown botanical garden, " * 20

    rows = chunk_prompt(tokenizer, prompt, syntax)

    assert [i for row in rows for i in row.ids if i < 49406] == tokenizer.encode(prompt)


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a cat BREAK a dog", ["a cat", "a dog"]),
        ("a cat\nBREAK\n", ["a cat"]),
        ("BREAK a dog", ["", "a dog"]),
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("BREAK", [""]),
        ("(a BREAK b:1.5)", ["a", "b"]),
        ("no BREAKFAST, no break", ["no breakfast , no break"]),
    ],
)
def test_a1111_starts_a_new_chunk_at_break(tokenizer, prompt, chunks):
    assert spelled(tokenizer, chunk_prompt(tokenizer, prompt, "a1111")) == chunks


@pytest.mark.parametrize(("before", "moved"), [(54, 0), (55, 19), (73, 1), (74, 0)])
def test_a1111_moves_what_follows_a_comma_among_the_last_20_tokens(tokenizer, before, moved):
    prompt = "cat " * before + "," + "dog " * (74 - before) + "bird"

    first, second = spelled(tokenizer, chunk_prompt(tokenizer, prompt, "a1111"))

    assert second == "dog " * moved + "bird"
    assert first.split() == ["cat"] * before + [","] + ["dog"] * (74 - before - moved)


def test_a1111_moves_nothing_when_the_next_token_is_the_comma(tokenizer):
    prompt = "cat " * 60 + "," + "dog " * 14 + ", bird"

    assert spelled(tokenizer, chunk_prompt(tokenizer, prompt, "a1111"))[1] == ", bird"


def test_the_moved_tokens_take_their_weights_along(tokenizer):
    first, second = chunk_prompt(tokenizer, "cat " * 70 + ", (red dog:1.5)" + " bird" * 3, "a1111")

    assert first.weights == [1.0] * 77
    assert second.weights == [1.0, 1.5, 1.5, *[1.0] * 74]
    assert spelled(tokenizer, [second]) == ["red dog bird bird bird"]


@pytest.mark.parametrize(("tokens", "first"), [(7, 70), (8, 75)])
def test_comfyui_divides_only_fragments_of_8_tokens_or_more(tokenizer, tokens, first):
    rows = chunk_prompt(tokenizer, "cat " * 70 + f"({'dog ' * tokens}:1.5)", "comfyui")

    assert [len(text.split()) for text in spelled(tokenizer, rows)] == [first, 70 + tokens - first]
    assert [row.weights.count(1.5) for row in rows] == [first - 70, 70 + tokens - first]


@pytest.mark.parametrize("syntax", SYNTAXES[1:])
@pytest.mark.parametrize("vectors", [1, 5, 20, 75])
@pytest.mark.parametrize("before", [0, 54, 60, 70, 74, 75])
def test_all_vectors_of_a_placeholder_stay_in_one_chunk(syntax, vectors, before):
    tokenizer = Tokenizer()
    own = tokenizer.add_token("<my-cat>", vectors)

    rows = chunk_prompt(tokenizer, "cat " * max(before - 1, 0) + "," * bool(before) + " <my-cat> dog", syntax)

    assert [[i for i in row.ids if i in own] for row in rows if set(row.ids) & set(own)] == [own]
    assert sum(i == 2368 for row in rows for i in row.ids) == max(before - 1, 0)
    assert sum(i == 1929 for row in rows for i in row.ids) == 1


def test_a1111_goes_back_to_the_comma_only_from_a_full_chunk():
    tokenizer = Tokenizer()
    tokenizer.add_token("<my-cat>", 20)

    for dogs, first in [(5, 66), (14, 61)]:
        rows = chunk_prompt(tokenizer, "cat " * 60 + "," + "dog " * dogs + "<my-cat>", "a1111")
        assert [len(text.split()) for text in spelled(tokenizer, rows)] == [first, 61 + dogs - first + 1]


def test_a_placeholder_that_no_chunk_can_hold_is_refused_in_words():
    tokenizer = Tokenizer(length=10, added_tokens={"<my-cat>": list(range(49408, 49418))})

    for syntax in WEIGHTED:
        with pytest.raises(ValueError, match="10 ids with BOS and EOS do not fit in 10"):
            chunk_prompt(tokenizer, "a <my-cat>", syntax)


# From chunks to states


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_without_weights_the_context_is_the_text_encoders_output(tokenizer, text_encoder, syntax):
    prompts = ["a cat, sitting", "", "a dog"]

    context = encode_prompts(text_encoder, tokenizer, prompts, syntax=syntax)

    assert torch.equal(context, text_encoder(tokenizer(prompts)))


@pytest.mark.parametrize("syntax", WEIGHTED)
def test_weights_of_1_change_no_bit(tokenizer, text_encoder, syntax):
    plain = text_encoder(tokenizer(["a red panda", "a dog"]))

    assert torch.equal(
        encode_prompts(text_encoder, tokenizer, ["a (red:1) panda", "(a dog:1.0)"], syntax=syntax), plain
    )


@pytest.mark.parametrize("syntax", SYNTAXES[1:])
def test_each_chunk_is_encoded_by_itself_and_the_states_are_joined(tokenizer, text_encoder, syntax):
    prompt = "cat " * 75 + "dog"

    context = encode_prompts(text_encoder, tokenizer, prompt, syntax=syntax)

    rows = text_encoder(tokenizer(["cat " * 75, "dog"]))
    assert torch.equal(context, torch.cat([rows[:1], rows[1:]], dim=1))


def test_a1111_weights_scale_the_states_and_keep_the_mean_of_every_chunk(tokenizer, text_encoder):
    prompt = "a (red:1.4) [panda] BREAK a (dog:0.3)"
    rows = chunk_prompt(tokenizer, prompt, "a1111")
    plain = text_encoder(torch.tensor([row.ids for row in rows]))

    context = encode_prompts(text_encoder, tokenizer, prompt, syntax="a1111").reshape(2, 77, 32)

    # float32 sums of 2464 numbers of about 1
    torch.testing.assert_close(context.mean((1, 2)), plain.mean((1, 2)), rtol=1e-5, atol=0)
    ratios = (context / plain).median(-1).values
    expected = torch.tensor([row.weights for row in rows])
    torch.testing.assert_close(ratios / ratios[:, :1], expected, rtol=1e-5, atol=0)
    assert (ratios[:, 0] - 1).abs().min() > 1e-4


@pytest.mark.parametrize("pad_id", [49407, 0])
def test_comfyui_weights_move_the_states_on_the_line_from_the_empty_prompts(text_encoder, pad_id):
    tokenizer = Tokenizer(pad_id=pad_id)
    plain, empty = text_encoder(tokenizer(["a red panda", ""])).unbind()

    for weight in [0.0, 0.5, 1.3, -1.0, 10.0]:
        (context,) = encode_prompts(text_encoder, tokenizer, f"a (red:{weight}) panda", syntax="comfyui")

        expected = plain.clone()
        expected[2] = empty[2] + weight * (plain[2] - empty[2])
        torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)  # float32 rounding, times 10
        assert torch.equal(context[torch.arange(77) != 2], plain[torch.arange(77) != 2])


def test_comfyui_weight_0_is_the_empty_prompts_state_to_the_bit(tokenizer, text_encoder):
    (context,) = encode_prompts(text_encoder, tokenizer, "a (red panda:0)", syntax="comfyui")

    assert torch.equal(context[2:4], text_encoder(tokenizer(""))[0, 2:4])


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.filterwarnings("ignore:.*read as text:UserWarning", "ignore:the prompt has:UserWarning")
def test_a_prompt_does_not_depend_on_its_neighbours(tokenizer, text_encoder, syntax):
    prompts = ["a (cat:1.4)", "", "a (dog), " * 40, "a house, " * 80, "(a [tree]:0.5)"]

    together = encode_prompts(text_encoder, tokenizer, prompts, syntax=syntax)

    for prompt, row in zip(prompts, together, strict=True):
        alone = encode_prompts(text_encoder, tokenizer, [prompt], syntax=syntax)
        copies = alone.repeat(1, len(row) // alone.shape[1], 1)
        torch.testing.assert_close(row[None], copies, rtol=0, atol=1e-5)  # other batch, other order of the sums


def test_contexts_of_unequal_length_are_repeated_whole():
    a, b, c = (torch.randn(2, length, 4) for length in (77, 154, 231))

    same = same_length(a, b, c)

    assert [tuple(x.shape) for x in same] == [(2, 462, 4)] * 3
    assert torch.equal(same[1], torch.cat([b, b, b], dim=1))
    assert torch.equal(same_length(a)[0], a)


def test_repeating_a_context_leaves_cross_attention_unchanged():
    torch.manual_seed(0)
    attention, x, context = Attention(32, 16, heads=2), torch.randn(1, 9, 32), torch.randn(1, 77, 16)
    longer, _ = same_length(context, torch.zeros(1, 231, 16))

    assert longer.shape[1] == 231
    torch.testing.assert_close(attention(x, longer), attention(x, context), rtol=0, atol=1e-6)  # float32 sums


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.filterwarnings("ignore:.*read as text:UserWarning")
def test_the_context_has_the_dtype_of_the_states(tokenizer, text_encoder, syntax, dtype):
    context = encode_prompts(lambda ids: text_encoder(ids).to(dtype), tokenizer, "a (cat:1.4)", syntax=syntax)

    assert context.dtype == dtype
    assert context.isfinite().all()


@pytest.mark.parametrize("syntax", WEIGHTED)
def test_gradients_reach_the_text_encoder_through_the_weights(tokenizer, syntax):
    torch.manual_seed(0)
    clip = CLIPText(replace(TINY, layers=1))
    torch.nn.init.constant_(clip.final_norm.bias, 0.5)

    encode_prompts(clip, tokenizer, "a (cat:1.4)", syntax=syntax).square().sum().backward()

    assert clip.token_embedding.weight.grad[2368].abs().sum() > 0


def test_the_ids_go_to_the_device_that_is_named(tokenizer):
    def text_encoder(ids):
        assert ids.device.type == "meta"
        return torch.zeros(*ids.shape, 4, device=ids.device)

    assert encode_prompts(text_encoder, tokenizer, ["a", "b"], device="meta").device.type == "meta"


# Words for the user


@pytest.mark.parametrize("syntax", ["plain", "chunked"])
def test_weights_in_a_syntax_without_weights_are_announced(tokenizer, syntax):
    with pytest.warns(UserWarning, match=r"'\(cat:1.3\)' is read as text.*'a1111' and 'comfyui' read weights"):
        chunk_prompt(tokenizer, "a (cat:1.3) in a box", syntax)


@pytest.mark.parametrize("prompt", ["a [cat:dog:0.5]", "a [cat:3]", "a [cat|dog]", "a cat AND a dog"])
def test_what_minisd_does_not_read_of_a1111s_syntax_is_announced(tokenizer, prompt):
    with pytest.warns(UserWarning, match="minisd has no prompt editing, alternation or AND"):
        chunk_prompt(tokenizer, prompt, "a1111")


def test_break_in_comfyuis_syntax_is_announced(tokenizer):
    with pytest.warns(UserWarning, match="'BREAK' is read as text.*'a1111' starts a new chunk"):
        chunk_prompt(tokenizer, "a cat BREAK a dog", "comfyui")


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("prompt", ["a cat (in a box)", "a cat: sitting", "16:9, [red]", r"\(x:1.3\)"])
def test_ordinary_brackets_and_colons_are_read_without_a_word(tokenizer, syntax, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunk_prompt(tokenizer, prompt, syntax)


@pytest.mark.parametrize("mean", [0.0, -1.0])
def test_a1111_weights_that_turn_the_mean_are_refused(mean):
    states = torch.stack([torch.full((1, 4), 1.0), torch.full((1, 4), 1.0)], dim=1)
    weights = torch.tensor([[1.0, 2 * mean - 1]])

    with pytest.raises(ValueError, match=r"turn the mean to zero or to the other sign.*comfyui"):
        weigh_a1111(states, weights)


def test_the_weights_of_one_chunk_leave_the_others_to_the_bit():
    torch.manual_seed(0)
    states, weights = torch.randn(3, 5, 4) + 1, torch.ones(3, 5)
    weights[1, 2] = 1.7

    for weighted in [weigh_a1111(states, weights), weigh_comfyui(states, weights, torch.zeros(1, 5, 4))]:
        assert torch.equal(weighted[[0, 2]], states[[0, 2]])
        assert not torch.equal(weighted[1], states[1])


def test_bad_input_is_refused_in_words(tokenizer, text_encoder):
    with pytest.raises(ValueError, match="unknown prompt syntax 'compel'; known: plain, chunked, a1111, comfyui"):
        encode_prompts(text_encoder, tokenizer, ["a cat"], syntax="compel")
    with pytest.raises(ValueError, match="no prompts were given"):
        encode_prompts(text_encoder, tokenizer, [])
    for syntax in SYNTAXES:
        with pytest.raises(ValueError, match="a prompt must be a str, not int: 3"):
            encode_prompts(text_encoder, tokenizer, [3], syntax=syntax)
