# Two commands do everything on a fresh machine: `make demo` and `make test`.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PICTURE ?=
NANO ?=
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-slow nano nano-u nano-hd lint format docs clean

# torch first and under its exact version: resolving it as a dependency may choose another, larger build.
# autoawq, the oracle of the int4 tests, for the same reason without what it asks for (its build wants torch, too).
# Pillow last: gradio asks for one below 13, which enlarges some pictures differently from the goldens, and works with 13
$(INSTALLED): pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation autoawq==0.2.9
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade 'pillow>=13'
	touch $@

# draws pictures and a clip, asks vila-nano about them and judges its answers; or describes $(PICTURE)
demo: $(INSTALLED)
	$(PYTHON) examples/nano/demo.py $(PICTURE)

$(VENV)/gptq: tests/gptq-requirements.txt $(INSTALLED)
	BUILD_CUDA_EXT=0 $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--target $@ --upgrade --requirement $<
	touch $@

# a file's tests share what they convert: they run in one process
test: lint
	$(PYTHON) -m pytest -c tests/pytest.ini -n auto --dist loadfile tests

test-slow: $(INSTALLED) $(VENV)/gptq
	$(PYTHON) -m pytest -c tests/pytest.ini -m slow tests

# trains vila-nano from random weights into nano-run/; goes on where it was stopped. NANO='--minutes 60' bounds the time
nano: $(INSTALLED)
	$(PYTHON) examples/nano/train.py $(NANO)

# trains vila-u-nano from random weights into nano-u-run/; goes on where it was stopped. NANO='--steps 0.5' bounds the time
nano-u: $(INSTALLED)
	$(PYTHON) examples/nano_u/train_u.py $(NANO)

# trains vila-hd-nano from vila-nano into nano-hd-run/; goes on where it was stopped. NANO='--steps 0.5' bounds the time
nano-hd: $(INSTALLED)
	$(PYTHON) examples/nano_hd/train_hd.py $(NANO)

# mypy wants the package under its import name, whatever the clone's folder is called
lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	mkdir -p $(VENV)/typecheck && ln -sfn "$(CURDIR)" $(VENV)/typecheck/vila
	cd $(VENV)/typecheck && ../bin/python -m mypy --config-file vila/pyproject.toml $(patsubst %,vila/%,$(wildcard *.py quantize/*.py))

format: $(INSTALLED)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# the API reference, from the docstrings: build/docs/index.html
docs: $(INSTALLED)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(PYTHON) -m pdoc --output-directory build/docs vila $(patsubst %.py,vila.%,$(filter-out __init__.py,$(wildcard *.py quantize/*.py)))

clean:
	rm -rf $(VENV) demo-drawings build *.egg-info
