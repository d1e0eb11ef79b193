"""Injection: exactly the layers asked for, everything else frozen, and not a name of the base changed."""

from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from ldm.errors import UserError
from ldm.lora.formats import write_lora
from ldm.lora.inject import assert_trainable, get_lora, inject_lora, remove_lora, set_lora
from ldm.lora.layers import HardLoRAConv2d, LoRAConv2d, LoRALinear, StepDropout
from ldm.lora.lora import LoRA
from ldm.lora.merge import merge_lora, unmerge_lora
from ldm.lora.spec import LayerSpec, LoRASpec
from ldm.lora.updates import LoRALayer
from ldm.models import initial_values, layers
from ldm.models.unet import UNetModel
from ldm.settings.model import load_model_config
from tests.lora.helpers import TEXT, TO_Q, UNET, Fresh, assert_unchanged, weights_of

ROOT = Path(__file__).parent.parent.parent
TEXT_LAYER = f"{TEXT}transformer.text_model.encoder.layers.0."


class LossAndGradients(nn.Cell):
    """Loss and its gradients for the trainable parameters, as one graph."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net
        self.weights = ms.ParameterTuple(net.trainable_params())
        self.grad = ops.GradOperation(get_by_list=True)

    def construct(self, *inputs):
        return self.net(*inputs), self.grad(self.net, self.weights)(*inputs)


class MeanSquare(nn.Cell):
    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net, self.mean = net, ops.ReduceMean()

    def construct(self, *inputs):
        y = self.net(*inputs)
        return self.mean(y * y)


class TestNames:
    @pytest.mark.parametrize("targets", ["attention", "all"])
    def test_the_bases_names_and_parameters_stay_as_they_are(self, tiny_model, targets):
        before = tiny_model.parameters_dict()
        inject_lora(tiny_model, LoRASpec(targets=targets, text_encoder=True))
        after = tiny_model.parameters_dict()
        assert [name for name in after if ".lora_" not in name] == list(before)
        assert all(after[name] is parameter for name, parameter in before.items())

    @pytest.mark.parametrize("targets", ["attention", "all"])
    def test_the_factors_are_named_after_their_layers(self, tiny_model, targets):
        before = set(tiny_model.parameters_dict())
        names = inject_lora(tiny_model, LoRASpec(targets=targets, text_encoder=True))
        factors = set(tiny_model.parameters_dict()) - before
        assert factors == {f"{name}.lora_{factor}.weight" for name in names for factor in ("down", "up")}
        assert all(f"{name}.weight" in before for name in names)

    def test_where_a_parameter_is_found_agrees_with_its_name(self, tiny_model):
        inject_lora(tiny_model, LoRASpec(targets="all", text_encoder=True))
        for name, parameter in tiny_model.parameters_and_names():
            assert name == parameter.name

    def test_a_part_of_a_model_gives_the_same_names(self, tiny_config, tiny_model):
        unet = tiny_model.model.diffusion_model
        names = inject_lora(unet, LoRASpec())
        assert names[0] == f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"
        assert all(name.startswith(UNET) for name in names)


class TestWhichLayers:
    def test_attention_of_the_unet_by_default(self, tiny_model):
        names = inject_lora(tiny_model, LoRASpec())
        blocks = {name.split(".transformer_blocks.")[0] for name in names}
        assert len(blocks) == 7 and len(names) == 7 * 2 * 4
        kinds = {name.split(".attn")[1].split(".", 1)[1] for name in names}
        assert kinds == {"to_q", "to_k", "to_v", "to_out.0"}

    def test_the_text_encoder_when_asked_for(self, tiny_model):
        names = inject_lora(tiny_model, LoRASpec(unet=False, text_encoder=True))
        assert len(names) == 2 * 4 and all(name.startswith(TEXT) for name in names)
        assert {name.rsplit(".", 1)[1] for name in names} == {"q_proj", "k_proj", "v_proj", "out_proj"}

    def test_all_takes_every_layer_of_the_blocks(self, tiny_model):
        names = inject_lora(tiny_model, LoRASpec(targets="all"))
        block = f"{UNET}input_blocks.3.0."
        for name in (
            f"{block}in_layers.2",
            f"{block}emb_layers.1",
            f"{block}out_layers.3",
            f"{block}skip_connection",
            f"{UNET}input_blocks.2.0.op",
            f"{UNET}output_blocks.1.2.conv",
            f"{UNET}middle_block.1.proj_in",
            f"{UNET}middle_block.1.transformer_blocks.0.ff.net.2",
        ):
            assert name in names
        for name in (f"{UNET}input_blocks.0.0", f"{UNET}out.2", f"{UNET}time_embed.0"):
            assert name not in names

    def test_layers_by_name(self, small_net):
        names = inject_lora(small_net, LoRASpec(targets=("attn2.to_k", "proj_in")))
        block = f"{UNET}input_blocks.0.1."
        assert names == [f"{block}proj_in", f"{block}transformer_blocks.0.attn2.to_k"]

    def test_a_group_and_a_name_together(self, tiny_model):
        names = inject_lora(tiny_model, LoRASpec(targets=("attention", "attn1.to_q", "ff.net.2")))
        kinds = {name.split(".transformer_blocks.0.")[1].split(".", 1)[1] for name in names}
        assert kinds == {"to_q", "to_k", "to_v", "to_out.0", "net.2"} and len(names) == 7 * (2 * 4 + 1)

    def test_a_target_is_whole_parts_of_a_name(self, small_net):
        with pytest.raises(UserError, match="match no layer"):
            inject_lora(small_net, LoRASpec(targets=("o_q",)))  # not to_q
        assert inject_lora(small_net, LoRASpec(targets=("attn1.to_q",)))

    def test_the_first_convolution_is_trained_by_its_name_alone(self, tiny_model):
        name = "model.diffusion_model.input_blocks.0.0"
        assert inject_lora(tiny_model, LoRASpec(targets=("input_blocks.0.0",))) == [name]
        unet = tiny_model.model.diffusion_model
        assert isinstance(unet.input_blocks[0].cell_list[0], LoRAConv2d)
        inputs = (Tensor(np.ones((1, 4, 8, 8), np.float32)), Tensor(np.array([3], np.int32)))
        context = Tensor(np.ones((1, 77, 32), np.float32))
        assert np.isfinite(unet(*inputs, context).asnumpy()).all()
        for others in (
            LoRASpec(targets="all"),
            LoRASpec(modules={"input_blocks.*": LayerSpec(2)}),
            LoRASpec(targets=("0",)),
        ):
            remove_lora(tiny_model)
            names = inject_lora(tiny_model, others)
            assert names and name not in names

    def test_cells_take_the_layers_place_in_sequences_too(self, small_net):
        inject_lora(small_net, LoRASpec(targets="all"))
        block = small_net.model.diffusion_model.input_blocks[0]
        transformer = block[1].transformer_blocks[0]
        assert isinstance(transformer.attn1.to_q, LoRALinear)
        assert isinstance(transformer.attn1.to_out[0], LoRALinear)
        assert isinstance(transformer.attn1.to_out.cell_list[0], LoRALinear)
        assert isinstance(block[1].proj_in, LoRAConv2d)
        assert isinstance(block[0].in_layers.cell_list[2], LoRAConv2d)


class TestSD15:
    @pytest.fixture
    def model(self, monkeypatch):
        """SD1's UNet: shapes without values, which take 3.4 GB otherwise."""
        monkeypatch.setattr(initial_values, "drawn", lambda shape, draw: initializer("zeros", shape))

        class Model(nn.Cell):
            def __init__(self, unet):
                super().__init__()
                self.model = nn.Cell()
                self.model.diffusion_model = unet
                self.model.update_parameters_name("model.")

        from mindspore.nn.utils import no_init_parameters

        with no_init_parameters():
            yield Model(UNetModel(**load_model_config(ROOT / "configs" / "v1-inference.yaml").unet))

    def test_rank_4_trains_797184_parameters(self, model):
        names = inject_lora(model, LoRASpec(rank=4))
        assert len(names) == 128
        assert sum(np.prod(parameter.shape) for parameter in model.trainable_params()) == 797_184
        assert sum(np.prod(p.shape) for p in model.get_parameters() if not p.requires_grad) == 859_520_964

    def test_rank_8_on_q_and_v_trains_797184_parameters_in_a_file_of_3_1_mb(self, model, tmp_path):
        """lora_wrapper's published figures, from its configuration: 797K parameters, a file of 3.08 MB."""
        entry = {"r": 8, "scale": 1, "trainable_scale": 0, "hard": 1}
        spec = LoRASpec().with_config({"trainable_model": 0, "to_q": entry, "to_v": entry})
        names = inject_lora(model, spec)
        assert len(names) == 64 and {name.rpartition(".")[2] for name in names} == {"to_q", "to_v"}
        assert sum(np.prod(parameter.shape) for parameter in model.trainable_params()) == 797_184
        shapes = {parameter.name: parameter.shape for parameter in model.trainable_params()}
        layers = {
            name: LoRALayer(*(np.zeros(shapes[f"{name}.lora_{half}.weight"], np.float32) for half in ("down", "up")), 8)
            for name in names
        }
        assert spec.modules == LoRASpec().with_config(ROOT / "configs" / "lora" / "lora_wrapper.json").modules
        write_lora(tmp_path / "lora.ckpt", LoRA(layers))
        assert 3.188e6 < (tmp_path / "lora.ckpt").stat().st_size < 3.25e6  # 3.04 to 3.1 MiB

    def test_the_example_with_ranks_by_block(self, model):
        names = inject_lora(model, LoRASpec().with_config(ROOT / "configs" / "lora" / "by_block.yaml"))
        parameters = model.parameters_dict()
        ranks = {name: parameters[f"{name}.lora_down.weight"].shape[0] for name in names}
        assert ranks[f"{UNET}input_blocks.2.1.transformer_blocks.0.attn1.to_q"] == 4
        assert ranks[f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_q"] == 8
        assert ranks[f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_out.0"] == 16
        assert f"{UNET}input_blocks.2.0.in_layers.2" in ranks
        assert not any(".input_blocks.1." in name and ".to_" in name for name in names)


class TestStart:
    def test_outputs_do_not_change(self, small_net, small_inputs):
        before = small_net(*small_inputs).asnumpy()
        inject_lora(small_net, LoRASpec(targets="all"))
        np.testing.assert_array_equal(Fresh(small_net)(*small_inputs).asnumpy(), before)

    def test_down_is_uniform_within_the_inverse_root_of_the_fan_in(self, tiny_model):
        inject_lora(tiny_model, LoRASpec(targets="all", rank=8))
        for parameter in tiny_model.trainable_params():
            values = parameter.asnumpy()
            assert values.dtype == np.float32
            if ".lora_up." in parameter.name:
                assert not values.any()
            else:
                bound = 1 / np.sqrt(np.prod(parameter.shape[1:]))
                assert 0.9 * bound < np.abs(values).max() <= bound
                assert abs(values.std() / (bound / np.sqrt(3)) - 1) < 0.25

    def test_the_seed_decides(self, tiny_model):
        def factors(seed, targets="attention"):
            inject_lora(tiny_model, LoRASpec(seed=seed, targets=targets))
            found = {p.name: p.asnumpy() for p in tiny_model.trainable_params()}
            remove_lora(tiny_model)
            return found

        one, again, other, more = factors(1), factors(1), factors(2), factors(1, "all")
        name = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.lora_down.weight"
        assert all(np.array_equal(one[key], again[key]) for key in one)
        assert not np.array_equal(one[name], other[name])
        assert not np.array_equal(one[name], one[name.replace("to_q", "to_k")])
        np.testing.assert_array_equal(one[name], more[name])  # whatever else is injected

    def test_injection_leaves_numpys_global_state_alone(self, small_net):
        np.random.seed(7)
        wanted = np.random.random()
        np.random.seed(7)
        inject_lora(small_net, LoRASpec())
        assert np.random.random() == wanted


class TestTraining:
    def test_only_the_factors_are_trainable(self, tiny_model):
        for parameter in tiny_model.get_parameters():
            parameter.requires_grad = True
        names = inject_lora(tiny_model, LoRASpec())
        assert len(tiny_model.trainable_params()) == 2 * len(names)
        assert_trainable(tiny_model, names)

    @pytest.mark.parametrize("change", ["thawed base", "frozen factor", "wrong names", "twice the same name"])
    def test_any_other_trainable_set_is_noticed(self, small_net, change):
        names = inject_lora(small_net, LoRASpec())
        parameters = small_net.parameters_dict()
        if change == "thawed base":
            parameters[f"{names[0]}.weight"].requires_grad = True
        elif change == "frozen factor":
            parameters[f"{names[0]}.lora_up.weight"].requires_grad = False
        elif change == "wrong names":
            names = names[1:]
        else:
            small_net.twin = Parameter(Tensor(np.zeros(1, np.float32)), name=f"{names[0]}.weight", requires_grad=False)
        with pytest.raises(RuntimeError, match="should be trainable|same name"):
            assert_trainable(small_net, names)

    def test_a_graph_trains_every_factor_and_nothing_else(self, small_net, small_inputs):
        frozen = {p.name: p.asnumpy().copy() for p in small_net.get_parameters()}
        inject_lora(small_net, LoRASpec(rank=2, targets="all", text_encoder=True))
        step = LossAndGradients(MeanSquare(small_net))
        started = {p.name: p.asnumpy().copy() for p in small_net.trainable_params()}
        losses = []
        for _ in range(4):
            loss, gradients = step(*small_inputs)
            losses.append(float(loss.asnumpy()))
            for parameter, gradient in zip(small_net.trainable_params(), gradients):
                parameter.set_data(Tensor(parameter.asnumpy() - 0.5 * gradient.asnumpy()))
        assert losses[-1] < losses[0]
        for parameter in small_net.get_parameters():
            if parameter.name in frozen:
                np.testing.assert_array_equal(parameter.asnumpy(), frozen[parameter.name])
            else:
                assert not np.array_equal(parameter.asnumpy(), started[parameter.name]), parameter.name


class TestBadSettings:
    @pytest.mark.parametrize(
        "setting, pattern",
        [
            (dict(rank=0), "lora_rank: 0 is not allowed"),
            (dict(rank=-4), "lora_rank: -4 is not allowed"),
            (dict(rank=2.5), "lora_rank: 2.5 is not a whole number"),
            (dict(rank=True), "lora_rank: True is not a whole number"),
            (dict(rank=9), "lora_rank 9 is more than the width 8"),
            (dict(rank=2**31), "lora_rank 2147483648 is more than the width 8"),
            (dict(rank=2**100), "lora_rank 1267650600228229401496703205376 is more than the width 8"),
            (dict(alpha=1e300), r"lora_alpha: 1e\+300 is not allowed: at least 1e-09, at most 1000000000"),
            (dict(scale=-1e-300), "lora_scale: -1e-300 is not allowed: 0, or at least 1e-09"),
            (dict(targets="to_q" * 100), "LoRA targets 'to_q.* ... .*choose one of"),
            (dict(targets=("x." * 500_000,)), "lora_targets: the name .* has 1,000,000 characters, at most 200"),
            (dict(targets=("*" * 200,), text_encoder=False, unet=False), "nothing to train"),
            (dict(targets=("*a" * 99 + "b",)), "match no layer of the UNet"),
            (dict(alpha=0.0), "lora_alpha: 0.0 is not allowed"),
            (dict(alpha=-1.0), "lora_alpha: -1.0 is not allowed"),
            (dict(alpha=float("nan")), "lora_alpha: nan is not a number"),
            (dict(scale=float("inf")), "lora_scale: inf is not a number"),
            (dict(unet=False), "nothing to train"),
            (dict(targets="attentions"), "choose one of attention, all"),
            (dict(targets=()), "empty"),
            (dict(targets=("to_q", "to_qq")), "'to_qq' matches no"),
            (dict(targets=("nothing",)), "match no layer of the UNet"),
            (dict(targets=("to_q",), text_encoder=True), "match no layer of the text encoder"),
        ],
    )
    def test_is_named_and_changes_nothing(self, small_net, setting, pattern):
        before = list(small_net.parameters_dict())
        with pytest.raises(UserError, match=pattern):
            inject_lora(small_net, LoRASpec(**setting))
        assert list(small_net.parameters_dict()) == before

    @pytest.mark.parametrize("name", ["to_qq", "x\n\x1b[2J", "*a" * 99 + "b", "[" * 200])
    def test_a_name_of_the_configuration_that_matches_nothing(self, small_net, name):
        with pytest.raises(UserError, match="LoRA configuration (match|holds)") as caught:
            inject_lora(small_net, LoRASpec().with_config({"to_q": {}, name: {}}))
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500

    def test_injecting_twice(self, small_net):
        inject_lora(small_net, LoRASpec())
        with pytest.raises(UserError, match="already"):
            inject_lora(small_net, LoRASpec())


def modules(content, **settings):
    return LoRASpec(**settings).with_config(content)


PROJ_IN = f"{UNET}input_blocks.0.1.proj_in"
TRANSFORMER = f"{UNET}input_blocks.0.1.transformer_blocks.0."


class TestPerModule:
    def test_ranks_alphas_and_scales_of_their_own(self, small_net, randomise):
        names = inject_lora(small_net, modules({
            "to_q": {"r": 2, "scale": 0.5},
            "attn2.*": {"r": 3, "alpha": 6},
            "in_layers.2": {"r": 1},
            "ff.net.*": {"r": 4, "alpha": 1, "trainable_scale": 1},
        }))  # fmt: skip
        lora = get_lora(small_net)
        assert set(lora.layers) == set(names)
        found = {name.removeprefix(f"{UNET}input_blocks.0."): (e.rank, e.alpha) for name, e in lora.layers.items()}
        block = "1.transformer_blocks.0."
        assert found == {
            "0.in_layers.2": (1, 1.0),
            f"{block}attn1.to_q": (2, 1.0),
            f"{block}attn2.to_q": (3, 6.0), f"{block}attn2.to_k": (3, 6.0),
            f"{block}attn2.to_v": (3, 6.0), f"{block}attn2.to_out.0": (3, 6.0),
            f"{block}ff.net.0.proj": (4, 1.0), f"{block}ff.net.2": (4, 1.0),
        }  # fmt: skip
        scales = [parameter.name for parameter in small_net.trainable_params() if "lora_scale" in parameter.name]
        assert scales == [f"{TRANSFORMER}ff.net.0.proj.lora_scale", f"{TRANSFORMER}ff.net.2.lora_scale"]

    def test_of_several_names_the_last_holds_and_rank_0_leaves_out(self, small_net):
        names = inject_lora(small_net, modules({"to_*": {"r": 2}, "attn1.to_k": {"r": 1}, "attn2.to_*": {"r": 0}}))
        assert not any(".attn2." in name for name in names)
        lora = get_lora(small_net)
        assert lora.layers[f"{TRANSFORMER}attn1.to_k"].rank == 1 and lora.layers[f"{TRANSFORMER}attn1.to_v"].rank == 2

    def test_hard_and_soft_convolutions(self, small_net, small_inputs, randomise):
        spec = modules({"proj_in": {"r": 2, "hard": 1}, "proj_out": {"r": 2}, "in_layers.2": {"r": 2}})
        inject_lora(small_net, spec)
        block = small_net.model.diffusion_model.input_blocks[0]
        assert isinstance(block[1].proj_in, HardLoRAConv2d) and isinstance(block[1].proj_out, LoRAConv2d)
        assert block[1].proj_in.lora_down.weight.shape == (2, 8)
        lora = get_lora(small_net)
        assert lora.layers[PROJ_IN].down.shape == (2, 8, 1, 1) and lora.layers[PROJ_IN].up.shape == (8, 2, 1, 1)

    def test_hard_changes_nothing_for_dense_layers(self, small_net):
        inject_lora(small_net, modules({"to_q": {"r": 2, "hard": 1}}))
        transformer = small_net.model.diffusion_model.input_blocks[0][1].transformer_blocks[0]
        assert isinstance(transformer.attn1.to_q, LoRALinear)

    def test_dropouts_share_one_key(self, small_net):
        inject_lora(small_net, modules({"to_q": {"dropout": 0.5}, "to_k": {"dropout": 0.1}, "to_v": {}}))
        dropouts = [cell for _, cell in small_net.cells_and_names() if isinstance(cell, StepDropout)]
        assert len(dropouts) == 4 and len({id(cell.key) for cell in dropouts}) == 1
        assert dropouts[0].key.name == "lora_dropout.key" and not dropouts[0].key.requires_grad

    def test_the_rest_of_the_model_where_it_is_asked_for(self, small_net):
        names = inject_lora(small_net, modules({"trainable_model": 1, "to_q": {"r": 2}}))
        trainable = {parameter.name for parameter in small_net.trainable_params()}
        for parameter in small_net.get_parameters():
            of_lora = parameter.name.rpartition(".")[0] in names
            wanted = parameter.name.startswith(UNET) and not of_lora
            assert (parameter.name in trainable) == wanted, parameter.name
        assert {f"{name}.lora_up.weight" for name in names} <= trainable

    @pytest.mark.parametrize(
        "content, settings, says",
        [
            ({"qkv_proj": {"r": 2}}, {}, "did you mean"),
            ({"to_q": {"r": 2}, "to_qq": {"r": 2}}, {}, '"to_qq" .* matches no .*: did you mean to_q'),
            ({"to_q": {"r": 2}, "attn3.*": {"r": 2}}, {}, '"attn3.\\*" .* matches no'),
            ({"to_q": {"r": 2}, "q_proj": {"r": 2}}, {}, "only layers of the text encoder.*lora_ft_text_encoder True"),
            ({"q_proj": {"r": 2}}, dict(text_encoder=True), "match no layer of the UNet"),
            ({"to_q": {"r": 2}}, dict(text_encoder=True), "match no layer of the text encoder"),
            ({"attn1.to_q": {"r": 2}, "to_q": {"r": 3}}, {}, '"attn1.to_q" .* is used for no layer'),
            ({"to_q": {"r": 0}}, {}, "leaves out every layer"),
            ({"to_q": {"r": 9}}, {}, '"to_q": r 9 is more than the width 8'),
            ({"in_layers.2": {"r": 2, "hard": 1}}, {}, "in_layers.2 is 3x3: set hard 0"),
            ({"attn1": {"r": 2}}, {}, "match no layer|matches no"),
        ],
    )
    def test_mistakes_are_named_and_change_nothing(self, small_net, content, settings, says):
        before = list(small_net.parameters_dict())
        with pytest.raises(UserError, match=says) as caught:
            inject_lora(small_net, modules(content, **settings))
        assert "\n" not in str(caught.value)
        assert list(small_net.parameters_dict()) == before


class TestRemoving:
    EVERYTHING = {"to_*": {"r": 2, "dropout": 0.5}, "proj_in": {"r": 2, "hard": 1}, "in_layers.2": {"r": 1}}

    def test_gives_the_layers_back(self, small_net, small_inputs, randomise):
        before = Fresh(small_net)(*small_inputs).asnumpy()
        cells = {name: cell for name, cell in small_net.cells_and_names()}
        arrays = {parameter.name: parameter.asnumpy().copy() for parameter in small_net.get_parameters()}
        names = inject_lora(small_net, modules(self.EVERYTHING))
        randomise(small_net)
        assert remove_lora(small_net) == names
        assert {name: cell for name, cell in small_net.cells_and_names()} == cells
        for parameter in small_net.get_parameters():
            np.testing.assert_array_equal(parameter.asnumpy(), arrays.pop(parameter.name))
        assert not arrays
        np.testing.assert_array_equal(Fresh(small_net)(*small_inputs).asnumpy(), before)

    def test_what_was_set_meanwhile_stays_set(self, small_net):
        inject_lora(small_net, LoRASpec())
        layers.set_compute_dtype(small_net, ms.float16)
        small_net.set_train()
        remove_lora(small_net)
        layer = small_net.model.diffusion_model.input_blocks[0][1].transformer_blocks[0].attn1.to_q
        assert layer.dtype == ms.float16 and layer.training

    def test_inject_take_out_remove_merge_unmerge(self, small_net, randomise):
        arrays = {parameter.name: parameter.asnumpy().copy() for parameter in small_net.get_parameters()}
        inject_lora(small_net, modules({**self.EVERYTHING, "ff.net.2": {"r": 2, "trainable_scale": 1}}))
        randomise(small_net)
        lora = get_lora(small_net)
        remove_lora(small_net)
        merge_lora(small_net, lora, 0.0)
        for parameter in small_net.get_parameters():
            np.testing.assert_array_equal(parameter.asnumpy(), arrays[parameter.name])
        merge_lora(small_net, lora, 0.8)
        unmerge_lora(small_net, lora, 0.8)
        for parameter in small_net.get_parameters():
            size = np.abs(arrays[parameter.name]).max(initial=0) + 1
            np.testing.assert_allclose(parameter.asnumpy(), arrays[parameter.name], rtol=0, atol=4e-7 * size)

    def test_again_after_removing(self, small_net):
        inject_lora(small_net, LoRASpec())
        remove_lora(small_net)
        assert inject_lora(small_net, LoRASpec(rank=2))

    def test_nothing_injected(self, small_net):
        with pytest.raises(UserError, match="nothing to remove"):
            remove_lora(small_net)


class TestGetting:
    def test_holds_every_injected_layer_with_its_strength(self, trained):
        net, lora = trained
        parameters = net.parameters_dict()
        assert {f"{name}.lora_up.weight" for name in lora.layers} == {n for n in parameters if ".lora_up." in n}
        for name, layer in lora.layers.items():
            np.testing.assert_array_equal(layer.up, parameters[f"{name}.lora_up.weight"].asnumpy())
            assert layer.rank == 2 and layer.alpha == 3.0 * 0.5

    def test_is_a_copy(self, trained):
        net, lora = trained
        layer = lora.layers[TO_Q]
        before = layer.down.copy(), layer.up.copy()
        for parameter in net.trainable_params():
            ops.assign_add(parameter, Tensor(np.ones(parameter.shape, np.float32)))  # in place, as an optimizer does
        np.testing.assert_array_equal(layer.down, before[0])
        np.testing.assert_array_equal(layer.up, before[1])

    def test_notes_what_it_was_made_for(self, small_net, tiny_config):
        inject_lora(small_net, LoRASpec())
        assert get_lora(small_net, tiny_config).metadata == {"architecture": "custom", "prediction_type": "epsilon"}

    def test_nothing_injected(self, small_net):
        with pytest.raises(UserError, match="no LoRA layers"):
            get_lora(small_net)


class TestSetting:
    @pytest.mark.parametrize("alpha, scale", [(None, 1.0), (3.0, 0.5), (1.0, 4.0)])
    def test_every_layer_begins_at_its_update(self, trained, fresh_net, alpha, scale):
        _, lora = trained
        inject_lora(fresh_net, LoRASpec(rank=2, alpha=alpha, scale=scale, targets="all", seed=9))
        set_lora(fresh_net, lora)
        begun = get_lora(fresh_net)
        assert begun.layers.keys() == lora.layers.keys()
        for name, layer in begun.layers.items():
            np.testing.assert_array_equal(layer.down, lora.layers[name].down)
            np.testing.assert_allclose(layer.update(), lora.layers[name].update(), rtol=1e-5, atol=1e-7)
            assert layer.alpha == (alpha or 2) * scale

    def test_a_hard_convolution_takes_its_kernels(self, small_net, randomise, fresh_net):
        config = {"in_layers.2": {"r": 2}, "proj_in": {"r": 2, "hard": 1}}
        for net in (small_net, fresh_net):
            inject_lora(net, LoRASpec().with_config(config))
        randomise(small_net)
        lora = get_lora(small_net)
        set_lora(fresh_net, lora)
        for name, layer in get_lora(fresh_net).layers.items():
            np.testing.assert_array_equal(layer.up, lora.layers[name].up)

    @pytest.mark.parametrize(
        "spec, words",
        [
            (LoRASpec(rank=2), "of its layers get no LoRA here.*lora_targets"),
            (LoRASpec(rank=2, targets="all", text_encoder=True), "0 of its layers.* 1 of those to be trained.*q_proj"),
            (LoRASpec(rank=3, targets="all"), "has rank 2, here it is 3: set lora_rank 2"),
        ],
    )
    def test_another_spec_is_refused(self, trained, fresh_net, spec, words):
        inject_lora(fresh_net, spec)
        before = weights_of(fresh_net)
        with pytest.raises(UserError, match=f"mine.ckpt.*{words}"):
            set_lora(fresh_net, trained[1], "mine.ckpt")
        assert_unchanged(fresh_net, before)

    def test_factors_beyond_fp32_are_refused(self, trained, fresh_net, recwarn):
        _, lora = trained
        inject_lora(fresh_net, LoRASpec(rank=2, alpha=1e-9, scale=1e-9, targets="all"))
        layers = {name: replace(layer, alpha=1e30) for name, layer in lora.layers.items()}
        with pytest.raises(
            UserError, match="at alpha 1e-18 are outside the range of fp32: set lora_alpha and lora_scale"
        ):
            set_lora(fresh_net, LoRA(layers))
        assert not [warning for warning in recwarn if "overflow" in str(warning.message)]

    def test_a_scale_of_zero_is_refused(self, trained, fresh_net):
        inject_lora(fresh_net, LoRASpec(rank=2, scale=0.0, targets="all"))
        with pytest.raises(UserError, match="mine.ckpt.*at scale 0.*set lora_scale"):
            set_lora(fresh_net, trained[1], "mine.ckpt")

    def test_another_models_shapes_are_refused(self, trained, fresh_net):
        inject_lora(fresh_net, LoRASpec(rank=2, targets="all"))
        layer = trained[1].layers[TO_Q]
        trained[1].layers[TO_Q] = LoRALayer(layer.down[:, :-1], layer.up, layer.alpha)
        before = weights_of(fresh_net)
        with pytest.raises(UserError, match="another model"):
            set_lora(fresh_net, trained[1])
        assert_unchanged(fresh_net, before)
