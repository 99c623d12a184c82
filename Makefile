# Two commands do all the set-up: `make serve` and `make test` install what they need into $(VENV) first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS ?=
PEERS := $(VENV)/peers
PEER_ENGINES := ctranslate2 llamacpp openvino vllm

.PHONY: help install serve test check bench peers-venvs bench-peers soak
help:
	@echo "make serve   run the server (ARGS='--port 9000 --profile baseline')"
	@echo "make test    run the tests (ARGS='-m unit')"
	@echo "make check   ruff, mypy"
	@echo "make bench   measure every profile on GPT-2 124M's shapes, into bench/results/ and docs/"
	@echo "make bench-peers  ours and other engines, each in an environment from make peers-venvs"
	@echo "make soak    20 minutes of mixed load: does memory stay, is nothing left over?"
	@echo "make install the runtime packages alone, into $(VENV)"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@

serve: install
	$(BIN)/dlight-serve run $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(VENV)/.installed-test
	$(BIN)/python -m bench.soak --minutes 20 --json bench/results/soak.json $(ARGS)

bench: install
	$(BIN)/dlight-serve bench --model synthetic:gpt2 --profile baseline --profile matmul \
		--profile gemv --profile reduction --profile full --profile stock --repetitions 3 \
		--json bench/results/cpu.json $(ARGS)
	$(BIN)/python -m bench.docs

peers-venvs: $(PEER_ENGINES:%=$(PEERS)/%/.installed)

$(PEERS)/%/.installed: bench/peers/requirements-%.txt
	$(PYTHON) -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

bench-peers: $(VENV)/.installed-test
	$(BIN)/python -m bench.peers --venvs $(PEERS) --json bench/results/peers.json $(ARGS)
