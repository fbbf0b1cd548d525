# Everything runs in a virtual environment of its own; `make help` lists the commands.
PYTHON ?= python3
VENV ?= .venv
# Another one, for `make test-cuda-build` only: a CUDA build of PyTorch takes 5 GB.
VENV_CUDA ?= .venv-cuda
# What `pip install` gets for PyTorch: any release from 2.11 on, CPU or CUDA build.
TORCH ?= torch>=2.11
# Two processes of one thread each finish sooner than one process of two: most tests are small.
# A test that hangs ends with the stacks of all its threads instead of holding up the rest.
TEST_ARGS ?= -n 2 --timeout 900
BENCHMARK_ARGS ?=
SANITIZE_ARGS ?= -n 2 --timeout 3600

bin := $(VENV)/bin
sources := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: help test test-cuda-build sanitize demo benchmark lint format clean
.SECONDARY:

help:
	@echo "make test       build in $(VENV) and run the tests"
	@echo "make test-cuda-build  build the CUDA kernels in $(VENV_CUDA) and look at the library; needs nvcc, no GPU"
	@echo "make sanitize   run the tests with CPU kernels that have every access and overflow checked; an hour"
	@echo "make demo       train MobileNetV3-Small on handwritten digits, stock and fused, and draw demo.png"
	@echo "make benchmark  time a quick subset of the shapes (BENCHMARK_ARGS=--benchmark-full for all, an hour)"
	@echo "make lint       check style (make format to fix it)"
	@echo "make clean      remove $(VENV), $(VENV_CUDA) and everything built"
	@echo
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) VENV_CUDA=$(VENV_CUDA) TORCH='$(TORCH)' TEST_ARGS='$(TEST_ARGS)'"

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(bin)/python -m pytest $(TEST_ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(bin)/python -m pytest $(TEST_ARGS) tests/test_triton_interpreter.py tests/test_cuda_host.py tests/test_cuda_host_faults.py

# Not -e, which would put libraries for this torch into the checkout. build/ has a folder for each torch; what an
# install copied there for the wheel is removed, as modules that are gone would be in the next one.
test-cuda-build: $(VENV_CUDA)/.torch
	rm -rf build/torch-*/lib.*
	MBN_BUILD_CPU=0 MBN_BUILD_CUDA=1 $(VENV_CUDA)/bin/python -m pip install --no-deps .
	cd $(VENV_CUDA) && bin/python -W ignore $(CURDIR)/tests/check_cuda_build.py

sanitize: $(VENV)/.installed-test
	$(bin)/python tests/run_sanitized.py $(SANITIZE_ARGS)

demo: $(VENV)/.installed-demo
	$(bin)/python examples/demo.py --output demo.png

benchmark: $(VENV)/.installed-benchmark
	$(bin)/python -m pytest --benchmark $(BENCHMARK_ARGS)

lint: $(bin)/ruff
	$(bin)/ruff check .
	$(bin)/ruff format --check .

format: $(bin)/ruff
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:
	rm -rf $(VENV) $(VENV_CUDA) build dist *.egg-info mbn_kernels/*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

%/.created:
	$(PYTHON) -m venv $*
	@touch $@

%/.torch: %/.created
	$*/bin/python -m pip install '$(TORCH)'
	@touch $@

# One stamp per extra. A changed source installs again, which compiles that source alone (objects stay in build/).
# TORCH is named again, as the newest of another package might bring another PyTorch with it.
$(VENV)/.installed-%: $(VENV)/.torch $(sources)
	$(bin)/python -m pip install -e '.[$*]' '$(TORCH)'
	@touch $@

$(bin)/ruff: $(VENV)/.created
	$(bin)/python -m pip install 'ruff>=0.14,<1'
	@touch $@
