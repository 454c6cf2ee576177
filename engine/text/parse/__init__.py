"""Model output to content, reasoning and tool calls."""
