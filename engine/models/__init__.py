"""Where a model comes from: folders, the Hugging Face cache and hub, GGUF files, the Python package index."""
