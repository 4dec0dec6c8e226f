# make demo: train, prune and look; make test: all tests; make docs: the API as pages; make coverage:
# what the tests reach; make matrix: all tests, and again with the oldest torch that is supported. Each
# sets up .venv on its first call.
PYTHON ?= python3
BIN := .venv/bin
DEMO := --dataset digits --checkpoint runs/demo.pth --sparsities 0.3 0.4 0.5 0.6 0.7 0.8 --overwrite
# OpenMP's busy waiting makes a training step up to ten times slower when anything else runs.
export OMP_WAIT_POLICY = passive

.PHONY: demo test coverage matrix lint docs
demo: .venv/installed
	$(BIN)/python main_optim.py --model resnet20 --dataset digits --optim mfac --save runs/demo.pth --overwrite
	$(BIN)/python main_prun.py $(DEMO) --pruner magnitude --out runs/demo-magnitude
	$(BIN)/python main_prun.py $(DEMO) --pruner mfac --ngrads 256 --out runs/demo-mfac --plot runs/demo-magnitude.csv

test: .venv/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

coverage: .venv/installed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(PYTEST_ARGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

matrix: test
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -r requirements.txt torch==2.9.0 torchvision==0.24.0
	.venv-oldest/bin/python -m pytest $(PYTEST_ARGS)

docs: .venv/installed
	$(BIN)/python -m pdoc --docformat google -o docs optim.py windows.py ranks.py coefficients.py prun.py fisher.py blocks.py pages.py masks.py gradients.py memory.py datautils.py ./models

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@
