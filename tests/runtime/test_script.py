"""How a script ends: exit codes, one line, no unfinished files. Each test runs a process, without MindSpore."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
START = """
import sys
from ldm.errors import UserError
from ldm.runtime.script import describe_progress, run_script, start_script
start_script()
"""
ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def script(main: str) -> str:
    """A script whose `main` has these lines."""
    return f"{START}def main():\n{textwrap.indent(main, '    ')}\nrun_script(main)"


def completed(main: str, folder: Path, **options) -> subprocess.CompletedProcess:
    """Run a script whose `main` has these lines."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT, **options}
    return subprocess.run([sys.executable, "-c", script(main)], text=True, cwd=folder, timeout=30, **options)


def interrupted(code: str, number: int, folder: Path, **options) -> tuple[int, str, str]:
    """Run code until it prints "ready", send the signal, and give its exit code, standard output and error."""
    options.setdefault("preexec_fn", lambda: [signal.signal(number, signal.SIG_DFL) for number, _ in ENDS])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-u", "-c", START + code]
    process = subprocess.Popen(command, **pipes, text=True, cwd=folder, env=ENVIRONMENT, **options)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, out, err


SCRIPTS = [
    "train_text_to_image.py", "text_to_image.py", "tools/demo.py", "tools/check_device.py", "tools/eval/eval_fid.py",
    "tools/eval/eval_clip_score.py", "tools/eval/compare_diffusers.py", "tools/model_conversion/convert_weights.py",
    "tools/lora/convert_lora.py", "tools/lora/lora_add.py", "tools/lora/extract_lora.py", "tools/lora/resize_lora.py",
    "tools/lora/cvtckpt.py", "tools/lora/doctor.py", "tools/lora/verify.py",
    *(f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.py"))),
]  # fmt: skip
STOP_AT_START = """
import runpy, sys
from ldm.runtime import script
script.start_script = lambda: sys.exit("numpy" in sys.modules)
runpy.run_path(sys.argv[1], run_name="__main__")
"""
BUSY = "print('ready')\nwhile True: pass"
IN_MAIN = "def main():\n    print('ready')\n    while True: pass\nrun_script(main)"
# Like MindSpore while it compiles or runs a graph, this handles no signals.
UNRESPONSIVE = (
    "import time, ldm.runtime.script\nldm.runtime.script.GRACE_SECONDS = 0.2\n{}print('ready')\ntime.sleep(60)"
)


@pytest.mark.parametrize("number, code", ENDS)
@pytest.mark.parametrize("where", ["while importing", "in main", "in a library that handles no signals"])
def test_a_signal_ends_a_script_with_one_line_and_its_code(number, code, where, tmp_path):
    lines = {"while importing": BUSY, "in main": IN_MAIN}.get(where, UNRESPONSIVE.format(""))
    assert interrupted(lines, number, tmp_path) == (code, "", "interrupted\n")


@pytest.mark.parametrize("number, code", ENDS)
def test_a_replaced_excepthook_changes_nothing(number, code, tmp_path):
    """As MindSpore does when it compiles with a cache."""
    own = "sys.excepthook = lambda *error: print('a hundred lines')\n"
    assert interrupted(own + IN_MAIN, number, tmp_path) == (code, "", "interrupted\n")


def test_the_last_work_is_done_where_the_main_thread_does_not_unwind(tmp_path):
    code = (
        "import os, threading, time\nimport ldm.runtime.script as module\n"
        "module.GRACE_SECONDS = 0.2\nmodule.LAST_WORK_SECONDS = 0.5\n"
        "def work():\n    open('report', 'w').close()\n    {}\n"
        "module.at_interrupt(work)\n"
        "def stuck():\n"
        "    print('ready')\n"
        "    while True:\n"
        "        try:\n            time.sleep(60)\n        except KeyboardInterrupt:\n            pass\n"
        "module.run_script(stuck)"
    )
    for last in ("pass", "raise ValueError", "time.sleep(60)"):
        assert interrupted(code.format(last), signal.SIGINT, tmp_path) == (130, "", "interrupted\n"), last
        (tmp_path / "report").unlink()


def test_a_second_signal_ends_a_script_at_once_with_the_same_line(tmp_path):
    again = "import os, signal, threading, time\nthreading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
    code = again + "print('ready')\ntime.sleep(20)"
    started = time.monotonic()
    assert interrupted(code, signal.SIGINT, tmp_path) == (130, "", "interrupted\n")
    assert time.monotonic() - started < 4


def test_a_reader_that_stops_reading_does_not_block_the_end(tmp_path):
    """Like `less`. The main thread is blocked in its write."""
    code = (
        "import os, ldm.runtime.script\nldm.runtime.script.GRACE_SECONDS = 0.1\nos.write(1, b'ready\\n')\n"
        "while True: print('x' * 65536, file=sys.stderr)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", START + code], **pipes, cwd=tmp_path, env=ENVIRONMENT)
    try:
        assert os.read(process.stdout.fileno(), 6) == b"ready\n"
        time.sleep(0.2)
        process.terminate()
        assert process.wait(timeout=10) == 143
    finally:
        process.kill()
        process.communicate()


def test_the_line_describes_the_progress(tmp_path):
    code = "describe_progress(lambda: 'after step 3 of 10')\n" + BUSY
    assert interrupted(code, signal.SIGINT, tmp_path)[2] == "interrupted after step 3 of 10\n"


def test_the_line_begins_on_a_new_line_after_a_progress_bar(tmp_path):
    code = "from tqdm import tqdm\nbar = tqdm(total=9)\n" + BUSY
    assert interrupted(code, signal.SIGINT, tmp_path)[2].endswith("\ninterrupted\n")


def test_errors_of_an_interrupted_library_are_not_shown(tmp_path):
    code = (
        "import os\ndef main():\n    try:\n        print('ready')\n        while True: pass\n"
        "    except KeyboardInterrupt:\n        os.write(2, b'a hundred lines\\n')\n"
        "        raise RuntimeError('compiling')\n"
        "run_script(main)"
    )
    assert interrupted(code, signal.SIGTERM, tmp_path) == (143, "", "interrupted\n")


def test_unfinished_files_are_removed_even_where_the_main_thread_never_ends(tmp_path):
    code = UNRESPONSIVE.format(
        "from pathlib import Path\nfrom ldm.files.atomic import atomic_path\n"
        "for compiler in ('rank_0/om', 'rank_1/om'):\n"
        "    Path(compiler).mkdir(parents=True)\n    Path(compiler, 'analyze_fail.ir').touch()\n"
        "Path('rank_1/mine').touch()\nwriting = atomic_path('out.png')\nwriting.__enter__().write_bytes(b'half')\n"
    )
    assert interrupted(code, signal.SIGTERM, tmp_path)[0] == 143
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "rank_1"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(number, tmp_path):
    """Like under `nohup`, or in the background of a shell script."""
    code = "import time\ndef main():\n    print('ready')\n    time.sleep(0.3)\n    print('done')\nrun_script(main)"
    result = interrupted(code, number, tmp_path, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    assert result == (0, "done\n", "")


@pytest.mark.parametrize(
    "raised, words",
    [
        ("raise UserError('a.yaml: no such thing: take another')", "a.yaml: no such"),
        ("raise UserError('\\x1b[2J\\x07 two\\nlines \\udcff')", r"\x1b[2J\x07 two li"),
        ("open('/nowhere/at all')", "/nowhere/at all cannot be used: No such file or directory: check"),
        ("open('a' * 300, 'w')", "File name too long: choose a shorter path"),
        ("import os; raise OSError(28, os.strerror(28), 'log.txt')", "log.txt cannot be used: No space left"),
        ("import os; os.write(os.open('/dev/full', 1), b'x')", "output, or an open file, cannot be used: No"),
        ("raise MemoryError", "memory is not enough"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_exit_code_2(raised, words, tmp_path):
    done = completed(raised, tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and words in done.stderr and len(done.stderr) < 700


def test_a_long_message_keeps_its_start_and_its_end(tmp_path):
    done = completed("raise UserError('a.ckpt ' + 'x' * 10000 + ': write it anew')", tmp_path)
    assert done.stderr.startswith("error: a.ckpt xxx") and done.stderr.endswith("xxx: write it anew\n")
    assert len(done.stderr) < 700


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path):
    done = completed("raise RuntimeError('a fault')", tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr and "RuntimeError: a fault" in done.stderr


def test_any_text_can_be_printed(tmp_path):
    printing = "print('\\u7ea2 \\udcff')\nprint('\\u7ea2', file=sys.stderr)"
    done = completed(printing, tmp_path, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u7ea2 \\udcff\n", "\\u7ea2\n")


def test_a_reader_that_closes_the_pipe_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = completed("print('x' * 100000)", tmp_path, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_pipe_without_a_reader_is_an_error(tmp_path):
    """It must not be confused with standard output."""
    done = completed("import os\nreader, writer = os.pipe()\nos.close(reader)\nos.write(writer, b'x')", tmp_path)
    assert done.returncode == 2 and "Broken pipe" in done.stderr


@pytest.mark.parametrize("full", [True, False], ids=["a full disk", "a closed pipe"])
def test_failed_writes_to_standard_error_are_ignored(full, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    main = "from tqdm import tqdm\nfor i in tqdm(range(3)): print(i, file=sys.stderr)\nopen('done', 'w').close()"
    done = completed(main, tmp_path, stdout=None, stderr=open("/dev/full", "w") if full else writer)
    os.close(writer)
    assert done.returncode == 0 and (tmp_path / "done").exists()


def test_nothing_is_printed_into_a_file_when_the_streams_are_closed(tmp_path):
    main = (
        "import os\nwith open('result', 'wb', buffering=0) as file:\n    file.write(b'sound')\n"
        "    print('a')\n    print('b', file=sys.stderr)\n    os.write(1, b'c')\n    os.write(2, b'd')\n"
        "    sys.stdout.flush()\n    raise UserError('e')"
    )
    (tmp_path / "script.py").write_text(script(main))
    command = f"'{sys.executable}' script.py >&- 2>&-"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=ENVIRONMENT, timeout=30)
    assert done.returncode == 2 and (tmp_path / "result").read_bytes() == b"sound"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_handles_signals_before_numpy_starts_its_threads(name):
    """Those threads would take the signals, and end the process without its last line."""
    command = [sys.executable, "-c", STOP_AT_START, str(ROOT / name)]
    completed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert completed.returncode == 0, completed.stderr
