"""Writes docs/benchmarks.md, and the tables of README.

python -m benchmarks.tables
"""

from benchmarks.tables.page import PAGE, README, page, with_tables

PAGE.write_text(page())
README.write_text(with_tables(README.read_text()))
