# Two commands: `make demo` and `make test`. `make base` trains the demo's base model again. Each makes .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test base

demo: $(VENV)/ready
	$(RUN) -m minitau.demo $(ARGS)

# A file's tests keep together, for they share what was slow to make. ARGS="-n 0" runs them one after the other.
test: $(VENV)/ready
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

base: $(VENV)/ready
	$(RUN) -m minitau.base.pretrain --out outputs/base $(ARGS)

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("minitau needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -c 'import ensurepip' || { echo "python's venv is missing; on Debian: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
