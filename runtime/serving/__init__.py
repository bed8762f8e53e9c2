"""Serving bundles over HTTP: the Open Inference Protocol and plain routes over one worker.

The rooms http/ and protocol/ hold the web application, which needs the extra `serve` and is only imported
by the command line. Everything else needs numpy, pillow and the standard library.
"""
