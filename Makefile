# `make` lists the targets. Everything happens in .venv, filled from requirements.lock (versions and hashes), but for
# `make install`, which fetches what it installs and what builds that.

VENV ?= .venv
BIN := $(VENV)/bin
UNIT := systemd/catfeeder-cron.service
SOURCES := pyproject.toml README.md LICENSE config.toml $(shell find catfeeder_cron -type f -not -path '*/__pycache__/*')
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Empty means no, whatever the shell says: to compile the tests anew takes each worker longer than a tenth of its tests.
export PYTHONDONTWRITEBYTECODE =
export DESTDIR PYTHON

.DEFAULT_GOAL := help
.PHONY: FORCE help run test coverage proof proof-outages test-outages test-systemd test-fresh check format bench man release install uninstall purge lock clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
	  || sed -nE 's/^([a-z-]+):.*## (.*)/  make \1 - \2/p' $(MAKEFILE_LIST)

run: $(VENV)/program ## show the daemon at work on a throw-away PostgreSQL with sample data
	@exec $(BIN)/catfeeder-cron demo

# Most tests wait for something, so there are more workers than cores; each has a PostgreSQL of its own.
WORKERS ?= 8
PYTEST = $(BIN)/pytest
TESTS = $(if $(ONLY),$(ONLY),tests --numprocesses $(WORKERS) --dist worksteal)

test: $(VENV)/program ## run the tests, or some: make test ONLY="tests/unit/test_crontab.py -k leap"
	$(PYTEST) $(TESTS)

coverage: $(VENV)/program ## run the tests and say which lines and branches they leave out
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(TESTS)
	@$(BIN)/coverage combine -q && $(BIN)/coverage report

# The long forms run one after the other, with the machine's time to themselves; the short ones mostly wait.
OUTAGES = $(BIN)/pytest $(if $(ONLY),$(ONLY),tests/proofs/outages)

test-outages: $(VENV)/program ## as root, with Debian's postgresql, libfaketime, iptables: the short forms of the next
	$(OUTAGES) -m "outage and not proof" --numprocesses 3

proof-outages: $(VENV)/program ## prove it while the database moves, is cut off or restored, and clocks are wrong (an hour)
	$(OUTAGES) -m "outage and proof" --timeout 2400 -o faulthandler_timeout=2430

proof: $(VENV)/program ## prove with real processes that no slot and no token is lost or had twice (a quarter of an hour)
	$(BIN)/pytest tests -m "proof and not outage" --timeout 1800 -o faulthandler_timeout=1830

# BOOT starts a throw-away systemd (see tests/acceptance/systemd/conftest.py); "host" stands for this machine's own.
test-systemd: $(VENV)/program build/wheel ## run the tests on a real systemd: make test-systemd BOOT=/path/to/boot.sh
	CATFEEDER_CRON_BOOT=$(BOOT) $(BIN)/pytest -m systemd tests/acceptance/systemd

test-fresh: $(VENV)/packages ## as root, with debootstrap: do `make run` and `make test` on fresh Debian roots (half an hour)
	@$(BIN)/python tests/fresh/roots.py

check: $(VENV)/program ## format, lint and types; the unit's exposure where systemd-analyze is there
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@mkdir -p build
	@if ! command -v systemd-analyze >/dev/null; then echo "no systemd-analyze here: the unit's exposure was not checked"; \
	elif systemd-analyze security --offline=true --threshold=11 --no-pager $(UNIT) >build/exposure 2>&1 \
	  && ! grep '$(notdir $(UNIT)):[0-9]' build/exposure; then grep 'exposure level' build/exposure; \
	else cat build/exposure; exit 1; fi

format: $(VENV)/packages ## rewrite the sources as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/program ## measure speed and memory, as ratios within one run
	$(BIN)/python -m tests.benchmarks

man: $(VENV)/program ## write the manual page, build/catfeeder-cron.1
	@mkdir -p build
	$(BIN)/python -m catfeeder_cron.console.manual > build/catfeeder-cron.1

release: build/tools/packages ## make release VERSION=1.2.0: changelog, sdist and wheel, commit and tag; nothing is uploaded
	tools/release.sh "$(VERSION)" build/tools

install: build/wheel ## install the program as a systemd service; DESTDIR is respected
	systemd/install.sh install requirements.runtime.lock build/wheel/*.whl

uninstall: ## remove it; configuration and state are kept
	systemd/install.sh uninstall

purge: ## remove it with its configuration and state
	systemd/install.sh purge

# The smaller two are parts of the first: what is installed, and what builds it.
lock: ## resolve the dependencies anew into requirements.lock and its parts
	python3 -m venv build/uv
	build/uv/bin/pip install --quiet uv
	$(COMPILE) --upgrade --all-extras --group dev pyproject.toml --output-file requirements.lock
	$(COMPILE) --constraint requirements.lock pyproject.toml --output-file requirements.runtime.lock
	$(COMPILE) --constraint requirements.lock --group build --output-file requirements.build.lock
	rm -rf build/uv

COMPILE = build/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-emit-index-url --no-emit-find-links --no-annotate --no-header

clean: ## remove what the targets above made
	rm -rf $(VENV) build dist .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Looked at each time: PYTHON may name another interpreter than the one that is there.
$(VENV)/packages: requirements.lock FORCE
	@tools/venv.sh $(VENV) $<

FORCE:

# The built wheel, not the working tree, is what runs and what is tested.
$(VENV)/program: $(VENV)/packages $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	@touch $@

build/tools/packages: requirements.build.lock FORCE
	@mkdir -p build
	@tools/venv.sh build/tools $<

build/wheel: build/tools/packages $(SOURCES)
	@rm -rf $@
	build/tools/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $@ .
