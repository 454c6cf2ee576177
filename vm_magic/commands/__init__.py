"""The commands of %vllm_metal, their flags and what they do."""
