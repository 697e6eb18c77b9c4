"""Candidate changes that only a GPU can judge, outside the product until one has: each is a context that applies a
change.

A candidate that pays moves into the product; one that does not is deleted. All are correct on a CPU, where mechanisms
of CUDA (streams, graphs) are left out.
"""
