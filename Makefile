# Needs Python 3.11 or newer with pip, and make. Everything else goes into .venv here; nothing is installed elsewhere.
#   make demo      fit a sentence encoder to "at most 1 % worse, as fast as possible"; the answer is in out/minilm
#   make test      lint, check types and run the tests          make quick  the same without the tests marked heavy
#   make exhaustive  the same with every method on every model of the zoo
#   make lint      lint and check types                          make peers  the environments of the benchmarks
#   make clean     remove what these made, the environments too
PYTHON ?= python3
WORKERS ?= 2
SOURCES := src examples tests benchmarks
SPECS := pyproject.toml constraints.txt
# One thread for each worker: workers that use all cores each would wait for one another.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(WORKERS)
PEERS := hqq nncf onnxruntime openvino optimum-quanto torch torchao
# Peers that need other versions than the rest, each in an environment of its own.
APART := autoround llmcompressor structure
PEER_autoround := auto-round torch
PEER_llmcompressor := llmcompressor torch
PEER_structure := --editable ".[examples]" torch-pruning

.PHONY: demo test quick exhaustive lint peers clean check-python

demo: .venv/.installed
	@rm -rf out/minilm
	.venv/bin/flyweight optimize examples/minilm.py --max-drop 1% --minimize latency --within 10m -o out/minilm

test: lint
	$(PYTEST) -m "not exhaustive"

quick: lint
	$(PYTEST) -m "not heavy and not exhaustive"

exhaustive: lint
	$(PYTEST)

lint: .venv/.installed
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/mypy

peers: .venv-peers/.installed $(APART:%=.venv-peers-%/.installed)

# A stamp: nothing is installed again while pyproject.toml and the constraints stay as they are.
.venv/.installed: $(SPECS) | check-python
	$(call environment,.venv)
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	@touch $@

.venv-peers/.installed: pyproject.toml benchmarks/peers-constraints.txt | check-python
	$(call environment,.venv-peers)
	.venv-peers/bin/python -m pip install --quiet --constraint benchmarks/peers-constraints.txt --editable ".[all]" $(PEERS)
	@touch $@

$(APART:%=.venv-peers-%/.installed): .venv-peers-%/.installed: benchmarks/peers-%-constraints.txt | check-python
	$(call environment,.venv-peers-$*)
	.venv-peers-$*/bin/python -m pip install --quiet --constraint $< $(PEER_$*)
	@touch $@

define environment
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || \
	{ rm -rf $(1); echo "$(PYTHON) cannot make an environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
@echo "installing into $(1); this takes some minutes and 2 GB once"
endef

check-python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || \
	{ echo "flyweight needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there)." >&2; \
	  echo "Give another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }

clean:
	rm -rf .venv .venv-peers $(APART:%=.venv-peers-%) out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/flyweight.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
