"""engine.inspect: what is understood of a model before loading, and from which file each fact came."""
