"""Write tests/golden/tokenizer.json.gz: what the reference tokenizers make of some 900 texts.

There is more than one CLIPTokenizer: up to transformers 4 it cleans with ftfy (where installed), from transformers 5 on
it does not. So this runs twice, and each run replaces the columns of the references that its environment has:

    pip install torch transformers==4.57.6 ftfy==6.3.1 && pip install --no-deps open_clip_torch==3.3.0
    python tests/golden/make_tokenizer.py

    pip install transformers==5.23.0
    python tests/golden/make_tokenizer.py

`--output` writes elsewhere, to compare with whatever version is installed.
"""

from __future__ import annotations

import argparse
import collections
import csv
import gzip
import html.entities
import importlib.metadata
import importlib.util
import json
import random
import runpy
import tempfile
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("tokenizer.json.gz")
VOCABULARY = ROOT / "ldm" / "tokenizer" / "bpe_simple_vocab_16e6.txt.gz"

# Texts are parted by the record separator's image, which none of them holds.
WRITTEN = {
    "plain": """
a photo of a cat␞A Photograph Of An Astronaut Riding A Horse␞a drawing of a green pokemon with red eyes␞
the quick brown fox jumps over the lazy dog␞oil on canvas, masterpiece, 8k, highly detailed␞
(masterpiece:1.2), [bad hands], {{best quality}}␞a cute girl -- no hat␞UPPER lower MiXeD␞x␞a␞I␞
supercalifragilistic␞antidisestablishmentarianism and pneumonoultramicroscopicsilicovolcanoconiosis␞
qwrtpsdfg zxcvbnm␞a  cat   with    four     spaces␞trailing space ␞  leading space␞cat,dog,bird␞cat, dog , bird␞
snake_case camelCase␞kebab-case-words␞www.example.com/path?query=1&other=2␞someone@example.com␞
#hashtag @mention␞$100 and 50% off␞C++ and C# and F#␞/usr/bin/env python3␞C:\\Windows\\System32␞
f(x) = x^2 + 2*x - 1␞{"key": [1, 2, 3]}␞~tilde~ `tick`""",
    "contractions": """
don't␞DON'T␞it's a dog's life␞I'm sure you're right and we've won␞they'll say he'd go␞rock 'n' roll␞
'tis the season␞'twas 'em␞y'all'd've␞o'clock␞the cats' toys␞'s't're've'm'll'd␞'S'T'RE␞can't won't shan't␞
l'été d'hiver qu'il␞''''␞he said 'stop'␞'␞'s␞a's b't c're␞ain't␞who'd've␞'re you␞i'ſ a long s␞don`t␞don´t""",
    "numbers": """
0␞7␞42␞1234567890␞3.14159␞1,000,000␞1e-5␞0x1F␞2024-02-29␞12:34:56␞+1 (555) 010-9999␞№5␞½ cup␞x² + y³␞H₂O␞Ⅳ Ⅷ Ⅻ␞
①②③␞١٢٣٤␞१२३४␞１２３␞七八九␞1st 2nd 3rd␞100%␞-40°C␞4k 8k 16k␞v1.5 v2.1-768␞a1b2c3␞007␞1/2 3/4␞10^6␞٣٫١٤␞𝟘𝟙𝟚""",
    "punctuation": """
...␞…␞!!!␞???␞?!?!␞wow!!! really???␞--- *** ___␞<<<>>>␞«guillemets»␞„unten“␞¿qué? ¡sí!␞a—b–c−d␞( ) [ ] { }␞
.,;:!?␞#$%&'*+/=?^_`{|}~␞"quoted" 'single'␞:) ;-) :-( ^_^ ¯\\_(ツ)_/¯␞→ ← ↑ ↓␞§ ¶ † ‡␞© ® ™␞€ £ ¥ ₹ ₿␞• ◦ ▪␞
~!@#$%^&*()_+␞a.b.c.d␞end.␞"␞""␞\\␞\\n \\t␞//␞a&b␞a & b␞<b>bold</b>␞<␞>␞a < b > c␞⸘interrobang‽""",
    "accents": """
café␞CAFÉ␞cafe\u0301␞naïve façade␞Ångström␞A\u030angstro\u0308m␞Ñandú␞über straße␞STRASSE ẞ␞İstanbul ılık␞Łódź␞
Čeština␞Đặng Thị Ngọc Thịnh␞Việt Nam␞Ελληνικά␞ΟΔΟΣ ΣΟΦΟΣ␞Россия␞Ёлка ё␞Україна␞ﬁne ﬂower oﬃce␞ĳsberg␞Æsir œuvre␞
Þór ð␞ǅ ǈ␞Z\u0334\u0321a\u0335\u0322l\u0336\u0322g\u0337\u0323o␞e\u0301\u0301\u0301␞ñ n\u0303␞Å Å K Ω␞ſtraße ſ␞
ŉ ǰ ΐ␞a\u0300b\u0301c\u0302␞résumé déjà-vu""",
    "cjk": """
一只猫的照片␞中国水墨画，山水␞你好，世界！␞繁體中文測試␞龍␞𠮷野家␞漢字かな交じり文␞猫の写真␞ねこ␞ネコ␞ﾈｺ␞
が か\u3099␞日本語と English の mix␞東京タワー　全角スペース␞「引用」『二重』␞〜波␞고양이 사진␞한국어 텍스트␞
\u1112\u1161\u11ab\u1100\u116e\u11a8␞ㄱㄴㄷ␞中文abc中文123␞ＦＵＬＬ ｗｉｄｔｈ １２３！␞㍿ ㊗ ㈱␞々〆〇␞⿰⿱␞
，。！？；：␞中 国 空 格␞水墨画中的一只红色的鸟站在树枝上""",
    "scripts": """
صورة قطة␞مرحبا بالعالم␞السَّلَامُ عَلَيْكُمْ␞العربية 123 ١٢٣␞فارسی می\u200cخواهم␞اردو میں␞חתול␞שָׁלוֹם עולם␞
नमस्ते दुनिया␞बिल्ली की तस्वीर␞ক্ষ বাংলা␞தமிழ்␞తెలుగు␞ಕನ್ನಡ␞മലയാളം␞සිංහල␞ภาษาไทย แมว␞ລາວ␞မြန်မာ␞ខ្មែរ␞ქართული␞
ᲥᲐᲠᲗᲣᲚᲘ␞Հայերեն␞አማርኛ␞ᏣᎳᎩ␞ꮳꮃꭹ␞ᐃᓄᒃᑎᑐᑦ␞བོད་ཡིག␞Монгол ᠮᠣᠩᠭᠣᠯ␞𐍈𐌰𐌹␞𒀭𒂗␞𝓯𝓪𝓷𝓬𝔂 𝕥𝕖𝕩𝕥␞𝐁𝐨𝐥𝐝␞ⓒⓘⓡⓒⓛⓔ␞🅰🅱␞ꜱᴍᴀʟʟ ᴄᴀᴘꜱ␞
uʍop ǝpᴉsdn␞ʰⁱᵍʰ␞Ω≈ç√∫˜µ≤≥÷␞𐐀𐐨""",
    "emoji": """
😀␞😀😀😀␞a 😀 b␞cat😺dog🐶␞👩‍👩‍👧‍👦 family␞👍🏽 thumbs␞🏳️‍🌈␞🏴‍☠️␞🇯🇵🇩🇪␞1️⃣2️⃣␞❤️␞❤␞☺️ ☺␞🤷🏾‍♀️ shrug␞
🧑‍🚀 astronaut␞©️ ®️␞🏴󠁧󠁢󠁥󠁮󠁧󠁿 england␞🫠🫡🫥␞🥹␞👁️‍🗨️␞🐦‍🔥␞:smile: 😄␞😀!😀?😀.␞🔥🔥🔥 lit 🔥␞♥♦♣♠␞☃ ☕ ⌛␞
🙂‍↔️␞🏽␞\u200d␞\ufe0f␞🇦""",
    "mojibake": """
cafÃ©␞naÃ¯ve␞âœ” No problems␞â€œquotesâ€\x9d␞donâ€™t␞Ã¼ber␞ðŸ˜€␞Â£100␞rÃ©sumÃ©␞schÃ¶n␞l\u2019Ã©tÃ©␞Ð¿Ñ€Ð¸Ð²ÐµÑ‚␞
ä½ å¥½␞Ã␞â␞Â␞don\u2019t␞\u201ccurly\u201d quotes␞\u2018single\u2019␞it\u02bcs␞\u201cit\u2019s\u201d␞
\u2039single\u203a␞a\u2028b␞a\u2029b␞a\x85b␞a\ufeffb␞\ufeffstart␞\ufffd␞a\ufffdb␞\x1b[31mred\x1b[0m␞
Broken text&hellip; it&#x2019;s ﬂubberiﬁc!␞ＬＯＵＤ　ＮＯＩＳＥＳ""",
    "entities": """
salt &amp; pepper␞salt &amp;amp; pepper␞salt &amp;amp;amp; pepper␞&lt;b&gt;bold&lt;/b&gt;␞&amp;lt;b&amp;gt;␞
&quot;quoted&quot;␞it&#39;s␞it&#x27;s␞it&amp;#39;s␞&nbsp;space&nbsp;here␞caf&eacute;␞&Eacute;clair␞&copy; 2024␞
&hearts; &spades;␞&#128512;␞&#x1F600;␞&amp;#128512;␞&#0;␞&#xD800;␞&#1114112;␞&#150;␞&unknown;␞&␞&&␞&;␞&amp␞
&ampersand␞&lt␞&ltb␞AT&T␞AT&amp;T␞R&D␞Q&A␞a&b;c␞fish &amp chips␞&AMP;␞&Amp;␞&NotEqualTilde;␞&apos;␞&frac12;␞
&euro;5␞&#8364;5␞&ndash;␞&mdash;␞&hellip;␞&ldquo;hi&rdquo;␞&zwj;␞&shy;soft␞a < b &amp; c␞<p>a &amp; b</p>␞
x &lt; y < z␞1 &lt; 2 &gt; 0␞<br/>line &nbsp; two␞&amp;nbsp;␞&amp;amp;lt;␞&#38;amp;␞&#38;#38;""",
    "special": """
<|startoftext|>␞<|endoftext|>␞a<|endoftext|>b␞<|startoftext|>a cat<|endoftext|>␞<|ENDOFTEXT|>␞
<|startoftext|> x <|startoftext|>␞<|endoftext||␞<|end of text|>␞<|endoftext|>'s␞</w>␞a</w> b</w>␞cat</w>␞<unk>␞
[PAD]␞!␞!!""",
}


def texts() -> list[tuple[str, str]]:
    """(kind, text) of every text, the same on every machine."""
    rng = random.Random(20240229)
    found = [(kind, text) for kind, block in WRITTEN.items() for text in block.replace("\n", "").split("␞")]

    spaces = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
    found += [("space", text) for text in ("", " ", "   ", "\n", "\t\t", " \n \t ", "\r\n", "\xa0", "\u3000", "\u200b")]
    found += [("space", f"a red{space}cat") for space in spaces]
    controls = [*range(0x20), *range(0x7F, 0xA0), 0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), 0x2060, 0xFFF9]
    found += [("control", f"a {chr(code)} red{chr(code)}cat{chr(code)}") for code in controls]
    found += [("control", "".join(map(chr, range(0x20)))), ("control", "\ud800 lone"), ("control", "a\udc80b")]

    names = sorted(name for name in html.entities.html5 if name.endswith(";"))
    for name in rng.sample(names, 40):
        found += [("entities", f"a &{name} b"), ("entities", f"&amp;{name}")]

    with open(ROOT / "datasets" / "emoji_noto" / "train" / "img_txt.csv", encoding="utf-8", newline="") as file:
        captions = [row["text"] for row in csv.DictReader(file)]
    found += [("captions", caption) for caption in rng.sample(captions, 120)]
    with open(ROOT / "datasets" / "emoji_noto" / "meta.csv", encoding="utf-8", newline="") as file:
        emoji = ["".join(chr(int(code, 16)) for code in row["unicode"].split("-")) for row in csv.DictReader(file)]
    found += [("emoji", f"{first} and{second}") for first, second in zip(rng.sample(emoji, 60), rng.sample(emoji, 60))]

    words = sorted({word for caption in captions for word in caption.split()})
    for count in (60, 70, 74, 75, 76, 77, 80, 100, 200, 1000):
        found.append(("long", " ".join(rng.choice(words) for _ in range(count))))
    found += [("long", "a" * 300), ("long", "ha" * 200), ("long", "猫" * 100), ("long", "😀" * 60), ("long", "!" * 500)]
    found += [("long", "a " * count) for count in (74, 75, 76)]

    blocks = [(0x21, 0x7E), (0xA1, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x621, 0x64A)]
    blocks += [(0x904, 0x939), (0xE01, 0xE30), (0x2010, 0x2027), (0x2030, 0x205E), (0x2190, 0x21FF), (0x2600, 0x26FF)]
    blocks += [
        (0x3041, 0x3096),
        (0x30A1, 0x30FA),
        (0x4E00, 0x9FA5),
        (0xAC00, 0xD7A3),
        (0xFF01, 0xFF5E),
        (0x1F300, 0x1F5FF),
    ]
    for _ in range(150):
        pieces = []
        for _ in range(rng.randint(1, 8)):
            first, last = rng.choice(blocks)
            pieces.append("".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 5))))
            pieces.append(
                rng.choice(["", " ", "'s ", rng.choice(words), f" {rng.choice(words)} ", str(rng.randint(0, 99))])
            )
        found.append(("mixed", "".join(pieces)))
    return list({text: (kind, text) for kind, text in found}.values())


def clip_files(folder: Path) -> tuple[Path, Path]:
    """vocab.json and merges.txt, as published with OpenAI's models, from the bundled list of merges."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    with gzip.open(VOCABULARY, "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    symbols = letters + [letter + "</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocab, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}), encoding="utf-8")
    merges_file.write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return vocab, merges_file


def clip_tokenizer() -> transformers.CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = clip_files(Path(folder))
        if transformers.__version__.startswith("4."):
            return transformers.CLIPTokenizer(str(vocab), str(merges), model_max_length=77)
        pairs = [tuple(line.split()) for line in merges.read_text(encoding="utf-8").split("\n")[1:-1]]
        return transformers.CLIPTokenizer(json.loads(vocab.read_text(encoding="utf-8")), pairs, model_max_length=77)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=GOLDEN)
    output = parser.parse_args().output

    golden = {"references": {}, "texts": []}
    if GOLDEN.exists():
        with gzip.open(GOLDEN, "rt", encoding="utf-8") as file:
            golden = json.load(file)
    if [(entry["kind"], entry["text"]) for entry in golden["texts"]] != texts():
        golden = {"references": {}, "texts": [{"kind": kind, "text": text} for kind, text in texts()]}
    entries = golden["texts"]

    def add(column: str, name: str, rows: list) -> None:
        golden["references"][column] = name
        for entry, row in zip(entries, rows):
            entry[column] = row

    tokenizer = clip_tokenizer()
    version = transformers.__version__

    def ids(texts: list[str]) -> list[list[int]]:
        return [tokenizer(text, truncation=True, max_length=77)["input_ids"] for text in texts]

    # A lone surrogate is no text to a tokenizer in Rust.
    sound = [entry["text"].encode("utf-8", "replace").decode("utf-8") for entry in entries]
    if version.startswith("4."):
        import ftfy

        # Its one file rather than the package, which wants torchvision.
        place = importlib.util.find_spec("open_clip").submodule_search_locations[0]
        simple = runpy.run_path(str(Path(place, "tokenizer.py")))["SimpleTokenizer"](str(VOCABULARY))
        name = f"CLIPTokenizer of transformers {version} with ftfy {ftfy.__version__}"
        add("clip4", name, ids([entry["text"] for entry in entries]))
        whitespace_clean = transformers.models.clip.tokenization_clip.whitespace_clean
        cleaned = [whitespace_clean(tokenizer.fix_text(entry["text"])).lower() for entry in entries]
        add("cleaned", f"the cleaning of the same, ftfy {ftfy.__version__}", cleaned)
        name = f"SimpleTokenizer of open_clip_torch {importlib.metadata.version('open_clip_torch')}"
        add("open_clip", name, [[49406, *simple.encode(entry["text"])[:75], 49407] for entry in entries])
    else:
        name = f"CLIPTokenizer of transformers {version}"
        add("clip5", name, ids(sound))
        add("clip5_of_cleaned", name, ids([entry["cleaned"] for entry in entries]))

    with open(output, "wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as file:
        file.write(json.dumps(golden, separators=(",", ":")).encode())
    print(f"{len(entries)} texts: {dict(collections.Counter(entry['kind'] for entry in entries))}")
    print("\n".join(f"{column}: {name}" for column, name in golden["references"].items()))


if __name__ == "__main__":
    main()
