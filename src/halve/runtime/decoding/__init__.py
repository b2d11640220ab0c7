"""The next token of a model of Llama's kind in one call: what is asked for, the blocks as compiled, keys and values.

It may use the packed layers and their kernels, and knows transformers' models of four families; whoever accelerates or
loads a model asks for it.
"""
