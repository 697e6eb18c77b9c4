"""Changes that only a GPU can judge, outside the product until one has: each a context in which the product has it.

A candidate that pays moves into the product; one that does not is deleted. All are correct on a CPU, where a mechanism
of CUDA's own (streams, graphs) is left out of them.
"""
