"""Other engines: a GGUF file for llama.cpp and the like, llama.cpp as a contender, and a plugin that serves with vLLM.

It may use the packed format; only modules named for an engine import it, and nothing else of the package knows one.
"""
