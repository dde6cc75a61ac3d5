#!/usr/bin/env bash
# From nothing to a verified export: makes .venv, trains a small ViT on scikit-learn's digits, fine-tunes its
# super-network, searches 150 genomes, exports the chosen one, verifies it and writes the report.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
# A model this small is faster on one thread: two spend their time waiting for each other, on a busy machine all of it.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
.venv/bin/python scripts/assets.py runs/assets digits
.venv/bin/python -m jointopt run scripts/configs/quickstart.yaml
