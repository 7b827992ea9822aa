# make demo | make test | make lab: each sets up .venv by itself, once.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
RECGEN_RUNS ?= $(CURDIR)/runs
export RECGEN_RUNS

.PHONY: demo test lab clean

demo: $(INSTALLED)
	$(VENV)/bin/python -m recgen.cli pipeline demo --overwrite
	@echo "open runs/demo/report.html"

test: $(INSTALLED)
	bash .ci/test

lab: $(INSTALLED)
	$(VENV)/bin/jupyter lab nbs

$(INSTALLED): settings.ini setup.py constraints.txt .ci/install
	bash .ci/install $(PYTHON) $(VENV)
	touch $@

clean:
	rm -rf $(VENV) runs
