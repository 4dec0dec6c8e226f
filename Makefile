# make demo: train and look; make test: all tests. Each sets up .venv on its first call.
PYTHON ?= python3
BIN := .venv/bin
# OpenMP's busy waiting makes a training step up to ten times slower when anything else runs.
export OMP_WAIT_POLICY = passive

.PHONY: demo test lint
demo: .venv/installed
	$(BIN)/python main_optim.py --model resnet20 --dataset digits --optim mfac --save runs/demo.pth --overwrite

test: .venv/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@
