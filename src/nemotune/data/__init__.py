"""Rows become tokens with a loss mask, and those become batches. Never sees a model.

The way of a row: `sources` (files, the hub) -> `formats/` (row to `Example`) -> `template` (tokens and mask) -> `prepare`
(checks, cache, run directory) -> `split` (what lies on disk) -> `loader` (batches). `preview` shows the result to people. Files of tokens
go another way, `megatron/`, to the same loader.
Nothing is imported here, so that a tokenising process never pays for torch: import from the modules.
"""
