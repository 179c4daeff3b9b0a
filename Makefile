# Everything a developer types.  A virtual environment in $(VENV) is made on
# the way; nothing outside it and build/ and dist/ is written.
#
#   make test PYTHON=python3.13 VENV=/tmp/v PACKAGE=dist/afork-….whl
#
# tests a built wheel instead of this folder; .ci/run does that for each
# Python.

PYTHON ?= python3
VENV ?= .venv
PACKAGE ?= .
PYTEST_ARGS ?=
BENCH ?= start calls memory latency scale picture readme
BENCH_ARGS ?=
FUZZ_SECONDS ?= 60
CC_FUZZ ?= clang
CLANG_FORMAT ?= clang-format

BIN := $(VENV)/bin
PIP := $(BIN)/pip -q --disable-pip-version-check
C_FILES := $(wildcard src/*/*.[ch] tests/*/*.[ch] bench/*.[ch])
HARNESSES := $(notdir $(basename $(wildcard tests/fuzz/*.c)))

# pip takes a wheel of the same version for installed, and setuptools reuses
# build/ even for files that have been deleted: both start afresh.
define install
$(PIP) uninstall -y afork
$(if $(filter .,$(PACKAGE)),rm -rf build/lib* build/temp* build/bdist*)
$(PIP) install "$(PACKAGE)$(1)"
endef

.DEFAULT_GOAL := help
.PHONY: help venv build test demo bench lint format fuzz asan wheel clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

# Made anew when PYTHON is another version than the one it was made with.
venv:
	@test "$$($(BIN)/python -V 2>&1)" = "$$($(PYTHON) -V)" \
	    || $(PYTHON) -m venv --clear $(VENV)

build: venv ## install this folder into $(VENV)
	$(call install,)

# The pytest script, not python -m pytest, and below -P: the working folder
# must stay out of sys.path, because its afork/ has no built extension.
test: venv ## install, then run the tests (PYTEST_ARGS=…)
	$(call install,[test])
	$(BIN)/pytest $(PYTEST_ARGS)

demo: venv ## install, then show what it does
	$(call install,)
	$(BIN)/python -P -m afork demo

# Each part leaves build/bench-….json; picture and readme are made of these.
# A part that fails does not keep the others from running, but what it left
# the last time is not shown for this time's.
bench: venv ## install, then measure (BENCH=calls BENCH_ARGS=…)
	$(call install,[bench])
	@failed=; for one in $(BENCH); do \
	    echo "== $$one"; args="$(BENCH_ARGS)"; \
	    case $$one in picture|readme) args= ;; esac; \
	    rm -f build/bench-$$one.json; \
	    $(BIN)/python bench/$$one.py $$args || failed="$$failed $$one"; \
	done; \
	test -z "$$failed" || { echo "bench: failed:$$failed" >&2; exit 1; }

lint: venv ## ruff, clang-format, mypy --strict, stubtest
	$(call install,[lint])
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(C_FILES)
	$(BIN)/mypy --strict afork
	$(BIN)/python -P -m mypy.stubtest afork._afork

format: venv ## rewrite the sources as `make lint` wants them
	$(PIP) install ruff
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(CLANG_FORMAT) -i $(C_FILES)

# libFuzzer over the C core alone; the seconds are shared by the harnesses.
# What it finds stays in build/fuzz/, with the inputs it has learnt from.
fuzz: $(HARNESSES:%=build/fuzz/%) ## fuzz the C core for FUZZ_SECONDS
	@test -n "$(HARNESSES)" || { echo "no harness in tests/fuzz"; exit 1; }
	@for name in $(HARNESSES); do \
	    seed=tests/fuzz/corpus/$$name; test -d $$seed || seed=; \
	    mkdir -p build/fuzz/$$name.corpus; \
	    echo "== $$name"; \
	    build/fuzz/$$name build/fuzz/$$name.corpus $$seed \
	        -artifact_prefix=build/fuzz/ -timeout=10 -print_final_stats=1 \
	        -verbosity=0 \
	        -max_total_time=$$(($(FUZZ_SECONDS) / $(words $(HARNESSES)))) \
	        || exit 1; \
	done

build/fuzz/%: tests/fuzz/%.c $(wildcard src/core/*.[ch])
	@mkdir -p $(@D)
	$(CC_FUZZ) -std=c11 -g -O1 -Isrc/core \
	    -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	    -o $@ $< $(wildcard src/core/*.c)

# The interpreter itself is not instrumented, so the sanitizers' libraries
# must come first, in templates as well, and what the interpreter never frees
# is not a leak.  Objects have red zones around them only if they are malloc's.
SANITIZE := -fsanitize=address,undefined
sanitized = AFORK_SANITIZE=1 PYTHONMALLOC=malloc \
    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1$(1) \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(BIN)/pytest $(PYTEST_ARGS)
BINDING_TESTS := $(patsubst %,tests/test_%.py,run fork_trees starts exec \
    arguments inherit link poller bulk rpc shared_buffer worker_socket)

# The handlers of the sanitizers' own would be in the way of tests of signals.
asan: venv ## the tests of the C code, under ASan and UBSan
	rm -rf build/lib* build/temp*
	AFORK_CFLAGS="$(SANITIZE) -fno-sanitize-recover=all -fno-omit-frame-pointer -g" \
	LDFLAGS="$(SANITIZE)" $(PIP) install --force-reinstall ".[test]"
	rm -rf build/lib* build/temp*
	$(call sanitized,) tests/core
	$(call sanitized,:handle_segv=0:handle_sigbus=0:handle_sigfpe=0:handle_abort=0) \
	    $(BINDING_TESTS)

wheel: venv ## build dist/afork-….whl
	rm -rf build/lib* build/temp* build/bdist*
	$(PIP) wheel --no-deps -w dist .

clean: ## remove everything made here
	rm -rf build dist .venv *.egg-info .pytest_cache .mypy_cache \
	    .ruff_cache .hypothesis afork/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
