"""Request bodies: their fields, their checks."""
