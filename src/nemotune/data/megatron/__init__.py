"""Pretraining data in Megatron's form: pairs of `.bin` and `.idx` files, blended by weight and read in place, never copied.

The way of a token: `index` (texts to files, through `writer`) -> `indexed` (the files, mapped) -> `blend` (which files, which weights) ->
`rows` (one dataset's rows of an epoch) -> `stream` (the blend's rows in the order of training, as the loader asks for them).
`prepare` is what `nemotune data` does with a recipe's blend. Nothing is imported here: import from the modules.
"""
