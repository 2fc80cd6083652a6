"""An adapter in the form that somebody else reads: PEFT's, vLLM's, llama.cpp's. Values stay what they are, to the bit, wherever the form can hold them.

`opened.py` reads one, `same_scale.py` gives its modules one rank and one scale where the reader knows no other, each form has a file that plans it.
"""
