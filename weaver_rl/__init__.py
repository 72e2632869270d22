"""weaver-rl as a library: everything that is true without a cluster. It never imports Ray."""

__version__ = "0.1.0"
