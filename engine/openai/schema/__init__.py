"""Request bodies: their fields, their checks, and what they are as a chat."""
