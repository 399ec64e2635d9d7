"""The files of a run root as values and bytes. No I/O, no policy, no torch."""
