"""What the program promises about speed and memory, measured: `python -m tests.benchmarks`, or `make bench`.

Everything is a ratio within one run on one server, so that it means the same on any machine. The two sides of a ratio
take turns, each on a fresh copy of the same table right after VACUUM ANALYZE and CHECKPOINT, and the medians are
compared.
"""
