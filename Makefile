# Every target does the set-up it needs; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup chat test lint format train clean

BIN := .venv/bin
ARGS ?=
RECIPE ?= scenes

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  More words for the program go into ARGS:  make chat ARGS='--port 8080'"

setup: ## the locked environment and nothing else
	@scripts/setup.sh

chat: setup ## chat with Joey in the browser
	@$(BIN)/kangaroo chat $(ARGS)

# Two threads in each of two processes wait for each other on two cores: with one each, the tests take 0.6 of the time.
# Many tests start programs of ours, which would compile all modules anew where Python may not write beside them.
test: ## ruff, mypy and the tests, with real vLLM and a real browser
	@scripts/setup.sh browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest -n 2 --dist loadfile $(ARGS)

lint: setup ## ruff and mypy alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## put the code into its one format, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: setup ## run a recipe: make train RECIPE=scenes
	@$(BIN)/kangaroo train $(RECIPE) $(ARGS)

clean: ## remove what set-up and tools made; runs/ stays
	rm -rf .venv .uv .uv.partial .mypy_cache .ruff_cache .pytest_cache dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
