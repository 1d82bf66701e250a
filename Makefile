# `make setup` installs what is missing; every other target depends on it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := fuse3 libfuse3-dev pkg-config gcc python3-dev python3-venv rsync attr \
	fio xfsprogs btrfs-progs e2fsprogs
BENCH_PACKAGES := mergerfs bindfs rclone sshfs openssh-server curl

# $(call install,PACKAGES): install those Debian packages that are missing.
define install
	@missing="$$(for name in $(1); do \
		dpkg-query -W -f='$${Status}' $$name 2>/dev/null | grep -q 'install ok installed' || echo $$name; \
	done)"; \
	if [ -n "$$missing" ]; then \
		echo "installing Debian packages:" $$missing; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi
endef

.PHONY: setup test test-long bench demo clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml Makefile $(wildcard sectorfs/*/*.[ch])
	$(call install,$(PACKAGES))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

test: setup
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(ARGS)

test-long: setup
	$(BIN)/python -m pytest -m long --timeout=1200 $(ARGS)

bench: setup $(VENV)/.bench-ready
	$(BIN)/python -m tests.bench $(ARGS)

# The benchmarks start an sshd of their own; installing one must not start another, now or at boot.
$(VENV)/.bench-ready: $(VENV)/.ready
	@if [ ! -e /usr/sbin/sshd ]; then \
		echo "masking ssh.service (undo: systemctl unmask ssh)"; \
		mkdir -p /etc/systemd/system && ln -sf /dev/null /etc/systemd/system/ssh.service; \
	fi
	$(call install,$(BENCH_PACKAGES))
	@touch $@

demo: setup
	$(BIN)/sectorfs demo $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
