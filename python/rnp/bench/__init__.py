"""Benchmarks of the operator, of layers, networks and training steps, each beside the rivals a user has.

`rnp bench` runs a part and writes a report (:mod:`rnp.bench.command`); the pytest-benchmark suites in the repository's
bench/ folder run the same cases. Whoever measures something else can use the pieces:

* :mod:`rnp.bench.timing`: sides in turn in one process, median with p20 and p80, one side twice as the noise floor;
* :mod:`rnp.bench.rivals`: what stock torch, ONNX Runtime and OpenVINO do with the same convolution or network;
* :mod:`rnp.bench.gate`: results are compared before anything is timed;
* :mod:`rnp.bench.environment`: machine, versions, threads, commit.
"""
