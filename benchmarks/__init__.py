"""Measurements against peers: one command each (`python -m benchmarks.NAME`), a JSON file and a table each.

Contenders run in turn in processes of their own, in one sitting, so that ratios hold where absolute figures do not. docs/performance.md
shows the tables. Nothing here is a test: a figure never fails a build.
"""
