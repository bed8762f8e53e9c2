"""A bundle as an HTTP service: the Open Inference Protocol and plain routes over one worker.

`app` and what it wires need the extra `serve` and are imported by the command line alone; the rest is numpy,
pillow and the standard library.
"""
