"""A Chinese page has the commands, figures, names, links and structure of its English page, block by block.

Only the words may differ: prose, headings, the text of links, and comments in code.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from itertools import zip_longest
from pathlib import PurePosixPath
from typing import NamedTuple

import pytest

from tests.conftest import ROOT

# English page -> Chinese page.
PAGES = {"README.md": "README.zh.md", "docs/ascend.md": "docs/ascend.zh.md"}

FENCE = re.compile(r"\s*```")
HEADING = re.compile(r"(#+) ")
ITEM = re.compile(r"(\s*)(?:[-*]|\d+\.) ")
# A shell or Python comment. No string in the pages' code has " # " in it.
COMMENT = re.compile(r"(?:^|(?<=\s))#(?=\s).*")
CODE_SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
NUMBER = re.compile(r"(?<![A-Za-z0-9.])\d+(?:,\d{3})*(?:\.\d+)*")
# A name that ends in a number, such as fp16, SD1.5 and A2. The Chinese text may repeat it or say "it".
NAME = re.compile(r"[A-Za-z]+\d+(?:\.\d+)*")
# A figure in Chinese numerals, such as "三小时" for "3 小时". 一 is left out: 一步 and 一层 are ordinary words.
CHINESE_FIGURE = re.compile(
    r"[二两三四五六七八九十百千万亿][十百千万亿]*个?(?:秒|分钟|小时|天|倍|像素|步|核|卡|通道|字节|随机种子)"
)


class Block(NamedTuple):
    """A heading, paragraph, list item, table row or fenced code block, which begins in line `line` of its page."""

    kind: str
    line: int
    text: str


class Content(NamedTuple):
    """What a translation keeps of a block's text. The order may differ, as that of words does."""

    code: Counter[str]
    links: Counter[str]
    numbers: Counter[str]
    names: Counter[str]
    bold: Counter[str]


def parse(page: str) -> list[Block]:
    """Split a page into blocks. A block's soft line breaks become spaces; code keeps its lines."""
    blocks: list[Block] = []
    code, open_block = False, False
    for number, line in enumerate(page.splitlines(), 1):
        if FENCE.match(line):
            if not code:
                blocks.append(Block(f"code {line.strip()}", number, ""))
            code, open_block = not code, False
        elif code:
            blocks[-1] = blocks[-1]._replace(text=f"{blocks[-1].text}{line}\n")
        elif not line.strip():
            open_block = False
        elif match := HEADING.match(line):
            blocks.append(Block(f"heading of level {len(match[1])}", number, line[match.end() :]))
            open_block = False
        elif line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line)) - 1
            blocks.append(Block(f"row of {cells} cells", number, line))
            open_block = False
        elif match := ITEM.match(line):
            blocks.append(Block(f"list item at column {len(match[1])}", number, line[match.end() :]))
            open_block = True
        elif open_block:
            blocks[-1] = blocks[-1]._replace(text=f"{blocks[-1].text} {line.strip()}")
        else:
            blocks.append(Block("paragraph", number, line.strip()))
            open_block = True
    assert not code, "a code block is not closed"
    return blocks


def content(prose: str) -> Content:
    """Return what a block's text has of each kind. Numbers and names are those outside code and link targets."""
    code = Counter(CODE_SPAN.findall(prose))
    prose = CODE_SPAN.sub(" ", prose)
    links = Counter(match[1] for match in LINK.findall(prose))
    prose = LINK.sub(r" \1 ", prose)
    names = Counter(set(NAME.findall(prose)))
    return Content(code, links, Counter(NUMBER.findall(prose)), names, Counter(re.findall(r"\*\*", prose)))


def translated(target: str, page: str) -> str:
    """Return where the Chinese page has to link to in place of `target`: to the Chinese page if there is one."""
    for english, chinese in PAGES.items():
        if posixpath.normpath(PurePosixPath(page).parent / target.partition("#")[0]) == english:
            return str(PurePosixPath(target).with_name(PurePosixPath(chinese).name))
    return target


def code_differences(english: str, chinese: str) -> list[str]:
    """Compare code line by line. Comments may be translated, but stand in the same lines and have the same figures."""
    differences = []
    for original, translation in zip_longest(english.splitlines(), chinese.splitlines(), fillvalue=""):
        if COMMENT.sub("", original).rstrip() != COMMENT.sub("", translation).rstrip():
            differences.append(f"command {original!r}, {translation!r}")
        comments = [match[0] if (match := COMMENT.search(line)) else "" for line in (original, translation)]
        if bool(comments[0]) != bool(comments[1]) or content(comments[0]) != content(comments[1]):
            differences.append(f"comment {comments[0]!r}, {comments[1]!r}")
    return differences


def differences(english: str, chinese: str, page: str = "README.md") -> list[str]:
    """Return what the Chinese page does not say as the English one does, each with the lines of both."""
    result = []
    for original, translation in zip_longest(parse(english), parse(chinese)):
        if original is None or translation is None or original.kind != translation.kind:
            # From here on the blocks are not each other's translation.
            return [*result, f"structure: {original}, {translation}"]
        where = f"lines {original.line} and {translation.line}"
        if original.kind.startswith("code"):
            result += [f"{where}: {difference}" for difference in code_differences(original.text, translation.text)]
            continue
        expected, actual = content(original.text), content(translation.text)
        expected = expected._replace(links=Counter(translated(link, page) for link in expected.links.elements()))
        for name, wanted, found in zip(Content._fields, expected, actual):
            if wanted != found:
                missing, added = sorted((wanted - found).elements()), sorted((found - wanted).elements())
                result.append(f"{where}: {name}: {missing} missing, {added} added in Chinese")
        result += [f"{where}: figure in words: {match}" for match in CHINESE_FIGURE.findall(translation.text)]
    return result


def without_language_line(page: str) -> str:
    lines = page.splitlines(keepends=True)
    return "".join([lines[0], "\n", "\n", *lines[3:]])


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("english", PAGES)
def test_each_page_links_to_its_other_language_below_the_title(english):
    chinese = PAGES[english]
    for page, other in ((english, chinese), (chinese, english)):
        title, empty, languages = read(page).splitlines()[:3]
        assert title.startswith("# ") and empty == ""
        assert [target for _, target in LINK.findall(languages)] == [PurePosixPath(other).name]


@pytest.mark.parametrize("english", PAGES)
def test_the_chinese_page_has_the_commands_figures_names_and_links_of_the_english_one(english):
    pages = [without_language_line(read(page)) for page in (english, PAGES[english])]
    assert differences(*pages, page=english) == []


ENGLISH = """# Title
Run `a.py --n 4` **alone** on 2 cores for 10 to 20 minutes;
see [the guide](docs/ascend.md#speed) and [API](docs/api.md).

- At rank 4, SD1.5 trains 797,184 parameters.
- At 512 pixels.

| a | b |
| --- | --- |
| `x` | 7.75 images |

```
python a.py --n 4 --resume True  # 10 minutes
```
"""
CHINESE = """# 标题
在 2 核上**单独**运行 `a.py --n 4`，需要 10 到 20 分钟；见 [API](docs/api.md) 和[指南](docs/ascend.zh.md)。

- 秩为 4 时，SD1.5 训练 797,184 个参数。
- 512 像素。

| 甲 | 乙 |
| --- | --- |
| `x` | 7.75 张图像 |

```
python a.py --n 4 --resume True  # 10 分钟
```
"""


def test_words_their_order_and_comments_may_differ():
    assert differences(ENGLISH, CHINESE) == []


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("797,184", "797,148", "numbers"),
        ("797,184", "79 万", "numbers"),
        ("7.75", "7.57", "numbers"),
        ("SD1.5", "SD2.1", "names"),
        ("10 到 20 分钟", "10 到 20 分钟（两小时）", "figure in words"),
        ("`a.py --n 4`", "`a.py --n 5`", "code"),
        ("`a.py --n 4`", "a.py", "code"),
        ("**单独**", "单独", "bold"),
        ("docs/ascend.zh.md", "docs/ascend.md", "links"),
        ("[API](docs/api.md)", "API", "links"),
        (" --resume True", "", "command"),
        ("# 10 分钟", "# 20 分钟", "comment"),
        ("  # 10 分钟", "", "comment"),
        ("# 标题", "## 标题", "structure"),
        ("- 512 像素。\n", "", "structure"),
        ("| `x` | 7.75 张图像 |\n", "", "structure"),
        ("| `x` | 7.75 张图像 |", "| `x` 7.75 张图像 |", "structure"),
        ("```\n", "```python\n", "structure"),
    ],
)
def test_a_difference_is_named(old, new, named):
    assert old in CHINESE
    found = differences(ENGLISH, CHINESE.replace(old, new, 1))
    assert found and all(named in difference for difference in found)
