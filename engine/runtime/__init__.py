"""The engine that runs: step(), its thread, its streams, what it does now."""
