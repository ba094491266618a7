# make demo: a whole Unit with its cloud, on this machine.   make test: everything that CI checks.
# make qemu: a Unit of two guests, from disk images to a service that survives a power cut without its cloud.
# make xen: the same with Xen: the Main Node in Dom0, the Secondary Node in a guest, the link between them by vchan.
# make field: a whole Unit under power cuts, lost links, full disks and more; a table of cases.
# All set up what they need, as root on Debian 12/13 or Ubuntu 24.04. `make help` lists the rest.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
TOOLS := .venv-tools
LAYER := .venv-layer
BIN := $(VENV)/bin
JOBS ?= 2
SOURCES := pyproject.toml setup.py proto/build.py $(shell find proto -name '*.proto') $(wildcard aoscore/_speedups/*.p[yx][xdi] aoscore/_speedups/*.h)

.PHONY: help field demo demo-down qemu xen guests test lint unit integration layer layer-check layer-size pins system vm beds bench guest-figures setup packages clean

help:
	@sed -n 's/^# *\(make .*\)/\1/p' Makefile
	@echo "make lint | unit | integration | layer | pins | system | vm: parts of make test"
	@echo "make beds: which kinds of tests this machine can run"
	@echo "make guests: disk images of guests, for make qemu, make system and make vm"
	@echo "make layer-check OE=PATH: the Yocto layer on a checkout of openembedded-core with bitbake and meta-openembedded"
	@echo "make layer-size: what aoscore adds to an image, into docs/"
	@echo "make bench: speed and memory figures into docs/"
	@echo "make demo-down: end the demo and remove all of it"

demo: setup $(TOOLS)/.done
	$(BIN)/aosctl demo up

demo-down:
	@if [ -x $(BIN)/aosctl ]; then $(BIN)/aosctl demo down; else echo "nothing to end: the demo was never set up"; fi

# REPORT=FILE writes the figures to a file, too.
qemu: setup $(TOOLS)/.done
	$(BIN)/python -m qemu show $(if $(REPORT),--report $(REPORT))

# Not part of CI: slow. REPORT as above.
xen: setup $(TOOLS)/.done
	$(BIN)/python -m qemu xen $(if $(REPORT),--report $(REPORT))

# Disk images of guests, which take long the first time.
guests: setup
	$(BIN)/python -m qemu images

# Each step below with a time limit of its own, and a table at the end.
test:
	$(PYTHON) tests/steps.py --jobs $(JOBS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: setup
	$(BIN)/pytest tests/unit tests/wire tests/fuzz -n $(JOBS) -q

integration: setup $(TOOLS)/.done
	$(BIN)/pytest tests/integration -n $(JOBS) -q

# The Yocto layer and the kas files, read by BitBake's parser, kas and oelint from the package registry.
layer: setup $(LAYER)/.done
	$(BIN)/python -m tests.layer.wheelfiles .cache/wheel-files.json
	AOSCORE_WHEEL_FILES=$(CURDIR)/.cache/wheel-files.json \
	    $(LAYER)/bin/pytest -c tests/layer/pytest.ini --confcutdir tests/layer tests/layer -q

layer-check: layer
	@[ -n "$(OE)" ] || { echo "name a checkout: make layer-check OE=PATH" >&2; exit 1; }
	$(LAYER)/bin/python tests/layer/check_oe.py $(OE)

layer-size: setup
	$(BIN)/python -m tests.layer.size docs/footprint.md

# Unit and wire tests on the library versions of each Yocto series, where an interpreter for it is found.
pins: packages
	$(PYTHON) tests/pins.py --jobs $(JOBS)

# Whole Units of two nodes with all that happens to them in the field, in guests and in systemd-nspawn.
# They wait most of their time. A file is one worker's: the longest first.
LONGEST := $(patsubst %,tests/system/test_%.py,guests guest_faults boot_updates power_cuts)
FILES := $(LONGEST) $(filter-out $(LONGEST),$(sort $(wildcard tests/system/test_*.py)))
UNITS := $(BIN)/pytest $(FILES) -n $(JOBS) --dist loadfile --no-loadscope-reorder -q
field: setup $(TOOLS)/.done
	$(UNITS)

# The same in two parts: the demo and beds of systemd-nspawn; and
system: setup $(TOOLS)/.done
	$(UNITS) -m "not vm"

# units of QEMU guests.
vm: setup $(TOOLS)/.done
	$(UNITS) -m vm

bench: setup $(TOOLS)/.done
	$(BIN)/python -m tests.benchmarks.run

# What both nodes of an idle Unit of guests take and write, over AOSCORE_IDLE_S seconds, into docs/footprint.md.
guest-figures: setup $(TOOLS)/.done
	$(BIN)/python -m tests.benchmarks.guests

setup: packages $(VENV)/.done

# Asks dpkg first: nothing is installed, and no network needed, when all is there.
packages:
	@missing=$$(grep -v '^#' packages.txt | while read -r name; do \
	    [ "$$(dpkg-query -W -f='$${db:Status-Status}' "$$name" 2>/dev/null)" = installed ] || echo "$$name"; done | xargs); \
	if [ -n "$$missing" ]; then \
	    [ "$$(id -u)" = 0 ] || { echo "not installed: $$missing" >&2; echo "run as root, or: apt-get install $$missing" >&2; exit 1; }; \
	    echo "Installing: $$missing"; \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=500 install -y --no-install-recommends $$missing >/dev/null || \
	    { echo "apt-get could not install: $$missing" >&2; \
	      echo "Its reasons are above; the first counts. It needs the network and Debian's main or Ubuntu's main and universe." >&2; exit 1; }; \
	fi

# An environment without pip is one whose making was broken off.
$(VENV)/.done: $(SOURCES) | packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is older or not there. Name another: make PYTHON=python3.11" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip setuptools wheel
	$(BIN)/python -m pip install -q -e '.[cm,sm,iam,mp,devcloud,test]'
	$(BIN)/python proto/build.py
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

# The cloud's public tools pin old versions of what we use new: they live apart.
$(TOOLS)/.done: tests/requirements-cloud-tools.txt | packages
	$(TOOLS)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q --upgrade pip 'setuptools<81' wheel
	$(TOOLS)/bin/python -m pip install -q -r tests/requirements-cloud-tools.txt
	touch $@

# BitBake's library, kas and oelint pin what they need: apart from ours.
$(LAYER)/.done: tests/requirements-layer.txt | packages
	$(LAYER)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(LAYER)
	$(LAYER)/bin/python -m pip install -q -r tests/requirements-layer.txt
	touch $@

clean: demo-down
	rm -rf $(VENV) $(VENV)-scarthgap $(VENV)-wrynose $(TOOLS) $(LAYER) build .state .cache aoscore/_pb aoscore/_speedups/*.c aoscore/_speedups/*.so *.egg-info
