"""The OpenAI port: protocol, routes and a server in a background thread of the kernel."""
