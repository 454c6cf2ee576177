"""Many prompts: lists, maps over tables, scores, benchmarks."""
