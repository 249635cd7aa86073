# Rackless: the two commands of a newcomer are `make testbed` and `make test`; the rest are chores.
# Every target sets up what it needs first (scripts/setup: distribution packages, .venv) and is safe to repeat.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.PHONY: help setup setup-tests testbed test test-unit test-long test-rack test-night images lint bench up down clean lock

# Namespaces, bridges and taps need root: when we are not, sudo runs the command (and only the command).
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -E)
RACKLESS := $(SUDO) .venv/bin/rackless
PYTEST := $(SUDO) .venv/bin/python -m pytest

# A rack file, for up and down; without one racks/default.yml is meant.
RACK ?=
# Extra arguments for pytest: make test-unit ARGS='-k doctor'
ARGS ?=

help: ## list the targets (this is the default)
	@echo 'usage: make TARGET'
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

setup: ## install what is missing: distribution packages, then Python packages into .venv
	@scripts/setup

setup-tests: setup ## and what only tests need: a browser, where the distribution has one (tests that miss it are skipped)
	@scripts/setup --tests

testbed: setup ## fresh machine -> a running default rack, a demo job on it, and commands to try next
	@$(RACKLESS) doctor
	$(RACKLESS) image build
	$(RACKLESS) up $(RACK)
	$(RACKLESS) demo
	$(RACKLESS) status
	cat <<-EOF

	The rack is running. Try next:
	  $(RACKLESS) ssh pb0                 # look around in a blade
	  $(RACKLESS) run --on pb0 -- sort --version   # run a program on a processor blade
	  make down                                # take the rack down again
	EOF

test: test-unit test-long test-rack ## fresh machine -> every test: unit first, then on real blades

test-unit: setup ## the tests that need no blade (a minute)
	@$(PYTEST) tests/unit -m 'not long' -n 4 --dist loadfile $(ARGS)

test-long: setup-tests ## those that need no blade either, but more time: storms, the command line, random operations, deaths (6 minutes)
	@$(PYTEST) tests/unit -m long -n 4 --dist loadfile $(ARGS)

test-rack: setup-tests ## the tests on real blades (half an hour or more; root)
	@$(PYTEST) tests/rack -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-night: setup-tests ## the same for a night: 30 killed commands, 200 killed programs, long soak, whole crash matrices
	@export RACKLESS_KILLS=30 RACKLESS_KILLED_PROGRAMS=200 RACKLESS_SOAK_SECONDS=600 RACKLESS_BLADE_CRASHES=220
	export RACKLESS_CRASH_RUNS=5000
	$(PYTEST) tests/unit -m long -n 4 --dist loadfile $(ARGS)
	$(PYTEST) tests/rack -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

images: setup ## build the blades' images (cached by content)
	@$(RACKLESS) image build

lint: setup ## ruff and mypy --strict
	@.venv/bin/ruff check .
	.venv/bin/mypy

bench: setup ## run an experiment: make bench NAME=... (JSON and raw samples in out/)
	@test -n "$(NAME)" || { echo 'which experiment? make bench NAME=..., one of:'; ls experiments; exit 2; } >&2
	$(RACKLESS) bench $(NAME)

up: setup ## bring the rack up: make up [RACK=racks/NAME.yml]
	@$(RACKLESS) up $(RACK)

down: setup ## take the rack down: make down [RACK=racks/NAME.yml]
	@$(RACKLESS) down $(RACK)

clean: ## remove what was made in this tree: .venv, caches, out/ (images and racks stay: rackless gc, make down)
	@$(SUDO) rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis out *.egg-info
	find . -name __pycache__ -not -path './.git/*' -prune -exec $(SUDO) rm -rf {} +

lock: setup ## resolve pyproject.toml again into requirements.lock
	@.venv/bin/python -m pip install --quiet uv
	.venv/bin/uv pip compile --quiet --universal --upgrade --python-version 3.11 --fork-strategy fewest \
	  --extra dev --extra build --custom-compile-command 'make lock' --no-emit-index-url --no-emit-find-links \
	  --output-file requirements.lock pyproject.toml
	sed -n '/^[a-z]/p' requirements.lock | wc -l | sed 's/$$/ packages pinned/'
