"""What a micro-batch trains on: a function of seed and number, from caches whose keys cover what they are made from."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from PIL import Image

from ldm.data.batches import BatchOrder
from ldm.data.content import file_hash
from ldm.data.dataset import Row
from ldm.data.preparation import data_of_rows
from ldm.data.shards import ShardedCache
from ldm.data.transforms import load_image
from ldm.errors import UserError
from ldm.runtime.device import Runtime
from ldm.settings.model import load_model_config
from ldm.settings.train import TrainSettings
from ldm.tokenizer import Tokenizer
from ldm.training import feed
from ldm.training.inputs import Inputs, sample_latents

MICRO = load_model_config(Path(__file__).with_name("micro.yaml"))
SIZE = 16


class Encoder(nn.Cell):
    """Stands for the autoencoder: mean = the image's red in every other pixel, a tiny variance."""

    def __init__(self):
        super().__init__()
        self.scale = Parameter(Tensor(np.ones(1, np.float32)), name="scale")
        self.concat = ops.Concat(1)

    def encode(self, images):
        red = images[:, 0:1, ::2, ::2] * self.scale
        return self.concat((red, red, red, red, red * 0 - 30, red * 0 - 30, red * 0 - 30, red * 0 - 30))


class Text(nn.Cell):
    """Stands for the text encoder: the tokens as numbers, each repeated to the width of the text embeddings."""

    def __init__(self):
        super().__init__()
        self.scale = Parameter(Tensor(np.ones(MICRO.context_dim, np.float32)), name="scale")

    def construct(self, tokens):
        return tokens.astype(ms.float32).reshape(-1, 77, 1) * self.scale


@pytest.fixture
def rows(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
        rows.append(Row(path, f"image {i}", file_hash(path)))
    return rows


def build(rows, tmp_path, seed=1, process_index=0, process_count=1, model=None, batch_size=2, **others):
    settings = TrainSettings(output_path=str(tmp_path / "run"), seed=seed, image_size=SIZE, **others)
    model = model or SimpleNamespace(config=MICRO, first_stage_model=Encoder(), cond_stage_model=Text())
    order = BatchOrder(len(rows), batch_size, seed, process_index, process_count)
    return Inputs(settings, model, data_of_rows(rows, SIZE, settings), order)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b))


def test_captions_that_are_cut_are_counted(rows, tmp_path, caplog):
    build([*rows[:3], rows[3]._replace(caption="word " * 75 + "and a hat")], tmp_path)
    assert '1 of 4 captions are longer than 75 tokens and cut there: 3.png loses "and a hat"' in caplog.text


def test_a_batch_has_the_shapes_and_types_of_the_step(rows, tmp_path):
    batch = build(rows, tmp_path).batch(0)
    assert batch.latents.shape == batch.noise.shape == (2, 4, 8, 8)
    assert batch.text_embeddings.shape == (2, 77, MICRO.context_dim)
    assert [array.dtype.name for array in batch.arrays()] == ["float32", "float32", "int32", "float32"]
    assert batch.timesteps.shape == (2,)


def test_latents_and_text_embeddings_are_those_of_the_rows_in_order(rows, tmp_path):
    inputs = build(rows, tmp_path)
    tokens = Tokenizer(pad="end").encode([row.caption for row in rows])
    for step in range(4):
        batch, at = inputs.batch(step), inputs.order.indices(step)
        for k, row in enumerate(at):
            red = load_image(rows[row].path, SIZE)[0, ::2, ::2] * MICRO.scale_factor
            np.testing.assert_allclose(batch.latents[k, 0], red, atol=1e-5)
            np.testing.assert_array_equal(batch.text_embeddings[k, :, 0], tokens[row])


def test_a_batch_depends_on_seed_number_and_process_alone(rows, tmp_path):
    inputs = build(rows, tmp_path)
    later = inputs.batch(7)
    inputs.batch(3)
    assert same(inputs.batch(7), later) and same(build(rows, tmp_path).batch(7), later)
    assert not np.array_equal(inputs.batch(8).noise, later.noise)
    assert not np.array_equal(build(rows, tmp_path, seed=2).batch(7).noise, later.noise)
    processes = [
        build(rows, tmp_path, process_index=process_index, process_count=2).batch(0) for process_index in (0, 1)
    ]
    assert not np.array_equal(processes[0].noise, processes[1].noise)
    assert not np.array_equal(processes[0].latents, processes[1].latents)


NOISES = [
    dict(noise_offset=0.1, adaptive_noise_scale=0.1),
    dict(multires_noise_iterations=6),
    dict(ip_noise_gamma=0.1),
]


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: next(iter(noise)))
def test_a_noise_setting_changes_the_noise_alone_and_a_resumed_run_has_the_same(rows, tmp_path, noise):
    plain, made, resumed = build(rows, tmp_path), build(rows, tmp_path, **noise), build(rows, tmp_path, **noise)
    for number in (3, 4):  # a resumed run begins anywhere
        expected, batch = plain.batch(number), made.batch(number)
        assert same(batch, resumed.batch(number)) and batch.noise.dtype == np.float32
        assert same(batch._replace(noise=expected.noise), expected)
        assert not np.array_equal(batch.noise, expected.noise)
    assert batch.noise.shape == (2, 8 if "ip_noise_gamma" in noise else 4, 8, 8)


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: next(iter(noise)))
def test_processes_train_on_the_noise_of_one_process(rows, tmp_path, noise):
    parts = [build(rows, tmp_path, process_index=i, process_count=2, **noise).batch(1) for i in range(2)]
    # One process with batches of 4 draws what two draw with batches of 2.
    together = build(rows, tmp_path, batch_size=4, **noise)
    whole = together.batch(1)
    for name in ("latents", "noise", "timesteps"):
        found = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(found, getattr(whole, name), err_msg=name)


def test_noise_is_standard_and_time_steps_cover_the_schedule(rows, tmp_path):
    inputs = build(rows, tmp_path)
    batches = [inputs.batch(step) for step in range(400)]
    noise = np.stack([batch.noise for batch in batches])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    timesteps = np.concatenate([batch.timesteps for batch in batches])
    assert timesteps.min() < 20 and 980 <= timesteps.max() < 1000


@pytest.mark.parametrize("cache_text", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_are_dropped_at_the_share_in_the_settings(rows, tmp_path, share, cache_text):
    inputs = build(rows, tmp_path, caption_dropout=share, cache_text=cache_text)
    empty = Tokenizer(pad="end").encode([""])[0]
    dropped = [
        np.array_equal(state[:, 0], empty) for step in range(100) for state in inputs.batch(step).text_embeddings
    ]
    assert abs(np.mean(dropped) - share) <= (0.1 if 0 < share < 1 else 0)


def test_tokens_are_returned_if_the_text_encoder_is_trained(rows, tmp_path):
    inputs = build(rows, tmp_path, use_lora=True, lora_ft_text_encoder=True, caption_dropout=0.5)
    batch = inputs.batch(0)
    assert batch.text_embeddings.dtype == np.int32 and batch.text_embeddings.shape == (2, 77)
    assert inputs.texts.cache is None


def encoded(inputs, monkeypatch):
    """Encode everything and return how many images and captions are put into the caches."""
    calls = {"images": 0, "texts": 0}
    put = ShardedCache.put

    def counting(cache, key, array):
        calls["images" if cache is inputs.moments.cache else "texts"] += 1
        return put(cache, key, array)

    with monkeypatch.context() as patch:
        patch.setattr(ShardedCache, "put", counting)
        inputs.encode_all()
    return calls


def test_validation_pushes_no_caption_out_of_the_memory_of_the_training(rows, tmp_path, monkeypatch):
    """The thread that makes the training's micro-batches would have to run the text encoder."""

    def refuse(tokens):
        raise AssertionError("the text encoder runs")

    changing = dict(caption_tag_dropout_rate=0.1, encode_ahead=1)
    monkeypatch.setattr("ldm.training.inputs.encode_ahead.MEMORY_BYTES", 0)
    monkeypatch.setattr("ldm.training.inputs.caches.RECENT_BYTES", 20 * 4 * 77 * MICRO.context_dim)
    inputs = build(rows, tmp_path, **changing)
    assert inputs.texts.cache.folder is None
    validation = inputs.of_data(inputs.data, "elsewhere")
    validation.texts.of([*(row.caption for row in rows), ""])  # some captions are those of the training
    inputs.prepare(0)
    captions = [f"caption {number}" for number in range(50)]
    embeddings = [validation.texts.of([caption])[0] for caption in captions]
    inputs.texts.encoder = refuse
    inputs.prepared_batch(0)
    # They are on disk for the next run, and both of the data sets of a validation use them.
    again = build(rows, tmp_path, **changing).of_data(inputs.data, "elsewhere")
    again.texts.encoder = refuse
    np.testing.assert_array_equal(again.of_data(inputs.data, None).texts.of(captions), embeddings)


def test_a_second_run_encodes_only_what_changed(rows, tmp_path, monkeypatch):
    assert encoded(build(rows, tmp_path), monkeypatch) == {"images": 6, "texts": 7}
    assert encoded(build(rows, tmp_path), monkeypatch) == {"images": 0, "texts": 0}
    Image.new("RGB", (SIZE, SIZE)).save(rows[2].path)
    rows[2] = rows[2]._replace(content=file_hash(rows[2].path))
    rows[3] = rows[3]._replace(caption="another caption")
    assert encoded(build(rows, tmp_path), monkeypatch) == {"images": 1, "texts": 1}


def test_another_model_encodes_again(rows, tmp_path, monkeypatch):
    build(rows, tmp_path).encode_all()
    model = SimpleNamespace(config=MICRO, first_stage_model=Encoder(), cond_stage_model=Text())
    model.first_stage_model.scale.set_data(Tensor(np.full(1, 2.0, np.float32)))
    assert encoded(build(rows, tmp_path, model=model), monkeypatch) == {"images": 6, "texts": 0}


@pytest.mark.parametrize(("ahead", "expected"), [(2, [1, 2, 2, 1, 2, 1, 2, 1]), (64, [1, 2, 3, 3, 3])])
def test_images_are_encoded_in_windows_that_grow_and_end_with_an_epoch(rows, tmp_path, monkeypatch, ahead, expected):
    inputs, windows = build(rows, tmp_path, encode_ahead=ahead), []
    encode = inputs.moments.encode
    monkeypatch.setattr(inputs.moments, "encode", lambda rows: windows.append(len(rows) // 2) or encode(rows))
    for number in range(12):
        inputs.batch(number)
    assert windows == expected  # of micro-batches of two rows, of which an epoch has three


def test_what_is_encoded_in_windows_is_what_is_encoded_at_once(rows, tmp_path):
    windows, whole = build(rows, tmp_path / "a"), build(rows, tmp_path / "b")
    whole.encode_all()
    for number in (0, 1, 2, 7, 3):
        assert same(windows.batch(number).arrays(), whole.batch(number).arrays())


def test_without_caches_the_batches_are_the_same_and_nothing_is_kept(rows, tmp_path):
    cached = build(rows, tmp_path / "a")
    inputs = build(rows, tmp_path / "b", cache_latents=False, cache_text=False)
    for step in (0, 1, 2, 1):
        for array, expected in zip(inputs.batch(step).arrays(), cached.batch(step).arrays()):
            np.testing.assert_allclose(array, expected, rtol=1e-6)
    assert not (tmp_path / "b" / "run" / "cache").exists()


def test_flipping_mirrors_some_images_and_is_the_same_again(rows, tmp_path):
    inputs = build(rows, tmp_path, random_flip=True)
    flipped = []
    for step in range(12):
        batch = inputs.batch(step)
        for k, row in enumerate(inputs.order.indices(step)):
            image = load_image(rows[row].path, SIZE)[0] * MICRO.scale_factor
            plain, mirrored = image[::2, ::2], image[:, ::-1][::2, ::2]
            is_plain, is_mirrored = (np.allclose(batch.latents[k, 0], x, atol=1e-5) for x in (plain, mirrored))
            assert is_plain != is_mirrored
            flipped.append(is_mirrored)
    assert 0.2 < np.mean(flipped) < 0.8
    assert same(build(rows, tmp_path, random_flip=True).batch(7), inputs.batch(7))


def test_latents_are_a_draw_from_the_moments_times_the_scale():
    mean, logvar = np.full((1, 4, 2, 2), 3.0, np.float32), np.full((1, 4, 2, 2), 2 * np.log(0.5), np.float32)
    eps = np.random.default_rng(0).standard_normal((1, 4, 2, 2)).astype(np.float32)
    latents = sample_latents(np.concatenate([mean, logvar], 1), eps, 0.18215)
    np.testing.assert_allclose(latents, (3.0 + 0.5 * eps) * 0.18215, rtol=1e-6)
    assert latents.dtype == np.float32


def test_the_variance_is_clipped():
    moments = np.concatenate([np.zeros((1, 1, 1, 2)), [[[[1000.0, -1000.0]]]]], 1).astype(np.float32)
    latents = sample_latents(moments, np.ones((1, 1, 1, 2), np.float32), 1.0)
    np.testing.assert_allclose(latents.ravel(), [np.exp(10.0), np.exp(-15.0)], rtol=1e-5)


def test_the_feed_returns_the_micro_batches_from_its_start(rows, tmp_path):
    inputs = build(rows, tmp_path)
    following = feed.make_feed(inputs, 3, 5, sink=False)
    for step in (3, 4):
        assert same([tensor.asnumpy() for tensor in following()], inputs.batch(step).arrays())
    with pytest.raises(StopIteration):
        following()


def test_a_thread_makes_the_same_micro_batches_ahead(rows, tmp_path, monkeypatch):
    inputs = build(rows, tmp_path)
    expected = [inputs.batch(number) for number in range(3, 7)]
    made, batch, main = [], inputs.prepared_batch, threading.current_thread()

    def make(number):
        assert threading.current_thread() is not main
        made.append(number)
        return batch(number)

    monkeypatch.setattr(inputs, "prepared_batch", make)
    following = feed.make_feed(inputs, 3, 7, sink=False, ahead=2)
    assert made == []
    assert same([tensor.asnumpy() for tensor in following()], expected[0])
    following.thread.submit(lambda: None).result()  # when the thread has made what it was asked for
    assert made == [3, 4, 5]
    for micro_batch in expected[1:]:
        assert same([tensor.asnumpy() for tensor in following()], micro_batch)
    with pytest.raises(StopIteration):
        following()


def test_an_error_of_the_thread_is_raised_with_its_micro_batch(rows, tmp_path, monkeypatch):
    inputs = build(rows, tmp_path)
    batch = inputs.prepared_batch

    def make(number):
        if number == 4:
            raise UserError("number 4 cannot be made")
        return batch(number)

    monkeypatch.setattr(inputs, "prepared_batch", make)
    following = feed.make_feed(inputs, 3, 7, sink=False, ahead=2)
    following()
    with pytest.raises(UserError, match="number 4 cannot be made"):
        following()


def test_what_networks_encode_is_made_when_it_is_asked_for(rows, tmp_path, monkeypatch):
    """Two threads must not run networks at once."""
    inputs, made = build(rows, tmp_path, random_flip=True), []
    batch = inputs.batch
    monkeypatch.setattr(inputs, "batch", lambda number: made.append(number) or batch(number))
    following = feed.make_feed(inputs, 3, 7, sink=False, ahead=2)
    following()
    assert made == [3]


def test_ascends_data_queue_is_fed_the_same_batches(rows, tmp_path, monkeypatch):
    """data_sink runs on Ascend only. Its arguments are checked here."""

    def data_sink(function, dataset, sink_size):
        assert sink_size == 1
        batches = dataset.create_tuple_iterator(num_epochs=1)
        return lambda: function(*next(batches))

    monkeypatch.setattr(feed.ms, "data_sink", data_sink)
    inputs = build(rows, tmp_path)
    following = feed.make_feed(inputs, 3, 6, sink=True)
    for step in (3, 4, 5):
        assert same([tensor.asnumpy() for tensor in following()], inputs.batch(step).arrays())


def test_the_length_of_the_queue_is_known_without_making_the_batches(rows, tmp_path, monkeypatch):
    inputs, made = build(rows, tmp_path), []
    inputs.encode_all()
    batch = inputs.prepared_batch
    monkeypatch.setattr(inputs, "prepared_batch", lambda step: made.append(step) or batch(step))
    queue = feed.make_queue(inputs, 3, 1003)
    assert queue.get_dataset_size() == 1000
    assert len(made) <= 2  # MindSpore looks at one for the types
    made.clear()
    short = feed.make_queue(inputs, 3, 6)
    assert len(list(short.create_tuple_iterator(num_epochs=1))) == 3
    assert set(made) == {3, 4, 5}


@pytest.mark.parametrize(
    ("others", "error"),
    [
        (dict(random_flip=True), "needs cached latents and text embeddings"),
        (dict(cache_latents=False), "needs cached latents and text embeddings"),
        (dict(cache_text=False), "needs cached latents and text embeddings"),
        (dict(), None),
        (dict(cache_text=False, use_lora=True, lora_ft_text_encoder=True), None),
    ],
)
def test_the_data_queue_needs_everything_cached(others, error):
    settings = TrainSettings(dataset_sink_mode=True, **others)
    ascend = Runtime("Ascend", ms.float16, 0, 1, 0)
    if error is None:
        return feed.check_sink(settings, ascend)
    with pytest.raises(UserError, match=error):
        feed.check_sink(settings, ascend)
