"""TensorBoard's event files: what they hold, what a resumed run adds, and what happens when the disk refuses."""

from __future__ import annotations

import struct
import zlib

import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.training.metrics_file import Metrics
from ldm.training.report import tensorboard
from ldm.training.report.tensorboard import TensorBoard, check_tensorboard
from tests.training.report.runs import write_samples, write_validation


def test_tensorboard_without_its_library_is_refused_with_the_command(monkeypatch):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    check_tensorboard(["csv", "html"])
    with pytest.raises(UserError, match="report_to tensorboard needs tensorboardX: pip install tensorboardX"):
        check_tensorboard(["tensorboard"])


def events(folder) -> list[tuple[str, int, float]]:
    """Return tag, step and value of the events in TensorBoard's files: -1 for an image, 0 for the start of a run."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.glob("events*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
            place += 16 + length
            if event.HasField("session_log"):
                found.append(("start", event.step, 0.0))
            for value in event.summary.value:
                shown = value.simple_value if value.WhichOneof("value") == "simple_value" else -1.0
                found.append((value.tag, event.step, pytest.approx(shown, rel=1e-6)))
    return found


def test_tensorboard_gets_steps_validations_and_samples_under_kohyas_tags(tmp_path):
    pytest.importorskip("tensorboardX")
    board = TensorBoard(tmp_path, 0, {"lr/unet": 1.0, "lr/textencoder": 0.5}, steps_per_epoch=40.0)
    board.add(Metrics(1, 0.5, 1e-3, 1024.0, 9.0, float("inf")), 0.6)
    write_validation(tmp_path, (0, 40, 60))
    write_samples(tmp_path, ("a cat",), (0, 40))
    board.update()
    board.update()  # what was written is not written again
    board.close()
    found = events(tmp_path / "tensorboard")
    for entry in (
        ("loss/current", 1, 0.5), ("loss/average", 1, 0.6), ("lr/unet", 1, 1e-3), ("lr/textencoder", 1, 5e-4),
        ("loss_scale", 1, 1024.0), ("seconds_per_step", 1, 9.0),
    ):  # fmt: skip
        assert found.count(entry) == 1, entry
    tags = [(tag, step) for tag, step, _ in found]
    assert not any(tag == "norm/gradient" for tag, _ in tags)  # it overflowed
    for step in (0, 40, 60):
        assert tags.count(("loss/validation/step_average", step)) == 1
        assert tags.count(("loss/validation/timestep_800", step)) == 1
        assert tags.count(("loss/validation_training/step_average", step)) == 1
    assert [step for tag, step in tags if tag == "loss/validation/epoch_average"] == [40]
    assert [step for tag, step in tags if tag == "samples/prompt-01"] == [0, 40]


def test_values_that_are_not_finite_are_left_out(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "validation.csv").write_text("step,images,loss,loss_200\n0,validation,nan,inf\n40,validation,0.5,0.5\n")
    board = TensorBoard(tmp_path, 0, {}, steps_per_epoch=40.0)
    board.update()
    board.close()
    assert {step for tag, step, _ in events(tmp_path / "tensorboard") if tag != "start"} == {40}


def write_image(folder, name: str, step: int) -> None:
    (folder / "samples" / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16)).save(folder / "samples" / name / f"step-{step:08d}.png")


def test_a_resumed_run_adds_what_is_missing_up_to_its_training_state_and_what_is_new(tmp_path):
    """A run that was killed after its last training state and before its last report has written less than that."""
    pytest.importorskip("tensorboardX")
    write_validation(tmp_path, (0, 20))
    for name, step in (("prompt-01", 20), ("prompt-01", 40), ("prompt-02", 20)):
        write_image(tmp_path, name, step)
    board = TensorBoard(tmp_path, 0, {}, steps_per_epoch=40.0)
    board.update()
    write_validation(tmp_path, (0, 20, 40))  # and no update

    board = TensorBoard(tmp_path, 40, {}, steps_per_epoch=40.0)
    write_validation(tmp_path, (0, 20, 40, 60))
    write_image(tmp_path, "prompt-02", 40)  # which the kill left undrawn
    board.update()
    board.close()
    found = [(tag, step) for tag, step, _ in events(tmp_path / "tensorboard")]
    assert [step for tag, step in found if tag == "loss/validation/step_average"] == [0, 20, 40, 60]
    assert [step for tag, step in found if tag == "loss/validation_training/step_average"] == [0, 20, 40, 60]
    assert [step for tag, step in found if tag == "samples/prompt-01"] == [20, 40]
    assert [step for tag, step in found if tag == "samples/prompt-02"] == [20, 40]


def test_what_an_earlier_start_wrote_beyond_the_training_state_is_hidden_and_written_again(tmp_path):
    pytest.importorskip("tensorboardX")
    write_validation(tmp_path, (0, 40, 60))
    for step in (0, 40):
        board = TensorBoard(tmp_path, step, {}, steps_per_epoch=40.0)
        board.update()
        board.close()
    found = [(tag, step) for tag, step, _ in events(tmp_path / "tensorboard")]
    assert [step for tag, step in found if tag == "loss/validation/step_average"] == [0, 40, 60, 60]
    assert [step for tag, step in found if tag == "start"] == [0, 41]


@pytest.mark.parametrize("damaged", ["", "[1]", '{"validation": "x"}', "{"])
def test_a_damaged_record_of_what_was_written_is_no_error(tmp_path, damaged):
    pytest.importorskip("tensorboardX")
    write_validation(tmp_path, (0, 40))
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "written.json").write_text(damaged)
    board = TensorBoard(tmp_path, 40, {}, steps_per_epoch=40.0)
    board.update()
    board.close()
    assert [step for tag, step, _ in events(tmp_path / "tensorboard") if tag == "loss/validation/step_average"] == [
        0,
        40,
    ]


def test_a_new_run_adds_nothing_of_an_earlier_one_in_its_folder_and_hides_its_events(tmp_path):
    pytest.importorskip("tensorboardX")
    write_validation(tmp_path)
    write_samples(tmp_path, ("a cat",))
    board = TensorBoard(tmp_path, 0, {}, steps_per_epoch=40.0, parts=[])
    board.update()
    board.close()
    assert events(tmp_path / "tensorboard") == [("start", 0, 0.0)]


def test_a_new_run_does_not_ask_what_an_earlier_one_has_written(tmp_path):
    pytest.importorskip("tensorboardX")
    write_validation(tmp_path, (0, 40))
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "written.json").write_text('{"validation": 40, "training": 40}')
    board = TensorBoard(tmp_path, 0, {}, steps_per_epoch=40.0)
    board.update()
    board.close()
    assert {step for tag, step, _ in events(tmp_path / "tensorboard") if tag != "start"} == {0, 40}


def test_an_image_that_cannot_be_read_is_left_out_with_one_warning(tmp_path, caplog):
    pytest.importorskip("tensorboardX")
    write_samples(tmp_path, ("a cat", "a dog"), (0, 20, 40, 60, 80))
    folder = tmp_path / "samples" / "prompt-01"
    whole = (folder / "step-00000000.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + whole[24:29]
    bomb = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    for name, content in (("step-00000000.png", b""), ("step-00000020.png", whole[:50]), ("step-00000040.png", bomb)):
        (folder / name).write_bytes(content)
    (folder / "step-00000060.png").unlink()
    (folder / "step-00000060.png").mkdir()
    board = TensorBoard(tmp_path, 0, {}, steps_per_epoch=40.0)
    board.update()
    board.update()
    board.close()
    found = [(tag, step) for tag, step, _ in events(tmp_path / "tensorboard")]
    assert [step for tag, step in found if tag == "samples/prompt-01"] == [80]
    assert [step for tag, step in found if tag == "samples/prompt-02"] == [0, 20, 40, 60, 80]
    assert caplog.text.count("is not in TensorBoard's events") == 4


def test_a_disk_that_refuses_neither_blocks_nor_ends_the_training(tmp_path, monkeypatch, caplog):
    """The thread of tensorboardX's SummaryWriter ends then, and the queue before it blocks for ever."""
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: open("/dev/full", "wb"))
    board = TensorBoard(tmp_path, 0, {}, steps_per_epoch=40.0)
    write_validation(tmp_path)
    for step in range(1, 200):
        board.add(Metrics(step, 0.5, 1e-3, 1024.0, 9.0, 0.1), 0.6)
    board.update()
    board.close()
    assert caplog.text.count("the training goes on without TensorBoard's events") == 1
    assert "No space left on device" in caplog.text and not (tmp_path / "tensorboard" / "written.json").exists()


def test_a_disk_that_refuses_at_the_end_is_a_warning(tmp_path, monkeypatch, caplog):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: open("/dev/full", "wb"))
    board = TensorBoard(tmp_path, 0, {}, steps_per_epoch=40.0)
    board.close()
    assert caplog.text.count("the training goes on without TensorBoard's events") == 1


def test_a_step_after_the_end_is_left_out(tmp_path):
    """An interrupt ends the events in another thread while the main thread still trains."""
    pytest.importorskip("tensorboardX")
    board = TensorBoard(tmp_path, 0, {}, steps_per_epoch=40.0)
    board.close()
    board.add(Metrics(1, 0.5, 1e-3, 1024.0, 9.0, 0.1), 0.6)
    board.update()
    assert events(tmp_path / "tensorboard") == [("start", 0, 0.0)]
