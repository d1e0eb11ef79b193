"""Training on data as people have it: any layout, in buckets, from images that were not looked at before."""

import logging

import numpy as np
import pytest
from PIL import Image

from ldm.data.draws import augmentation_draws
from ldm.errors import UserError
from ldm.settings.train import TrainSettings
from ldm.training.inputs import encode_ahead
from ldm.training.setup import begin
from ldm.training.trainer import run_steps, train
from tests.data.prepared_data import BUCKETS, write, write_shards
from tests.data.sources import layouts
from tests.training.micro import SETTINGS, metrics, prepare

LORA = {"use_lora": True, "lora_rank": 2, "max_steps": 2, "start_learning_rate": 1e-3}
MIXED = [(40, 40)] * 3 + [(90, 30)] * 3


@pytest.fixture
def make(micro_base_model, tmp_path):
    """Makes the settings of a run on a data set."""

    def settings(data, name="run", **others):
        paths = {"pretrained_model_path": micro_base_model, "data_path": data, "output_path": tmp_path / name}
        return TrainSettings(**{**SETTINGS, **LORA, **paths, **others})

    return settings


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.arrays(), b.arrays()))


def test_every_layout_gives_the_same_micro_batches(make, tmp_path, monkeypatch):
    monkeypatch.setitem(layouts.CAPTIONS, "cats/c d.png", "two, tags")
    options = dict(
        check_images=None,
        caption_dropout=0.2,
        caption_prefix="a photo of",
        shuffle_caption=True,
    )
    expected = prepare(make(layouts.image_text_csv(tmp_path / "csv"), "csv_run", **options))
    batches = [expected.inputs.batch(number) for number in range(4)]
    for writer in (writer for writers in layouts.WRITERS.values() for writer in writers):
        if writer in layouts.NEED_PYARROW:
            pytest.importorskip("pyarrow")
        data, name = writer(tmp_path / writer.__name__), f"run_{writer.__name__}"
        run = prepare(make(data, name, **options))
        assert all(same(run.inputs.batch(number), batch) for number, batch in enumerate(batches)), name
        assert run.fingerprint == expected.fingerprint


@pytest.mark.processes
def test_a_run_in_buckets_has_one_shape_a_step_and_resumes_bit_for_bit(make, tmp_path):
    options = dict(BUCKETS, max_steps=6, gradient_accumulation_steps=2)
    data = write(tmp_path / "data", MIXED)
    run = prepare(make(data, **options))
    shapes = [run.inputs.batch(number).latents.shape[2:] for number in range(12)]
    assert set(shapes) == {(8, 8), (4, 12)} and any(shapes[i] != shapes[i + 1] for i in range(0, 12, 2))
    whole, steps = run_steps(run).read_bytes(), metrics(tmp_path / "run")
    next((tmp_path / "run" / "ckpt").glob("state-*6.safetensors")).unlink()
    resumed = prepare(make(data, **options, resume=True))
    assert resumed.status.steps_done == 3
    assert run_steps(resumed).read_bytes() == whole
    assert [row["loss"] for row in metrics(tmp_path / "run")] == [row["loss"] for row in steps]


def test_captions_that_change_resume_bit_for_bit(make, tmp_path):
    captions = ["a, b, c, d", "{x|y}, e, f", "g, h ||| i"] * 3
    data = write(tmp_path / "data", [(16, 16)] * 9, captions)
    options = dict(
        shuffle_caption=True, enable_wildcard=True, keep_tokens=1, caption_tag_dropout_rate=0.2, caption_dropout=0.2,
        token_warmup_step=0.5, caption_dropout_every_n_epochs=2, max_steps=12,
    )  # fmt: skip
    whole = prepare(make(data, **options)).inputs
    batches = [whole.batch(number) for number in range(12)]
    resumed = prepare(make(data, "other", **options)).inputs
    assert all(same(resumed.batch(number), batches[number]) for number in (7, 11, 2))
    texts = [batch.text_embeddings for batch in batches]
    empty = whole.texts.of([""])[0]
    is_empty = np.array([[np.array_equal(row, empty) for row in text] for text in texts])
    assert is_empty[4:8].all() and is_empty[8:].mean() < 0.6  # four batches an epoch, of which every second is empty


def test_an_image_that_turns_out_to_be_broken_is_replaced_by_the_next_and_named(make, tmp_path, caplog):
    data = write(tmp_path / "data", [(16, 16)] * 10)
    (data / "03.png").write_bytes((data / "03.png").read_bytes()[:200])
    for cached in (True, False):
        caplog.clear()
        run = prepare(make(data, f"run{cached}", check_images=False, cache_latents=cached))
        epoch = [run.inputs.batch(number) for number in range(5)]
        assert "03.png: the image" in caplog.text and len(run.inputs.data) == 10
        rows = np.concatenate([run.inputs.rows(number) for number in range(5)])
        assert 3 not in rows and (rows == 4).sum() == 2
        again = prepare(make(data, f"again{cached}", check_images=False, cache_latents=cached)).inputs
        assert all(same(again.batch(number), epoch[number]) for number in (4, 0, 2, 1, 3))


def test_too_many_broken_images_end_the_run(make, tmp_path):
    data = write(tmp_path / "data", [(16, 16)] * 10)
    for number in (2, 3):
        (data / f"{number:02}.png").write_bytes(b"no image")
    run = prepare(make(data, check_images=False))
    with pytest.raises(UserError, match="2 of 10 images are broken"):
        [run.inputs.batch(number) for number in range(5)]


def test_cache_only_encodes_everything_and_a_training_uses_it(make, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    data = write(tmp_path / "data", [(16, 16)] * 5)
    assert train(make(data, cache_only=True)) == tmp_path / "run" / "cache"
    assert "the images and captions of 5 rows are encoded" in caplog.text
    assert not list((tmp_path / "run" / "ckpt").glob("*.ckpt"))
    run = prepare(make(data))
    monkeypatch.setattr(run.inputs.vae_encoder, "construct", None)
    assert run.inputs.batch(0).latents.shape == (2, 4, 8, 8)


def test_cache_only_needs_a_cache(make, tmp_path):
    with pytest.raises(UserError, match="cache_only needs cache_latents or cache_text"):
        make(tmp_path, cache_only=True, cache_latents=False, cache_text=False)


def test_a_wrong_colour_is_reported_before_anything_is_read(make, tmp_path):
    with pytest.raises(UserError, match='alpha_color: "blurple" is no colour'):
        begin(make(write(tmp_path / "data", [(16, 16)] * 2), alpha_color="blurple"))


# Masks and class images


def write_masks(folder, values):
    """Write a mask of one grey value for each image."""
    folder.mkdir()
    for number, value in enumerate(values):
        Image.new("L", (16, 16), value).save(folder / f"{number:02}.png")
    return folder


def test_white_masks_train_as_no_masks_bit_for_bit_and_black_ones_do_not_train(make, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data, results = write(tmp_path / "data", [(16, 16)] * 4), {}
    for name, value in (("white", 255), ("black", 0)):
        masks = write_masks(tmp_path / name, [value] * 4)
        run = prepare(make(data, f"run_{name}", masked_loss=True, conditioning_data_dir=masks))
        assert run.inputs.batch(0).weights.shape == (2, 1, 8, 8)
        run_steps(run)
        results[name] = {key: array for key, array in run.step.state().items() if not key.startswith("v.")}
    run = prepare(make(data, "without"))
    before = run.step.state()
    run_steps(run)
    for key, array in run.step.state().items():
        if key in results["white"]:
            np.testing.assert_array_equal(results["white"][key], array)
    up = next(key for key in before if key.startswith("p.") and "lora_up" in key)
    assert not results["black"][up].any() and results["white"][up].any()
    assert "masks: 4 of 4 images have one, which show 100.0% of them on average" in caplog.text
    assert "images whose mask is black everywhere: 4" in caplog.text


def test_masks_are_cropped_and_mirrored_with_their_images_and_cached_ones_are_the_same(make, tmp_path):
    data, masks = tmp_path / "data", tmp_path / "masks"
    data.mkdir(), masks.mkdir()
    for number in range(4):
        image = np.zeros((24, 48, 3), np.uint8)
        image[:, : 12 * (number + 1)] = 255
        Image.fromarray(image).save(data / f"{number}.png")
        Image.fromarray(image[..., 0]).save(masks / f"{number}.png")
        (data / f"{number}.txt").write_text("a cat")
    given = dict(masked_loss=True, conditioning_data_dir=masks, cache_text=False)
    augmented = prepare(make(data, "a", **given, random_crop=True, random_flip=True)).inputs
    seen = set()
    for number in range(6):
        rows, _, found = augmented.at_each_step.of_batch(number)
        images = [
            augmented.data.image_and_mask(row, 2, rng)[0] for row, rng in zip(rows, augmentation_draws(42, number, 2))
        ]
        for image, mask in zip(images, found):
            white = (image[0].reshape(8, 2, 8, 2).mean((1, 3)) + 1) / 2
            np.testing.assert_allclose(mask[0], white, atol=0.2)
            seen.add(round(float(mask.mean()), 2))
    assert len(seen) > 3
    cached = prepare(make(data, "b", **given)).inputs
    first, again = (prepare(make(data, "b", **given)).inputs.batch(0).weights for _ in range(2))
    np.testing.assert_array_equal(cached.batch(0).weights, first)
    np.testing.assert_array_equal(first, again)


def test_a_broken_image_that_was_not_checked_is_replaced_where_there_are_masks(make, tmp_path, caplog):
    data, masks = write(tmp_path / "data", [(16, 16)] * 10), write_masks(tmp_path / "masks", [255] * 10)
    (data / "03.png").write_bytes(b"no image")
    given = dict(masked_loss=True, conditioning_data_dir=masks, check_images=False)
    for name, others in (("cached", {}), ("augmented", {"random_flip": True})):
        caplog.clear()
        run = prepare(make(data, name, **given, **others))
        batches = [run.inputs.batch(number) for number in range(5)]
        assert "03.png: the image" in caplog.text
        assert all(batch.weights.min() == 1 for batch in batches)


def test_masks_that_change_are_another_run_and_without_any_it_is_refused(make, tmp_path):
    data, masks = write(tmp_path / "data", [(16, 16)] * 4), write_masks(tmp_path / "masks", [255] * 4)
    settings = make(data, masked_loss=True, conditioning_data_dir=masks)
    before = prepare(settings).fingerprint["data"]
    Image.new("L", (16, 16), 9).save(masks / "02.png")
    assert prepare(settings).fingerprint["data"] != before
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image has a mask"):
        prepare(make(data, masked_loss=True, conditioning_data_dir=tmp_path / "empty"))
    with pytest.raises(UserError, match="conditioning_data_dir has no effect without masked_loss"):
        make(data, conditioning_data_dir=masks)


def test_class_images_have_their_weight_in_the_loss(make, tmp_path):
    write(tmp_path / "data" / "1_dog", [(16, 16)] * 3), write(tmp_path / "class", [(16, 16)] * 5)
    (tmp_path / "config.toml").write_text(
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'data/1_dog'\n"
        "[[datasets.subsets]]\nimage_dir = 'class'\nis_reg = true\n"
    )
    inputs = prepare(make(tmp_path / "config.toml", "a", prior_loss_weight=0.25)).inputs
    for number in range(3):
        is_class = [inputs.data.rows[row].subset == 1 for row in inputs.rows(number)]
        expected = np.where(is_class, 0.25, 1.0)
        np.testing.assert_array_equal(inputs.batch(number).weights[:, 0, 0, 0], expected)
    assert len(inputs.data) == 6
    # The loss has no weights where all are 1, so that a run is as before.
    assert prepare(make(tmp_path / "config.toml", "b")).inputs.batch(0).weights is None
    alone = prepare(make(tmp_path / "config.toml", "c", prior_loss_weight=0)).inputs
    only = prepare(make(tmp_path / "data", "d")).inputs
    assert all(same(alone.batch(number), only.batch(number)) for number in range(4))


# Tar shards that are read in turn


def test_shards_are_read_in_turn_and_a_run_resumes_bit_for_bit(make, tmp_path):
    data = write_shards(tmp_path / "data", [(16, 16)] * 12)
    options = dict(shuffle_buffer_size=3, check_images=False, max_steps=8)
    run = prepare(make(data, **options))
    rows = np.concatenate([run.inputs.rows(number) for number in range(8)])
    assert sorted(rows[:12]) == list(range(12)) and rows[:4].tolist() != rows[12:].tolist()
    files = run.inputs.data.file_of_row()[rows[:12]]
    assert len(set(files[:3])) == len(set(files[-3:])) == 1 and files[0] != files[-1]
    whole, steps = run_steps(run).read_bytes(), metrics(tmp_path / "run")
    next((tmp_path / "run" / "ckpt").glob("state-*8.safetensors")).unlink()
    resumed = prepare(make(data, **options, resume=True))
    assert resumed.status.steps_done == 6
    assert run_steps(resumed).read_bytes() == whole
    assert [row["loss"] for row in metrics(tmp_path / "run")] == [row["loss"] for row in steps]
    with pytest.raises(UserError, match="shuffle_buffer_size"):
        prepare(make(data, **{**options, "shuffle_buffer_size": 4}, resume=True))


def test_images_in_files_of_their_own_are_shuffled_all_together_whatever_the_buffer(make, tmp_path, caplog):
    data = write(tmp_path / "data", [(16, 16)] * 4)
    expected = prepare(make(data)).inputs
    inputs = prepare(make(data, "other", shuffle_buffer_size=2)).inputs
    assert "shuffle_buffer_size has no effect: each image has a file of its own" in caplog.text
    assert all(same(inputs.batch(number), expected.batch(number)) for number in range(4))


def test_a_mask_is_cached_with_the_scale_of_its_image(make, tmp_path):
    """The same image in two data sets, of which one crops it to a bucket."""
    data = tmp_path / "data"
    data.mkdir()
    ramp = np.zeros((50, 50, 4), np.uint8)
    ramp[..., 3] = np.arange(50) * 5
    Image.fromarray(ramp).save(data / "a.png")
    (data / "a.txt").write_text("a cat")
    subset = f"[[datasets.subsets]]\nimage_dir = '{data}'\nalpha_mask = true\n"
    (tmp_path / "config.toml").write_text(
        f"[[datasets]]\nresolution = 48\n{subset}[[datasets]]\nresolution = 50\nenable_bucket = true\n"
        f"bucket_no_upscale = true\nbucket_reso_steps = 16\nmin_bucket_reso = 16\n{subset}"
    )
    inputs = prepare(make(tmp_path / "config.toml", train_batch_size=1)).inputs
    assert [inputs.data.buckets.size(row) for row in (0, 1)] == [(48, 48)] * 2
    for row in (0, 1):
        np.testing.assert_array_equal(inputs.masks.of_row(row), inputs.data.mask(row, 2))
    assert not np.array_equal(inputs.masks.of_row(0), inputs.masks.of_row(1))


def test_a_truncated_image_with_an_alpha_mask_is_replaced_where_it_was_not_checked(make, tmp_path, caplog):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(10):
        noise = np.random.default_rng(number).integers(0, 256, (16, 16, 4), dtype=np.uint8)
        Image.fromarray(noise).save(data / f"{number:02}.png")
        (data / f"{number:02}.txt").write_text("a cat")
    content = (data / "03.png").read_bytes()
    (data / "03.png").write_bytes(content[: len(content) // 2])
    inputs = prepare(make(data, alpha_mask=True, check_images=False)).inputs
    [inputs.batch(number) for number in range(5)]
    assert 3 not in np.concatenate([inputs.rows(number) for number in range(5)]) and "03.png" in caplog.text


def test_captions_that_change_are_not_kept_on_disk(make, tmp_path):
    data = write(tmp_path / "data", [(16, 16)] * 4, ["a, b, c, d"] * 4)
    inputs = prepare(make(data, shuffle_caption=True)).inputs
    [inputs.batch(number) for number in range(6)]
    assert not list((tmp_path / "run" / "cache").glob("texts*")) and list((tmp_path / "run" / "cache").glob("latents*"))


def test_the_window_is_as_large_as_the_memory_that_it_may_take(make, tmp_path, monkeypatch):
    data = write(tmp_path / "data", [(16, 16)] * 8)
    assert prepare(make(data)).inputs.ahead.limit == 64
    monkeypatch.setattr(encode_ahead, "WINDOW_BYTES", 100_000)
    assert 1 <= prepare(make(data)).inputs.ahead.limit < 8


def test_a_cache_that_cannot_be_written_trains_the_same_batches(make, tmp_path, monkeypatch):
    data = write(tmp_path / "data", [(16, 16)] * 8)
    expected = prepare(make(data)).inputs
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "cache").write_text("no folder")
    inputs = prepare(make(data, "full")).inputs
    assert all(same(inputs.batch(number), expected.batch(number)) for number in range(8)) and not inputs.keeps_all


def test_cache_only_says_when_there_is_nothing_to_encode(make, tmp_path):
    data = write(tmp_path / "data", [(16, 16)] * 4)
    with pytest.raises(UserError, match="there is nothing to encode ahead"):
        train(make(data, cache_only=True, random_flip=True, shuffle_caption=True))
