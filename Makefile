# `make setup` installs what is missing; every other target depends on it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := fuse3 libfuse3-dev pkg-config gcc python3-dev python3-venv rsync attr

.PHONY: setup test test-long bench demo clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml Makefile $(wildcard sectorfs/*/*.c)
	@missing="$$(dpkg-query -W -f='$${Package} $${Status}\n' $(PACKAGES) 2>/dev/null | awk '/install ok installed/ {print $$1}' | sort > .have; printf '%s\n' $(PACKAGES) | sort | comm -23 - .have; rm -f .have)"; \
	if [ -n "$$missing" ]; then \
		echo "installing Debian packages:" $$missing; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

test: setup
	$(BIN)/python -m pytest $(ARGS)

test-long: setup
	$(BIN)/python -m pytest -m long --timeout=1200 $(ARGS)

bench: setup
	$(BIN)/python -m pytest -m bench --timeout=1200 $(ARGS)

demo: setup
	$(BIN)/sectorfs demo $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
