"""docs/benchmarks.md and the tables of README, made of benchmarks/results: nothing is copied by hand.

- :mod:`~benchmarks.tables.markdown`: a table, a run, a goal
- :mod:`~benchmarks.tables.saving`: saves beside other systems, and where a save's time goes
- :mod:`~benchmarks.tables.transfer`: uploads and resumes
- :mod:`~benchmarks.tables.tools`: listings, exports, adapters, replicas, many tensors, many ranks
- :mod:`~benchmarks.tables.page`: all of it
"""
