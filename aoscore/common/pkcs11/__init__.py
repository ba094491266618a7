"""Keys and certificates on PKCS#11 tokens: addresses, and work done by a helper process."""
