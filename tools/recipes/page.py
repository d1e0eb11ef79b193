"""The tables of docs/recipes.md, made of the tables that the tool uses.

python -m tools.recipes.page    # writes them into the page
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from tools.recipes import diffusers_command, kohya_tables, lora_header, onetrainer_tables
from tools.recipes.recipe import Rule

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
BEGIN, END = "<!-- tables of tools.recipes.page -->", "<!-- end of the tables -->"


def tables() -> str:
    """Return the tables of all projects as Markdown."""
    parts = [
        *_project(
            "kohya's sd-scripts and kohya_ss",
            (*kohya_tables.SAME, *kohya_tables.RULES, *kohya_tables.NETWORK_ARGS),
            kohya_tables.TOGETHER,
            kohya_tables.NO_COUNTERPART,
            kohya_tables.NOT_NEEDED,
        ),
        *_project(
            "OneTrainer",
            (
                *onetrainer_tables.RULES,
                *(rule._replace(theirs=f"concepts.*.{rule.theirs}") for rule in onetrainer_tables.CONCEPT_RULES),
            ),
            onetrainer_tables.TOGETHER,
            onetrainer_tables.NO_COUNTERPART,
            onetrainer_tables.NOT_NEEDED,
        ),
        *_project(
            "Commands of diffusers",
            (*diffusers_command.SAME, *diffusers_command.RULES),
            diffusers_command.TOGETHER,
            diffusers_command.NO_COUNTERPART_NAMES,
            diffusers_command.NOT_NEEDED_NAMES,
        ),
        "### The header of a LoRA",
        "",
        "Its names are those of sd-scripts with `ss_` in front, but for these:",
        "",
        *_table(("header", "sd-scripts"), ((f"`ss_{old}`", f"`{new}`") for old, new in lora_header.NAMES.items())),
        *_reasons("What is no setting", lora_header.STATISTICS),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _project(
    title: str,
    rules: Iterable[Rule],
    together: Iterable[tuple[str, str, str]],
    no_counterpart: Mapping[str, str],
    not_needed: Mapping[str, str],
) -> list[str]:
    rules = list(rules)
    equal = [rule.theirs for rule in rules if rule.theirs == rule.ours and not rule.note]
    others = [rule for rule in rules if rule.theirs != rule.ours or rule.note]
    return [
        f"### {title}",
        "",
        *([f"The same name and meaning: {_names(equal)}.", ""] if equal else []),
        *_table(("there", "here", ""), ((f"`{rule.theirs}`", f"`{rule.ours}`", rule.note) for rule in others)),
        "Read together:",
        "",
        *_table(
            ("there", "here", ""),
            ((_names(theirs.split()), _names(ours.split()), how) for theirs, ours, how in together),
        ),
        *_reasons("No counterpart", no_counterpart),
        *_reasons("Not needed", not_needed),
    ]


def _reasons(title: str, reasons: Mapping[str, str]) -> list[str]:
    return _table((title, "because"), ((_names(names.split()), reason) for reason, names in reasons.items()))


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    heads = list(heads)
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def with_tables(page: str) -> str:
    """Return the page with the tables between its two marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
