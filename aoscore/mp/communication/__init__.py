"""The inter-node link: frames, channels, TLS inside them, transports."""
