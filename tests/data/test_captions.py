"""Captions change in the order of sd-scripts, by draws of the seed and the step alone."""

import math
from collections import Counter

import numpy as np
import pytest

from ldm.data.captions import (
    cut_captions,
    cut_report,
    final_caption,
    longest_caption,
    whole_caption,
)
from ldm.data.draws import augmentation_draws, caption_draws
from ldm.errors import UserError
from ldm.settings.data import CaptionSettings
from ldm.settings.declare import names_of
from ldm.tokenizer import Tokenizer


def final(caption, rng=None, step=0, epoch=1, total_steps=None, **settings):
    rng = rng or np.random.default_rng(0)
    return final_caption(caption, CaptionSettings(**settings), rng, step=step, epoch=epoch, total_steps=total_steps)


def drawn(caption, count=400, **settings):
    """How often each final caption is drawn."""
    rules, rng = CaptionSettings(**settings), np.random.default_rng(0)
    return Counter(final_caption(caption, rules, rng) for _ in range(count))


def test_without_settings_a_caption_stays_as_it_is():
    assert final("a cat,  on a mat {x|y} ;;; 猫,") == "a cat,  on a mat {x|y} ;;; 猫,"
    assert final("") == ""


def test_names_and_defaults_are_those_of_sd_scripts():
    assert CaptionSettings() == CaptionSettings(
        caption_prefix=None, caption_suffix=None, shuffle_caption=False, caption_separator=",", keep_tokens=0,
        keep_tokens_separator=None, secondary_separator=None, enable_wildcard=False, caption_dropout=0.0,
        caption_dropout_every_n_epochs=0, caption_tag_dropout_rate=0.0, token_warmup_min=1, token_warmup_step=0,
    )  # fmt: skip


def test_a_resumed_run_must_have_the_same_captions():
    assert len(names_of(CaptionSettings, resume="fixed")) == 13


# Prefix and suffix


def test_prefix_and_suffix_are_joined_by_one_space():
    assert final("a cat", caption_prefix="photo of", caption_suffix=", hd") == "photo of a cat , hd"
    assert final("", caption_prefix="sks") == "sks "


def test_the_prefix_is_among_the_kept_tags():
    assert final("a, b", caption_prefix="sks,", keep_tokens=1, caption_tag_dropout_rate=1.0) == "sks"


# Lines


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_the_first_line_that_is_not_blank_counts(newline):
    assert final(newline.join(["", "  a cat ", "a dog"]), caption_suffix="hd") == "a cat hd"


def test_other_separators_of_lines_are_ordinary_characters():
    assert final("a\u2028cat\x0b!") == "a\u2028cat\x0b!"


def test_with_wildcards_a_line_is_drawn():
    assert set(drawn("one\n\n two \r\nthree", enable_wildcard=True)) == {"one", "two", "three"}


def test_the_texts_of_a_wildcard_are_drawn_equally_often():
    counts = drawn("{a|b|c|d}", 4000, enable_wildcard=True)
    assert all(900 < counts[text] < 1100 for text in "abcd")


def test_wildcards_are_drawn_before_the_caption_is_split_into_tags():
    assert final("{a, b|a, b}", enable_wildcard=True, keep_tokens=1, caption_tag_dropout_rate=1.0) == "a"


def test_wildcards_without_an_end_take_no_longer_than_the_caption():
    assert final("{a" * 60_000, enable_wildcard=True) == "{a" * 60_000


# Dropping the whole caption


def test_every_nth_epoch_has_empty_captions_and_the_first_epoch_is_number_one():
    captions = [final("a cat", epoch=epoch, caption_dropout_every_n_epochs=3) for epoch in range(1, 8)]
    assert captions == ["a cat", "a cat", "", "a cat", "a cat", "", "a cat"]


def test_dropped_captions_are_empty_in_spite_of_prefix_kept_tags_and_separators():
    always = {"caption_dropout_every_n_epochs": 1}
    assert final("a|||b", caption_prefix="x", keep_tokens_separator="|||", keep_tokens=9, **always) == ""


# Tags


def test_shuffling_reaches_every_order_equally_often():
    counts = drawn("a, b,c", 6000, shuffle_caption=True)
    assert len(counts) == 6 and all(900 < count < 1100 for count in counts.values())
    assert "c, a, b" in counts


def test_kept_tags_stay_in_front():
    counts = drawn("sks dog, a, b, c", 300, shuffle_caption=True, keep_tokens=1)
    assert len(counts) == 6 and all(caption.startswith("sks dog, ") for caption in counts)
    assert final("a, b", shuffle_caption=True, keep_tokens=7) == "a, b"


def test_tags_behind_the_kept_ones_are_dropped_as_often_as_asked():
    counts = drawn("sks, a, b", 4000, keep_tokens=1, caption_tag_dropout_rate=0.5)
    assert set(counts) == {"sks", "sks, a", "sks, b", "sks, a, b"} and all(
        900 < count < 1100 for count in counts.values()
    )
    assert final("a, b", caption_tag_dropout_rate=1.0) == ""


def test_a_separator_marks_the_kept_tags_and_a_second_one_a_fixed_end():
    settings = {"keep_tokens_separator": "|||", "shuffle_caption": True}
    assert set(drawn("sks, dog ||| a, b", **settings)) == {"sks, dog, a, b", "sks, dog, b, a"}
    assert set(drawn("sks|||a, b|||hd, 4k", **settings)) == {"sks, a, b, hd, 4k", "sks, b, a, hd, 4k"}
    assert set(drawn("|||a|||", **settings)) == {"a"}
    # A third one belongs to the end.
    assert final("sks|||a|||b|||c", **settings) == "sks, a, b|||c"


def test_keep_tokens_counts_only_where_the_separator_is_not_found():
    settings = {"keep_tokens": 2, "keep_tokens_separator": "|||", "caption_tag_dropout_rate": 1.0}
    assert final("a|||b, c, d", **settings) == "a"
    assert final("a, b, c, d", **settings) == "a, b"


def test_empty_tags_are_removed_only_where_the_separator_of_kept_tags_is_found():
    settings = {"keep_tokens_separator": "|||", "token_warmup_step": 1}
    assert final("a,, b ,", step=9, **settings) == "a, , b, "
    assert final("a,|||, b ,", step=9, **settings) == "a, b"


def test_the_separator_of_kept_tags_stays_where_tags_are_not_changed():
    settings = CaptionSettings(keep_tokens_separator="|||", keep_tokens=3, token_warmup_min=5)
    assert final_caption("a|||b", settings, np.random.default_rng(0)) == "a|||b"
    kept, mark, least = settings.without_effect()
    assert "keep_tokens has no effect" in kept and '"|||" stays in the captions' in mark and "token_warmup_min" in least
    assert CaptionSettings(keep_tokens_separator="|||", keep_tokens=3, shuffle_caption=True).without_effect() == []


@pytest.mark.parametrize("separator", [",", "、", "; ", "・", "🐱", "\t", "||"])
def test_tags_are_joined_by_a_comma_and_a_space_whatever_separates_them(separator):
    tags = drawn(separator.join(["猫", "b c", "é"]), 200, caption_separator=separator, shuffle_caption=True)
    assert len(tags) == 6 and all(sorted(caption.split(", ")) == ["b c", "é", "猫"] for caption in tags)


def test_separators_are_plain_texts_not_patterns():
    assert final("a.b|c", caption_separator=".", token_warmup_step=1, step=1) == "a, b|c"


def test_spaces_and_separators_stay_where_tags_are_not_changed():
    assert final("a ,b,,  c") == "a ,b,,  c"


def test_the_secondary_separator_holds_tags_together_and_becomes_the_first():
    counts = drawn("a;;;b, c", shuffle_caption=True, secondary_separator=";;;")
    assert set(counts) == {"a,b, c", "c, a,b"}
    assert final("a;;;b", secondary_separator=";;;") == "a,b"
    assert final("a;;;b", secondary_separator=";;;", caption_separator="、") == "a、b"


# Token warm-up


def used(step, tags=5, **settings):
    caption = final(", ".join("abcdefgh"[:tags]), step=step, **settings)
    return len(caption.split(", ")) if caption else 0


def test_the_warm_up_adds_tags_linearly_from_the_first_on():
    assert [used(step, token_warmup_step=8) for step in range(10)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [used(step, token_warmup_step=4, token_warmup_min=3) for step in range(5)] == [3, 3, 4, 4, 5]


def test_the_warm_up_may_be_a_share_of_all_steps():
    share = [used(step, token_warmup_step=0.5, total_steps=17) for step in range(10)]
    assert share == [used(step, token_warmup_step=8) for step in range(10)]
    with pytest.raises(ValueError, match="total_steps"):
        used(0, token_warmup_step=0.5)


def test_the_warm_up_counts_the_tags_that_are_not_kept():
    assert used(0, keep_tokens=2, token_warmup_step=8) == 3
    assert used(0, token_warmup_step=8, token_warmup_min=0) == 0


def test_a_caption_of_fewer_tags_than_the_least_is_used_whole():
    assert [used(step, tags=2, token_warmup_step=8, token_warmup_min=4) for step in range(9)] == [2] * 9


def test_the_warm_up_cuts_before_tags_are_shuffled():
    assert set(drawn("a, b, c, d", shuffle_caption=True, token_warmup_step=2, token_warmup_min=2)) == {"a, b", "b, a"}


# Draws

EVERYTHING = {
    "shuffle_caption": True, "keep_tokens": 1, "enable_wildcard": True,
    "caption_tag_dropout_rate": 0.3, "secondary_separator": ";;;", "caption_prefix": "sks,",
}  # fmt: skip
CAPTIONS = ["{a|b}, c, d;;;e, f\ng, h", "i, j, {k|l|m}", "n"]


def batch(micro_batch, count=6, process_index=0):
    generators = caption_draws(7, micro_batch, count, process_index)
    captions = (CAPTIONS * 4)[process_index * count :][:count]
    return [final(caption, rng, **EVERYTHING) for caption, rng in zip(captions, generators)]


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws():
    straight = [batch(micro_batch) for micro_batch in range(12)]
    assert [batch(micro_batch) for micro_batch in (7, 2, 11)] == [straight[7], straight[2], straight[11]]
    assert len({tuple(captions) for captions in straight}) > 6


def test_several_processes_draw_what_one_process_draws():
    assert [batch(5, 3, process_index=0), batch(5, 3, process_index=1)] == [batch(5)[:3], batch(5)[3:]]


def test_captions_are_drawn_apart_from_crops_and_flips():
    assert caption_draws(1, 2, 1)[0].random() != augmentation_draws(1, 2, 1)[0].random()


def test_the_published_captions_stay():
    # A change of these breaks the resuming of every run.
    assert batch(3) == ["g, h", "sks, j, i", "sks, n", "sks, d,e, a, f, c", "sks, k", "sks"]


# Captions that are cut

WORDS = ", ".join(["cat"] * 37)  # 37 words and 36 commas: 73 tokens


def test_a_whole_caption_has_all_tags_in_their_order_whatever_training_drops():
    rules = CaptionSettings(
        caption_prefix="p", caption_suffix="s", shuffle_caption=True, caption_tag_dropout_rate=1.0, caption_dropout=1.0,
        caption_dropout_every_n_epochs=1, token_warmup_step=10, keep_tokens_separator="|||", secondary_separator=";",
    )  # fmt: skip
    assert whole_caption("a|||b,c;d", rules, np.random.default_rng(0)) == "p a, b, c,d s"
    wildcards = CaptionSettings(enable_wildcard=True)
    assert {whole_caption("{x|y}", wildcards, np.random.default_rng(seed)) for seed in range(20)} == {"x", "y"}


def test_captions_over_75_tokens_are_listed_once_with_what_they_lose():
    captions = [WORDS, WORDS + ", a dog", WORDS + ", dog"]
    cut = cut_captions(captions, CaptionSettings(), Tokenizer())
    assert [(row, lost) for row, lost in cut] == [(1, "dog")]


def test_the_longest_caption_that_may_be_drawn_counts():
    settings = CaptionSettings(
        enable_wildcard=True, caption_suffix=", red hat", caption_dropout=1.0, caption_tag_dropout_rate=0.9,
        shuffle_caption=True, token_warmup_step=100,
    )  # fmt: skip
    captions = [f"short\n{WORDS}, {{a|a big}}", "short"]
    assert [row for row, _ in cut_captions(captions, settings, Tokenizer())] == [0]


def test_the_longest_caption_has_the_longest_text_of_every_wildcard():
    settings = CaptionSettings(enable_wildcard=True, caption_tag_dropout_rate=1.0, secondary_separator=";")
    assert longest_caption("a;b, {c|dd|}\ne", settings, len) == "a,b, dd"


def test_the_report_counts_all_and_names_the_first():
    tokenizer = Tokenizer()
    cut = cut_captions([f"{WORDS}, a dog {number}" for number in range(8)], CaptionSettings(), tokenizer)
    line = cut_report(cut, 1200, lambda row: f"{row}.png")
    assert line.startswith("8 of 1,200 captions are longer than 75 tokens and cut there: 0.png loses")
    assert "4.png" in line and "5.png" not in line and line.endswith("and 3 more")
    assert cut_report([], 10, str) == ""


# Bad settings


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"caption_separator": ""}, "caption_separator is empty"),
        ({"caption_dropout": 1.1}, "caption_dropout"),
        ({"caption_dropout": -0.1}, "caption_dropout"),
        ({"caption_tag_dropout_rate": math.nan}, "caption_tag_dropout_rate"),
        ({"keep_tokens": -1}, "keep_tokens"),
        ({"keep_tokens": "two"}, "keep_tokens"),
        ({"shuffle_caption": 1}, "shuffle_caption"),
        ({"token_warmup_step": -1}, "token_warmup_step"),
        ({"caption_dropout_every_n_epochs": -2}, "caption_dropout_every_n_epochs"),
        ({"caption_prefix": 3}, "caption_prefix"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, named):
    with pytest.raises(UserError, match=named):
        CaptionSettings(**settings)
