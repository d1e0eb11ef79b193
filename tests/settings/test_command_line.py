"""Flags of the tools: bounds, names, and mistakes in one line that names the flag."""

from __future__ import annotations

import pytest

from ldm.errors import UserError
from ldm.files.paths import user_path
from ldm.settings.command_line import Parser, number, truth, whole_number


@pytest.fixture
def parser():
    made = Parser("A tool.\n\n    an example")
    made.add_argument("--source", type=user_path, required=True)
    made.add_argument("--output_path", type=user_path)
    made.add_argument("--rank", type=whole_number(low=1, high=1000))
    made.add_argument("--alpha", type=number())
    made.add_argument("--energy", type=number(low=0, high=1))
    made.add_argument("--mode", choices=("sum", "mean"))
    made.add_argument("--text", type=truth, default=True)
    return made


@pytest.mark.parametrize(
    "words, says",
    [
        ("", "required: --source (-h lists the flags)"),
        ("--source", "--source: expected one argument"),
        ("--source a --rank x", '--rank: "x" is not a whole number, 1 or more and 1,000 or less'),
        ("--source a --rank 0", '--rank: "0" is not a whole number'),
        ("--source a --rank 2.5", '--rank: "2.5" is not a whole number'),
        ("--source a --rank " + "9" * 5000, "is not a whole number"),
        ("--source a --alpha nan", '--alpha: "nan" is not a number'),
        ("--source a --alpha inf", '--alpha: "inf" is not a number'),
        ("--source a --alpha 1e999", '--alpha: "1e999" is not a number'),
        ("--source a --alpha=-inf", '--alpha: "-inf" is not a number'),
        ("--source a --energy 1.5", '--energy: "1.5" is not a number, 0 or more and 1 or less'),
        ("--source a --mode max", "--mode: invalid choice: 'max'"),
        ("--source a --text maybe", '--text: "maybe" is neither True nor False'),
        ("--source a --output b", "there is no flag --output: did you mean --output_path?"),
        ("--source a --output-path=b", "there is no flag --output-path: did you mean --output_path?"),
        ("--source a --ran 1", "there is no flag --ran: did you mean --rank?"),
        ("--source a b", '"b" belongs to no flag'),
        ("--source a " + "b" * 100_000, "belongs to no flag"),
        ("--source a --mode \x1b[2J", "--mode: invalid choice"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(parser, words, says):
    with pytest.raises(UserError) as error:
        parser.parse_args(words.split(" ") if words else [])
    text = str(error.value)
    assert says in text and text.endswith("(-h lists the flags)")
    assert len(text) < 600 and text.isprintable()


def test_values_are_what_they_say(parser, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("PLACE", "here")
    args = parser.parse_args(["--source=~/a", "--output_path", "$PLACE/b", "--rank", "7", "--alpha=-1e-3", "--text",
                              "FALSE"])  # fmt: skip
    assert (str(args.source), str(args.output_path)) == ("/home/somebody/a", "here/b")
    assert (args.rank, args.alpha, args.text, args.energy) == (7, -1e-3, False, None)


def test_help_keeps_the_lines_of_the_description(parser, capsys):
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["-h"])
    assert not ended.value.code and "A tool.\n\n    an example\n" in capsys.readouterr().out
