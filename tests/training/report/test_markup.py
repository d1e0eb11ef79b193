"""Only `tag` and `raw` make markup. Everything else is escaped, wherever it stands."""

from __future__ import annotations

import json
from html.parser import HTMLParser

from ldm.training.report.charts import embedded_json
from ldm.training.report.markup import joined, raw, tag
from tests.training.report.runs import HOSTILE


def parsed(markup: str) -> tuple[list[str], str, list]:
    """Return the elements, the text and the attributes that a browser would find."""
    elements, texts, attributes = [], [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda name, given: (elements.append(name), attributes.extend(given))
    parser.handle_data = texts.append
    parser.feed(markup)
    return elements, "".join(texts), attributes


def test_texts_and_attributes_are_escaped():
    elements, text, attributes = parsed(tag("p", HOSTILE, [HOSTILE], title=HOSTILE))
    assert elements == ["p"]
    shown = HOSTILE.replace("\u202e", "\\u202e")  # it would turn the direction of what follows
    assert text == shown * 2 and attributes == [("title", shown)]


def test_markup_stands_as_it_is_and_none_is_left_out():
    assert joined(tag("b", "x"), None, raw("<br>"), 3) == "<b>x</b><br>3"
    assert tag("img", alt="", hidden=True, title=None, tabindex=False) == '<img alt="" hidden>'
    assert tag("td", class_="a", aria_label="b") == '<td class="a" aria-label="b"></td>'


def test_control_characters_and_halves_of_characters_are_shown_as_escapes():
    assert tag("p", "a\0b\x1b[31m\udcffc") == "<p>a\\x00b\\x1b[31m\\xffc</p>"


def test_json_cannot_end_its_script_element():
    text = embedded_json({"name": "</script><!--\u2028"})
    assert "<" not in text and "\u2028" not in text
    assert json.loads(text) == {"name": "</script><!--\u2028"}
