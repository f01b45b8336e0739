"""Helpers for the workshop's notebooks: plumbing, and what a notebook has already shown.

Importing this package imports nothing heavy: each module loads torch and its like when a function needs them.
"""

__version__ = "0.1.0"
