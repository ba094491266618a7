"""Log provider: answers the cloud's requests for logs of the node, of instances and of crashes."""
