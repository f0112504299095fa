"""Tests with the real vLLM; `make test-vllm` runs them in `.venv-vllm`."""
