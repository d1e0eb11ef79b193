# make demo         fine-tune the nano model with LoRA and compare images before and after: output/demo/grid.png
# make test         run the tests, without PyTorch, and print the 20 slowest
# make test-parity  compare with PyTorch, diffusers and transformers, in a virtual environment of its own
# make test-ascend  compile for Ascend without a device and compare the kernels with the recorded ones
# make lint         check style, layout and types: ruff and mypy
# make format       apply ruff's fixes and layout
#
# PYTHON=... chooses the Python that the virtual environments are made from.

PYTHON ?=
export MAKECMDGOALS

.PHONY: demo test test-parity test-ascend lint format clean

demo: .venv/ready
	@.venv/bin/python -m tools.demo

test: .venv/ready
	@.venv/bin/python -m pytest --durations=20

test-parity: .venv-parity/ready
	@.venv-parity/bin/python -m pytest tests/parity

test-ascend: .venv/ready
	@.venv/bin/python -m pytest tests/ascend --durations=20

lint: .venv/ready
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

format: .venv/ready
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

.venv/ready: requirements.txt requirements-dev.txt
	@tools/make_venv .venv 9 requirements-dev.txt $(PYTHON)

.venv-parity/ready: requirements.txt requirements-dev.txt requirements-parity.txt
	@tools/make_venv .venv-parity 11 requirements-parity.txt $(PYTHON)

clean:
	rm -rf .venv .venv-parity .mypy_cache .pytest_cache .ruff_cache build output *.egg-info
