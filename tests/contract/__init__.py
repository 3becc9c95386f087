"""The contract: what must hold on every supported version of transformers (docs/versions.md). `make test-contract` runs
it with one version, `make matrix` with all of them. It needs torch, transformers, pillow, sentencepiece, protobuf and
pytest; the files about another package are skipped where that package is missing.

The scripts in `fresh/` run in interpreters of their own, which have imported nothing yet: there a missing import shows.
"""
