"""``dcpsvc doctor``: what this machine, these ranks and this run root will do to a job, found out before it starts."""
