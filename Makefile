# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# One pinned pair for reproducible results; any torch that Ultralytics supports works: make TORCH="torch torchvision" ...
TORCH ?= torch==2.14.1 torchvision==0.29.1
OLDEST ?= ultralytics==8.3.0 numpy==1.26.4 pandas==2.2.3 matplotlib==3.9.4 scipy==1.13.1 contourpy==1.2.1 \
          seaborn==0.13.2 tqdm py-cpuinfo opencv-python==4.11.0.86 pytz tzdata
DOCS ?= mkdocs==1.6.1 mkdocs-material==9.8.2
BUILD ?= build==1.6.1 hatchling==1.33.0 twine==7.0.0
BIN = $(VENV)/bin
SITE = $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')

# Two versions between them, where the forms of what we hook into differ (docs/VERSIONS.md); any other may be named.
IN_BETWEEN ?= 8.3.150 8.4.50
# Two processes, one thread of PyTorch in each (tests/conftest.py); PYTEST_ARGS=--no-skips is what CI adds.
PYTEST_ARGS ?=
PYTEST = python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

.PHONY: demo test test-long test-versions unit test-newest test-oldest test-extras lint docs dist clean

demo: $(VENV)/installed ## train YOLOv8n with SophiaG on a generated data set
	$(BIN)/yolo train model=yolov8n.yaml data=configs/data/shapes.yaml imgsz=160 epochs=20 batch=16 nbs=16 \
	    optimizer=SophiaG project=$(CURDIR)/runs name=demo exist_ok=True
	@echo; echo "Pictures to look at:"; ls $(CURDIR)/runs/demo/sophia.png $(CURDIR)/runs/demo/results.png \
	    $(CURDIR)/runs/demo/val_batch0_pred.jpg

test: test-oldest test-extras test-newest ## all tests: oldest and newest Ultralytics, and other packages

test-newest: $(VENV)/tested
	$(BIN)/$(PYTEST) -m "not extras"

test-oldest: $(VENV)-oldest/tested
	YOLO_CONFIG_DIR=$(CURDIR)/$(VENV)-oldest/config $(VENV)-oldest/bin/$(PYTEST) -m "compat and not extras"

test-extras: $(VENV)-extras/tested ## with Ray, pycocotools, MLflow, W&B, and PostgreSQL where it is installed
	YOLO_CONFIG_DIR=$(CURDIR)/$(VENV)-extras/config $(VENV)-extras/bin/$(PYTEST) -m extras

test-versions: test-oldest $(IN_BETWEEN:%=test-%) $(VENV)/tested ## the integration tests on four versions
	$(BIN)/$(PYTEST) -m "compat and not extras"

test-8.%: $(VENV)-8.%/tested
	YOLO_CONFIG_DIR=$(CURDIR)/$(VENV)-8.$*/config $(VENV)-8.$*/bin/$(PYTEST) -m "compat and not extras"

unit: $(VENV)/tested ## the tests that take under a minute together
	$(BIN)/$(PYTEST) -m "not slow and not extras"

test-long: $(VENV)/tested $(VENV)-oldest/tested $(VENV)-extras/tested ## what CI has no time for
	$(BIN)/python -m pytest -q -m "long and not extras"
	YOLO_CONFIG_DIR=$(CURDIR)/$(VENV)-extras/config $(VENV)-extras/bin/python -m pytest -q -m "long and extras"
	YOLO_CONFIG_DIR=$(CURDIR)/$(VENV)-oldest/config $(VENV)-oldest/bin/python -m pytest -q -m "long and compat"
	$(BIN)/python -m pytest -q --hypothesis-profile=long tests/test_fuzz.py

lint: $(VENV)/tested
	$(BIN)/pip install -q ruff==0.17.6
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: $(VENV)-docs/installed ## the documentation as a site in site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict -f .ci/mkdocs.yml

$(VENV)-docs/installed: Makefile
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install -q $(DOCS)
	touch $@

dist: $(VENV)/installed $(VENV)-dist/tools ## wheel and sdist, checked, and each installed on its own to train from
	rm -rf dist
	$(VENV)-dist/bin/python -m build --no-isolation --outdir dist .
	$(VENV)-dist/bin/twine check --strict dist/*
	$(BIN)/python scripts/check_dist.py dist

$(VENV)-dist/tools: Makefile
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/pip install -q $(BUILD)
	touch $@

$(VENV)/installed: pyproject.toml yolo_sophia/autoload.pth
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/pip install -q -e ".[test]"
	touch $@

# The oldest supported Ultralytics with the packages of its time; torch and the rest come from the other environment.
$(VENV)-oldest/tested: $(VENV)/tested
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install -q --no-deps $(OLDEST)
	echo "$(SITE)" > $$($(VENV)-oldest/bin/python -c 'import site; print(site.getsitepackages()[0])')/zz_shared.pth
	$(VENV)-oldest/bin/pip install -q --no-deps -e .
	touch $@

# Packages that would change other runs (Ultralytics logs to MLflow wherever it is installed) or that are large.
$(VENV)-extras/tested: $(VENV)/tested
	$(PYTHON) -m venv $(VENV)-extras
	echo "$(SITE)" > $$($(VENV)-extras/bin/python -c 'import site; print(site.getsitepackages()[0])')/zz_shared.pth
	$(VENV)-extras/bin/pip install -q -e ".[test-extras]"
	touch $@

# Any other version with the newest packages, and the few that older ones need besides.
$(VENV)-8.%/tested: $(VENV)/tested
	$(PYTHON) -m venv $(VENV)-8.$*
	$(VENV)-8.$*/bin/pip install -q --no-deps ultralytics==8.$* pandas seaborn tqdm py-cpuinfo pytz tzdata
	echo "$(SITE)" > $$($(VENV)-8.$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/zz_shared.pth
	$(VENV)-8.$*/bin/pip install -q --no-deps -e .
	touch $@

.PRECIOUS: $(VENV)-8.%/tested

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-extras $(VENV)-dist $(VENV)-docs $(VENV)-8.* runs dist site
