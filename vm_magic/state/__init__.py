"""What the notebook remembers: the session, conversations, settings."""
