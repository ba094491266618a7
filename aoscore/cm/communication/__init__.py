"""The link to the cloud: messages, service discovery, delivery session and WebSocket."""
