#!/usr/bin/env bash
# `python -m benchmarks on-gpus STAGE FOLDER --limit LIMIT`, whose help says what the stages are.
exec env PYTHONPATH="$PWD" python3 -m benchmarks on-gpus "$@" --limit "${LIMIT:-520}"
