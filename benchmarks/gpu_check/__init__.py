"""One command for whoever has a GPU: `make gpu-check`, on a CPU `make gpu-check ARGS=--cpu`.

Measures on one device what the tests hold on a CPU, each against the bound that the tests have, and writes one JSON file
and one table. It makes no environment: see `packages` for what it needs and what it carries along.
"""
