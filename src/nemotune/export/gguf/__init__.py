"""GGUF files for llama.cpp: what tensors are called and how they are packed there."""
