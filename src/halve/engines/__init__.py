"""Other engines: a GGUF file for llama.cpp and whatever else reads its files, and a plugin that serves with vLLM.

It may use the packed format; only modules named for an engine import it, and nothing else of the package knows one.
"""
