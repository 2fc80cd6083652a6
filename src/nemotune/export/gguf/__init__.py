"""GGUF files for llama.cpp: what tensors are called and how they are packed there, and whether it computes the same from them."""
