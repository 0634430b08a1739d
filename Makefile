# Everything a fresh checkout needs, on Debian 12 or anything like it.
#
# `make demo` and `make test` make a virtual environment in .venv and install what is missing: Debian packages
# only when run as root, otherwise they are named. What is there already is not done again.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
SEEDS ?= 20000
START ?= $(shell date +%s)
FUZZ_ROUNDS ?= 10
# Processes that run tests side by side: most tests wait for something most of the time.
WORKERS ?= 3

# program:package of Debian that has it; a path (with *) stands for itself
TEST_PROGRAMS := fio:fio nbdinfo:libnbd-bin nbdcopy:libnbd-bin nbdfuse:libnbd-bin nbdsh:python3-libnbd \
	nbd-client:nbd-client qemu-img:qemu-utils qemu-io:qemu-utils qemu-storage-daemon:qemu-system-common \
	mkfs.ext4:e2fsprogs e2fsck:e2fsprogs fusermount3:fuse3 losetup:mount unshare:util-linux setpriv:util-linux \
	ip:iproute2 nft:nftables etcd:etcd-server etcdctl:etcd-client fence_dummy:fence-agents nbdkit:nbdkit \
	/usr/lib/*/nbdkit/plugins/nbdkit-python-plugin.so:nbdkit-plugin-python \
	/usr/lib/*/faketime/libfaketime.so.1:faketime
BENCH_PROGRAMS := fio:fio ip:iproute2 nft:nftables qemu-io:qemu-utils
# The plain busybox needs libraries. A kernel is a file, and installing one adds it to the machine's boot menu.
GUEST_PROGRAMS := qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils mkfs.ext4:e2fsprogs e2fsck:e2fsprogs cpio:cpio \
	/var/lib/dpkg/info/busybox-static.list:busybox-static /boot/vmlinuz-*-cloud-amd64:linux-image-cloud-amd64

# A Python that is new enough and can make a virtual environment; Debian's own is preferred. Debian keeps
# ensurepip in python3-venv.
define find_python
find_python() {
	for python in /usr/bin/python3 python3.11 python3 python3.12 python3.13 python3.14; do
		if "$$python" -c 'import sys; from ensurepip import version; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
			command -v "$$python"
			return
		fi
	done
	return 1
}
endef

# $(call install_missing,PROGRAM:PACKAGE ...): what is needed to make .venv is always included.
define install_missing
$(find_python)
missing=()
set -f
for need in $(1); do
	case "$$need" in
	/*) compgen -G "$${need%%:*}" > /dev/null || missing+=("$${need#*:}") ;;
	*) PATH="$$PATH:/usr/sbin:/sbin" command -v "$${need%%:*}" > /dev/null || missing+=("$${need#*:}") ;;
	esac
done
set +f
[[ -e $(VENV)/.made ]] || find_python > /dev/null || missing+=(python3-venv)
if (( $${#missing[@]} )); then
	packages=$$(printf '%s\n' "$${missing[@]}" | sort -u | xargs)
	install="apt-get install --yes --no-install-recommends $$packages"
	if (( $$(id -u) != 0 )); then
		echo "Debian packages are missing: $$packages. Run as root: apt-get update && $$install" >&2
		exit 1
	elif ! command -v apt-get > /dev/null; then
		echo "This system has no apt-get. Install what Debian has in these packages: $$packages" >&2
		exit 1
	fi
	export DEBIAN_FRONTEND=noninteractive
	apt-get update
	$$install
fi
endef

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.demo ## Run two nodes on this machine until Ctrl-C (ARGS="--dir DIR --port-base P")
	@exec $(BIN)/stortrends-ha demo $(ARGS)

.PHONY: test
test: test-packages $(VENV)/.test ## Check style, types and imports, and run all tests (ARGS for pytest)
	$(BIN)/ruff check .
	# Tests in two folders may have modules of the same name: one run for each.
	$(BIN)/mypy
	$(BIN)/mypy tests/*.py tests/unit
	$(BIN)/mypy tests/integration
	$(BIN)/mypy --package tests.failures --package tests.guest --package tests.history
	$(BIN)/mypy --package tests.simulator --package tests.rules_model
	$(BIN)/lint-imports
	$(BIN)/pytest -n $(WORKERS) --dist loadfile $(ARGS)

.PHONY: test-guest
test-guest: test-guest-packages $(VENV)/.test ## Run a virtual machine on a volume while its nodes are killed (QEMU, no KVM)
	$(BIN)/pytest tests/guest/guest_failover.py $(ARGS)

.PHONY: bench
bench: bench-packages $(VENV)/.demo ## Measure it beside other NBD servers (ARGS="--help" lists the options)
	@$(BIN)/python -m bench.run $(ARGS)

.PHONY: failover-bench
failover-bench: bench-packages $(VENV)/.demo ## Measure how long clients wait at a failover (ARGS="--help" lists the options)
	@$(BIN)/python -m bench.failover $(ARGS)

# Tests that set their own number of examples do not heed the profile: hence rounds, each with new examples.
.PHONY: fuzz
fuzz: $(VENV)/.test ## Run the fuzz tests for long (FUZZ_ROUNDS=10)
	for (( round = 1; round <= $(FUZZ_ROUNDS); round++ )); do
		$(BIN)/pytest --hypothesis-profile=fuzz --timeout=0 $$(find tests -name 'test_*fuzz*.py') $(ARGS)
	done

.PHONY: simulate
simulate: $(VENV)/.test ## Run the simulator for long (SEEDS=20000, START=first seed; new ones by default)
	$(BIN)/python -m tests.simulator --seeds $(SEEDS) --start $(START) $(ARGS)

.PHONY: clean
clean: ## Remove .venv and all caches
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: demo-packages
demo-packages:
	@$(call install_missing,)

.PHONY: test-packages
test-packages:
	@$(call install_missing,$(TEST_PROGRAMS))

.PHONY: test-guest-packages
test-guest-packages:
	@$(call install_missing,$(GUEST_PROGRAMS))

.PHONY: bench-packages
bench-packages:
	@$(call install_missing,$(BENCH_PROGRAMS))

$(VENV)/.made: | demo-packages
	@$(find_python)
	if ! python=$$(find_python); then
		echo "Python 3.11 or newer is needed, with its venv module: there is none." >&2
		exit 1
	fi
	"$$python" -m venv --clear $(VENV)
	touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.made
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.made
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $(VENV)/.demo $@
