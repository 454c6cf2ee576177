"""What has nothing to do with models: options, guards, errors, streams, metrics of the port."""
