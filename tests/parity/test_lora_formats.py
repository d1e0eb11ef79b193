"""LoRA files go between this project and diffusers, PEFT and PyTorch, live: the networks' outputs agree."""

from __future__ import annotations

import warnings
from pathlib import Path

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel

from ldm.diffusion.sampling import Sampling
from ldm.generation.pipeline import Pipeline
from ldm.lora.formats import detect_format, read_lora, write_lora
from ldm.lora.formats.cloneofsimo import CLASSES, in_order
from ldm.lora.formats.modules import BaseModules
from ldm.lora.lora import LoRA
from ldm.lora.merge import merge_lora
from ldm.lora.updates import LoRALayer
from ldm.settings.model import load_model_config
from ldm.textual_inversion.embedding import Embedding
from ldm.textual_inversion.formats import write_embeddings
from tests.golden import make_lora_formats as maker
from tests.golden.make_pipelines import draw
from tests.named_weights import named_input, relative_error
from tests.network_cases import FORMS, inputs_for, model_with_named_weights, run_network
from tests.pipeline_cases import NEGATIVE_PROMPTS, PROMPTS, SCALE, starting_latents

GOLDEN = Path(__file__).parents[1] / "golden"
BOUND = 1e-4
FEW_STEPS = 8
# What each of diffusers' older forms held when it was current.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


class Case:
    """A model here and its twin there, and LoRAs on them."""

    def __init__(self, form: str):
        self.config = load_model_config(GOLDEN / f"{form}.yaml")
        self.base = BaseModules(self.config)
        self.given = inputs_for(self.config)
        self.model = model_with_named_weights(self.config)
        self.weights = {name: parameter.asnumpy().copy() for name, parameter in self.model.parameters_dict().items()}
        self.outputs = {network: run_network(self.model, network, self.given) for network in ("unet", "text")}

    def ours(self, lora: LoRA) -> dict[str, np.ndarray]:
        """Outputs with `lora` merged, and the base as it was afterwards."""
        merge_lora(self.model, lora)
        found = {network: run_network(self.model, network, self.given) for network in ("unet", "text")}
        for name, parameter in self.model.parameters_dict().items():
            parameter.set_data(ms.Tensor(self.weights[name]))
        return found

    def reference(self, unet: dict | None = None, text: dict | None = None):
        return maker.adapted(self.config, unet, text, self.weights)

    def pipeline(self, reference) -> StableDiffusionPipeline:
        return maker_pipeline(reference)

    def lora(self, targets, alpha, rank=lambda i: 2 + i % 2) -> LoRA:
        layers = {}
        for i, module in enumerate(self.base.modules):
            if targets is None or module.path.endswith(targets):
                outgoing, incoming, *kernel = module.shape
                r = rank(i)
                layers[module.name] = LoRALayer(
                    values(f"{module.name} down", (r, incoming, *kernel)),
                    values(f"{module.name} up", (outgoing, r, *(1 for _ in kernel))),
                    float(alpha(i)),
                )
        return LoRA(layers)

    def agree(self, ours: dict[str, np.ndarray], reference, networks=("unet", "text")) -> None:
        for network in networks:
            theirs = reference.run(network, self.given)
            assert relative_error(self.outputs[network], theirs) > 0.01, f"the LoRA of {network} does nothing"
            assert relative_error(ours[network], theirs) < BOUND, network


def maker_pipeline(reference) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=None, text_encoder=reference.text, tokenizer=None, unet=reference.unet, scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Small enough that attention does not become a choice of one, which blows up the last digit."""
    return (0.4 * named_input(name, shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


@pytest.fixture(scope="module", params=list(FORMS))
def case(request):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Case(request.param)


class TestWrittenHere:
    @pytest.mark.parametrize(
        "format, targets, alpha",
        [
            ("diffusers", None, lambda i: 1 + i % 3),  # every layer, alphas that differ
            ("diffusers", ATTENTION, lambda i: 3),
            ("diffusers-newer", None, lambda i: 1 + i % 3),
            ("diffusers-middle", ATTENTION, lambda i: 1 + i % 3),
            ("kohya", None, lambda i: 3),
            ("kohya", ATTENTION, lambda i: 0.5),
        ],
    )
    def test_diffusers_loads_it(self, case, tmp_path, format, targets, alpha):
        lora = case.lora(targets, alpha)
        write_lora(tmp_path / "pytorch_lora_weights.safetensors", lora, format, case.config)
        reference = case.reference()
        case.pipeline(reference).load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
        case.agree(case.ours(lora), reference)

    def test_diffusers_unet_loads_the_oldest(self, case, tmp_path):
        lora = case.lora(ATTENTION[:4], lambda i: 3)
        write_lora(tmp_path / "lora.safetensors", lora, "diffusers-oldest", case.config)
        reference = case.reference()
        from safetensors.torch import load_file

        reference.unet.load_lora_adapter(load_file(tmp_path / "lora.safetensors"), prefix=None)
        case.agree(case.ours(lora), reference, ["unet"])

    def test_peft_loads_the_folder(self, case, tmp_path):
        lora = case.lora(None, lambda i: 1 + i % 3).only("unet")
        write_lora(tmp_path / "lora", lora, "peft", case.config)
        reference = case.reference()
        PeftModel.from_pretrained(reference.unet, tmp_path / "lora")
        case.agree(case.ours(lora), reference, ["unet"])

    def test_pytorch_loads_the_list(self, case, tmp_path):
        lora = case.lora(("to_q", "to_k", "to_v", "to_out.0"), lambda i: 3).only("unet")
        for dtype, torch_dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
            write_lora(tmp_path / "lora.pt", lora, "cloneofsimo-pt", case.config, dtype)
            loaded = torch.load(tmp_path / "lora.pt", weights_only=True)
            modules = in_order(case.base.of_component("unet"), ("Attention",), "unet")
            assert len(loaded) == 2 * len(modules) and loaded[0].dtype == torch_dtype
            for i, module in enumerate(modules):
                layer = lora.layers[module.name]
                theirs = (loaded[2 * i].float() @ loaded[2 * i + 1].float()).numpy()
                limit = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2}[dtype]
                assert relative_error(layer.update().reshape(theirs.shape), theirs) < limit

    def test_pytorch_loads_the_embedding(self, tmp_path):
        vectors = np.random.default_rng(0).standard_normal((2, 768)).astype(np.float32)
        write_embeddings(tmp_path / "tokens.pt", [Embedding("", vectors)], "a1111")
        loaded = torch.load(tmp_path / "tokens.pt", weights_only=True)
        assert loaded.keys() == {"string_to_token", "string_to_param", "name"} and loaded["name"] == ""
        assert loaded["string_to_token"]["*"] == torch.tensor(265)
        np.testing.assert_array_equal(loaded["string_to_param"]["*"].numpy(), vectors)


class TestWrittenThere:
    def test_diffusers_with_its_metadata(self, case, tmp_path):
        targets = ["to_q", "to_out.0", "net.0.proj", "proj_in", "conv1", "conv_shortcut", "time_emb_proj"]
        unet = dict(
            r=4, lora_alpha=6, target_modules=targets, rank_pattern={"to_q": 2}, alpha_pattern={"attn1.to_out.0": 1}
        )
        text = dict(r=3, lora_alpha=1, target_modules=["q_proj", "fc1"], use_rslora=True)
        reference = case.reference(unet, text)
        maker.save_diffusers(reference, tmp_path)
        lora = read_lora(tmp_path, case.config)
        assert detect_format(tmp_path) == "diffusers" and lora.only("unet").layers and lora.only("text_encoder").layers
        case.agree(case.ours(lora), reference)

    def test_peft_folders(self, case, tmp_path):
        unet = dict(r=4, lora_alpha=6, target_modules=["to_k", "conv2"], use_rslora=True)
        text = dict(r=2, lora_alpha=16, target_modules=["v_proj", "fc2"])
        reference = case.reference(unet, text)
        maker.save_peft(reference, tmp_path)
        case.agree(case.ours(read_lora(tmp_path, case.config)), reference)

    @pytest.mark.parametrize("save, format", [(maker.save_kohya, "kohya"), (maker.save_older, "diffusers-newer")])
    def test_diffusers_own_conversions(self, case, tmp_path, save, format):
        unet = dict(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        text = dict(r=2, lora_alpha=2, target_modules=["q_proj", "out_proj"])
        reference = case.reference(unet, text)
        save(reference, tmp_path / "lora.safetensors")
        assert detect_format(tmp_path / "lora.safetensors") == format
        case.agree(case.ours(read_lora(tmp_path / "lora.safetensors", case.config)), reference)

    def test_pickled_by_diffusers(self, case, tmp_path):
        reference = case.reference(
            dict(r=2, lora_alpha=2, target_modules=["to_q"]), dict(r=2, lora_alpha=2, target_modules=["q_proj"])
        )
        layers = {**maker._prefixed(reference.unet, "unet"), **maker._prefixed(reference.text, "text_encoder")}
        torch.save(layers, tmp_path / "pytorch_lora_weights.bin")
        case.agree(case.ours(read_lora(tmp_path, case.config)), reference)

    def test_a_list_in_the_order_of_todays_diffusers(self, case, tmp_path):
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"]
        reference = case.reference(
            dict(r=2, lora_alpha=2, target_modules=targets),
            dict(r=2, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]),
        )
        torch.save([factor.float() for factor in maker.numbered(reference.unet)], tmp_path / "lora.pt")
        torch.save([factor.float() for factor in maker.numbered(reference.text)], tmp_path / "lora.text_encoder.pt")
        lora = read_lora(tmp_path / "lora.pt", case.config)
        theirs = {network: reference.run(network, case.given) for network in ("unet", "text")}
        for network, found in case.ours(lora).items():
            assert relative_error(found, theirs[network]) < 0.02  # the factors went through half precision


def test_the_classes_hold_the_layers_that_they_hold_there(case):
    """The patterns by which layers are told stand for diffusers' and transformers' classes, and the list's order for
    the order of their modules."""
    reference = case.reference()
    for component, network in (("unet", reference.unet), ("text_encoder", reference.text)):
        layers = {
            name for name, module in network.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        }
        ordered = [name.replace("text_model.", "") for name, _ in network.named_modules() if name in layers]
        assert ordered == [module.path for module in case.base.of_component(component)]
        for name in CLASSES[component]:
            theirs = [
                f"{outer}.{inner}".strip(".").replace("text_model.", "")
                for outer, ancestor in network.named_modules()
                if type(ancestor).__name__ == name
                for inner, module in ancestor.named_modules()
                if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
            ]
            found = [
                module.path for module in in_order(case.base.of_component(component), [name], component, early=False)
            ]
            if theirs:
                assert [path for path in theirs if path in ordered] == found, name
            else:  # names of other versions
                assert name in ("CrossAttention", "CLIPSdpaAttention", "CLIPFlashAttention2"), name


def test_golden_files_are_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "FOLDER", tmp_path / "lora")
    maker.main()
    stored = np.load(GOLDEN / "lora" / "updates.npz", allow_pickle=False)
    fresh = np.load(tmp_path / "lora" / "updates.npz", allow_pickle=False)
    assert set(stored) == set(fresh), peft.__version__
    assert max(relative_error(stored[name], fresh[name]) for name in fresh) < 1e-5


@pytest.mark.parametrize("start, end", [(0.5, None), (None, 0.5)])
def test_a_lora_at_some_steps_is_diffusers_adapter_switched_there(case, graph_mode, tmp_path, start, end):
    lora = case.lora(ATTENTION, lambda i: 3).only("unet")
    write_lora(tmp_path / "pytorch_lora_weights.safetensors", lora, "diffusers", case.config)
    given = starting_latents(case.config)
    height, width = (side * case.config.vae_factor for side in given.shape[2:])
    sampling = Sampling("dpm_solver_pp", FEW_STEPS, SCALE, height=height, width=width, batch_size=len(given))

    def ours(**ends) -> np.ndarray:
        pipeline = Pipeline(case.model)
        pipeline.load_lora(tmp_path / "pytorch_lora_weights.safetensors", 0.8, **ends)
        (batch,) = pipeline.generate(PROMPTS, sampling, 0, NEGATIVE_PROMPTS, given, progress=False)
        pipeline.unload_lora()
        return batch.latents

    reference = case.reference()
    maker_pipeline(reference).load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")

    def set_strength(step: int) -> None:
        is_on = step >= FEW_STEPS // 2 if end is None else step < FEW_STEPS // 2
        reference.unet.set_adapters("default_0", 0.8 if is_on else 0.0)

    def after_step(pipeline, step, timestep, tensors):
        set_strength(step + 1)
        return tensors

    set_strength(0)
    theirs = draw(case.config, reference, sampling.sampler, given, FEW_STEPS, callback_on_step_end=after_step)
    assert relative_error(ours(), theirs) > 10 * BOUND, "the other steps do nothing"
    assert relative_error(ours(start=start, end=end), theirs) < BOUND
