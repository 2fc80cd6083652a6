"""Between Hugging Face directories and the checkpoints of Megatron-Bridge: weights both ways, LoRA, and what lies beside them.

`homes.py` declares what maps to what; the rest reads and writes by it. Tensors are rows of files: no Megatron code runs, no model is built.
"""
