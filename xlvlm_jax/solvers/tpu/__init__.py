"""Kernels for TPU: an update's work on one block of rows after another, each read from memory once.

`blocks` says when they are used.
"""
