"""Benchmarks that check before they time: `python -m benchmarks --help`.

`cases` say what is measured, `peers` who, `run` how, `suites` are the commands, and `report` writes
the documents from raw JSON lines (`records`). Every case runs in a process of its own (`run.pool`);
one that cannot run is named as not run, and nothing is estimated.
"""
