"""What a user may say: engine arguments, sampling values, structured outputs, live settings."""
