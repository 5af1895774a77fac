"""Privacy engines: mathematics without trust."""
