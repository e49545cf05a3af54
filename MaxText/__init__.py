"""A small MaxText-style codebase for pretraining language models of Python code."""

__version__ = "0.1.0"
