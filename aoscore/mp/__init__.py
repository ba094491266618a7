"""Message Proxy: the multiplexed link of a Secondary Node to the Main Node."""
