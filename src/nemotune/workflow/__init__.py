"""The stages of a run in order, meeting through files in the run directory. Read `stages.py` from `run` on: each stage is a file beside it."""
