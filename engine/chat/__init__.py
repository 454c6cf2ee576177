"""One chat: from messages to a request, from deltas to a reply."""
