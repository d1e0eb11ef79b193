"""PEFT's settings: ranks, alphas and their patterns, and adapters that are no plain LoRA."""

import json
import os
import re
import warnings

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.formats import lora_config as adapters
from ldm.lora.formats import read_lora, write_lora
from ldm.lora.formats.lora_config import LoraConfig, settings_of
from ldm.lora.formats.modules import known_bases
from ldm.lora.lora import LoRA
from ldm.weights.checkpoint import write_checkpoint
from tests.lora.formats.files import random_lora

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYER = f"{BLOCK}.attn1.to_q"
TEXT = "encoder.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    "settings, layer, rank, alpha",
    [
        ({}, LAYER, 8, 8),
        ({"r": 4}, LAYER, 4, 8),
        ({"r": 4, "lora_alpha": 16}, LAYER, 4, 16),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, LAYER, 4, 32),  # 16 / sqrt(4) = 32 / 4
        ({"r": 9, "lora_alpha": 2, "use_rslora": True}, LAYER, 9, 6),
        ({"r": 4, "lora_alpha": 1.5}, LAYER, 4, 1.5),
        ({"rank_pattern": {"to_q": 2}}, LAYER, 2, 8),
        ({"rank_pattern": {"to_k": 2}}, LAYER, 8, 8),
        ({"rank_pattern": {"o_q": 2}}, LAYER, 8, 8),  # whole parts of a name
        ({"rank_pattern": {LAYER: 2}, "alpha_pattern": {LAYER: 1}}, LAYER, 2, 1),
        ({"alpha_pattern": {"attn1.to_q": 1, "to_q": 2}}, LAYER, 8, 1),
        ({"alpha_pattern": {r".*\.attn[12]\.to_[qk]": 3}}, LAYER, 8, 3),
        ({"alpha_pattern": {f"^{LAYER}": 3}}, LAYER, 8, 3),
        ({"alpha_pattern": {"text_model.encoder.layers.3.self_attn.q_proj": 3}}, TEXT, 8, 3),
        ({"alpha_pattern": {"encoder.layers.3.self_attn.q_proj": 3}}, TEXT, 8, 3),
        ({"rank_pattern": None, "alpha_pattern": None, "peft_type": "LORA"}, LAYER, 8, 8),
    ],
)
def test_alpha(settings, layer, rank, alpha):
    assert LoraConfig(settings, "adapter_config.json").alpha(layer, rank) == pytest.approx(alpha)


@pytest.mark.parametrize(
    "settings, pattern",
    [
        ({"peft_type": "VERA"}, "peft_type is VERA"),
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"use_qalora": True}, "QALoRA"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"layer_replication": [[0, 4]]}, "replicated"),
        ({"init_lora_weights": "pissa"}, "base model that was changed"),
        ({"init_lora_weights": "pissa_niter_16"}, "base model that was changed"),
        ({"init_lora_weights": "olora"}, "base model that was changed"),
        ({"r": "four"}, 'r: "four" is not a whole number or a number'),
        ({"r": True}, "r: True is not a whole number"),
        ({"r": [8]}, r"r: \[8\] is not a whole number"),
        ({"use_rslora": "false"}, 'use_rslora: "false" is a text, not True or False'),
        ({"alpha_pattern": {"a{99999999999999999999}": 1}}, "in alpha_pattern"),
        ({"alpha_pattern": {"(" * 400 + "a" + ")" * 400 + "*" * 9: 1}}, "no regular expression"),
        ({"alpha_pattern": {"(?i)to_q": 1}}, "no regular expression"),  # in PEFT too: it is not at the beginning
        ({"lora_alpha": float("nan")}, "lora_alpha: nan is not"),
        ({"lora_alpha": None}, "lora_alpha: None is not"),
        ({"r": 10**400}, "r: 1000.* at most 1e"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"rank_pattern": ["to_q"]}, "rank_pattern"),
        ({"alpha_pattern": {"to_q": "1"}}, 'alpha_pattern: to_q: "1" is a text'),
        ({"alpha_pattern": {"to_(q": 1}}, "no regular expression"),
    ],
)
def test_refused(settings, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        LoraConfig(settings, "adapter_config.json")
    assert "adapter_config.json" in str(caught.value)


class TestPatterns:
    """Regular expressions of anybody: compared as PEFT compares them, within a time."""

    @pytest.mark.parametrize("pattern", [
        "to_q", r".*\.attn[12]\.to_[qk]", r"(down|up)_blocks\.\d+\.attentions\.0.*", r"(\w+\.)*to_v", "[[a]", "",
        r"(?!.*attn2).*to_k", r".*blocks\.[0-1]\..{2,40}proj", "x|to_out.0", r"[^.]+\.0", r"(?P<a>attn)\d.*", r"to_q\b",
        r".{3}_blocks.*",
    ])  # fmt: skip
    def test_matches_as_re_does(self, pattern):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig({"alpha_pattern": {pattern: 1}}, "adapter_config.json")
            for module in known_bases()[0].modules:
                names = (module.path, f"text_model.{module.path}")
                fits = any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
                assert config.alpha(module.path, 8) == (1 if fits else 8), module.path

    @pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
    @pytest.mark.parametrize("pattern", [
        "((a?){31}){31}",  # 0.2 s for each name
        "(?:.*(?!q)){1,31}[A-Z]",  # more than minutes for one
    ])  # fmt: skip
    def test_one_that_never_ends_is_given_up(self, monkeypatch, key, pattern):
        monkeypatch.setattr(adapters, "MAX_SECONDS", 0.1)
        with pytest.raises(UserError, match=rf"adapter_config.json: {key} takes more than 0.1 s .*31.*name the layers"):
            config = LoraConfig({key: {pattern: 8}}, "adapter_config.json")
            for module in known_bases()[0].modules:
                config.alpha(module.path, 8)

    @pytest.mark.parametrize("pattern", [r"(a+)+", r"([a-z_.0-9]+)+!", r"(.*)*!", r"(\w|\w|\w|\.)*!", ".*" * 20 + "!"])
    def test_the_usual_ones_that_never_end(self, pattern):
        config = LoraConfig({"alpha_pattern": {pattern: 1}}, "adapter_config.json")
        assert all(config.alpha(module.path, 8) == 8 for module in known_bases()[0].modules)

    @pytest.mark.parametrize("patterns, says", [
        ({"(((a?){99}){99}){99}": 1}, "repeats more than 1,000 times"),
        ({"a" * 1001: 1}, "has 1,001 characters, at most 1,000 are read"),
        ({str(i): 1 for i in range(4097)}, "rank_pattern: 4,097 values given"),
        ({"to_q{e<=2}": 1}, "holds a bracket that no layer's name has"),
    ])  # fmt: skip
    def test_bounds(self, patterns, says):
        with pytest.raises(UserError, match=says) as caught:
            LoraConfig({"rank_pattern": patterns}, "adapter_config.json")
        assert "adapter_config.json" in str(caught.value) and len(str(caught.value)) < 300

    def test_one_for_each_layer_of_a_model(self):
        paths = [module.path for module in known_bases()[0].modules]
        config = LoraConfig({"alpha_pattern": {path: i for i, path in enumerate(paths)}}, "adapter_config.json")
        assert [config.alpha(path, 8) for path in paths] == list(range(len(paths)))


def test_a_rank_that_is_not_the_factors():
    with pytest.raises(UserError, match="the rank of .*to_q is 8, but its factors have 4"):
        LoraConfig({}, "adapter_config.json").alpha(LAYER, 4)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva"])
def test_starting_values_of_the_published_base(start):
    assert LoraConfig({"init_lora_weights": start}, "x").alpha(LAYER, 8) == 8


class TestWritten:
    def settings(self, lora, component="unet"):
        base = known_bases()[2]
        layers = {
            module.path: lora.layers[module.name]
            for module in base.of_component(component)
            if module.name in lora.layers
        }
        return settings_of(layers, base.of_component(component))

    def test_whole_kinds_of_layers_are_named_by_their_end(self):
        base = known_bases()[2]
        layers = {**random_lora(base, only="to_q").layers, **random_lora(base, only="to_out.0").layers}
        assert self.settings(LoRA(layers))["target_modules"] == ["to_out.0", "to_q"]

    def test_single_layers_are_named_in_full(self):
        found = self.settings(random_lora(known_bases()[2], only="attn1.to_q"))["target_modules"]
        assert len(found) == 10 and f"{BLOCK}.attn1.to_q" in found

    @pytest.mark.parametrize("component", ["unet", "text_encoder"])
    def test_targets_match_what_is_there_and_nothing_else(self, component):
        base = known_bases()[2]
        chosen = {m.path: m for i, m in enumerate(base.of_component(component)) if i % 3 or m.path.endswith("to_v")}
        layers = random_lora(base, rank=1).layers
        settings = settings_of({path: layers[m.name] for path, m in chosen.items()}, base.of_component(component))
        matched = {
            m.path
            for m in base.of_component(component)
            if any(f".{m.path}".endswith(f".{target}") for target in settings["target_modules"])
        }
        assert matched == chosen.keys()

    def test_patterns_hold_what_differs_from_the_most(self):
        lora = random_lora(known_bases()[2], rank=lambda i: 4 if i == 40 else 2, alpha=lambda i: 3 if i == 41 else 1)
        settings = self.settings(lora)
        assert settings["r"] == 2 and settings["lora_alpha"] == 1
        assert list(settings["rank_pattern"].values()) == [4] and list(settings["alpha_pattern"].values()) == [3]


class TestFolder:
    def write(self, tmp_path, **settings):
        nano = known_bases()[2]
        write_lora(tmp_path / "lora", random_lora(nano, rank=2, alpha=1.0, only="to_q"), "peft", nano.config)
        path = tmp_path / "lora" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        return tmp_path / "lora"

    def test_one_network_is_a_folder_two_are_subfolders(self, tmp_path):
        nano = known_bases()[2]
        assert sorted(path.name for path in self.write(tmp_path).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        write_lora(tmp_path / "both", random_lora(nano, rank=1), "peft", nano.config)
        assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["text_encoder", "unet"]

    @pytest.mark.parametrize("first, second", [("to_q", ""), ("", "to_q")])
    def test_another_adapter_in_the_folder_would_be_read_in_its_place(self, tmp_path, first, second):
        nano = known_bases()[2]
        one, two = (random_lora(nano, rank=1, only=only) for only in (first, second))
        write_lora(tmp_path / "lora", one, "peft")
        with pytest.raises(UserError, match="holds another adapter.*give a new folder"):
            write_lora(tmp_path / "lora", two, "peft")
        assert read_lora(tmp_path / "lora").layers.keys() == one.layers.keys()
        write_lora(tmp_path / "lora", one, "peft")

    def test_what_the_configuration_says_holds(self, tmp_path):
        lora = read_lora(self.write(tmp_path, lora_alpha=5))
        assert {layer.alpha for layer in lora.layers.values()} == {5.0}
        lora = read_lora(self.write(tmp_path / "rs", use_rslora=True))
        assert [layer.alpha for layer in lora.layers.values()] == [pytest.approx(2**0.5)] * 20

    def test_the_file_in_the_folder_stands_for_it(self, tmp_path):
        assert len(read_lora(self.write(tmp_path) / "adapter_model.safetensors").layers) == 20

    def test_without_a_configuration_the_strength_is_not_known(self, tmp_path):
        folder = self.write(tmp_path)
        (folder / "adapter_config.json").unlink()
        with pytest.raises(UserError, match="alpha is in adapter_config.json, which is not beside it"):
            read_lora(folder / "adapter_model.safetensors")

    @pytest.mark.parametrize("content, pattern", [
        (b"{", "is not valid JSON"), (b"[]", "no JSON object"), (b"", "is not valid JSON"),
        (b"[" * 100_000, "nested too deeply"), (b'{"r": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"r": 2, "r": 3}', '"r" is given twice'), (b"\xff\xfe{\0}\0", "is UTF-16: save it as UTF-8"),
        (b'{"r": "\xff"}', "line 1: not a UTF-8 text file"),
    ])  # fmt: skip
    def test_a_broken_configuration(self, tmp_path, content, pattern):
        folder = self.write(tmp_path)
        (folder / "adapter_config.json").write_bytes(content)
        with pytest.raises(UserError, match=rf"adapter_config\.json.*{pattern}") as caught:
            read_lora(folder)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)

    def test_a_configuration_with_a_byte_order_mark(self, tmp_path):
        folder = self.write(tmp_path, lora_alpha=5)
        path = folder / "adapter_config.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert {layer.alpha for layer in read_lora(folder).layers.values()} == {5.0}

    @pytest.mark.parametrize("kind", ["a pipe (FIFO)", "a folder"])
    def test_something_else_in_the_place_of_the_configuration(self, tmp_path, kind):
        folder = self.write(tmp_path)
        (folder / "adapter_config.json").unlink()
        (os.mkfifo if "FIFO" in kind else os.mkdir)(folder / "adapter_config.json")
        with pytest.raises(UserError, match=rf"adapter_config\.json is {re.escape(kind)}, not a file: fetch it again"):
            read_lora(folder)

    @pytest.mark.parametrize("mode", [0o000, 0o100])
    def test_a_folder_of_another_user(self, unprivileged, mode):
        folder = unprivileged / "style"
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(UserError, match="the LoRA .*style cannot be read: Permission denied: give this user"):
            read_lora(folder)
        with pytest.raises(UserError, match="style.* cannot be (accessed|read): Permission denied: give this user"):
            read_lora(folder / "inner" if mode == 0 else folder)

    def test_a_rank_that_is_not_the_factors(self, tmp_path):
        with pytest.raises(UserError, match="is 3, but its factors have 2"):
            read_lora(self.write(tmp_path, r=3))

    def test_the_same_layer_in_both_subfolders(self, tmp_path):
        for part in ("unet", "text_encoder"):
            self.write(tmp_path / part)
            (tmp_path / part / "lora").rename(tmp_path / f"{part}_")
            (tmp_path / part).rmdir()
            (tmp_path / f"{part}_").rename(tmp_path / part)
        with pytest.raises(UserError, match="is in two of its files"):
            read_lora(tmp_path)


class TestDiffusersMetadata:
    def read(self, tmp_path, text):
        arrays = {f"unet.{LAYER}.lora_A.weight": np.ones((2, 320)), f"unet.{LAYER}.lora_B.weight": np.ones((320, 2))}
        path = tmp_path / "pytorch_lora_weights.safetensors"
        write_checkpoint(
            path,
            {name: array.astype(np.float32) for name, array in arrays.items()},
            {"lora_adapter_metadata": text} if text is not None else None,
        )
        (layer,) = read_lora(path).layers.values()
        return layer.alpha

    @pytest.mark.parametrize(
        "settings, alpha",
        [
            (None, 2),
            ({"unet.r": 2, "unet.lora_alpha": 6}, 6),
            ({"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {LAYER: 5}}, 5),
            ({"r": 2, "lora_alpha": 7}, 7),  # of unet.save_lora_adapter
            ({"text_encoder.r": 4, "text_encoder.lora_alpha": 6}, 2),
        ],
    )
    def test_alpha(self, tmp_path, settings, alpha):
        assert self.read(tmp_path, None if settings is None else json.dumps(settings)) == alpha

    @pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '{"unet.r": 4}', '{"unet.use_dora": true}'])
    def test_refused(self, tmp_path, text):
        with pytest.raises(UserError, match="lora_adapter_metadata"):
            self.read(tmp_path, text)
