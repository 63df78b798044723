# make quickstart   train on the starter data and caption held-out samples
# make test-fast    test the token stream, the network and the tokenizers: under a minute
# make test         run all tests, those without training first: 20 to 35 minutes on two cores
# make test-long    run the long robustness tests: kills, full disks, fuzzing, a soak test (hours)
# make lint         check the code with ruff and mypy
# make docs         build the documentation in docs/_build
# make mutants      mutation testing: plant one bug at a time and check that the tests catch it (MUTANTS='names' for some of them)
# make bench        measure speed against other programs (BENCH_ARGS=--short: only check that all scripts run)
# make gpu          all that needs a GPU, in ten minutes on one card: tests, training, decoding, captions (GPU_ARGS=--steps ...)
# make starter      train everything from scratch: the three tokenizers and the vocoder, then the decoder (seven hours or more on two cores)
#
# Each of them first creates the virtual environment if it does not exist yet. Variables:
#   PYTHON=python3.12          the Python to create it with, 3.11 or newer
#   VENV=.venv RUNS=runs       folders of the environment and of the runs
#   FIT_ARGS='--trainer.max_steps 20'   more options for `mmtx fit` of the decoder; CODEC_ARGS: of the image and audio tokenizers
#   EVALUATE_ARGS='--show 20'  more options for `mmtx evaluate`
#   BENCH_ARGS=--short         more options for the scripts of `make bench`
#   GPU_ARGS='--short --device cpu'   more options for `make gpu`
#   TEST_ARGS='-m "not slow"'  more options for pytest
#   TEST_PROCESSES=2           processes that run the tests of `make test` in parallel

PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
FIT_ARGS ?=
CODEC_ARGS ?=
EVALUATE_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=
TEST_ARGS ?=
TEST_PROCESSES ?= 2

MMTX := $(VENV)/bin/mmtx
PACKAGE := pyproject.toml constraints.txt

# The value that mmtx.limit_openmp_spin sets, for programs that import torch before mmtx.
export GOMP_SPINCOUNT ?= 1000

.PHONY: quickstart test test-fast test-long lint docs mutants bench gpu starter environment clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(MMTX) fit --config configs/quickstart/decoder.yaml --output $(RUNS)/quickstart $(FIT_ARGS)
	$(MMTX) evaluate --model $(RUNS)/quickstart/model --config configs/quickstart/decoder.yaml $(EVALUATE_ARGS)

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --no-loadscope-reorder $(TEST_ARGS)

FAST := layout kernels block model loss sequence vocabulary modality files schema fsq text optimizer formats packing encoders attention

test-fast: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not slow" $(FAST:%=tests/test_%.py) $(TEST_ARGS)

test-long: $(VENV)/.installed-test
	MMTX_LONG=1 $(VENV)/bin/python -m pytest tests/test_long_media.py
	$(VENV)/bin/python tests/fuzz.py media --count 4000
	$(VENV)/bin/python tests/fuzz_files.py --seconds 300
	$(VENV)/bin/python benchmarks/write_kills.py
	$(VENV)/bin/python benchmarks/prepare_kills.py --kills 30
	$(VENV)/bin/python benchmarks/resume_kills.py --kills 50
	$(VENV)/bin/python benchmarks/soak.py

lint: $(VENV)/.installed-test
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

docs: $(VENV)/.installed-docs
	$(VENV)/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build

mutants: $(VENV)/.installed-test
	$(VENV)/bin/python tests/mutants/run.py $(MUTANTS)

# litgpt and torchtune need old versions of packages that mmtx needs, too: they are in a separate folder, with what they import only.
PEERS := litgpt==0.5.13 psutil torchtune==0.6.1 torchao==0.9.0 omegaconf==2.4.0 tiktoken==0.14.0
SPEED := loss_memory packed_cost input_wait media_speed captions_speed decode_speed llamacpp_speed train_speed startup

bench: $(VENV)/.installed-bench
	for name in $(SPEED); do PYTHONPATH=$(VENV)/peers $(VENV)/bin/python benchmarks/$$name.py $(BENCH_ARGS) || exit 1; done

gpu: $(VENV)/.installed-test
	$(VENV)/bin/python benchmarks/gpu.py $(GPU_ARGS)

CODECS := $(foreach kind,text image audio,--data.tokenizers.$(kind) tokenizers/$(kind))

# New tokenizers give new codes: they replace the shipped ones, and decoders trained with the shipped ones no longer fit.
starter: $(VENV)/.installed
	$(MMTX) fit --config configs/starter/text.yaml --output $(RUNS)/starter/text
	$(MMTX) fit --config configs/starter/image.yaml --output $(RUNS)/starter/image $(CODEC_ARGS)
	$(MMTX) fit --config configs/starter/image.yaml --output $(RUNS)/starter/image-refined \
	    --model.refine $(RUNS)/starter/image/model --model.l1_weight 0 --model.optimizer.learning_rate 1e-3 \
	    --model.optimizer.muon_lr 2e-3 --data.multi_size_prob 0 --trainer.max_steps 500 --trainer.val_check_interval 500 $(CODEC_ARGS)
	$(MMTX) fit --config configs/starter/audio.yaml --output $(RUNS)/starter/audio $(CODEC_ARGS)
	mkdir -p tokenizers/text tokenizers/image tokenizers/audio
	$(MMTX) fit --config configs/starter/vocoder.yaml --output $(RUNS)/starter/vocoder $(CODEC_ARGS) \
	    --model.tokenizer $(RUNS)/starter/audio/model
	cp -r $(RUNS)/starter/text/model/* tokenizers/text/
	cp -r $(RUNS)/starter/image-refined/model/* tokenizers/image/
	cp -r $(RUNS)/starter/vocoder/model/* tokenizers/audio/
	$(MMTX) fit --config configs/starter/decoder.yaml --output $(RUNS)/starter/decoder $(FIT_ARGS)
	$(MMTX) fit --config configs/starter/captions.yaml --output $(RUNS)/starter/captions $(CODECS) $(FIT_ARGS) \
	    --model.init_from $(RUNS)/starter/decoder/model
	$(MMTX) fit --config configs/starter/captions.yaml --output $(RUNS)/starter/captions-more $(CODECS) $(FIT_ARGS) \
	    --model.init_from $(RUNS)/starter/captions/model
	$(VENV)/bin/python demos/average.py $(RUNS)/starter/captions/model $(RUNS)/starter/captions-more/model --output $(RUNS)/starter/mean
	$(MMTX) evaluate --model $(RUNS)/starter/mean --config configs/starter/captions.yaml $(EVALUATE_ARGS)

environment: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $$($(PYTHON) --version 2>&1) is too old or missing, expected 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(PACKAGE) | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(PACKAGE) | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(VENV)/.installed-test
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-test
	$(VENV)/bin/python -m pip install -q --no-deps --target $(VENV)/peers $(PEERS)
	touch $@

clean:
	rm -rf $(VENV)
