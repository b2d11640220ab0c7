"""Out to other engines: what llama.cpp and whatever else reads its files need of a pruned model."""
