"""Benchmarks that check before they time: `python -m benchmarks --help`.

Every suite prints a table and writes raw JSON lines (`records`). Peers run in processes of their
own (`worker`); one that cannot run is named as not run, and nothing is estimated.
"""
