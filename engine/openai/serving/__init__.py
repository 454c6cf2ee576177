"""What the routes share: from a body to running requests, from deltas to replies."""
