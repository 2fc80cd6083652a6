"""Everything that makes `nemotron-tiny`, the built-in model, and the rows of the quickstart. `python -m scripts.make_tiny` runs it.

Read words.py and tools.py (what is talked about), then corpus.py and calls.py (how), then __main__.py (in which order).
Nothing here is read when nemotune runs: its results are the files under src/nemotune/assets.
"""
