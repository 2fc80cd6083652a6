"""From a base and an adapter on disk to what others load. It reads and writes files, tensor by tensor; a model is built in memory only to
say whether another program computes the same (`gguf/check.py`)."""
