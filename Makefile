# make demo           fine-tune the nano model with LoRA and compare images before and after: output/demo/grid.png
# make test           run the tests, without PyTorch, and print the 20 slowest
# make test-processes run the tests that start several processes at once, which `make test` leaves out
# make test-parity    compare with PyTorch, diffusers and transformers, in a virtual environment of its own
# make test-peers     run OpenVINO beside diffusers with a tiny model, in the environment that `make peers` makes
# make test-versions  run a part of the tests with other versions of MindSpore, a virtual environment each
# make test-aarch64   run the tests of the C++ kernels on an emulated aarch64; on Debian 12
# make test-ascend    compile for Ascend without a device, compare the kernels with the recorded ones, look up operators
# make peers          install what tools/benchmark/run.py --peers compares with, in a virtual environment of its own
# make lint           check style, layout and types: ruff and mypy
# make format         apply ruff's fixes and layout
#
# PYTHON=... chooses the Python that the virtual environments are made from, VERSIONS="2.7.2" the versions of MindSpore.

PYTHON ?=
VERSIONS ?= 2.7.2 2.10.0
export MAKECMDGOALS

.PHONY: demo test test-processes test-parity test-peers test-versions test-aarch64 test-ascend peers lint format clean

demo: .venv/ready
	@.venv/bin/python -m tools.demo

test: .venv/ready
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile -m "not processes" --durations=20

# They use both cores by themselves.
test-processes: .venv/ready
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m processes tests/examples tests/generation tests/tools tests/training

test-parity: .venv-parity/ready
	@.venv-parity/bin/python -m pytest tests/parity

test-peers: .venv-peers/ready
	@.venv-peers/bin/python -m pytest tests/parity/test_benchmark.py

test-versions: $(VERSIONS:%=.venv-%/ready)
	@status=0; for version in $(VERSIONS); do \
	    echo "MindSpore $$version"; .venv-$$version/bin/python -m pytest $(VERSION_TESTS) || status=1; \
	done; exit $$status

# The tests that use most of MindSpore.
VERSION_TESTS := tests/ops tests/models tests/lora tests/generation tests/weights tests/runtime/test_versions.py \
	$(addprefix tests/training/,test_step.py test_trainer.py test_resume.py)

test-aarch64: .venv-aarch64/ready
	@.venv-aarch64/python -m pytest -p no:cacheprovider tests/ops --durations=20

test-ascend: .venv/ready
	@.venv/bin/python -m pytest tests/ascend --durations=20

peers: .venv-peers/ready .venv-parity/ready

lint: .venv/ready
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

format: .venv/ready
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

.venv/ready: requirements.txt requirements-dev.txt
	@tools/make_venv .venv 9 requirements-dev.txt $(PYTHON)

# MindSpore 2.10 has no wheel for Python 3.9.
.venv-%/ready: requirements.txt requirements-dev.txt
	@sed '/^-r/d; s/^mindspore==.*/mindspore==$*/' requirements.txt requirements-dev.txt > .venv-$*.txt
	@tools/make_venv .venv-$* $(if $(filter 2.10.%,$*),10,9) .venv-$*.txt $(PYTHON)
	@rm .venv-$*.txt

.venv-aarch64/ready: .venv/ready requirements.txt tools/make_aarch64
	@tools/make_aarch64 .venv-aarch64 .venv/bin/python

.venv-parity/ready: requirements.txt requirements-dev.txt requirements-parity.txt
	@tools/make_venv .venv-parity 11 requirements-parity.txt $(PYTHON)

.venv-peers/ready: requirements.txt requirements-dev.txt requirements-peers.txt
	@tools/make_venv .venv-peers 11 requirements-peers.txt $(PYTHON)

clean:
	rm -rf .venv .venv-* .mypy_cache .pytest_cache .ruff_cache build output *.egg-info
