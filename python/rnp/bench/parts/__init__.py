"""The parts of `rnp bench`. Each has ``jobs(options)``: what it measures, as a list of :class:`rnp.bench.run.Job`."""
