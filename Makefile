# make demo         fine-tune the embedded model with LoRA and look at the result: output/demo/grid.png
# make test         the tests, without PyTorch
# make test-parity  the comparisons with PyTorch, diffusers and transformers, in a virtual environment of their own
# make lint         ruff
#
# PYTHON=... chooses the Python that the virtual environments are made from.

PYTHON ?=
export MAKECMDGOALS

.PHONY: demo test test-parity lint clean

demo: .venv/ready
	@.venv/bin/python -m tools.demo

test: .venv/ready
	@.venv/bin/python -m pytest

test-parity: .venv-parity/ready
	@.venv-parity/bin/python -m pytest tests/parity

lint: .venv/ready
	@.venv/bin/ruff check .

.venv/ready: requirements.txt requirements-dev.txt
	@tools/make_venv .venv 9 requirements-dev.txt $(PYTHON)

.venv-parity/ready: requirements.txt requirements-dev.txt requirements-parity.txt
	@tools/make_venv .venv-parity 11 requirements-parity.txt $(PYTHON)

clean:
	rm -rf .venv .venv-parity output
