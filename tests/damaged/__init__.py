"""Damaged models: folders and GGUF files that anybody may meet, and what reading them may end in.

``python -m tests.damaged.tries FIRST COUNT`` tries cases in processes of their own and prints the faults.
"""
