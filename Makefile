# make demo: train, prune and look; make test: all tests; make docs: the API as pages; make coverage:
# what the tests reach; make matrix: all tests, and again with the oldest torch that is supported. Each
# sets up what it needs of .venv on its first call.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := -m pytest --numprocesses logical --maxprocesses 8 --dist loadgroup $(PYTEST_ARGS)
DEMO := --dataset digits --checkpoint runs/demo.pth --sparsities 0.3 0.4 0.5 0.6 0.7 0.8 --overwrite
# OpenMP's busy waiting makes a training step up to ten times slower when anything else runs.
export OMP_WAIT_POLICY = passive

.PHONY: demo test coverage matrix lint docs
demo: .venv/for-scripts
	$(BIN)/python main_optim.py --model resnet20 --dataset digits --optim mfac --save runs/demo.pth --overwrite
	$(BIN)/python main_prun.py $(DEMO) --pruner magnitude --out runs/demo-magnitude
	$(BIN)/python main_prun.py $(DEMO) --pruner mfac --ngrads 256 --out runs/demo-mfac --plot runs/demo-magnitude.csv
	@echo 'Open runs/demo.png (training) and runs/demo-mfac.png (pruning). Try next: examples/quickstart.ipynb, or the commands above with --dataset FOLDER of your own images.'

test: .venv/for-tests
	$(BIN)/python $(PYTEST)

coverage: .venv/for-tests
	$(BIN)/coverage erase
	$(BIN)/coverage run $(PYTEST)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

matrix: test
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -r requirements-test.txt torch==2.9.0 torchvision==0.24.0
	.venv-oldest/bin/python $(PYTEST)

docs: .venv/for-tests
	$(BIN)/python -m pdoc --docformat google -o build/api $(filter-out setup%.py main_%.py,$(wildcard *.py)) ./models

lint: .venv/for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/for-scripts: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/for-tests: requirements-test.txt .venv/for-scripts
	$(BIN)/python -m pip install -r requirements-test.txt
	touch $@
