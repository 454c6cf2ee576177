"""What a person sees: replies, tables, pictures, errors."""
