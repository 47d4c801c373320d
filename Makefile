# make demo           environment, data, training, clips, scores, and a page that shows them
# make long           after make demo: a model of long video, a clip of 1,000 frames, scores
# make test           the tests, except tests/studies
# make test-studies   the tests of studies/, with the packages that they need
# make clean          remove the environment and the demo's run

PYTHON ?= python3
PY := .venv/bin/python
# Waiting threads spin and stay on their cores, which is 10 to 15 % faster on an idle CPU.
# glibc keeps freed memory, which torch asks for again in the next operation (support/cli.py).
FAST := OMP_WAIT_POLICY=ACTIVE OMP_PROC_BIND=true \
	MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296

.PHONY: demo long test test-1 test-2 test-3 test-4 test-studies clean
.DELETE_ON_ERROR:

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'needs Python 3.10 or newer: make PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/studies: studies/requirements.txt .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r studies/requirements.txt
	touch $@

demo: .venv/installed
	$(FAST) $(PY) train.py runs/demo --data shapes \
		$(if $(wildcard runs/demo/train.json),--resume)
	$(FAST) $(PY) -m studies.page runs/demo --prompts-file prompts.txt

long: .venv/installed
	$(FAST) $(PY) -m papers.long_video train runs/long --init runs/demo \
		$(if $(wildcard runs/long/long_video.json),--resume)
	$(FAST) $(PY) -m papers.long_video sample runs/long "a red circle moving left" \
		--output runs/long/long.gif
	$(FAST) $(PY) -m papers.long_video evaluate runs/long

# Tests are small, so two processes with one core each are faster than one process with two.
test: .venv/installed
	@$(MAKE) --no-print-directory --jobs 2 test-1 test-2 test-3 test-4 \
		$(if $(filter output-sync,$(.FEATURES)),--output-sync)

test-1: FILES := $(wildcard tests/test_[a-n]*.py)
test-2: FILES := $(wildcard tests/test_[o-z]*.py)
test-3: FILES := tests/papers
test-4: FILES := tests/checkpoints tests/media
test-1 test-2 test-3 test-4:
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q $(FILES)

test-studies: .venv/studies
	$(PY) -m pytest -q tests/studies

clean:
	rm -rf .venv runs/demo
