"""Wildcards: what is drawn, that it is drawn again, and files that mislead."""

from __future__ import annotations

import collections
import os
from contextlib import suppress

import pytest

from ldm.errors import UserError
from ldm.files.prompts import MAX_CHARACTERS
from ldm.prompts.wildcards import MAX_DRAWS, Wildcards
from tests.growth import assert_linear, text_maker


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clothes").mkdir()
    files = {
        "colours.txt": "\ufeff# a comment\nred\n\n  green \nblue\n",
        "clothes/hats.txt": "a __colours__ hat\n{top|bowler} hat\n",
        "braces.txt": "{1-2$$a|b}\n",
        "loop.txt": "x __loop__\n",
        "ping.txt": "__pong__\n",
        "pong.txt": "__ping__\n",
        "laughs.txt": "__laughs2__ " * 40,
        "laughs2.txt": "__laughs3__ " * 40,
        "laughs3.txt": "ha " * 10,
        "long.txt": "y" * 9000,
        "longer.txt": "y" * 10_001,
        "empty.txt": "# nothing\n\n",
        "latin.txt": b"caf\xe9\n",
        "my list.v2.txt": "mine\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path.parent / f"{tmp_path.name}-secret.txt").write_text("secret\n")
    (tmp_path / "link.txt").symlink_to(tmp_path.parent / f"{tmp_path.name}-secret.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    return tmp_path


def drawn(text: str, count: int = 200, folder=None, seed: int = 0) -> collections.Counter:
    wildcards = Wildcards(folder)
    return collections.Counter(wildcards.draw(text, seed, index) for index in range(count))


@pytest.mark.parametrize(
    "text, results",
    [
        ("{red|blue}", {"red", "blue"}),
        ("a {red|blue} {cat|dog}", {f"a {c} {a}" for c in ("red", "blue") for a in ("cat", "dog")}),
        ("{a {b|c}|d}", {"a b", "a c", "d"}),
        ("{a||b}", {"a", "", "b"}),
        ("{ a | b }", {" a ", " b "}),
        ("{red}", {"red"}),
        ("{}", {""}),
        ("{2$$a|b|c}", {"a, b", "b, a", "a, c", "c, a", "b, c", "c, b"}),
        ("{2$$ and $$a|b}", {"a and b", "b and a"}),
        ("{1-2$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{0-1$$a}", {"", "a"}),
        ("{0::a|b}", {"b"}),
        ("{0::a|1::{c|d}|0.5::e}", {"c", "d", "e"}),
        ("no wildcard", {"no wildcard"}),
        ("{open", {"{open"}),
        ("closed}", {"closed}"}),
        ("{{a|b}", {"{a", "{b"}),
        (r"\{a|b\}", {"{a|b}"}),
        (r"{a\|b|c}", {"a|b", "c"}),
        (r"\(x\) \\", {r"\(x\) \\"}),
        ("a|b", {"a|b"}),
        ("snake_case __ ___", {"snake_case __ ___"}),
    ],
)  # fmt: skip
def test_braces(text, results):
    assert set(drawn(text)) == results


@pytest.mark.parametrize(
    "text, results",
    [
        ("__colours__", {"red", "green", "blue"}),
        ("(__colours__:1.3)", {"(red:1.3)", "(green:1.3)", "(blue:1.3)"}),
        ("__clothes/hats__", {"a red hat", "a green hat", "a blue hat", "top hat", "bowler hat"}),
        ("{__colours__|x}", {"red", "green", "blue", "x"}),
        ("__braces__", {"a", "b", "a, b", "b, a"}),
        ("__my list.v2__", {"mine"}),
        ("__./colours__", {"red", "green", "blue"}),
        ("__clothes/../colours__", {"red", "green", "blue"}),
    ],
)
def test_files(text, results, folder):
    assert set(drawn(text, folder=folder)) == results


def test_shares_are_probabilities():
    counts = drawn("{3::a|b}", 2000)
    assert 0.7 < counts["a"] / 2000 < 0.8
    assert 0.45 < drawn("{a|b}", 2000)["a"] / 2000 < 0.55


def test_a_draw_depends_on_seed_number_and_stream_alone(folder):
    text = "__colours__ {a|b|c|d} __clothes/hats__"
    in_order = [Wildcards(folder).draw(text, 7, index) for index in range(20)]
    wildcards = Wildcards(folder)
    assert [wildcards.draw(text, 7, index) for index in reversed(range(20))] == in_order[::-1]
    assert [wildcards.draw(text, 8, index) for index in range(20)] != in_order
    assert [wildcards.draw(text, 7, index, "negative prompt") for index in range(20)] != in_order
    # Recorded: another result would change the images of old settings.
    assert "".join(Wildcards().draw("{a|b|c|d|e|f|g|h}", 42, index) for index in range(8)) == "ehefcdbc"


@pytest.mark.parametrize(
    "text, message",
    [
        ("__color__", "did you mean __colours__"),
        ("__hats__", "clothes/hats"),
        ("__zzz__", "does not exist: add it"),
        ("__../secret__", "not inside wildcard_dir"),
        ("__/etc/passwd__", "not inside wildcard_dir"),
        ("__clothes/../../x__", "not inside wildcard_dir"),
        ("__link__", "not inside wildcard_dir"),
        ("__pipe__", "does not exist"),
        ("__loop__", "lead to each other"),
        ("__ping__", "__ping__ > __pong__"),
        ("__laughs__", f"more than {MAX_DRAWS} wildcards"),
        ("__long__ __long__", "make 18,001 characters"),
        ("__longer__", "a line of 10,001 characters"),
        ("__empty__", "is empty"),
        ("__latin__", "not a UTF-8 text file"),
        ("{3$$a|b}", "has 2 texts, 3 to 3"),
        ("{2-1$$a|b}", "2 to 1 cannot be drawn"),
        ("{0::a|0::b}", "has 0 texts"),
        ("__" + "a" * 190 + "__", "does not exist"),
        ("{" * 100 + "a" + "}" * 100, "lie too deep"),
        ("{1500$$" + "x" * 5000 + "$$" + "|".join("a" * 1500) + "}", "make more than 100,000 characters"),
        ("{2$$" + "x" * 9000 + "$$aaaa|bbbb|cccc}" + "__long__", "make 18,008 characters"),
        ("__long__ " * 900, "make more than 100,000 characters"),
        ("{a|b}" * 1001, f"more than {MAX_DRAWS} wildcards"),
    ],
)
def test_mistakes(text, message, folder):
    with pytest.raises(UserError, match="^prompt|^wildcard_dir") as error:
        Wildcards(folder).draw(text, 0, 0)
    assert message in str(error.value)


def test_files_need_a_folder(tmp_path):
    with pytest.raises(UserError, match="--wildcard_dir <folder>"):
        Wildcards().draw("__colours__", 0, 0)
    with pytest.raises(UserError, match="is not a folder"):
        Wildcards(tmp_path / "missing")


@pytest.mark.parametrize(
    ("begin", "repeated", "end"),
    [
        ("", "{", ""), ("", "{a|", ""), ("", "_", ""), ("{", "}", ""), ("", "\\", ""), ("", "__ ", ""),
        ("", "__a ", ""), ("{", "a|", "}"), ("{", "1", "}"), ("{", " ", "}"), ("{2$$", "$", "|}"),
        ("{1-", "1-", "$$}"), ("{|", "{}", "}"),
    ],
)  # fmt: skip
def test_the_work_grows_with_the_characters_alone(begin, repeated, end):
    def draw(text):
        with suppress(UserError):
            Wildcards().draw(text, 0, 0)

    assert_linear(draw, text_maker(begin, repeated, end), MAX_CHARACTERS)


def test_the_work_of_wildcards_in_wildcards_grows_with_the_characters_alone():
    def draw(text):
        with pytest.raises(UserError, match="lie too deep"):
            Wildcards().draw(text, 0, 0)

    assert_linear(draw, lambda n: "{0::|" * (n // 6) + "}" * (n // 6), MAX_CHARACTERS)
