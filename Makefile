# make demo   learn the packaged stream of tasks, print what was kept, write a report
# make test   lint, types, layers, tests
# make clean  remove the environment and the caches
#
# Both need Python 3.10+ and make, nothing else; they share .venv, whichever comes first.

VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ABOUT  := pyproject.toml src/perpetune/_version.py

# The first of these that is 3.10 or newer and can make an environment; `make PYTHON=/path/to/python` overrides.
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10 python3.14 python)
USABLE  := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-core
	$(BIN)/perpetune run

test: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# A stamp is newer than pyproject.toml once its install is complete. The test install holds the core one too.
$(VENV)/.installed-core: $(ABOUT) | $(BIN)/pip
	@echo "installing perpetune and its dependencies into $(VENV): once, a few minutes"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(ABOUT) | $(BIN)/pip
	@echo "installing perpetune with every extra and the test tools into $(VENV): once, a few minutes"
	@$(PIP) --editable '.[all,test]'
	@touch $(VENV)/.installed-core $@

# pip is what venv makes last: an environment without it was interrupted, and is made again.
$(BIN)/pip:
	@for python in $(PYTHONS); do \
		if "$$python" -c '$(USABLE)' 2>/dev/null; then \
			echo "making $(VENV) with $$("$$python" --version)"; \
			exec "$$python" -m venv $(VENV); \
		fi; \
	done; \
	echo "no Python 3.10 or newer with venv found (tried: $(PYTHONS));" \
		"install one (Debian: apt install python3-venv) or name it: make PYTHON=/path/to/python" >&2; \
	exit 1

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
