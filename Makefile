# make demo | make test | make test-browser | make lab | make bench: each sets up .venv by itself, once.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
RECGEN_RUNS ?= $(CURDIR)/runs
export RECGEN_RUNS

.PHONY: demo test test-browser lab bench clean

demo: $(INSTALLED)
	$(VENV)/bin/python -m recgen.cli pipeline demo --overwrite
	@echo "open $(RECGEN_RUNS)/demo/report.html"

test: $(INSTALLED)
	bash .ci/test

# Every stage notebook in a headless Chromium (Debian: chromium, chromium-driver); screenshots in runs/browser. make test-browser ONLY="00_data or explorer" opens some.
test-browser: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q -p no:cacheprovider tests/browser/notebooks.py $(if $(ONLY),-k "$(ONLY)")

lab: $(INSTALLED)
	$(VENV)/bin/jupyter lab nbs $(if $(filter 0,$(shell id -u)),--allow-root)

# Alone on the machine, please. make bench ONLY="rqkmeans level" measures some; every call is a folder of its own below runs/bench/.
bench: export RECGEN_DATA ?= $(abspath ../shared/data)
bench: LABEL := $(shell date +%Y%m%d-%H%M%S)
bench: $(INSTALLED)
	@(grep -v -i -E '^(torch|triton|nvidia-[a-z0-9-]+)==' constraints.txt; $(VENV)/bin/python -c "import torch; print('torch==' + torch.__version__)") > $(VENV)/.constraints
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/.constraints -e '.[bench]'
	mkdir -p $(RECGEN_RUNS)/bench
	$(VENV)/bin/papermill nbs/07_benchmarks.ipynb $(RECGEN_RUNS)/bench/$(LABEL).ipynb -f nbs/params/bench/07_benchmarks.yaml \
		-p label $(LABEL) -p output_dir $(RECGEN_RUNS)/bench/$(LABEL) $(if $(ONLY),-p measurements "$(ONLY)")

$(INSTALLED): settings.ini setup.py constraints.txt .ci/install
	bash .ci/install $(PYTHON) $(VENV)
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
