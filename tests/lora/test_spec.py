"""Which layers get LoRA, and of what kind: the per-module configuration in lora_wrapper's form."""

import json
import os
from fnmatch import fnmatchcase

import pytest

from ldm.errors import UserError
from ldm.lora.spec import LayerSpec, LoRASpec, fits, near_names

PUBLISHED = {
    "trainable_model": 0,
    "to_q": {"r": 8, "scale": 1, "trainable_scale": 0, "hard": 1},
    "to_v": {"r": 8, "scale": 1, "trainable_scale": 0, "hard": 1},
}
BLOCK = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0."


class TestReading:
    def test_lora_wrappers_form(self):
        spec = LoRASpec().with_config(PUBLISHED)
        assert spec.layer_specs() == {name: LayerSpec(8, None, 1.0, False, True) for name in ("to_q", "to_v")}
        assert spec.trainable_model is False

    def test_everything_that_a_layer_may_say(self):
        entry = {"r": 2, "alpha": 4, "scale": 0.5, "trainable_scale": True, "hard": False, "dropout": 0.25}
        assert LoRASpec().with_config({"to_q": entry}).modules["to_q"] == LayerSpec(2, 4.0, 0.5, True, False, 0.25)

    def test_what_an_entry_leaves_out_comes_from_the_settings(self):
        spec = LoRASpec(rank=6, alpha=3.0, scale=2.0, dropout=0.1).with_config({"to_q": {}, "to_v": {"r": 1}})
        assert spec.modules["to_q"] == LayerSpec(6, 3.0, 2.0, dropout=0.1)
        assert spec.modules["to_v"] == LayerSpec(1, 3.0, 2.0, dropout=0.1)

    @pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
    def test_json_and_yaml(self, tmp_path, suffix):
        path = tmp_path / f"lora{suffix}"
        path.write_text(json.dumps(PUBLISHED, indent="\t" if suffix == ".json" else 2))
        assert LoRASpec().with_config(path) == LoRASpec().with_config(PUBLISHED)

    def test_yaml_of_its_own(self, tmp_path):
        path = tmp_path / "lora.yaml"
        path.write_text("trainable_model: true\nff.net.*: {r: 4, scale: 1e-1}  # a comment\n")
        spec = LoRASpec().with_config(path)
        assert spec.trainable_model and spec.modules == {"ff.net.*": LayerSpec(4, scale=0.1)}

    @pytest.mark.parametrize(
        "content, says",
        [
            ([1], "must hold entries"),
            ({}, "names no layer"),
            ({"trainable_model": 1}, "names no layer"),
            ({"trainable_model": 2, "to_q": {}}, "trainable_model: 2 is not True or False"),
            ({"to_q": 8}, "to_q must hold lines of `setting: value`, not a value of type int"),
            ({"to_q": {"rank": 8}}, 'unknown setting "to_q.rank": did you mean "'),
            ({"to_q": {"r": 2.5}}, "to_q.r: 2.5 is not a whole number"),
            ({"to_q": {"r": True}}, "to_q.r: True is not a whole number"),
            ({"to_q": {"r": -1}}, "to_q.r: -1 is not allowed: at least 0"),
            ({"to_q": {"alpha": "4"}}, 'to_q.alpha: "4" is a text, not a number'),
            ({"to_q": {"alpha": 0}}, "to_q.alpha: 0.0 is not allowed: at least 1e-09"),
            ({"to_q": {"scale": None}}, "to_q.scale: None is not a number"),
            ({"to_q": {"hard": "yes"}}, 'to_q.hard: "yes" is a text, not True or False'),
            ({"to_q": {"dropout": 1}}, "to_q.dropout: 1.0 is not allowed: at least 0, below 1"),
            ({"to_q": {"dropout": -0.1}}, "to_q.dropout: -0.1 is not allowed: at least 0"),
            ({"to_q": {"hard": 1, "dropout": 0.5}}, "to_q.hard and dropout do not go together"),
            ({"to_q": {"scale": 10**400}}, "is not a number"),
            ({"to_q": {"scale": -1e-30}}, "to_q.scale: -1e-30 is not allowed: 0, or at least 1e-09"),
            ({"to_q": {"alpha": 1e38}}, "to_q.alpha: 1e+38 is not allowed: at least 1e-09, at most 1000000000.0"),
            ({"to_q": {"r": -(10**400)}}, "to_q.r: -1000000"),
            ({"to_q": {"r": [[[1]] * 10_000]}}, "to_q.r: [[[1], [1]"),
            ({"to_q": {"s\n" * 100_000: 1}}, 'unknown setting "to_q.s s s s'),
            ({"to_q": "x" * 100_000}, "to_q must hold lines"),
            ({"\x1b[2J\n" * 10: 3}, "\\x1b[2J \\x1b[2J "),
            ({"q." * 500_000: {}}, 'the name "q.q.q.'),
            ({f"layer{i}": {} for i in range(4097)}, "holds 4,097 names, at most 4,096 are read: use * for several"),
        ],
    )
    def test_mistakes_are_named_with_file_and_place(self, tmp_path, content, says):
        path = tmp_path / "lora.json"
        path.write_text(json.dumps(content))
        with pytest.raises(UserError) as caught:
            LoRASpec().with_config(path)
        assert says in str(caught.value) and "lora.json" in str(caught.value) and str(caught.value).isprintable()
        assert len(str(caught.value)) < 700

    @pytest.mark.parametrize(
        "name, text, says",
        [
            ("a.json", '{"to_q": {"r": 8},}', "line 1 is not valid JSON"),
            ("a.json", '{"to_q": {}, "to_q": {}}', '"to_q" is given twice'),
            ("a.json", '{"to_q": {"r": 1, "r": 2}}', '"r" is given twice'),
            ("a.yaml", "to_q: {}\nto_q: {}\n", "given twice"),
            ("a.yaml", "to_q: {r: NaN}", "not a whole number"),
            ("a.json", '{"to_q": {"scale": NaN}}', "scale: nan is not a number"),
            ("a.yaml", "to_q: !!python/object:os.system {}", "not valid YAML"),
            ("a.yaml", "", "must hold entries"),
            ("a.yaml", "to_q: {r: 2020-13-45}", '"2020-13-45" is not a whole number'),
            ("a.yaml", f"to_q: {{r: {'9' * 5000}}}", "line 1 is not valid YAML"),
            ("a.json", f'{{"to_q": {{"r": {"9" * 5000}}}}}', "is not valid JSON"),
            ("a.yaml", "[" * 100_000, "nested too deeply"),
            ("a.json", "[" * 100_000, "nested too deeply"),
        ],
    )
    def test_broken_files(self, tmp_path, name, text, says):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=says):
            LoRASpec().with_config(tmp_path / name)

    @pytest.mark.parametrize("name", ["a.json", "a.yaml"])
    def test_a_pipe_and_a_byte_order_mark(self, tmp_path, name):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is a pipe .*, not a file: give the path of a JSON or YAML file"):
            LoRASpec().with_config(tmp_path / name)
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"to_q": {"r": 3}}')
        assert LoRASpec().with_config(tmp_path / name).modules == {"to_q": LayerSpec(3)}

    @pytest.mark.parametrize("name", ["none.json", "none.yaml"])
    def test_a_missing_file(self, tmp_path, name):
        with pytest.raises(UserError, match="does not exist"):
            LoRASpec().with_config(tmp_path / name)


class TestNames:
    @pytest.mark.parametrize(
        "pattern",
        [
            "to_q", "attn1.to_q", f"{BLOCK}attn1.to_q", "attn?.to_q", "input_blocks.*.to_q", "*",
            "model.diffusion_model.input_blocks.[1-3].*", "transformer_blocks.0.*.to_q", "to_[qv]",
        ],
    )  # fmt: skip
    def test_a_name_its_last_parts_or_a_pattern_fits(self, pattern):
        assert fits(pattern, f"{BLOCK}attn1.to_q")

    @pytest.mark.parametrize(
        "pattern", ["o_q", "to_k", "attn1", "attn1.to", "attn2.to_q", "input_blocks", "to_[kv]", "to_q.*", "TO_Q"]
    )
    def test_parts_of_words_other_places_and_other_cases_do_not(self, pattern):
        assert not fits(pattern, f"{BLOCK}attn1.to_q")

    @pytest.mark.parametrize("pattern", ["*a" * 99 + "b", "*" * 199, "*_*" * 66, "?*" * 99 + "!", "[a-z]*" * 33 + "!"])
    def test_many_stars_end(self, pattern):
        names = [f"{BLOCK}attn1.to_q", "a" * 1000]
        assert [fits(pattern, name) for name in names] == [fnmatchcase(f".{name}", f"*.{pattern}") for name in names]

    @pytest.mark.parametrize(
        "pattern, near",
        [("to_qq", "to_q"), ("qkv_proj", "q_proj"), ("attn1.to_qs", "attn1.to_q"), ("proj_inn", "proj_in")],
    )
    def test_near_names(self, pattern, near):
        names = [f"{BLOCK}attn1.to_q", f"{BLOCK}attn1.to_out.0", "x.self_attn.q_proj", "x.1.proj_in"]
        assert near in near_names(pattern, names)
